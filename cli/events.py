"""`kprobe events`: the events of a capture in the order of time, as text or one JSON document a line.

Exit status: 0, or 3 when the capture says that events are missing in the window (told on stderr), 2 for bad input.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from events.errors import InputError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_EPILOG = """\b
Examples:
  kprobe events run.kcap | head -50
  kprobe events run.kcap --tid 4821 --kind sched_switch --kind sched_waking
  kprobe events run.kcap --from 81234000000000 --to 81235000000000 --jsonl | jq -c '[.time_mono_ns, .kind, .fields]'

Text columns: monotonic ns, CPU, thread id, name, kind, fields. Kinds and fields carry the kernel's tracepoint names.
"""


@app.command(epilog=_EPILOG)
def events(
    file: Annotated[Path, typer.Argument(metavar="FILE.kcap", help="Capture to list.")],
    tid: Annotated[
        list[int] | None, typer.Option("--tid", metavar="N", help="Events of this thread, or that name it; may be repeated.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="K", help="Events of this kind or family (sched_switch, irq); may be repeated."),
    ] = None,
    from_mono_ns: Annotated[int | None, typer.Option("--from", metavar="NS", help="From this monotonic time on.")] = None,
    to_mono_ns: Annotated[int | None, typer.Option("--to", metavar="NS", help="Before this monotonic time.")] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON document a line.")] = False,
) -> None:
    """List the events of a capture, decoded, in the order of time."""
    from probe.listing import Choice

    choice = Choice(frozenset(tid or ()), _kinds(kind or []), from_mono_ns, to_mono_ns)
    complete = _list(file, choice, jsonl)
    raise typer.Exit(0 if complete else 3)


def _kinds(names: list[str]) -> frozenset[int]:
    from events.kinds import BY_NAME, FAMILIES, KINDS

    numbers: set[int] = set()
    for name in names:
        if name in BY_NAME:
            numbers.add(BY_NAME[name].number)
        elif name in FAMILIES:
            numbers.update(k.number for k in KINDS if k.family == name)
        else:
            import difflib

            near = difflib.get_close_matches(name, [*BY_NAME, *FAMILIES], 3)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; families are {', '.join(FAMILIES)}"
            raise InputError(f"unknown kind {name!r}{hint}")
    return frozenset(numbers)


def _list(file: Path, choice: Any, jsonl: bool) -> bool:
    import orjson

    from probe.capture import CaptureReader
    from probe.listing import in_order, rows_of
    from probe.tasks import TaskTable

    tasks = TaskTable()
    told = _Losses()
    with CaptureReader(file) as reader:
        frames = reader.frames(choice.from_mono_ns, choice.to_mono_ns)
        for frame, columns in in_order(told.watch(frames), choice, tasks):
            rows = rows_of(frame, columns, tasks)
            if jsonl:
                sys.stdout.buffer.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
            else:
                sys.stdout.write("".join(map(_line, rows)))
        sys.stdout.flush()
        for damage in reader.damage:
            print(f"kprobe: {file}: {damage}", file=sys.stderr)
        if not reader.closed:
            print(
                f"kprobe: {file} was not closed by its recorder: what came after its last whole frame is missing",
                file=sys.stderr,
            )
        complete = reader.closed and not reader.damage
    if told.count or told.rows:
        print(f"kprobe: {told.count} events are missing here ({told.rows} losses; `kprobe info` shows them)", file=sys.stderr)
        complete = False
    return complete


class _Losses:
    """Counts the losses that pass by."""

    def __init__(self) -> None:
        self.rows = self.count = 0

    def watch(self, frames: Any) -> Any:
        for frame in frames:
            if frame.kind == "losses/1":
                self.rows += frame.batch.num_rows
                self.count += sum(n or 0 for n in frame.batch.column("count").to_pylist())
            yield frame


def _line(row: dict[str, Any]) -> str:
    fields = " ".join(f"{name}={value}" for name, value in row["fields"].items())
    return (
        f"{row['time_mono_ns']} {row['cpu']:>3} {row['tid']:>7} {row['comm'] or '?':<15} {row['kind']:<22} {fields}".rstrip()
        + "\n"
    )
