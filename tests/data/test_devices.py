"""Data of domains: real packages for the built-in ones, small folders for the others."""

import json
import os
import subprocess
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gaisnet.config import Config, DataSettings
from gaisnet.config.file import parse_config
from gaisnet.data import builtin as domains
from gaisnet.data.builtin import CATEGORIES, CHAPTERS, LANGUAGES, DrawnExamples, clean_notice, draw_builtin
from gaisnet.data.devices import (
    DomainData,
    load_device,
    load_domains,
    load_public_task,
    majority_share,
    partition_by_label,
    retention_text,
)
from gaisnet.data.examples import DeviceData, Example
from gaisnet.errors import DataError, MissingPackage

GOOD_LINE = '{"prompt": "2 + 2 =", "completion": " 4"}'


def config_of(*domain_names: str, num_devices: int = 3, seed: int = 0, **data: Any) -> Config:
    edges = [
        {"name": f"edge-{name}", "domain": name, "devices": [{"name": f"{name}-{i}"} for i in range(num_devices)]}
        for name in domain_names
    ]
    return parse_config({"seed": seed, "edges": edges, "data": data})


def folder_config(*folders: Path | None, domain: str = "sums", **edge: Any) -> Config:
    devices = [{"name": f"device-{i}", "data": folder} for i, folder in enumerate(folders)]
    return parse_config({"edges": [{"name": "edge", "domain": domain, "devices": devices, **edge}]})


def write_folder(folder: Path, train: str = GOOD_LINE, test: str = GOOD_LINE) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(train, encoding="utf-8")
    (folder / "test.jsonl").write_text(test, encoding="utf-8")
    return folder


def all_of(domain: DomainData, part: str) -> list[Example]:
    return [example for data in domain.devices.values() for example in getattr(data, part)]


def body(example: Example) -> str:
    """Return the text within the template."""
    return example.prompt.split(": ", 1)[1].rsplit("\n", 1)[0]


@pytest.fixture(scope="module")
def loaded() -> dict[str, DomainData]:
    return load_domains(config_of("medical", "licences", "languages"))


# The built-in data sets


@pytest.mark.parametrize(
    ("name", "num_labels", "start", "end"),
    [
        ("medical", 21, "Diagnosis: ", "\nChapter:"),
        ("licences", 6, "Notice: ", "\nCategory:"),
        ("languages", 8, "Phrase: ", "\nLanguage:"),
    ],
)
def test_a_built_in_domain_is_balanced_and_as_large_as_asked(
    loaded: dict[str, DomainData], name: str, num_labels: int, start: str, end: str
) -> None:
    domain = loaded[name]
    assert list(domain.devices) == [f"{name}-{i}" for i in range(3)]
    assert domain.template == f"{start}{{text}}{end}"
    assert len(domain.labels) == num_labels
    completions = {f" {label}" for label in domain.labels}
    for part, total in (("train", 420), ("test", 210)):
        counts = Counter(example.completion for example in all_of(domain, part))
        assert counts.keys() == completions and counts.total() == total
        assert max(counts.values()) - min(counts.values()) <= (total % num_labels > 0)
        prompts = [example.prompt for example in all_of(domain, part)]
        assert all(prompt.startswith(start) and prompt.endswith(end) for prompt in prompts)


@pytest.mark.parametrize("name", ["medical", "licences", "languages"])
def test_test_texts_are_neither_trained_on_nor_repeated(loaded: dict[str, DomainData], name: str) -> None:
    texts = [body(example) for part in ("train", "test") for example in all_of(loaded[name], part)]
    assert len(set(texts)) == len(texts) == 630
    train = {body(example).lower() for example in all_of(loaded[name], "train")}
    assert not train & {body(example).lower() for example in all_of(loaded[name], "test")}


@pytest.mark.parametrize("name", ["medical", "licences", "languages"])
def test_test_texts_are_not_much_like_training_texts(loaded: dict[str, DomainData], name: str) -> None:
    def words(example: Example) -> frozenset[str]:
        return domains.BUILT_IN[name].words_of(body(example))

    train = defaultdict(list)
    for example in all_of(loaded[name], "train"):
        train[example.completion].append(words(example))
    for example in all_of(loaded[name], "test"):
        held_out = words(example)
        overlap = max(len(held_out & other) / len(held_out | other) for other in train[example.completion])
        assert overlap <= domains.MAX_OVERLAP, body(example)


