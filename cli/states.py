"""`kprobe states`: what every thread of a capture did, from the first event that proves it to the end.

One row a state: running, runnable, blocked, or unknown where evidence is missing. `waker_tid` names who ended a blocked
state and so began the runnable one; it is null where an interrupt did (`context` says which) or where the trace does not
tell. A state that was still going on at the end of the capture ends there and is marked `open`. Of inconsistent traces each
event counts for what it says: a thread switched out twice was blocked from the first time on.

Exit status 3 if events are missing; what only they could prove is `unknown`.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from causality.timeline import Interval, Timeline

app = typer.Typer()


@app.command()
def states(
    file: Annotated[Path, typer.Argument(help="The capture (.kcap).")],
    tid: Annotated[int | None, typer.Option(help="Only this thread.")] = None,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON object a line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """List the thread states of a capture: running, runnable, blocked, and who woke whom."""
    import orjson

    lost = False
    rows: list[dict[str, Any]] = []
    write = sys.stdout.buffer.write
    for timeline, last_ns in _timelines(file):
        lost = lost or bool(timeline.losses(timeline.lo_mono_ns, timeline.hi_mono_ns + 1))
        for row in _rows(timeline, last_ns, tid):
            if as_jsonl:
                write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            elif as_json:
                rows.append(row)
            else:
                write(_line(row).encode())
    if as_json:
        write(orjson.dumps({"schema": "kprobe.states/1", "states": rows}, option=orjson.OPT_APPEND_NEWLINE))
    sys.stdout.flush()
    if lost:
        print(f"kprobe: events of {file} are missing; what only they could prove is unknown", file=sys.stderr)
        raise typer.Exit(3)


def _timelines(path: Path) -> Iterator[tuple["Timeline", int]]:
    """One timeline a recording in the file, and the time of its last event, which is where states that go on end."""
    from causality.log import EventLog
    from causality.tasks import TaskTable
    from causality.timeline import Loss, Timeline
    from events.frames import Frame
    from probe.capture import CaptureReader

    recordings: dict[tuple[str, str], list[Frame]] = {}
    with CaptureReader(path) as reader:
        for frame in reader.frames():
            recordings.setdefault((frame.node, frame.boot_id), []).append(frame)
    for (node, boot_id), frames in recordings.items():
        log, tasks, losses = EventLog(), TaskTable(), []
        session: dict[str, Any] = {}
        for frame in frames:
            if frame.kind == "events/1":
                log.add(frame.events())
            elif frame.kind == "tasks/1":
                tasks.fold(frame.batch)
            elif frame.kind == "session/1":
                session = session or dict(frame.body)
            else:
                rows = frame.batch.to_pylist()
                losses += [
                    Loss(r["from_mono_ns"], r["to_mono_ns"], r["cpu"], r["reason"], r["family"] or "", r["count"]) for r in rows
                ]
        log.seal(1 << 62)
        log.settle()
        if not log.segments:
            continue
        first, last = log.segments[0].first_mono_ns, log.segments[-1].last_mono_ns
        # The probe saw everything from its start on; of another tool's trace nobody knows.
        proven = None if session.get("imported") else session.get("started_mono_ns")
        yield (
            Timeline(
                log.segments, tasks, losses, lo_mono_ns=first, hi_mono_ns=last + 1, node=node, boot_id=boot_id,
                session=session, proven_mono_ns=proven,
            ),
            last,
        )  # fmt: skip


def _rows(timeline: "Timeline", last_ns: int, tid: int | None) -> Iterator[dict[str, Any]]:
    for one in [tid] if tid is not None else timeline.known_tids():
        if one == 0:
            continue  # the idle task is on every CPU that nobody wants
        for key in timeline.lives(one):
            yield from _rows_of(timeline, key, last_ns)


def _rows_of(timeline: "Timeline", key: tuple[int, int], last_ns: int) -> Iterator[dict[str, Any]]:
    task = timeline.task(*key)
    head = {"tid": key[0], "tgid": task.tgid, "start_boot_ns": key[1], "comm": task.comm}
    intervals = timeline.states(key, timeline.lo_mono_ns, timeline.hi_mono_ns)
    while intervals and not _says_something(intervals[-1]):
        intervals.pop()  # after its end
    from causality.log import FORK

    calls = timeline.records_syscalls(key)
    proven = False
    for interval in _fork_joined(intervals):
        # Before its first proof a thread has no state.
        proven = proven or _says_something(interval)
        if not proven:
            continue
        start, end = interval.start_mono_ns, min(interval.end_mono_ns, last_ns)
        if start < end or interval.open:
            row = _row(timeline, interval, head, _state(interval), (start, end))
            if interval.state_name == "unknown" != row["state"] and interval.role != FORK:
                row["contradicted"] = True
            yield row | {"label": _label(timeline, interval, row["state"], key if calls else None)}


def _says_something(interval: "Interval") -> bool:
    return bool(interval.evidence) or interval.inferred or interval.lost


def _fork_joined(intervals: Sequence["Interval"]) -> Iterator["Interval"]:
    """A new thread is runnable from its fork on: what lies between fork and first enqueue is no state of its own."""
    from dataclasses import replace

    from causality.log import FORK

    forked = None
    for interval in intervals:
        if interval.role == FORK:
            forked = interval
            continue
        if forked is not None and interval.state_name == "runnable":
            interval = replace(interval, start_mono_ns=forked.start_mono_ns)
        elif forked is not None:
            yield forked
        forked = None
        yield interval
    if forked is not None:
        yield forked


def _state(interval: "Interval") -> str:
    """What the event that begins the interval says. The engine calls a state unknown also where the *next* event contradicts
    it (switched in without a wake-up): when it ended is unknown then, what it was is not."""
    from causality.log import FORK, IN, NEW, OUT, WAKEUP, WAKING

    if interval.role == FORK:
        return "runnable"
    if interval.state_name != "unknown" or not interval.evidence:
        return interval.state_name
    if interval.role == OUT:
        return "blocked" if interval.prev_state and interval.prev_state != 0x100 else "runnable"
    if interval.role in (WAKING, WAKEUP, NEW):
        return "runnable"
    return "running" if interval.role == IN else "unknown"


def _row(
    timeline: "Timeline", interval: "Interval", head: dict[str, Any], state: str, span: tuple[int, int]
) -> dict[str, Any]:
    from causality.log import FORK
    from events.records import UNKNOWN_CPU, UNKNOWN_TID

    wake = interval.wake if state in ("runnable", "blocked") else None
    waker = None if wake is None or wake.frames or wake.waker[0] == UNKNOWN_TID else wake.waker[0]
    if interval.role == FORK and wake is None:
        waker = timeline.task(head["tid"], head["start_boot_ns"]).parent_tid or None
    row = {**head, "start_mono_ns": span[0], "end_mono_ns": span[1], "state": state, "cpu": None, "waker_tid": waker}
    if state in ("running", "runnable") and 0 <= interval.cpu < UNKNOWN_CPU:
        row["cpu"] = interval.cpu
    row["label"] = None
    if wake is not None and wake.frames:
        row["context"] = wake.frames[-1]
    if interval.open:
        row["open"] = True
    return row | {"node": timeline.node}


def _label(timeline: "Timeline", interval: "Interval", state: str, key: tuple[int, int] | None) -> str | None:
    """The ledger label, where the state alone decides it; running time needs the whole ledger (`kprobe analyze`).

    `key` is None for a thread none of whose calls were recorded: looking for them before every wait would take for ever.
    """
    if state == "blocked":
        from causality.walk import wait_label

        return wait_label(timeline.syscall_at(key, interval.start_mono_ns) if key is not None else None)
    if state == "runnable":
        return "runq.quota" if interval.throttled else "runq"
    return "unknown" if state == "unknown" else None


def _line(row: dict[str, Any]) -> str:
    where = "" if row["cpu"] is None else f"cpu {row['cpu']}"
    by = row.get("context") or ("" if row["waker_tid"] is None else f"woken by {row['waker_tid']}")
    ns = row["end_mono_ns"] - row["start_mono_ns"]
    cells: Iterable[str] = (f"{row['start_mono_ns']}", f"{ns:>12}", f"{row['state']:<9}", f"{where:<7}", by, row["label"] or "")
    return f"{row['comm']:<16} {row['tid']:>8} " + " ".join(cells).rstrip() + "\n"
