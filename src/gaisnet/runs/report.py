"""``report.html``: one self-contained page with the closing table and a plot of each flow over the cycles.

Names chosen by users are escaped. Equal summaries give equal bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from html import escape

import yaml

from gaisnet.network import NO_ADAPTER
from gaisnet.runs.plots import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILION,
    Line,
    Plot,
    Stack,
    lines_svg,
    plain_style,
    stacks_svg,
    swatch,
)
from gaisnet.runs.summary import Summary
from gaisnet.runs.table import (
    HEADINGS,
    TITLE,
    accuracy,
    against_rows,
    bytes_unit,
    closing_captions,
    closing_rows,
    human_bytes,
    human_seconds,
    percent,
    unit_bytes,
)
from gaisnet.tiers.cloud.adapted_body import MERGED

CSS = """
:root{color-scheme:light dark;--ink:#1d2329;--dim:#59636e;--paper:#fff;--card:#f6f7f9;--edge:#d9dee4}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--dim:#9aa5b1;--paper:#14171b;--card:#1c2127;--edge:#333b44}}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1040px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.5rem 0 .2rem}
h3{font-size:1rem;margin:0 0 .4rem;overflow-wrap:anywhere}p{margin:.3rem 0;max-width:80ch}.dim{color:var(--dim)}
.scroll{overflow-x:auto;margin-top:1.5rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;padding:0 0 .5rem;color:var(--dim)}
th,td{padding:.45rem .7rem;border-bottom:1px solid var(--edge);text-align:right;white-space:nowrap}
th:first-child{text-align:left;min-width:6rem;white-space:normal;overflow-wrap:anywhere}thead th{color:var(--dim)}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1rem;margin:.8rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 2rem}
.pair section{min-width:0}
figure{margin:0;padding:.8rem;background:var(--card);border:1px solid var(--edge);border-radius:10px;min-width:0}
figure{max-width:520px;align-self:start}figure>svg{display:block;width:100%;height:auto}
.said{max-height:18rem;overflow:auto;padding-left:1.2rem}
figure text{font-family:inherit!important}figure svg *{stroke-linejoin:round;stroke-linecap:butt}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:.6rem 0;font-size:.9rem}
.legend svg{vertical-align:middle;margin-right:.45rem}.legend li{overflow-wrap:anywhere;min-width:0}
details{margin-top:2.5rem}summary{cursor:pointer;font-weight:600}
pre{overflow:auto;padding:1rem;background:var(--card);border:1px solid var(--edge);border-radius:10px;font-size:.85rem}
@media print{figure,section{break-inside:avoid}}
"""

_PERPLEXITY = (
    "Perplexity is how surprised the FM is by public text that no domain trains on: where it rises, the FM forgets "
    "what it knew, and the gate weakens or refuses an adapter above its limit."
)
_DRIFT = (
    "How far an adapter moves what the FM makes of public inputs, before any classifier. There is no limit: the FM "
    "alone stays as it was, and other domains have adapters of their own."
)
_NOT_MEASURED = (
    "The FM writes no text, and the cloud has no public inputs (model.public_inputs), so nothing was measured: the "
    "gate looked at the shape of adapters and at their numbers."
)


def render_report(summary: Summary) -> str:
    """Render the whole page. It refers to nothing outside itself."""
    with plain_style():
        flows = [_down_flow(summary), _up_flow(summary), _retention(summary)]
        costs = [_bytes(summary), _seconds(summary)]
    config = yaml.safe_dump(summary.config, sort_keys=False, allow_unicode=True)
    page = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>GaisNet run, seed {summary.seed}</title><style>{CSS}</style></head><body><main>",
        f"<h1>GaisNet run, seed {summary.seed}</h1><p>{escape(_model_line(summary))}</p>",
        _closing_table(summary),
        *flows,
        _against(summary),
        _everywhere(summary),
        f'<div class="pair">{"".join(costs)}</div>',
        f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>",
        "</main></body></html>\n",
    ]
    return "\n".join(page)


def _model_line(summary: Summary) -> str:
    model, name = summary.model, _setting(summary, "model", "foundation")
    return (
        f"Foundation model (FM){f' {name}' if isinstance(name, str) else ''}: {model.foundation_params / 1e6:.1f} M "
        f"parameters in {model.foundation_layers} layers. Domain models (DMs): {model.domain_layers} layers. "
        f"Trained per domain: {model.trainable_params / 1e6:.2f} M parameters."
    )


def _closing_table(summary: Summary) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in HEADINGS)
    rows = []
    for row in closing_rows(summary):
        name, *cells = map(escape, row.cells())
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    table = f"<caption>{escape(TITLE)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    notes = "".join(f"<p>{escape(caption)}.</p>" for caption in closing_captions(summary))
    return f'<section><div class="scroll"><table>{table}</table></div>{notes}</section>'


def _down_flow(summary: Summary) -> str:
    panels, lines, relay = [], list[Line](), list[Line]()
    for name in summary.domains:
        lines = [
            Line("DM of the domain", [accuracy(cycle.domain, name) for cycle in summary.cycles], BLUE, marker="o"),
            Line("FM at the start", [accuracy(summary.cycles[0].foundation, name)], INK, "--"),
        ]
        relay = _relay_lines(summary, name)
        panels.append((name, _accuracy_svg(summary, f"Down flow, {name}", lines, relay)))
    note = (
        "Accuracy is the share of a domain's held-out examples that the DM at the edge gets exactly right; the FM at "
        "the start, of domains that learn, is what the cloud's model could do before anything was trained."
    )
    if relay:
        note += (
            " Relay loss is how far the DM is from the FM on text that the FM itself wrote, before and after the cloud "
            "trained the cycle's relay adapter; KL is how far what it says next there is from what the FM says, in "
            "nats, both with the adapter that the FM has."
        )
    return _section("Down flow: the foundation model teaches the domain models", [*lines, *relay], panels, note)


def _relay_lines(summary: Summary, domain: str) -> list[Line]:
    """Return curves of relay loss before and after each cycle's distillation; none if the relay is disabled."""
    losses = [cycle.relay.get(domain) for cycle in summary.cycles]
    if not any(cycle.relay for cycle in summary.cycles):
        return []
    before = [None if loss is None else loss.loss_before for loss in losses]
    after = [None if loss is None else loss.loss_after for loss in losses]
    divergence = [None if loss is None else loss.kl_after for loss in losses]
    return [
        Line("relay loss before", before, ORANGE, "--", "s", "{:.3g}".format),
        Line("relay loss after", after, GREEN, "-", "^", "{:.3g}".format),
        Line("KL to the FM, after", divergence, PURPLE, ":", "D", "{:.3g}".format),
    ]