def test_medical_labels_are_the_chapters_of_the_codes(loaded: dict[str, DomainData]) -> None:
    examples = {body(e): e.completion for part in ("train", "test") for e in all_of(loaded["medical"], part)}
    icd = domains._import_icd()
    checked: Counter[str] = Counter()
    for code in icd.get_all_codes(with_dots=True):
        if icd.is_leaf(code) and icd.get_description(code) in examples:
            label = CHAPTERS[icd.get_ancestors(code)[-1]]
            assert examples[icd.get_description(code)] == f" {label}"
            checked[label] += 1
    assert set(checked) == set(CHAPTERS.values())


def test_chapter_labels_say_what_the_package_says() -> None:
    icd = domains._import_icd()
    said = {"infections": "infectious", "newborn": "perinatal"}
    for number, label in CHAPTERS.items():
        assert said.get(label, label) in icd.get_description(number).lower()


def test_a_medical_category_gives_few_codes(loaded: dict[str, DomainData]) -> None:
    icd = domains._import_icd()
    chosen = {body(example) for part in ("train", "test") for example in all_of(loaded["medical"], part)}
    categories: defaultdict[str, set[str]] = defaultdict(set)
    for code in icd.get_all_codes(with_dots=True):
        if icd.is_leaf(code) and icd.get_description(code) in chosen:
            categories[code[:3]].add(icd.get_description(code))
    assert max(map(len, categories.values())) <= 3
    # 24 categories must give the 30 codes of the ear; nearly all others have categories enough for one code each.
    assert sum(len(found) - 1 for found in categories.values()) < 40


def test_the_side_of_the_body_makes_no_new_diagnosis() -> None:
    words = domains.BUILT_IN["medical"].words_of
    assert words("Retinal vasculitis, left eye") == words("Retinal vasculitis, unspecified eye")
    assert words("Fall on ice, initial encounter") == words("Fall on ice, sequela")
    assert words("Retinal vasculitis, left eye") != words("Vasculitis, left ear")


@pytest.mark.parametrize("labels", [tuple(CHAPTERS.values()), tuple(CATEGORIES.values()), tuple(LANGUAGES.values())])
def test_no_label_begins_another(labels: tuple[str, ...]) -> None:
    assert all(not a.startswith(b) and not b.startswith(a) for a, b in combinations(labels, 2))


def test_languages_are_those_of_the_packages_names(loaded: dict[str, DomainData]) -> None:
    emoji = domains._import_emoji()
    for part in ("train", "test"):
        for example in all_of(loaded["languages"], part)[:40]:
            code = next(code for code, label in LANGUAGES.items() if example.completion == f" {label}")
            written = f":{body(example).replace(' ', '_')}:"
            assert emoji.emojize(written, language=code) != written


def test_the_skins_tone_makes_no_new_phrase() -> None:
    texts = [candidate.text for candidate in domains._read_languages() if candidate.label == "English"]
    assert len(texts) > 1500
    assert not [text for text in texts if "skin tone" in text]


@pytest.mark.parametrize("count", [2, 7])
def test_licence_categories_are_used_in_order(count: int) -> None:
    drawn = draw_builtin("licences", DataSettings(licence_categories=count), 0)
    assert drawn.labels == tuple(CATEGORIES.values())[:count]
    counts = Counter(example.completion for example in drawn.test)
    assert set(counts) == {f" {label}" for label in drawn.labels}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_licence_dominates_a_category_that_has_many() -> None:
    drawn = draw_builtin("licences", DataSettings(), 0)
    licence_of = {candidate.text: candidate.group for candidate in domains._read_licences()}
    for label in ("copyleft", "permissive", "weak copyleft"):
        chosen = [licence_of[body(e)] for e in (*drawn.train, *drawn.test) if e.completion == f" {label}"]
        # A share of the notices as they are would give gpl-2.0 and mit 30 of these 105.
        assert max(Counter(chosen).values()) <= 12


