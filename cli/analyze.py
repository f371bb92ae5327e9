"""`kprobe analyze`: judge the operations of a capture, offline, with the same folds as the flow.

`--operations` names what to judge; `--tid` judges all recorded time of a thread as one operation. Exit status:
0 all verdicts complete; 3 some evidence is incomplete (told on stderr); 2 bad input.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from events.errors import InputError

if TYPE_CHECKING:
    from causality.operations import Operation
    from events.frames import Frame

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_EPILOG = """\b
Examples:
  kprobe analyze run.kcap --operations operations.csv
  kprobe analyze run.kcap --operations operations.csv --jsonl | jq -r .sentence
  kprobe analyze run.kcap --tid 4821                  the thread's whole recorded time as one operation

The operations file has one line an operation:
  operation_id,type,tid,start_mono_ns,end_mono_ns,deadline_ns,outcome
"""


@app.command(epilog=_EPILOG)
def analyze(
    file: Annotated[Path, typer.Argument(metavar="FILE.kcap", help="Capture to judge.")],
    operations: Annotated[
        Path | None, typer.Option("--operations", metavar="FILE.csv", help="The operations to judge.")
    ] = None,
    tid: Annotated[
        list[int] | None, typer.Option("--tid", metavar="N", help="Judge all recorded time of this thread; may be repeated.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="kprobe.yaml", help="Settings of the site.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: a list of verdicts.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="One verdict a line.")] = False,
) -> None:
    """Judge the operations of a capture: one verdict each."""
    from events.settings import load

    load(config)
    if operations is None and not tid:
        raise InputError("nothing to judge: give --operations FILE.csv, or --tid N for all recorded time of a thread")
    wanted = operations_of(operations) if operations is not None else []
    verdicts, damaged = judge_capture(file, wanted, tid or [])
    _print(verdicts, as_json=as_json, jsonl=jsonl)
    incomplete = [v["operation_id"] for v in verdicts if not v["completeness"]["complete"]]
    if incomplete:
        shown = ", ".join(incomplete[:5]) + (f" and {len(incomplete) - 5} more" if len(incomplete) > 5 else "")
        print(f"kprobe: evidence is incomplete for {shown}; see completeness in the verdicts", file=sys.stderr)
    raise typer.Exit(3 if incomplete or damaged else 0)


def operations_of(path: Path) -> "list[Operation]":
    """The operations of a file. Raises InputError that names what is wrong with it."""
    from causality.operations import read_csv

    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"cannot read operations file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"operations file {path} is not UTF-8 text: {error}") from error
    return read_csv(text, str(path))


def judge_capture(file: Path, wanted: "list[Operation]", tids: list[int]) -> tuple[list[dict[str, Any]], bool]:
    """Verdicts of operations on a capture, by (node, end, id), and whether the capture is damaged (told on stderr)."""
    from causality.engine import EngineConfig, NodeEngine
    from probe.capture import CaptureReader

    # Without threads to judge over all recorded time, only what the known operations need is held.
    config = EngineConfig(retention_ns=2**62 if tids else 0, edges=False)
    engines: dict[tuple[str, str], NodeEngine] = {}
    span: dict[tuple[str, str], list[int]] = {}
    verdicts: list[dict[str, Any]] = []
    with CaptureReader(file) as reader:
        for frame in reader.frames():
            key = frame.node, frame.boot_id
            if key not in engines:
                engines[key] = NodeEngine(*key, config)
                engines[key].submit(o for o in wanted if o.node in ("", frame.node))
            engines[key].fold([frame])
            if frame.kind == "events/1" and frame.batch.num_rows:
                times = frame.batch.column("time_mono_ns").to_numpy()
                low, high = span.get(key, [2**63 - 1, 0])
                span[key] = [min(low, int(times.min())), max(high, int(times.max()))]
            verdicts += engines[key].ready()
        damage = [str(d) for d in reader.damage]
    for key in sorted(engines):
        engines[key].finish()
        engines[key].submit(_whole(tids, *span.get(key, [0, 1])))
        verdicts += engines[key].ready()
    for line in damage:
        print(f"kprobe: {file}: {line}", file=sys.stderr)
    return verdicts, bool(damage)


def _whole(tids: list[int], low: int, high: int) -> "list[Operation]":
    from causality.operations import Operation

    return [Operation(f"thread-{t}", "thread", t, low, max(high, low + 1)) for t in tids]


def whole_time(tids: list[int], frames: "list[Frame]") -> "list[Operation]":
    """All recorded time of each of some threads as one operation."""
    times = [f.batch.column("time_mono_ns").to_numpy() for f in frames if f.kind == "events/1" and f.batch.num_rows]
    if not times:
        return []
    return _whole(tids, int(min(t.min() for t in times)), int(max(t.max() for t in times)))


def _print(verdicts: list[dict[str, Any]], *, as_json: bool, jsonl: bool) -> None:
    import orjson

    if as_json:
        print(orjson.dumps(verdicts, option=orjson.OPT_INDENT_2).decode())
    elif jsonl:
        for verdict in verdicts:
            print(orjson.dumps(verdict).decode())
    else:
        from cli.render import verdict_text, wants_colour

        for verdict in verdicts:
            print(verdict_text(verdict, colour=wants_colour(sys.stdout)))
            print()
