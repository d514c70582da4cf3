"""YAML as people write it: what it makes of their words is said in their words, and nothing in it grows without end."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from gaisnet.config.file import load_config
from gaisnet.config.overrides import with_overrides
from gaisnet.config.yaml_text import DEEPEST, MOST_VALUES, load_yaml, spelling
from gaisnet.errors import ConfigError
from tests.tiny import tiny_raw_config

LABELS = "  labels:\n  - 'yes'\n  - 'no'\n"


@pytest.fixture
def text() -> str:
    """A configuration with one edge, as a file has it."""
    raw = tiny_raw_config()
    raw["edges"] = raw["edges"][:1]
    return yaml.safe_dump(raw, sort_keys=False)


def refusal(path: Path, text: str | bytes, *overrides: str) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("yes", "true"),
        ("No", "false"),
        ("on", "true"),
        ("OFF", "false"),
        ("007", "the number 7"),
        ("1_000", "the number 1000"),
        ("12:30", "the number 750"),
        ("1.50", "the number 1.5"),
        ("2024-01-31", "the date 2024-01-31"),
        ("null", "nothing"),
        ("~", "nothing"),
    ],
)
def test_a_label_that_yaml_does_not_read_as_text_is_shown_as_it_was_written(
    tmp_path: Path, text: str, written: str, read: str
) -> None:
    path = tmp_path / "run.yaml"
    told = f"edges.0.labels.1: text is needed, and YAML reads {written} as {read}; quote it: '{written}'"
    assert refusal(path, text.replace(LABELS, f"  labels: [a, {written}]\n")).endswith(told)
    assert refusal(path, text, f"edges.0.labels=[a, {written}]").endswith(told)
    assert refusal(path, text, f"edges.0.labels.1={written}").endswith(told)
    path.write_text(text.replace(LABELS, f"  labels: [a, '{written}']\n"), encoding="utf-8")
    assert load_config(path).edges[0].labels == ("a", written)


@pytest.mark.parametrize("written", ["2024-02-30", "2023-13-01", "2024-01-31 25:00:00", "0b_", "9" * 5000])
def test_what_only_looks_like_a_date_or_a_number_is_refused(tmp_path: Path, text: str, written: str) -> None:
    told = "is read as a .* and is none .*line .*; quote it if it is text"
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=told):
        path.write_text(text.replace(LABELS, f"  labels: [{written}]\n"), encoding="utf-8")
        load_config(path)
    with pytest.raises(ConfigError, match=r"--set edges.0.labels=.* is not YAML .*; quote it"):
        with_overrides(yaml.safe_load(text), [f"edges.0.labels=[{written}]"])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (LABELS, "  labels: a, b\n", "edges.0.labels: .*; write a list, as in"),
        (LABELS, "  labels: [a, a]\n", "labels must differ, but these are given twice: a"),
        (LABELS, "  labels: ['', b]\n", "a label is empty"),
        (LABELS, "  labels: [a, ]\n  labels: [b]\n", r"'labels' is given twice \(line"),
        ("template: Is {text} so?", "template: {text}", "edges.0.template: .* as a mapping; quote it"),
        ("name: north\n", "name: no\n", "edges.0.name: .*YAML reads no as false; quote it: 'no'"),
        ("name: north\n", "name: site.a\n", "edges.0.name: .*; begin with a letter or a digit, and use letters"),
        (
            "local_epochs: 1",
            "local_epochs: yes",
            "fine_tune.local_epochs: a number is needed, and this is read as true",
        ),
        ("seed: 3", "seed: off", "seed: a number is needed, and this is read as false"),
        ("  rank: 2\n  sequences: 16\n  tokens: 12\n", "", "relay: nothing stands under it; write settings below it"),
        ("\n  context", "\n\tcontext", r"cannot be read .*line \d+.*; indent with spaces"),
        ("seed: 3", "seed: 3\n---\nseed: 4", "another document .*; keep one document"),
        ("seed: 3", f"seed: {'[' * 100_000}", f"cannot be read .values nest deeper than {DEEPEST} levels .line 1"),
        ("seed: 3", f"seed: {'{a: ' * 2000}", f"cannot be read .values nest deeper than {DEEPEST} levels .line 1"),
        ("seed: 3", "seed: &s [*s]", "an alias stands inside what it stands for"),
        ("seed: 3", "seed: !!timestamp x", "'x' is read as a date and is none"),
        ("seed: 3", "seed: !!int ''", "'' is read as a int and is none"),
        ("seed: 3", "? [a]\n: 3", "unhashable key"),
        ("seed: 3", "seed: 3\nyes: 4", "cannot be read|is not known|Keys should be strings"),
    ],
)
def test_a_slip_is_named_with_its_place_and_a_way_out(tmp_path: Path, text: str, old: str, new: str, told: str) -> None:
    assert old in text
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        (tmp_path / "run.yaml").write_text(text.replace(old, new), encoding="utf-8")
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "bomb", ["[*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}]", "{{<<: [*{0}, *{0}, *{0}]}}"]
)
def test_aliases_that_stand_for_more_and_more_are_refused_at_once(tmp_path: Path, text: str, bomb: str) -> None:
    first = "[x, x]" if bomb.startswith("[") else "{x: 1}"
    lines = [f"a0: &a0 {first}", *(f"a{i}: &a{i} {bomb.format(f'a{i - 1}')}" for i in range(1, 30))]
    told = refusal(tmp_path / "run.yaml", "\n".join(lines))
    assert f"its aliases stand for more than {MOST_VALUES} values" in told


def test_a_chain_of_aliases_does_not_nest_without_end() -> None:
    chain = ["- &a0 [x]", *(f"- &a{i} [*a{i - 1}]" for i in range(1, 2000))]
    with pytest.raises(yaml.YAMLError, match="nest deeper"):
        load_yaml("\n".join(chain))


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    assert load_config(path).edges[0].labels == ("yes", "no")


def test_another_encoding_is_named(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path / "run.yaml", text.encode("utf-16")).endswith("not UTF-8); save it as UTF-8")


def test_an_override_fills_a_group_with_nothing_under_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("  rank: 2\n  sequences: 16\n  tokens: 12\n", ""), encoding="utf-8")
    assert load_config(path, ["relay.rank=5"]).relay.rank == 5


def test_an_index_of_too_many_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no item of a list of 1; use an index"):
        with_overrides({"edges": [{}]}, [f"edges.{'9' * 5000}.name=x"])


@pytest.mark.parametrize(
    ("which", "other"),
    [("name: north-b", "name: North-A"), ("name: north\n", "name: Cloud\n"), ("domain: shapes", "domain: None")],
)
def test_names_that_differ_in_case_only_are_refused(tmp_path: Path, text: str, which: str, other: str) -> None:
    """Folders and host names often do not tell them apart."""
    assert which in text
    told = refusal(tmp_path / "run.yaml", text.replace(which, other))
    assert "differ in more than upper and lower case" in told or "cannot be named" in told


def test_domains_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    raw = tiny_raw_config()
    raw["edges"][1]["domain"] = "Shapes"
    told = refusal(tmp_path / "run.yaml", json.dumps(raw))
    assert "differ in more than upper and lower case, but there are shapes and Shapes" in told


@pytest.mark.parametrize(
    ("location", "found"),
    [(("a", 0), "yes"), (("a", "tuple", 1), "0x10"), (("b",), ""), (("c",), None), (("a", 7), None), (("a",), None)],
)
def test_a_spelling_is_found_by_its_place(location: tuple[Any, ...], found: str | None) -> None:
    assert spelling("a: [yes, 0x10]\nb:\n", location) == found


def test_what_yaml_reads_right_stays(tmp_path: Path) -> None:
    assert load_yaml("a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: [*x, *x]\ne: 2024-01-31\n") == {
        "a": {"b": 1},
        "c": {"b": 2},
        "d": [{"b": 1}, {"b": 1}],
        "e": date(2024, 1, 31),
    }
