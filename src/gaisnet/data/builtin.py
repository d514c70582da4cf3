"""Built-in data sets: real, labelled text from packages, drawn so that test texts are unlike training texts.

* medical: ICD-10-CM descriptions -> chapter, from ``simple-icd-10-cm``
* licences: licence notices -> category of the licence, from ``licensedcode-data``
* languages: names of emoji -> the language that they are in, from ``emoji``
"""

import functools
import importlib.util
import random
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gaisnet.config import DataSettings
from gaisnet.data.examples import Example
from gaisnet.errors import DataError, MissingPackage

# Labels are short, so that completions have few tokens, and no label is a prefix of another.
_CHAPTER_LABELS = (
    *("infections", "neoplasms", "blood", "endocrine", "mental", "nervous", "eye"),
    *("ear", "circulatory", "respiratory", "digestive", "skin", "musculoskeletal", "genitourinary"),
    *("pregnancy", "newborn", "congenital", "symptoms", "injury", "external causes", "health status"),
)
CHAPTERS: Mapping[str, str] = {str(number): label for number, label in enumerate(_CHAPTER_LABELS, start=1)}
"""Labels of ICD-10-CM chapters by number, without chapter 22, which has only 3 codes."""

CATEGORIES: Mapping[str, str] = {
    "Copyleft": "copyleft",
    "Permissive": "permissive",
    "Copyleft Limited": "weak copyleft",
    "Commercial": "commercial",
    "Public Domain": "public domain",
    "Unstated License": "unstated",
    "Source-available": "source-available",
}
"""Labels of ScanCode's licence categories that have enough notices."""

LANGUAGES: Mapping[str, str] = {
    "en": "English",
    "es": "Spanish",
    "pt": "Portuguese",
    "it": "Italian",
    "fr": "French",
    "de": "German",
    "id": "Indonesian",
    "tr": "Turkish",
}
"""Labels of languages in Latin script in which emoji have names."""

MIN_NOTICE_CHARS = 20
MAX_NOTICE_CHARS = 240

MAX_OVERLAP = 0.6
"""Largest Jaccard similarity of the words of two texts, unless too few other texts are available."""

# Sibling codes differ only in these words: the side, the number of the fetus, the encounter.
_ICD_VARIANT = re.compile(
    r", (?:initial|subsequent) encounter.*|, sequela\b|"
    r"\b(?:right|left|bilateral|unspecified|not applicable|fetus \d)\b",
    re.IGNORECASE,
)
_COMMENT_START = re.compile(r"^(?:[\s/*#;%.>|'+-]|<!--|dnl\b|REM\b)+", re.MULTILINE)
_COMMENT_END = re.compile(r"(?:[\s*#|]|\*/|-->)+$", re.MULTILINE)
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_RULER_OR_MARK = re.compile(r"[=*#_~-]{3,}|\{\{|\}\}")


WordsOf = Callable[[str], frozenset[str]]
"""A function that returns the distinctive words of a text; texts with equal words count as one text."""


@dataclass(frozen=True)
class Candidate:
    """A labelled text; ``group`` is its subject (ICD category, licence), over which draws are spread."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class DrawnExamples:
    """A built-in data set, drawn and shuffled, before it is partitioned between devices.

    Attributes:
        template: The public task template.
        labels: The public label names.
        train: The training set.
        test: The test set.
        newcomer_tests: The test set of each newcomer.
    """

    template: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    newcomer_tests: tuple[tuple[Example, ...], ...] = ()


@dataclass(frozen=True)
class _Source:
    template: str
    labels: Mapping[str, str]
    read: Callable[[], Sequence[Candidate]]
    words_of: WordsOf


def domain_seed(domain: str, seed: int) -> int:
    """Return a separate seed for each domain of a run, the same in every process."""
    return zlib.crc32(f"{seed}/{domain}".encode())


def draw_builtin(domain: str, settings: DataSettings, seed: int, num_newcomers: int = 0) -> DrawnExamples:
    """Draw ``settings.train_examples`` and ``test_examples`` from the built-in ``domain``, balanced over its labels.

    Each newcomer gets as many test examples from the remaining texts, so other examples do not depend on newcomers.
    Raises ``MissingPackage``, or ``DataError`` where the package has too few texts.
    """
    source = BUILT_IN[domain]
    labels = tuple(source.labels.values())
    if domain == "licences":
        labels = labels[: settings.licence_categories]
    rng = random.Random(domain_seed(domain, seed))
    pools = _pools(source, labels, rng)
    quotas = _quotas({label: len(pools[label]) for label in labels}, settings, domain)
    asked = num_newcomers * settings.test_examples
    left = _newcomer_quotas({label: len(pools[label]) - sum(quotas[label]) for label in labels}, asked, domain)
    train: list[Candidate] = []
    test: list[Candidate] = []
    for_newcomers: list[Candidate] = []
    for label, (num_train, num_test) in quotas.items():
        chosen = _choose_diverse(pools[label], num_train + num_test + left[label], source.words_of)
        mine, others = chosen[: num_train + num_test], chosen[num_train + num_test :]
        rng.shuffle(mine)  # otherwise the largest groups, which come last, would all be in the test set
        train += mine[:num_train]
        test += mine[num_train:]
        for_newcomers += others
    rng.shuffle(train)
    rng.shuffle(test)
    every = [
        _examples(some, source.template) for some in (train, test, *_deal_candidates(for_newcomers, num_newcomers, rng))
    ]
    return DrawnExamples(source.template, labels, every[0], every[1], tuple(every[2:]))


def _newcomer_quotas(available: Mapping[str, int], asked: int, domain: str) -> dict[str, int]:
    """Return how many of each label's remaining texts go to newcomers. Raises ``DataError``."""
    if asked > sum(available.values()):
        raise DataError(
            f"{asked} examples for newcomers to the domain '{domain}'",
            f"its package has {sum(available.values())} left beside those of its own edge",
            "lower data.test_examples, data.train_examples or the number of newcomers",
        )
    return _share_equally(available, asked)


