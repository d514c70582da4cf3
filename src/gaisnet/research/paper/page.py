"""The report of ``gaisnet paper``: one self-contained page, claim by claim.

It shows the claim, the figures and the verdict, also where they disagree. Equal results give equal bytes.
"""

from collections.abc import Mapping, Sequence
from html import escape

from gaisnet.research.paper.claims import Finding
from gaisnet.research.paper.experiment import SEEDS, Column, Experiment, Row
from gaisnet.research.paper.figures import Drawing, drawn, legend_of, mean
from gaisnet.research.paper.results import Machine, Result
from gaisnet.runs.plots import swatch
from gaisnet.runs.report import CSS
from gaisnet.runs.table import human_seconds

_VERDICTS = {"agrees": "#009e73", "partly": "#e69f00", "disagrees": "#d55e00", "not measured": "#7d8791"}
_CSS = (
    ".verdict{display:inline-block;padding:0 .6em;border-radius:1em;color:#fff;font-weight:600;font-size:.9rem}"
    ".claims td{white-space:normal;text-align:left;vertical-align:top}.claims th{white-space:normal}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem;max-width:90ch}"
    "dt{color:var(--dim)}dd{margin:0}"
)


def render_page(experiments: Sequence[Experiment], results: Mapping[str, Result], quick: bool) -> str:
    """Render the whole page; it refers to nothing outside itself.

    Args:
        experiments: All experiments.
        results: Results by the experiments' names, as far as they were measured.
        quick: Whether the run was quick; the page says so.
    """
    found = [(one, results.get(one.name)) for one in experiments]
    findings = {one.name: result.finding_of(one) if result else None for one, result in found}
    kind = " This was a quick run: less of everything, so the figures are worth less." if quick else ""
    page = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>GaisNet: the paper's claims, measured</title><style>{CSS}{_CSS}</style></head><body><main>",
        "<h1>The paper's claims, measured</h1>",
        f"<p>What the paper on GaisNet says, in our words, and what was measured here, also where they disagree.{kind} "
        f"Figures are means of {len(SEEDS)} seeds ({', '.join(map(str, SEEDS))}), with the least and the most.</p>",
        _overview(experiments, findings),
        *(_section(one, result.rows_of(one) if result else [], findings[one.name]) for one, result in found),
        _machines(results),
        "</main></body></html>\n",
    ]
    return "\n".join(page)


def _overview(experiments: Sequence[Experiment], findings: Mapping[str, Finding | None]) -> str:
    rows = []
    for one in experiments:
        finding = findings[one.name]
        measured = escape(finding.measured) if finding else "–"
        rows.append(
            f'<tr><th scope="row"><a href="#{escape(one.name)}">{escape(one.title)}</a></th>'
            f"<td>{escape(one.claim.says)}</td><td>{measured}</td><td>{_badge(finding)}</td></tr>"
        )
    head = "".join(f'<th scope="col">{heading}</th>' for heading in ("", "The paper says", "Measured", "Verdict"))
    return (
        f'<section class="claims"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _badge(finding: Finding | None) -> str:
    verdict = finding.verdict if finding else "not measured"
    return f'<span class="verdict" style="background:{_VERDICTS[verdict]}">{verdict}</span>'


def _section(one: Experiment, rows: Sequence[Row], finding: Finding | None) -> str:
    told = {
        "The paper says": f"{escape(one.claim.says)} ({escape(one.claim.where)})",
        "What was done": escape(one.method),
        "Rule": escape(one.rule),
        "Measured": escape(finding.measured) if finding else "not all of it yet",
        "Verdict": _badge(finding),
    }
    listed = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in told.items())
    shown = _table(one.columns, rows) if rows else ""
    if finding:
        shown += f'<div class="panels">{"".join(map(_panel, one.draw(rows)))}</div>'
    return f'<section id="{escape(one.name)}"><h2>{escape(one.title)}</h2><dl>{listed}</dl>{shown}</section>'


def _table(columns: Mapping[str, Column], rows: Sequence[Row]) -> str:
    """Render one line per condition: mean, lowest and highest value over the seeds of each figure."""
    alike: dict[tuple[str | int | float, ...], list[Row]] = {}
    for row in rows:
        alike.setdefault(tuple(row.condition.values()), []).append(row)
    headings = [*rows[0].condition, *(column.heading for column in columns.values())]
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = []
    for condition, seeds in alike.items():
        named = "".join(f'<th scope="row">{escape(str(value))}</th>' for value in condition)
        cells = [_cell(column, [row.figures[name] for row in seeds]) for name, column in columns.items()]
        body.append(f"<tr>{named}{''.join(cells)}</tr>")
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table>{table}</table></div>'


def _cell(column: Column, values: Sequence[float]) -> str:
    middle, low, high = map(column.show, (mean(values), min(values), max(values)))
    spread = "" if low == high else f' <span class="dim">({escape(low)} to {escape(high)})</span>'
    return f"<td>{escape(middle)}{spread}</td>"


def _panel(drawing: Drawing) -> str:
    legend = "".join(f"<li>{swatch(line)}{escape(line.label)}</li>" for line in legend_of(drawing))
    return f'<figure><h3>{escape(drawing.title)}</h3>{drawn(drawing)}<ul class="legend">{legend}</ul></figure>'


def _machines(results: Mapping[str, Result]) -> str:
    """Describe the machines, and how long the measurements took."""
    names = {name: field for name, field in Machine.model_fields.items()}
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "wall time", "rows", *names))
    rows = []
    for name, result in results.items():
        cells = [human_seconds(result.seconds), str(len(result.rows))]
        cells += [str(value) for value in result.machine.model_dump().values()]
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        )
    return (
        f'<section><h2>Machine</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )
