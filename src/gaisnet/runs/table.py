"""The closing table of a run: one row per domain, before and after, and the costs."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from gaisnet.runs.summary import Score, Summary, Traffic

TITLE = "Accuracy on held-out examples that never left their devices (points gained)"
HEADINGS = ("Domain", "Majority", "DM, before → after", "FM, before → after", "FM merged, after")
MISSING = "–"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class ClosingRow:
    """Accuracies of one domain in 0..1; ``None`` where the run has none."""

    domain: str
    majority: float | None
    domain_before: float | None
    domain_after: float | None
    foundation_before: float | None
    foundation_after: float | None
    merged_after: float | None

    def cells(self) -> tuple[str, ...]:
        """Return the texts under ``HEADINGS``."""
        return (
            self.domain,
            percent(self.majority),
            _gain(self.domain_before, self.domain_after),
            _gain(self.foundation_before, self.foundation_after),
            percent(self.merged_after),
        )


def closing_rows(summary: Summary) -> list[ClosingRow]:
    """Return a row per domain: entry 0 against the last cycle."""
    first, last = summary.cycles[0], summary.cycles[-1]
    return [
        ClosingRow(
            domain=name,
            majority=summary.majority.get(name),
            domain_before=accuracy(first.domain, name),
            domain_after=accuracy(last.domain, name),
            foundation_before=accuracy(first.foundation, name),
            foundation_after=accuracy(last.foundation, name),
            merged_after=accuracy(last.merged, name),
        )
        for name in summary.domains
    ]


def against_rows(summary: Summary) -> list[tuple[str, list[str]]]:
    """Return a row per baseline and result: a label, and a text per domain.

    Baselines that were not measured have no row.
    """
    last, gaps, found = summary.cycles[-1].bodies(), summary.gap_closed, summary.baselines
    bodies = {"domain": "DM", "merged": "FM, merged adapter", "foundation": "FM, domain's adapter"}
    shares: list[tuple[str, Mapping[str, float]]] = [
        (label, {name: score.accuracy for name, score in last[body].items()}) for body, label in bodies.items()
    ]
    if found is not None:
        shares = [
            ("FM, asked", found.zero_shot),
            ("FM, asked with examples", found.few_shot),
            ("edge alone, from scratch", found.scratch),
            ("edge alone, DM without a relay", found.no_relay),
            *shares,
            ("pooled, FM, all layers", found.pooled),
        ]
    rows = [(label, [percent(each.get(name)) for name in summary.domains]) for label, each in shares if each]
    for body, label in bodies.items() if gaps else ():
        closed: Mapping[str, float | None] = getattr(gaps, body)
        cells = [MISSING if (gap := closed.get(name)) is None else f"{gap:.2f}" for name in summary.domains]
        rows.append((f"gap closed, {label}", cells))
    return rows


def closing_captions(summary: Summary) -> list[str]:
    """Return the lines under the table: retention, bytes, seconds, and the largest device's share of the FM."""
    seconds = sum(sum(cycle.seconds.model_dump().values()) for cycle in summary.cycles)
    return [
        f"Retention: {_retention(summary)}",
        f"Bytes, device–edge: {_both_ways([cycle.bytes.device_edge for cycle in summary.cycles])}; "
        f"edge–cloud: {_both_ways([cycle.bytes.edge_cloud for cycle in summary.cycles])}",
        f"Wall time: {human_seconds(seconds)}",
        f"The largest split device holds {percent(summary.device.params_fraction)} of the FM's parameters",
        *_truncated(summary),
        *_newcomers(summary),
        *(f"Note: {sentence}" for sentence in summary.cycles[-1].merged_below_own()),
        *(f"Left out: {fault}" for cycle in summary.cycles for fault in cycle.faults),
    ]


def _retention(summary: Summary) -> str:
    first, last = summary.cycles[0].retention.perplexity, summary.cycles[-1].retention
    if first is not None and last.perplexity is not None:
        change = f"{last.perplexity / first - 1:+.1%}".replace("%", " %") if first else MISSING
        return f"the FM's perplexity on public text went from {first:.2f} to {last.perplexity:.2f} ({change})"
    if last.drift is not None:
        return f"adapters move the FM's features of public inputs by {percent(last.drift)} of their length at most"
    return "not measured; the FM writes no text, and the cloud has no public inputs"


def _truncated(summary: Summary) -> list[str]:
    """Return a line per device with truncated examples."""
    takes = summary.model.longest_example
    return [
        f"Device '{name}': {each.num_truncated} of {each.num_examples} examples are truncated to model.context, "
        f"{summary.model.context} tokens; {each.longest} would hold all"
        + (f", but the FM takes {takes}" if takes is not None and each.longest > takes else "")
        for name, each in summary.examples.items()
        if each.num_truncated
    ]


def _newcomers(summary: Summary) -> list[str]:
    reached = summary.cycles[-1].domain
    return [
        f"Without data of its own, '{name}' starts with what '{followed}' has learned: its DM reaches "
        f"{percent(accuracy(reached, name))}, that of '{followed}' {percent(accuracy(reached, followed))}"
        for name, followed in summary.follows.items()
    ]


def closing_table(summary: Summary) -> Table:
    """Return the table that ends a run in the terminal."""
    # Text, not str: rich would read a domain called "[red]" as markup.
    caption = Text("\n".join(closing_captions(summary)))
    table = Table(title=Text(TITLE), caption=caption, caption_justify="left")
    table.add_column(HEADINGS[0], justify="left", overflow="fold")
    for heading in HEADINGS[1:]:
        table.add_column(heading, justify="right")
    for row in closing_rows(summary):
        table.add_row(*(Text(cell) for cell in row.cells()))
    return table


def accuracy(scores: dict[str, Score], domain: str) -> float | None:
    """Return the accuracy of ``domain``, or ``None`` if it was not measured."""
    score = scores.get(domain)
    return None if score is None else score.accuracy


def percent(share: float | None) -> str:
    """Format ``0.123`` as ``12.3 %``."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def human_bytes(size_bytes: float) -> str:
    """Format a number of bytes with a binary unit: ``1536`` as ``1.5 KiB``."""
    unit = bytes_unit(size_bytes)
    value = size_bytes / 1024 ** _UNITS.index(unit)
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def bytes_unit(size_bytes: float) -> str:
    """Return the largest binary unit that ``size_bytes`` still fills once, after rounding to one decimal."""
    power = 0
    while size_bytes / 1024**power >= 1023.95 and power < len(_UNITS) - 1:
        power += 1
    return _UNITS[power]


def unit_bytes(unit: str) -> int:
    """Return the bytes of one ``unit`` of ``bytes_unit``."""
    return int(1024 ** _UNITS.index(unit))


def human_seconds(seconds: float) -> str:
    """Format a duration: ``75.2`` as ``1 min 15 s``, short ones with a decimal."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _gain(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return MISSING
    if before is None or after is None:
        return f"{percent(before)} → {percent(after)}"
    return f"{percent(before)} → {percent(after)} ({100 * (after - before):+.1f})"


def _both_ways(traffic: list[Traffic]) -> str:
    up, down = sum(one.up for one in traffic), sum(one.down for one in traffic)
    return f"{human_bytes(up)} up, {human_bytes(down)} down"