def test_licences_of_a_single_notice_are_in_the_test_set_as_well() -> None:
    notices = domains._read_licences()
    num_of = Counter(candidate.group for candidate in notices)
    rare = {candidate.text for candidate in notices if num_of[candidate.group] == 1}
    drawn = draw_builtin("licences", DataSettings(), 0)
    train, test = (
        sum(body(e) in rare for e in part if e.completion == " weak copyleft") for part in (drawn.train, drawn.test)
    )
    assert train > 0 and test > 0


def test_notices_are_clean(loaded: dict[str, DomainData]) -> None:
    notices = [body(example) for part in ("train", "test") for example in all_of(loaded["licences"], part)]
    assert all(20 <= len(notice) <= 240 for notice in notices)
    assert not [notice for notice in notices if "{{" in notice or "  " in notice or notice[0] in "*#/"]


def test_clean_notice_leaves_the_sentence() -> None:
    text = "/***************\n * Licensed under {{the MIT}} license,  *\n *\n# see http://x.org/mit/\n ****/\n"
    assert clean_notice(text) == "Licensed under the MIT license, see http://x.org/mit/"


@pytest.mark.parametrize("settings", [{"train_examples": 25, "test_examples": 10}, {"train_examples": 100}])
def test_what_does_not_divide_leaves_labels_one_apart(settings: dict[str, int]) -> None:
    asked = DataSettings(**settings)
    drawn = draw_builtin("medical", asked, 0)
    assert (len(drawn.train), len(drawn.test)) == (asked.train_examples, asked.test_examples)
    for examples in (drawn.train, drawn.test):
        counts = Counter(example.completion for example in examples)
        assert max(counts.values()) - min(counts.values() if len(counts) == 21 else [0]) <= 1
    # Fewer test examples than labels: test labels must still be in the training set.
    assert {e.completion for e in drawn.test} <= {e.completion for e in drawn.train}


def test_a_short_label_gives_what_it_has_and_the_others_fill_up() -> None:
    settings = DataSettings(licence_categories=7, train_examples=1000, test_examples=500)
    drawn = draw_builtin("licences", settings, 0)
    assert (len(drawn.train), len(drawn.test)) == (1000, 500)
    train, test = (Counter(example.completion for example in part) for part in (drawn.train, drawn.test))
    scarce = " source-available"
    assert 90 <= train[scarce] + test[scarce] <= 100
    assert train[scarce] // test[scarce] == 2
    assert train[" copyleft"] == train[" permissive"] > train[scarce]


def test_more_than_the_package_holds_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        draw_builtin("licences", DataSettings(train_examples=50_000, test_examples=50), 0)
    assert "data.train_examples is 50000 for the domain 'licences'" in str(caught.value)
    assert str(caught.value).endswith("lower data.train_examples")


def test_the_same_seed_gives_the_same_data(loaded: dict[str, DomainData]) -> None:
    assert load_domains(config_of("licences"))["licences"] == loaded["licences"]
    assert load_domains(config_of("licences", seed=1))["licences"] != loaded["licences"]


def test_a_domain_does_not_depend_on_the_other_edges(loaded: dict[str, DomainData]) -> None:
    assert load_domains(config_of("languages", "licences", "medical")) == loaded


def with_newcomers(*names: str) -> Config:
    raw = config_of("languages").model_dump(mode="json")
    for name in names:
        devices = [{"name": f"{name}-{i}"} for i in range(2)]
        raw["edges"].append({"name": f"edge-{name}", "domain": name, "follows": "languages", "devices": devices})
    return parse_config(raw)


def test_newcomers_have_no_training_set_and_a_test_set_that_nobody_else_has() -> None:
    domains = load_domains(with_newcomers("tourists", "students"))
    assert [len(all_of(data, "train")) for data in domains.values()] == [420, 0, 0]
    texts = [{body(e) for e in all_of(data, "test")} for data in domains.values()]
    assert [len(each) for each in texts] == [210, 210, 210]
    assert len(set.union(*texts, {body(e) for e in all_of(domains["languages"], "train")})) == 3 * 210 + 420
    assert {(data.template, data.labels) for data in domains.values()} == {
        (domains["languages"].template, domains["languages"].labels)
    }
    assert all(data.devices and all(device.test for device in data.devices.values()) for data in domains.values())


def test_newcomers_change_nothing_for_anybody_else(loaded: dict[str, DomainData]) -> None:
    for names in (("tourists",), ("tourists", "students")):
        assert load_domains(with_newcomers(*names))["languages"] == loaded["languages"]