def _up_flow(summary: Summary) -> str:
    panels, lines = [], list[Line]()
    scored = {name for cycle in summary.cycles for name in cycle.foundation}
    for name in (name for name in summary.domains if name in scored):
        own = [accuracy(cycle.foundation, name) for cycle in summary.cycles]
        merged = [accuracy(cycle.merged, name) for cycle in summary.cycles]
        has_merged = any(value is not None for value in merged)
        lines = [
            Line("FM with the domain's adapter", own, VERMILION, marker="o"),
            *([Line("FM with the merged adapter", merged, PURPLE, "--", "s")] if has_merged else []),
            Line("FM at entry 0", own[:1], INK, ":"),
            Line("majority: always the commonest class", [summary.majority.get(name)], GREEN, ":"),
        ]
        panels.append((name, _accuracy_svg(summary, f"Up flow, {name}", lines, [])))
    note = (
        "Accuracy is the share of the same held-out examples that the FM in the cloud gets exactly right, with "
        "the adapter that the domain's devices trained, and with the one adapter merged from all domains, where there "
        "is one. Entry 0 was measured before training; majority is the score of always naming the commonest class."
    )
    return _section("Up flow: the domains make the foundation model better", lines, panels, note)


def _retention(summary: Summary) -> str:
    last = summary.cycles[-1].retention
    if last.perplexity is not None:
        lines, unit, note = _perplexities(summary), "perplexity", _PERPLEXITY
    elif last.drift is not None:
        lines, unit, note = _drifts(summary), "share of their length", _DRIFT
    else:
        lines, unit, note = [], "", _NOT_MEASURED
    panels = (
        [("", lines_svg("Retention", _numbers(summary), [Plot(lines, unit, in_percent=last.perplexity is None)]))]
        if lines
        else []
    )
    said = [f"<li>Cycle {cycle.cycle}: {escape(line)}</li>" for cycle in summary.cycles for line in cycle.gate]
    extra = (
        f'<div><h3>What the gate said, and what fell</h3><ul class="said">{"".join(said)}</ul></div>' if said else ""
    )
    return _section("Retention", lines, panels, note, extra)


