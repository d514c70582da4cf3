"""Writes ``docs/modules.md`` from the code: the ladder of ``.importlinter`` and the first sentence of every module.

Run it as ``make map`` after a module was added, moved or renamed; a test compares the page with the code.
"""

import ast
import configparser
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "gaisnet"
PAGE = ROOT / "docs" / "modules.md"


def ladder() -> list[str]:
    """Return the layers of the package, the highest first."""
    linter = configparser.ConfigParser()
    linter.read(ROOT / ".importlinter")
    return linter["importlinter:contract:ladder"]["layers"].split("\n")[1:]


def summaries(package: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the first paragraph of the docstring of each module below ``package``."""
    path = PACKAGE / package
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        if docstring:
            name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
            yield name, re.sub(r"``([^`]*)``", r"`\1`", " ".join(docstring.partition("\n\n")[0].split()))


def render() -> str:
    """Return the page."""
    lines = [
        "# Modules",
        "",
        "Generated from the code by `make map`. Imports point down this ladder; `|` separates siblings that may not "
        "import each other. `make check` proves it.",
        "",
        *(f"{number}. `{layer}`" for number, layer in enumerate(ladder(), 1)),
    ]
    for layer in ladder():
        for package in layer.split(" | "):
            lines += ["", f"## {package}", "", "| module | purpose |", "|---|---|"]
            lines += [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in summaries(package.strip())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