def test_newcomers_test_sets_are_balanced() -> None:
    domains = load_domains(with_newcomers("tourists", "students"))
    for name in ("tourists", "students"):
        counts = Counter(example.completion for example in all_of(domains[name], "test"))
        assert len(counts) == len(LANGUAGES) and max(counts.values()) - min(counts.values()) <= 1


def test_more_newcomers_than_the_package_holds_examples_for_are_refused() -> None:
    raw = with_newcomers("tourists").model_dump(mode="json")
    raw["data"]["test_examples"] = 7000
    with pytest.raises(DataError, match="7000 examples for newcomers to the domain 'languages': its package has"):
        load_domains(parse_config(raw))


def test_a_newcomer_without_folders_does_not_follow_one_with_folders_into_a_built_in_domain(tmp_path: Path) -> None:
    raw = folder_config(write_folder(tmp_path / "old"), domain="languages").model_dump(mode="json")
    raw["edges"].append({"name": "edge-new", "domain": "more", "follows": "languages", "devices": [{"name": "late"}]})
    with pytest.raises(DataError, match="'more' of edge 'edge-new': is not built in"):
        load_domains(parse_config(raw))


def test_a_newcomers_task_is_described_as_that_of_the_domain_that_it_follows(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "old")
    raw = folder_config(folder, template="{text} =", labels=["4", "5"]).model_dump(mode="json")
    devices = [{"name": "late", "data": str(folder)}]
    raw["edges"].append({"name": "edge-new", "domain": "more", "follows": "sums", "devices": devices})
    config = parse_config(raw)
    found = load_domains(config)["more"]
    assert (found.template, found.labels) == ("{text} =", ("4", "5"))
    shape = load_public_task(config.edges[1], config).task
    assert (shape.template, shape.labels) == ("{text} =", ("4", "5"))


@pytest.mark.parametrize("share", [0.1, 0.34])
def test_a_validation_set_is_drawn_from_all_of_the_training_set_and_removed_from_it(share: float) -> None:
    raw = config_of("licences", num_devices=3, train_examples=60, test_examples=12).model_dump(mode="json")
    whole = load_domains(parse_config(raw))["licences"].devices
    raw["absorb"]["validation_share"] = share
    config = parse_config(raw)
    for name, mine in load_domains(config)["licences"].devices.items():
        assert len(mine.validate) == max(1, round(share * len(whole[name].train)))
        assert Counter(mine.train) + Counter(mine.validate) == Counter(whole[name].train)
        assert mine.test == whole[name].test
        assert [each for each in whole[name].train if each in mine.validate] == list(mine.validate)
        num, places = len(whole[name].train), [whole[name].train.index(each) for each in mine.validate]
        ends = [i * num // len(places) for i in range(len(places) + 1)]
        assert all(first <= place < stop for place, (first, stop) in zip(places, pairwise(ends), strict=True))
        assert load_device(config, name) == mine


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_validation_set_has_every_kind_of_alternating_examples(share: float) -> None:
    """Taking every second or fourth example would give only one kind."""
    every = tuple(Example(f"Is it {i}?", (" no", " yes")[i % 2]) for i in range(200))
    found = DeviceData(every, every[:1]).with_validation_split(share, "ward-1")
    kinds = Counter(example.completion for example in found.validate)
    assert min(kinds.values()) > 0.2 * len(found.validate)


def test_a_draw_leaves_each_device_a_training_and_a_validation_example() -> None:
    for seed in range(8):
        raw = config_of("licences", num_devices=4, seed=seed, train_examples=40, test_examples=12).model_dump(
            mode="json"
        )
        raw["absorb"]["validation_share"] = 0.1
        for mine in load_domains(parse_config(raw))["licences"].devices.values():
            assert mine.train and mine.validate


def test_a_device_with_a_folder_has_a_validation_set_too(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) + "\n" for i in range(5))
    raw = folder_config(write_folder(tmp_path / "data", train=lines)).model_dump(mode="json")
    device = raw["edges"][0]["devices"][0]["name"]
    whole = load_device(parse_config(raw), device)
    raw["absorb"]["validation_share"] = 0.5
    found = load_device(parse_config(raw), device)
    assert found.validate and Counter(found.train) + Counter(found.validate) == Counter(whole.train)
    assert load_domains(parse_config(raw))["sums"].devices[device] == found