def _perplexities(summary: Summary) -> list[Line]:
    start = summary.cycles[0].retention.perplexity
    worst = [cycle.retention.perplexity for cycle in summary.cycles]
    lines = [Line("largest over the domain adapters", worst, INK, "-", "o", "{:.2f}".format)]
    # Before the first cycle there is no adapter: each curve starts from the FM alone.
    lines += _with_adapters(summary, lambda name: start, "{:.2f}".format)
    increase = _setting(summary, "absorb", "max_retention_increase")
    if isinstance(increase, int | float) and start is not None:
        limit = start * (1 + increase)
        lines.append(Line(f"limit of the gate (+{100 * increase:g} %)", [limit], VERMILION, ":", "", "{:.2f}".format))
    return lines


def _drifts(summary: Summary) -> list[Line]:
    worst = [cycle.retention.drift for cycle in summary.cycles]
    return [
        Line("largest over the domain adapters", worst, INK, "-", "o"),
        *_with_adapters(summary, summary.cycles[0].retention.adapters.get, percent),
    ]


def _with_adapters(
    summary: Summary, start: Callable[[str], float | None], show: Callable[[float], str]
) -> Iterator[Line]:
    """Return a curve for each adapter."""
    names = dict.fromkeys(name for cycle in summary.cycles for name in cycle.retention.adapters)
    for index, name in enumerate(names):
        values = [start(name), *(cycle.retention.adapters.get(name) for cycle in summary.cycles[1:])]
        colour, marker = PALETTE[index % len(PALETTE)], "s^D"[index % 3]
        yield Line(f"with the adapter '{name}'", values, colour, "--", marker, show)


def _against(summary: Summary) -> str:
    """Return the comparison with baselines; empty before they are measured."""
    if summary.baselines is None:
        return ""
    rows = [(label, [f"<td>{escape(cell)}</td>" for cell in cells]) for label, cells in against_rows(summary)]
    note = (
        "Accuracy on the same held-out examples. Pooled is LoRA on all layers of the FM with a domain's examples in "
        "one place, which the network avoids; gap closed is the share of the way there from the start. An edge alone "
        "has a model of the DM's size that learned from nothing, or the DM as it first came. All that learn made as "
        "many passes."
    )
    return _by_domain("Against what you might do instead", summary.domains, rows, note)


def _everywhere(summary: Summary) -> str:
    """Return the scores of every model on every domain; empty if they were not measured."""
    matrix = summary.cycles[-1].matrix
    if matrix is None:
        return ""
    models = {"FM as it is": matrix.foundation[NO_ADAPTER]}
    models |= {f"FM with the adapter of {name}": matrix.foundation[name] for name in matrix.domain}
    models["FM with the merged adapter"] = matrix.foundation[MERGED]
    models |= {f"DM of {name}": scores for name, scores in matrix.domain.items()}
    rows = [(label, [_shaded(accuracy(on, name)) for name in matrix.domain]) for label, on in models.items()]
    note = (
        "Accuracy on the held-out examples of each domain (columns). A row that is dark in one column only knows that "
        "domain; what the FM as it is can do, and an adapter of another domain cannot, is interference."
    )
    return _by_domain("Every model on every domain", list(matrix.domain), rows, note)


