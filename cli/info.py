"""`kprobe info`: what a capture holds, and what it does not.

Exit status: 0, or 3 when events are known to be missing (the output says which, where and when), 2 for a file that is
no capture.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_EPILOG = """A capture that was cut off (kill -9, full disk) is read up to its last whole frame.

\b
Examples:
  kprobe info run.kcap
  kprobe info run.kcap --json | jq .losses
"""
_TASKS_SHOWN = 15
_KINDS_SHOWN = 20


@app.command(epilog=_EPILOG)
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE.kcap", help="Capture to look into.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON document, with every task and kind.")] = False,
) -> None:
    """Show kinds and counts, clocks, losses per CPU and time, and the tasks of a capture; checks every checksum on the way."""
    from probe.capture import CaptureReader
    from probe.summary import summarise

    with CaptureReader(file) as reader:
        document = summarise(reader)
    if json:
        import orjson

        print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
    else:
        for line in _text(document):
            print(line)
    raise typer.Exit(0 if document["complete"] else 3)


def _text(document: dict[str, Any]) -> list[str]:
    return [*_head(document), *_losses(document), *_kinds(document), *_tasks(document)]


def _head(document: dict[str, Any]) -> list[str]:
    size, events, clocks = document["size_bytes"], document["events"], document["clocks"]
    per_event = f", {size / events:.1f} bytes an event" if events else ""
    lines = [f"{document['file']}: {events} events in {sum(document['frames'].values())} frames, {size} bytes{per_event}"]
    if not clocks:
        return [*lines, "no frames"]
    recording = document["recording"]
    session = recording["session"]
    lines.append(f"node {recording['node']}, boot {recording['boot_id']}, kernel {_release(session)}")
    opened = datetime.fromtimestamp(clocks["opened"]["real_ns"] / 1e9, UTC)
    lines.append(f"recorded from {opened:%Y-%m-%d %H:%M:%S} UTC for {_seconds(clocks['opened'], clocks['closed'])}")
    if events:
        lines.append(f"events from {clocks['first_event_mono_ns']} to {clocks['last_event_mono_ns']} ns (monotonic)")
    missing = [name for name, state in session.get("families", {}).items() if not state.get("attached")]
    if missing:
        lines.append(f"families not recorded: {', '.join(missing)}")
    return lines


def _release(session: dict[str, Any]) -> str:
    kernel = session.get("kernel", "unknown")
    return str(kernel.get("release", "unknown") if isinstance(kernel, dict) else kernel)


def _seconds(opened: dict[str, int], closed: dict[str, int]) -> str:
    return f"{(closed['mono_ns'] - opened['mono_ns']) / 1e9:.3f} s"


def _losses(document: dict[str, Any]) -> list[str]:
    lines = []
    if not document["closed"]:
        until = document["clocks"].get("watermark_mono_ns", 0)
        lines.append(f"NOT CLOSED: still being written, or its recorder was killed; nothing is known after {until} ns")
    lines += [
        f"DAMAGED: bytes {d['offset']}..{d['offset'] + d['size_bytes']}: {d['reason']}; "
        f"{'an unknown number of' if d['events'] is None else d['events']} events lost"
        for d in document["damage"]
    ]
    if not document["losses"]:
        return [*lines, "lost events: 0"]
    hidden = document["hidden_switches"]
    lines += [
        f"lost events: {document['lost_events']}" + (f"; switches of tasks that the kernel hides: {hidden}" if hidden else ""),
        f"  {'cpu':>4}  {'reason':<12} {'count':>10}  from .. to (monotonic ns)",
    ]
    for row in document["losses"]:
        cpu = "any" if row["cpu"] is None else row["cpu"]
        reason = f"{row['reason']} {row['family'] or ''}".strip()
        count = row["count"] or "unknown"
        until = "the end" if row["to_mono_ns"] is None else row["to_mono_ns"]
        lines.append(f"  {cpu:>4}  {reason:<12} {count:>10}  {row['from_mono_ns']} .. {until}")
    return lines


def _kinds(document: dict[str, Any]) -> list[str]:
    kinds = list(document["kinds"].items())
    lines = ["", f"  {'events':>10}  kind"]
    lines += [f"  {n:>10}  {name}" for name, n in kinds[:_KINDS_SHOWN]]
    more = sum(n for _, n in kinds[_KINDS_SHOWN:])
    return [*lines, f"  {more:>10}  {len(kinds) - _KINDS_SHOWN} other kinds (--json lists all)"] if more else lines


def _tasks(document: dict[str, Any]) -> list[str]:
    tasks = document["tasks"]
    lines = ["", f"  {'events':>10}  {'tid':>8} {'tgid':>8}  task ({len(tasks)} known)"]
    for task in tasks[:_TASKS_SHOWN]:
        where = task["container"] or task["cgroup"] or ""
        tgid = "?" if task["tgid"] is None else task["tgid"]
        lines.append(f"  {task['events']:>10}  {task['tid']:>8} {tgid:>8}  {task['comm'] or '?'}  {where}".rstrip())
    return lines
