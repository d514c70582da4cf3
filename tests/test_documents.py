"""The documents: every block of code in them runs or is read by the product, and their lists are those of the code."""

import configparser
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from gaisnet.cli.app import app
from gaisnet.config.file import parse_config
from tests.serving.servers import running_server
from tests.tiny import write_tiny_run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 900
DRAWN = re.compile("[─►▲┌└│]")  # a figure


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


BLOCKS = list(blocks())


def of_language(*languages: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language in languages and not DRAWN.search(block.text)]
    return pytest.mark.parametrize("block", chosen, ids=[f"{block.page.name}:{block.line}" for block in chosen])


def commands(block: Block) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.text.splitlines() if line.strip()]


def check_arguments(command: Any, name: str, args: list[str]) -> None:
    """Parse a command line as the command does, without running it. Raises a click error."""
    context = command.make_context(name, list(args))
    if hasattr(command, "resolve_command") and context._protected_args + context.args:
        sub_name, sub, rest = command.resolve_command(context, context._protected_args + context.args)
        check_arguments(sub, sub_name, rest)


@of_language("", "bash")
def test_commands_that_are_shown_exist(block: Block, tmp_path: Path) -> None:
    for words in commands(block):
        if words[0] == "gaisnet":
            check_arguments(typer.main.get_command(app), "gaisnet", words[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        elif words[0] == "python":
            subprocess.run([sys.executable, *words[1 : words.index(">>")]], check=True, cwd=tmp_path)
        else:
            assert words[0] in {"pip", "rsync"} or words[0].endswith("start.sh"), words[0]


@of_language("yaml")
def test_configurations_that_are_shown_are_valid(block: Block) -> None:
    assert parse_config(yaml.safe_load(block.text), str(block.page), block.text).edges


@of_language("json")
def test_json_that_is_shown_is_json(block: Block) -> None:
    assert json.loads(block.text.replace(", ...", ""))


@of_language("ini")
def test_a_unit_that_is_shown_is_one(block: Block) -> None:
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block.text)
    assert "ExecStart" in unit["Service"]


@of_language("python")
def test_python_that_is_shown_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_run(tmp_path / "tiny").rename(tmp_path / "tiny" / "my.yaml")
    with running_server(threshold=0.0) as at:
        text = block.text.replace("http://127.0.0.1:8000", at.url).replace('"my.yaml"', '"tiny/my.yaml"')
        exec(compile(text, f"{block.page.name}:{block.line}", "exec"), {"__name__": "__main__"})


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS if not DRAWN.search(block.text)} <= {
        "", "bash", "yaml", "json", "ini", "python"
    }  # fmt: skip


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_every_link_leads_somewhere() -> None:
    for page in [*PAGES, *sorted((ROOT / "docs" / "decisions").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_has_every_decision() -> None:
    folder = ROOT / "docs" / "decisions"
    named = set(re.findall(r"\((\d{4}[^)]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert named == {page.name for page in folder.glob("0*.md")}


# -- the map of the code -----------------------------------------------------------------------------------------------


def test_the_list_of_modules_is_that_of_the_code() -> None:
    found = runpy.run_path(str(ROOT / "docs" / "module_map.py"))
    assert (ROOT / "docs" / "modules.md").read_text(encoding="utf-8") == found["render"](), "run: make map"


def test_every_test_that_the_list_of_faults_names_exists() -> None:
    named = re.findall(
        r"`((?:[\w/]+/)?test_\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    )
    assert len(named) > 50
    files = {name: (ROOT / "tests" / name).read_text(encoding="utf-8") for name, _ in named}
    assert [f"{name}::{test}" for name, test in named if test and f"def {test}(" not in files[name]] == []