def test_a_newcomers_folder_needs_no_training_set(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / name) for name in ("old", "new")]
    (folders[1] / "train.jsonl").unlink()
    raw = folder_config(folders[0]).model_dump(mode="json")
    devices = [{"name": "late", "data": str(folders[1])}]
    raw["edges"].append({"name": "edge-new", "domain": "more", "follows": "sums", "devices": devices})
    domains = load_domains(parse_config(raw))
    assert domains["more"].devices["late"] == DeviceData((), (Example("2 + 2 =", " 4"),))


def test_hash_randomisation_changes_nothing(loaded: dict[str, DomainData]) -> None:
    code = (
        "import sys, zlib; sys.path.insert(0, sys.argv[1]); import test_devices\n"
        "data = test_devices.load_domains(test_devices.config_of('medical', 'licences', 'languages'))\n"
        "sys.stdout.write(str(zlib.crc32(repr(data).encode())))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},  # this process has a random one, or another
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == str(zlib.crc32(repr(loaded).encode()))


@pytest.mark.parametrize(
    ("domain", "module", "package"),
    [
        ("medical", "simple_icd_10_cm", "simple-icd-10-cm"),
        ("licences", "licensedcode", "licensedcode-data"),
        ("languages", "emoji", "emoji"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(
    monkeypatch: pytest.MonkeyPatch, domain: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage) as caught:
        load_domains(config_of(domain))
    expected = f"domain '{domain}': the package '{package}' is not installed; run: pip install {package}"
    assert str(caught.value) == expected


def test_importing_the_codes_raises_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "simple_icd_10_cm"]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        domains._import_icd()


# A small package of licence data


def fake_licences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rules: dict[str, str]) -> None:
    data = tmp_path / "licensedcode" / "data"
    for folder in ("licenses", "rules"):
        (data / folder).mkdir(parents=True)
    for key, category in (("mit", "Permissive"), ("gpl-2.0", "Copyleft")):
        front = f"---\nkey: {key}\ncategory: {category}\n---\n\ntext of the licence"
        (data / "licenses" / f"{key}.LICENSE").write_text(front, encoding="utf-8")
    for name, text in rules.items():
        (data / "rules" / f"{name}.RULE").write_bytes(text.encode())
    monkeypatch.syspath_prepend(tmp_path)


def rule(expression: str, text: str, *more: str, notice: str = "is_license_notice: yes") -> str:
    return "\n".join(["---", f"license_expression: {expression}", notice, *more, "---", "", text])


def test_only_usable_notices_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long_enough = "Licensed to you under the terms of"
    rules = {
        "a_good": rule("mit", f"# {long_enough} {{{{MIT}}}}\n#\n"),
        "b_crlf": rule("gpl-2.0", f"{long_enough} GPL 2").replace("\n", "\r\n"),
        "c_dashes": rule("mit", f"{long_enough} dashes\n---\nand more"),
        "no_expression": rule("mit OR gpl-2.0", f"{long_enough} either"),
        "no_unknown": rule("who-knows", f"{long_enough} who knows"),
        "no_deprecated": rule("mit", f"{long_enough} old MIT", "is_deprecated: yes"),
        "no_french": rule("mit", f"{long_enough} French MIT", "language: fr"),
        "no_reference": rule("mit", f"{long_enough} reference", notice="is_license_reference: yes"),
        "no_short": rule("mit", "MIT license"),
        "no_long": rule("mit", "word " * 100),
    }
    fake_licences(monkeypatch, tmp_path, rules)
    assert [(found.text, found.label, found.group) for found in domains._read_licences()] == [
        (f"{long_enough} MIT", "permissive", "mit"),
        (f"{long_enough} GPL 2", "copyleft", "gpl-2.0"),
        (f"{long_enough} dashes and more", "permissive", "mit"),
    ]


def test_a_text_under_two_labels_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rules = {
        "a": rule("mit", "may be used by everybody as they like"),
        "b": rule("gpl-2.0", "MAY BE USED by everybody, as they like!"),
        "c": rule("gpl-2.0", "under the General Public License"),
        "d": rule("gpl-2.0", "under the GNU licence, version two"),
    }
    fake_licences(monkeypatch, tmp_path, rules)
    drawn = draw_builtin("licences", DataSettings(train_examples=1, test_examples=1, licence_categories=2), 0)
    assert {example.completion for example in (*drawn.train, *drawn.test)} == {" copyleft"}
    with pytest.raises(DataError, match="of the 2 distinct texts in its package 1 are available"):
        draw_builtin("licences", DataSettings(train_examples=2, test_examples=2, licence_categories=2), 0)


def test_broken_licence_data_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_licences(monkeypatch, tmp_path, {"torn": "license_expression: mit\nis_license_notice: yes\nno front matter"})
    with pytest.raises(DataError, match=r"torn\.RULE': has no front matter between lines of '---'; reinstall"):
        draw_builtin("licences", DataSettings(), 0)


# The partition


def labelled(counts: dict[str, int]) -> list[Example]:
    return [Example(f"{label} {i}", label) for label, count in counts.items() for i in range(count)]


def deal(examples: list[Example], num_devices: int, alpha: float, seed: int = 0) -> list[list[Example]]:
    return partition_by_label(
        examples, lambda example: example.completion, num_devices, alpha, np.random.default_rng(seed)
    )


def test_partition_deals_every_example_once_and_keeps_its_order() -> None:
    examples = labelled({"a": 50, "b": 33, "c": 1})
    parts = deal(examples, 4, 0.5)
    assert len(parts) == 4
    assert sorted(example.prompt for part in parts for example in part) == sorted(e.prompt for e in examples)
    for part in parts:
        assert [examples.index(example) for example in part] == sorted(examples.index(example) for example in part)


def test_partition_to_one_device_gives_it_all() -> None:
    examples = labelled({"a": 5, "b": 3})
    assert deal(examples, 1, 0.1) == [examples]
    assert deal([], 2, 0.1) == [[], []]


def mean_skew(alpha: float) -> float:
    """Return the mean total variation distance between a device's labels and all labels, over devices and draws."""
    examples = labelled(dict.fromkeys("abcdef", 200))
    distances = []
    for seed in range(20):
        for part in deal(examples, 4, alpha, seed):
            counts = Counter(example.completion for example in part)
            distances.append(sum(abs(counts[label] / max(len(part), 1) - 1 / 6) for label in "abcdef") / 2)
    return float(np.mean(distances))


def test_skew_grows_as_alpha_falls() -> None:
    skews = [mean_skew(alpha) for alpha in (1000.0, 10.0, 1.0, 0.1)]
    assert skews == sorted(skews)
    assert skews[0] < 0.03
    assert skews[-1] > 0.5


def test_proportions_have_the_mean_and_spread_of_the_dirichlet() -> None:
    examples = labelled({"a": 1000})
    shares = np.array([[len(part) / 1000 for part in deal(examples, 4, 0.5, seed)] for seed in range(400)])
    assert shares.mean(axis=0) == pytest.approx([0.25] * 4, abs=0.05)
    # Variance of a Dirichlet of 4 equal alphas: (1/4)(3/4) / (4 alpha + 1).
    assert shares.var(axis=0) == pytest.approx([0.1875 / 3] * 4, rel=0.25)


def test_generators_in_one_state_deal_alike_whatever_the_other_labels_are() -> None:
    both = deal(labelled({"a": 100, "b": 100}), 3, 0.5, seed=7)
    alone = deal(labelled({"b": 50}), 3, 0.5, seed=7)
    for part, half in zip(both, alone, strict=True):
        assert sum(example.completion == "b" for example in part) == pytest.approx(2 * len(half), abs=2)
    assert deal(labelled({"a": 100, "b": 100}), 3, 0.5, seed=8) != both


@pytest.mark.parametrize("alpha", [1e-300, 1e308, float("inf")])
def test_the_ends_of_alpha_are_one_owner_and_equal_parts(alpha: float) -> None:
    sizes = sorted(map(len, deal(labelled({"a": 100}), 4, alpha)))
    assert sizes == ([0, 0, 0, 100] if alpha < 1 else [25] * 4)


def test_training_and_test_set_of_a_device_have_the_same_skew(loaded: dict[str, DomainData]) -> None:
    for data in loaded["licences"].devices.values():
        train, test = (Counter(example.completion for example in part) for part in (data.train, data.test))
        for label in train | test:
            # 70 and 35 examples per label; rounding moves either end of a device's share by half an example.
            assert train[label] / 70 == pytest.approx(test[label] / 35, abs=1 / 70 + 1 / 35)


def test_devices_of_a_built_in_domain_differ(loaded: dict[str, DomainData]) -> None:
    shares = []
    for data in loaded["licences"].devices.values():
        counts = Counter(example.completion for example in data.train)
        shares.append(max(counts.values()) / counts.total())
    assert max(shares) > 0.3


def test_proportions_are_drawn_again_until_every_device_has_something() -> None:
    for seed in range(5):
        config = config_of("licences", num_devices=4, seed=seed, train_examples=60, test_examples=6)
        devices = load_domains(config)["licences"].devices
        assert all(data.train and data.test for data in devices.values())


def test_a_device_that_gets_nothing_is_named() -> None:
    with pytest.raises(DataError) as caught:
        load_domains(config_of("licences", num_devices=3, train_examples=2, test_examples=2))
    message = str(caught.value)
    assert message.startswith("device 'licences-")
    assert "test examples in the last of 100 draws, out of 2 and 2 for 3 devices; raise data.dirichlet_" in message


# Folders of JSONL


def test_folders_are_read_line_by_line(tmp_path: Path) -> None:
    # Some characters end a line for str.splitlines but not in JSON.
    odd = json.dumps({"prompt": "a\u2028b", "completion": "\u00e9\n"}, ensure_ascii=False)
    first = write_folder(tmp_path / "a", train=f"\n{GOOD_LINE}\n  \n{odd}\r\n\n")
    second = write_folder(tmp_path / "b")
    config = folder_config(first, second, template="Sum: {text}", labels=("4", "5"))
    four = Example("2 + 2 =", " 4")
    assert load_domains(config) == {
        "sums": DomainData(
            template="Sum: {text}",
            labels=("4", "5"),
            devices={
                "device-0": DeviceData((four, Example("a\u2028b", "\u00e9\n")), (four,)),
                "device-1": DeviceData((four,), (four,)),
            },
        )
    }


def test_folders_take_the_place_of_a_built_in_domain(tmp_path: Path) -> None:
    domain = load_domains(folder_config(write_folder(tmp_path / "a"), domain="medical"))["medical"]
    assert (domain.template, domain.labels) == (None, ())
    assert domain.devices["device-0"].train == (Example("2 + 2 =", " 4"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "is not valid JSON (Expecting property name"),
        ("[" * 100_000, "is not valid JSON ("),
        ("[1, 2]", "is a list, not an object"),
        ("null", "is a NoneType, not an object"),
        ('{"prompt": "a"}', "lacks 'completion'"),
        ("{}", "lacks 'completion', 'prompt'"),
        ('{"prompt": "a", "completion": "b", "label": "c"}', "has unknown keys: 'label'"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', "has unknown keys: 'text'; write {\"prompt\""),
        ('{"image": "a", "completion": "b", "prompt": "c"}', "has unknown keys: 'image'; write {\"prompt\""),
        ('{"prompt": "a", "completion": 4}', "'completion' is 4, not text; quote it: \"4\""),
        ('{"prompt": "a", "completion": true}', "'completion' is true, not text; quote it: \"true\""),
        ('{"prompt": "a", "completion": ["b"]}', "'completion' is [\"b\"], not text; write a string"),
        ('{"prompt": null, "completion": "b"}', "'prompt' is null, not text; write a string"),
        ('{"prompt": "", "completion": "b"}', "'prompt' is empty; write some text"),
        ('{"prompt": "a", "completion": " \\n"}', "'completion' is empty; write some text"),
        ('{"prompt": "\\ud800", "completion": "b"}', "is not valid JSON (a string holds half of a surrogate pair"),
        ('{"prompt": "a", "completion": "b", "prompt": "c"}', 'is not valid JSON (the key "prompt" is given twice)'),
        ('{"prompt": "a", "completion": "b", "\\u0070rompt": "c"}', 'is not valid JSON (the key "prompt" is given'),
        ('{"prompt": "a", "completion": NaN}', "is not valid JSON (NaN is not a number of JSON)"),
        ('{"prompt": "a", "completion": -Infinity}', "is not valid JSON (-Infinity is not a number of JSON)"),
        ('{"prompt": "a", "completion": 1e999}', "is not valid JSON (the number 1e999 is too large)"),
        ('{"prompt": "a", "completion": ' + "9" * 5000 + "}", "is not valid JSON (a number has 5000 digits"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, part: str, line: str, message: str) -> None:
    folder = write_folder(tmp_path / "a", **{part: f"{GOOD_LINE}\n\n{line}\n"})
    with pytest.raises(DataError) as caught:
        load_domains(folder_config(folder))
    assert str(caught.value).startswith(f"{folder / part}.jsonl, line 3: {message}")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_any_line_ends_are_read(tmp_path: Path, newline: str) -> None:
    folder = write_folder(tmp_path / "a")
    plain = load_domains(folder_config(folder))
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{GOOD_LINE}{newline}{newline}".encode())
    assert load_domains(folder_config(folder)) == plain


def test_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    (folder / "train.jsonl").write_bytes(GOOD_LINE.encode() + b'\n{"prompt": "caf\xe9", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"line 2 is not UTF-8: .*; save it as UTF-8"):
        load_domains(folder_config(folder))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_a_device_without_examples(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path / "a", test=text)
    with pytest.raises(DataError) as caught:
        load_domains(folder_config(folder))
    expected = f"examples '{folder / 'test.jsonl'}' of device 'device-0': device without examples; write"
    assert str(caught.value).startswith(expected)


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    (folder / "test.jsonl").unlink()
    for place, name in ((folder, "test.jsonl"), (tmp_path / "nowhere", "train.jsonl")):
        with pytest.raises(DataError) as caught:
            load_domains(folder_config(place))
        expected = f"examples '{place / name}' of device 'device-0': there is no such file; put train.jsonl and test"
        assert str(caught.value).startswith(expected)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    (folder / "train.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(
        DataError, match=r"train\.jsonl' of device 'device-0': cannot be read .line 1 is not UTF-8: inv"
    ):
        load_domains(folder_config(folder))
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_domains(folder_config(folder))


# Which of them an edge gets


def test_a_mixture_names_the_devices_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_domains(folder_config(write_folder(tmp_path / "a"), None, None, domain="medical"))
    assert str(caught.value) == (
        "domain 'medical' of edge 'edge': some of its devices name 'data', but not device-1, device-2; "
        "give every device of the edge a data folder, or none"
    )


def test_an_unknown_domain_names_the_built_in_ones() -> None:
    with pytest.raises(DataError) as caught:
        load_domains(folder_config(None, domain="medicine"))
    assert str(caught.value) == (
        "domain 'medicine' of edge 'edge': is not built in, and its devices name no 'data'; "
        "give every device a data folder, or use one of: medical, licences, languages"
    )


@pytest.mark.parametrize("given", [{"template": "Q: {text}"}, {"labels": ("a", "b")}])
def test_the_template_and_labels_of_a_built_in_domain_are_fixed(given: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="is built in, so its template and labels are fixed; remove 'template' and"):
        load_domains(folder_config(None, domain="licences", **given))


# Retention text and the majority


def test_retention_text_is_the_documentation_in_sorted_order() -> None:
    from pydoc_data.topics import topics

    text = retention_text(20_000)
    assert len(text) == 20_000
    assert text.startswith(topics[min(topics)][:500])
    assert retention_text(1_000) == text[:1_000]


def test_retention_text_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="topics have [0-9]+; lower absorb.retention_windows"):
        retention_text(10**9)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="comes without pydoc_data; use a Python with its whole standard library"):
        retention_text(10)


def test_majority_counts_the_test_examples_of_all_devices() -> None:
    yes, no = Example("p", " yes"), Example("p", " no")
    devices = {"a": DeviceData((no, no, no, no), (yes, no)), "b": DeviceData((no,), (yes, yes))}
    assert majority_share(DomainData(None, (), devices)) == 0.75


def test_majority_of_a_balanced_domain_is_chance(loaded: dict[str, DomainData]) -> None:
    assert majority_share(loaded["medical"]) == pytest.approx(1 / 21)


def test_a_drawn_data_set_is_shuffled() -> None:
    drawn: DrawnExamples = draw_builtin("licences", DataSettings(), 0)
    assert len({example.completion for example in drawn.train[:20]}) > 3