def _by_domain(title: str, domains: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], note: str) -> str:
    """Return a table with a column per domain; the cells are HTML, the labels are not."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *domains))
    body = "".join(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>' for label, cells in rows)
    return (
        f'<section><h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="dim">{escape(note)}</p></section>'
    )


def _shaded(share: float | None) -> str:
    """Return a table cell, darker for higher values."""
    depth = round(60 * (share or 0.0))
    return f'<td style="background:color-mix(in srgb,{BLUE} {depth}%,transparent)">{escape(percent(share))}</td>'


def _bytes(summary: Summary) -> str:
    each = [cycle.bytes for cycle in summary.cycles]
    stacks = [
        Stack("device to edge (up)", [link.device_edge.up for link in each], BLUE, human_bytes),
        Stack("edge to device (down)", [link.device_edge.down for link in each], SKY, human_bytes),
        Stack("edge to cloud (up)", [link.edge_cloud.up for link in each], VERMILION, human_bytes, 1),
        Stack("cloud to edge (down)", [link.edge_cloud.down for link in each], ORANGE, human_bytes, 1),
    ]
    unit = bytes_unit(max(value for stack in stacks for value in stack.values))
    svg = stacks_svg("Bytes per cycle", _numbers(summary), stacks, unit, unit_bytes(unit))
    note = (
        "Every message of a cycle as it was encoded for the wire, evaluation included: the left bar is the links "
        "between devices and edges, the right bar those between edges and cloud."
    )
    return _section("Bytes", stacks, [("", svg)], note)


def _seconds(summary: Summary) -> str:
    colours = {"release": BLUE, "fine_tune": ORANGE, "absorb": GREEN, "evaluate": PURPLE}
    each = [cycle.seconds.model_dump() for cycle in summary.cycles]
    stacks = [Stack(verb, [one[verb] for one in each], colour, human_seconds) for verb, colour in colours.items()]
    svg = stacks_svg("Seconds per cycle", _numbers(summary), stacks, "seconds")
    note = (
        "Wall time by verb: release trains the relays and sends them down, fine_tune learns from private data, absorb "
        "takes the adapters up through the gate, and evaluate scores the DMs and the FM."
    )
    return _section("Seconds", stacks, [("", svg)], note)


def _section(
    title: str, series: Sequence[Line | Stack], panels: Sequence[tuple[str, str]], note: str, extra: str = ""
) -> str:
    """Return a titled group of figures (heading, SVG) with one legend and one note; ``extra`` is HTML beside them."""
    figures = [f"<figure>{f'<h3>{escape(name)}</h3>' if name else ''}{svg}</figure>" for name, svg in panels]
    legend = "".join(f"<li>{swatch(one)}{escape(one.label)}</li>" for one in series)
    return (
        f'<section><h2>{escape(title)}</h2><div class="panels">{"".join(figures)}{extra}</div>'
        f'<ul class="legend">{legend}</ul><p class="dim">{escape(note)}</p></section>'
    )


def _setting(summary: Summary, group: str, key: str) -> object:
    """Return a value of the run's configuration, or ``None`` if the summary does not have it."""
    settings = summary.config.get(group)
    return settings.get(key) if isinstance(settings, dict) else None


def _numbers(summary: Summary) -> list[int]:
    return [cycle.cycle for cycle in summary.cycles]


def _accuracy_svg(summary: Summary, title: str, lines: Sequence[Line], losses: Sequence[Line]) -> str:
    """Draw accuracies over the cycles, with a second plot below if there are ``losses``."""
    plots = [Plot(lines, "accuracy", (-0.03, 1.03), in_percent=True)]
    if losses:
        plots.append(Plot(losses, "distance to the FM", (0, None)))
    return lines_svg(title, _numbers(summary), plots)