def _deal_candidates(candidates: list[Candidate], num: int, rng: random.Random) -> list[list[Candidate]]:
    """Deal candidates, which are sorted by label, in turn into ``num`` parts, and shuffle each part."""
    parts = [candidates[first::num] for first in range(num)]
    for part in parts:
        rng.shuffle(part)
    return parts


def _pools(source: _Source, labels: Sequence[str], rng: random.Random) -> dict[str, list[Candidate]]:
    """Return each label's candidates in random order, without duplicates and without texts of two labels."""
    candidates = list(source.read())
    rng.shuffle(candidates)
    alike: dict[frozenset[str], list[Candidate]] = {}
    for candidate in candidates:
        alike.setdefault(source.words_of(candidate.text), []).append(candidate)
    pools: dict[str, list[Candidate]] = {label: [] for label in labels}
    for same in alike.values():
        if len({candidate.label for candidate in same}) == 1 and same[0].label in pools:
            pools[same[0].label].append(same[0])
    return pools


def _quotas(available: Mapping[str, int], settings: DataSettings, domain: str) -> dict[str, tuple[int, int]]:
    """Return the numbers of training and test examples of each label, as equal as possible. Raises ``DataError``."""
    asked_train, asked_test = settings.train_examples, settings.test_examples
    # A label with few texts is divided in the overall ratio, so that it is in both training and test set.
    for_test = {label: count * asked_test // (asked_train + asked_test) for label, count in available.items()}
    for_train = {label: count - for_test[label] for label, count in available.items()}
    for what, asked, held in (("train", asked_train, for_train), ("test", asked_test, for_test)):
        if asked > sum(held.values()):
            raise DataError(
                f"data.{what}_examples is {asked} for the domain '{domain}'",
                f"of the {sum(available.values())} distinct texts in its package {sum(held.values())} are available, "
                f"at a ratio of {asked_train} : {asked_test}",
                f"lower data.{what}_examples",
            )
    train, test = _share_equally(for_train, asked_train), _share_equally(for_test, asked_test)
    return {label: (train[label], test[label]) for label in available}


def _share_equally(limits: Mapping[str, int], total: int) -> dict[str, int]:
    """Share ``total`` equally up to each label's limit; the remainder goes to the first labels."""
    shares = dict.fromkeys(limits, 0)
    while total:
        with_room = [label for label in limits if shares[label] < limits[label]]
        each = max(1, total // len(with_room))
        for label in with_room[:total]:
            more = min(each, limits[label] - shares[label])
            shares[label] += more
            total -= more
    return shares


def _choose_diverse(pool: Sequence[Candidate], count: int, words_of: WordsOf) -> list[Candidate]:
    """Choose ``count`` of ``pool`` from all groups in turn, taking texts similar to chosen ones only at the end."""
    group_sizes: Counter[str] = Counter()
    places = []
    for candidate in pool:
        places.append(group_sizes[candidate.group])
        group_sizes[candidate.group] += 1
    chosen: list[Candidate] = []
    similar: list[Candidate] = []
    seen: list[frozenset[str]] = []
    for i in sorted(range(len(pool)), key=places.__getitem__):
        if len(chosen) == count:
            break
        words = words_of(pool[i].text)
        if any(len(words & other) > MAX_OVERLAP * len(words | other) for other in seen):
            similar.append(pool[i])
        else:
            chosen.append(pool[i])
            seen.append(words)
    return (chosen + similar)[:count]


def _examples(candidates: Sequence[Candidate], template: str) -> tuple[Example, ...]:
    return tuple(Example(template.replace("{text}", found.text), f" {found.label}") for found in candidates)


def _read_medical() -> tuple[Candidate, ...]:
    icd = _import_icd()
    leaves = [code for code in icd.get_all_codes(with_dots=True) if icd.is_leaf(code)]
    chapter_of = {code: icd.get_ancestors(code)[-1] for code in leaves}
    return tuple(
        Candidate(icd.get_description(code), CHAPTERS[chapter_of[code]], code[:3])
        for code in leaves
        if chapter_of[code] in CHAPTERS
    )


def _import_icd() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # Its import uses deprecated functions to read its files.
            warnings.simplefilter("ignore", DeprecationWarning)
            import simple_icd_10_cm
    except ModuleNotFoundError as error:
        raise MissingPackage("domain 'medical'", "simple-icd-10-cm", "pip install simple-icd-10-cm") from error
    module: ModuleType = simple_icd_10_cm
    return module


def _diagnosis_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", _ICD_VARIANT.sub("", text).lower()))


def _read_licences() -> Sequence[Candidate]:
    return _read_notices(_licence_folder())


def _licence_folder() -> Path:
    spec = importlib.util.find_spec("licensedcode")
    places = spec.submodule_search_locations if spec is not None else None
    folders = [Path(place) / "data" for place in places or () if (Path(place) / "data" / "rules").is_dir()]
    if not folders:
        raise MissingPackage("domain 'licences'", "licensedcode-data", "pip install licensedcode-data")
    return folders[0]


@functools.cache
def _read_notices(folder: Path) -> tuple[Candidate, ...]:
    """Read notices of a single licence, in the order of their file names.

    Fields are found by regular expressions: a YAML parser takes over ten seconds for 34,859 rules.
    """
    licences = [_front_and_text(path, path.read_bytes())[0] for path in sorted((folder / "licenses").glob("*.LICENSE"))]
    category_of = {_field(front, "key"): _field(front, "category") for front in licences}
    candidates = []
    for path in sorted((folder / "rules").glob("*.RULE")):
        raw = path.read_bytes()
        if b"\nis_license_notice: yes" not in raw:
            continue
        front, text = _front_and_text(path, raw)
        key = _field(front, "license_expression")
        label = CATEGORIES.get(category_of.get(key, ""))
        # Rules that name their language are not in English.
        if label is None or _field(front, "is_deprecated") == "yes" or _field(front, "language"):
            continue
        notice = clean_notice(text)
        if MIN_NOTICE_CHARS <= len(notice) <= MAX_NOTICE_CHARS:
            candidates.append(Candidate(notice, label, key))
    return tuple(candidates)


def _front_and_text(path: Path, raw: bytes) -> tuple[str, str]:
    parts = re.split(r"^---\s*$", raw.decode("utf-8"), maxsplit=2, flags=re.MULTILINE)
    if len(parts) != 3:
        found = "has no front matter between lines of '---'"
        raise DataError(f"licence data '{path}'", found, "reinstall licensedcode-data")
    return parts[1], parts[2]


def _field(front: str, name: str) -> str:
    found = re.search(rf"^{name}:[ \t]*(\S.*?)\s*$", front, flags=re.MULTILINE)
    return found[1] if found else ""


def clean_notice(text: str) -> str:
    """Remove comment characters, rulers, ``{{ }}`` marks and line ends from a notice."""
    bare = _COMMENT_END.sub("", _COMMENT_START.sub("", _RULER_OR_MARK.sub("", text)))
    return " ".join(bare.split())


def _notice_words(text: str) -> frozenset[str]:
    return frozenset(re.findall("[a-z]+", text.lower()))


def _read_languages() -> tuple[Candidate, ...]:
    """Read names of emoji, without variants in skin tone."""
    emoji = _import_emoji()
    emoji.config.load_language(list(LANGUAGES))
    full = {
        one: names
        for one, names in emoji.EMOJI_DATA.items()
        if names["status"] == emoji.STATUS["fully_qualified"] and not _SKIN_TONES.intersection(one)
    }
    return tuple(
        Candidate(names[code].strip(":").replace("_", " "), label, one)
        for one, names in full.items()
        for code, label in LANGUAGES.items()
        if code in names
    )


def _import_emoji() -> ModuleType:
    try:
        import emoji
    except ModuleNotFoundError as error:
        raise MissingPackage("domain 'languages'", "emoji", "pip install emoji") from error
    module: ModuleType = emoji
    return module


def _phrase_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


BUILT_IN: Mapping[str, _Source] = {
    "medical": _Source("Diagnosis: {text}\nChapter:", CHAPTERS, _read_medical, _diagnosis_words),
    "licences": _Source("Notice: {text}\nCategory:", CATEGORIES, _read_licences, _notice_words),
    "languages": _Source("Phrase: {text}\nLanguage:", LANGUAGES, _read_languages, _phrase_words),
}
"""Built-in data sets by domain."""
