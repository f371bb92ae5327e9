"""`kprobe import`: another tool's trace as a capture, so that it can be listed and judged like one of our own.

The report goes to stderr (with `--json` to stdout). Exit status 3 if the trace says that events were lost, or lines had to be
left out: the capture then holds less than happened.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from probe.neutral import Report

app = typer.Typer()


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="The trace; - for standard input.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The capture to write (.kcap).")],
    format_name: Annotated[str, typer.Option("--format", help="jsonl (neutral events) or ftrace-text.")],
    node: Annotated[str, typer.Option(help="Name of the machine, where the trace does not give one.")] = "imported",
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON document on stdout.")] = False,
) -> None:
    """Turn another tool's trace into a capture.

    jsonl is one object a line: {"time_ns":, "cpu":, "kind": "sched_switch", "node": optional, FIELDS} with the field names of
    the kernel's tracepoint formats. ftrace-text is what tracefs' trace and trace_pipe, or `trace-cmd report`, print.
    """
    import orjson

    from probe.capture import CaptureWriter
    from probe.importers import import_trace

    frames, report = import_trace(file, format_name, node)
    with CaptureWriter(output) as writer:
        for frame in frames:
            writer.write(frame)
    if as_json:
        print(orjson.dumps(report.to_json()).decode())
    else:
        _tell(report, output)
    if report.skipped or report.losses:
        raise typer.Exit(3)


def _tell(report: "Report", output: Path) -> None:
    lines = [f"{output}: {report.events} events of {', '.join(report.nodes)}"]
    lines += [f"  {count} of unknown kind {kind}: left out" for kind, count in sorted(report.unknown_kinds.items())]
    lines += [f"  {count} lines left out: {reason}" for reason, count in sorted(report.skipped.items())]
    lines += [f"  {message}" for message in report.messages]
    lines += [f"  {count} {note}" for note, count in sorted(report.notes.items())]
    if report.losses:
        count = f"{report.lost_events} events" if report.lost_events else "an unknown number of events"
        lines.append(f"  the trace lost {count} in {report.losses} places")
    print("\n".join(lines), file=sys.stderr)
