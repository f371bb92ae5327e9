"""A verdict for people: the sentence, the ledger as a table with bars, the causes with their chains, and what is missing.

The same text for a verdict from the stores (`kprobe why`), from a capture (`kprobe analyze`) and of the demo. Pure: takes the
document of interface section 3 and returns lines. Colour is the caller's choice, `wants_colour` is the rule: only on a
terminal, never where NO_COLOR is set.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TextIO

__all__ = ["aligned", "bar", "format_ns", "task_name", "verdict_lines", "verdict_text", "wants_colour"]

Verdict = Mapping[str, Any]
Task = Mapping[str, Any]

_BAR_CELLS: Final = 24
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_LEDGER_ROWS_MAX: Final = 20
_EVIDENCE_MAX: Final = 3
_CULPRITS_MAX: Final = 4
_UNITS: Final = ((10**9, "s"), (10**6, "ms"), (10**3, "us"))
_STYLES: Final[Mapping[str, str]] = {
    "late": "31;1",
    "failed": "31;1",
    "ok": "32;1",
    "unjudged": "33",
    "run": "32",
    "irq": "35",
    "runq": "31",
    "wait": "33",
    "unknown": "36",
    "lost": "36",
    "head": "1",
    "dim": "2",
}


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour what goes to `stream`."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def format_ns(ns: int) -> str:
    """A duration with its unit, one decimal: `790.1 ms`; below a microsecond in ns."""
    for size, unit in _UNITS:
        if abs(ns) >= size:
            return f"{ns / size:.1f} {unit}"
    return f"{ns} ns"


def task_name(task: Task | None) -> str:
    """How a thread is named in text: `batch-recon (pid 4721)`, a thread of a process with its tid too."""
    if task is None:
        return ""
    if task["tgid"] == task["tid"]:
        return f"{task['comm']} (pid {task['tgid']})"
    return f"{task['comm']} (pid {task['tgid']}, tid {task['tid']})"


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A bar of `cells` characters for a share between 0 and 1, in steps of an eighth; more than nothing always shows."""
    eighths = round(max(0.0, min(share, 1.0)) * cells * 8)
    if share > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(cells)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as lines with columns under one another; the columns in `right` are aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def verdict_text(verdict: Verdict, *, colour: bool = False) -> str:
    """All lines as one text, ending with a newline."""
    return "\n".join(verdict_lines(verdict, colour=colour)) + "\n"


def verdict_lines(verdict: Verdict, *, colour: bool = False) -> Iterator[str]:
    """The lines of one verdict."""
    paint = _painter(colour)
    yield paint("head", verdict["sentence"])
    yield ""
    yield from _head(verdict, paint)
    yield ""
    yield from _ledger(verdict, paint)
    for cause in verdict["causes"]:
        yield ""
        yield from _cause(cause, paint)
    yield from _ruled_out(verdict, paint)
    yield ""
    yield from _completeness(verdict, paint)
    yield paint("dim", f"{verdict['algorithm']}  {verdict['hash']}")


def _painter(colour: bool) -> Any:
    def paint(style: str, text: str) -> str:
        code = _STYLES.get(style)
        return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text

    return paint


def _head(verdict: Verdict, paint: Any) -> Iterator[str]:
    deadline = verdict["deadline_ns"]
    limit = f"deadline {format_ns(deadline)}" if deadline is not None else "no deadline"
    status = paint(verdict["status"], verdict["status"])
    yield f"{verdict['type']} {verdict['operation_id']}: {status}, {format_ns(verdict['duration_ns'])}, {limit}"
    yield paint("dim", f"{task_name(verdict['thread'])} on {verdict['node']}, from {verdict['start_mono_ns']} ns (monotonic)")


def _ledger(verdict: Verdict, paint: Any) -> Iterator[str]:
    """Where the time went: slices of one label and culprit together, the longest first; the sum is the duration."""
    sums: dict[tuple[str, str], int] = {}
    for piece in verdict["ledger"]:
        key = (piece["label"], task_name(piece["culprit"]))
        sums[key] = sums.get(key, 0) + piece["ns"]
    ranked = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    total = verdict["duration_ns"] or 1
    shown, hidden = ranked[:_LEDGER_ROWS_MAX], ranked[_LEDGER_ROWS_MAX:]
    rows = [(label, format_ns(ns), f"{100 * ns / total:.1f} %", bar(ns / total), who) for (label, who), ns in shown]
    if hidden:
        ns = sum(ns for _, ns in hidden)
        rows.append((f"{len(hidden)} more", format_ns(ns), f"{100 * ns / total:.1f} %", bar(ns / total), ""))
    rows.append(("sum", format_ns(sum(sums.values())), "", "", f"{len(verdict['ledger'])} slices"))
    lines = aligned(rows, right=(1, 2))
    styles = [label.split(".")[0] for (label, _), _ in shown] + ["dim"] * (len(rows) - len(shown))
    for line, style in zip(lines, styles, strict=True):
        yield paint(style, line)


def _cause(cause: Mapping[str, Any], paint: Any) -> Iterator[str]:
    low, high = cause["without_it_ns"]
    without = format_ns(low) if low == high else f"{format_ns(low)} to {format_ns(high)}"
    who = f" by {task_name(cause['culprit'])}" if cause["culprit"] else ""
    head = f"cause {cause['rank']}: {cause['kind']}{who}"
    yield paint("head", head) + f", {format_ns(cause['ns'])}, {cause['confidence']}; without it {without}"
    others = [each for each in cause.get("culprits") or [] if each["task"] != cause["culprit"]]
    for each in others[:_CULPRITS_MAX]:
        yield f"  also {task_name(each['task'])}, {format_ns(each['ns'])}"
    if rest := others[_CULPRITS_MAX:]:
        yield f"  and {len(rest)} more, {format_ns(sum(each['ns'] for each in rest))} together"
    for step in cause["chain"]:
        ends = f"{task_name(step['from']) or '?'} -> {task_name(step['to']) or '?'}"
        yield f"  {step['edge']}: {ends}, {format_ns(step['ns'])}"
        yield from (paint("dim", f"    evidence {line}") for line in _evidence(step["evidence"]))


def _evidence(ids: Sequence[str]) -> Iterator[str]:
    yield from ids[:_EVIDENCE_MAX]
    if len(ids) > _EVIDENCE_MAX:
        yield f"and {len(ids) - _EVIDENCE_MAX} more events"


def _ruled_out(verdict: Verdict, paint: Any) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for each in verdict["ruled_out"]:
        reasons.setdefault(each["why"], []).append(each["kind"])
    if reasons:
        yield ""
    for why, kinds in reasons.items():
        yield paint("dim", f"ruled out ({why}): {', '.join(kinds)}")


def _completeness(verdict: Verdict, paint: Any) -> Iterator[str]:
    found = verdict["completeness"]
    if found["complete"]:
        yield f"evidence complete: lost events {found['lost_events']}, unknown {format_ns(found['unknown_ns'])}"
        return
    missing = f", missing: {', '.join(found['missing'])}" if found["missing"] else ""
    text = f"lost events {found['lost_events']}, unknown {format_ns(found['unknown_ns'])}, lost {format_ns(found['lost_ns'])}"
    yield paint("late", "evidence incomplete: ") + text + missing
