"""`kprobe replay`: record a program so that it can run again; replay it; prove a fix against it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Recording = Annotated[Path, typer.Argument(metavar="DIR", help="A recording made by `kprobe replay record`.")]


@app.callback()
def _replay() -> None:
    """Replay an incident; prove a fix against it."""


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def record(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="A new folder for the recording.")],
    command: Annotated[list[str], typer.Argument(metavar="-- CMD ARG...")],
    passive: Annotated[
        bool, typer.Option("--passive", help="With BPF, without touching the program; needs root. Level F2 at most.")
    ] = False,
) -> None:
    """Record a program and all that it starts, so that it can run again.

    The program's input and output are passed through; its exit status is returned, 128 + N for signal N.
    """
    if passive:
        from cli.passive import record_passive

        sys.exit(record_passive(command, output))
    from replay.recorder import record as run

    sys.exit(run(command, output))


@app.command("import")
def import_(
    capture: Annotated[Path, typer.Argument(metavar="FILE.kcap", help="A capture made by `kprobe record --payload -- CMD`.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="A new folder for the recording.")],
) -> None:
    """Make a recording that can run again from a capture with payloads.

    Exit status: 0; 3 when the recording cannot be replayed as a program, with the reasons on stderr.
    """
    from cli.passive import import_capture

    sys.exit(import_capture(capture, output))


@app.command()
def run(
    recording: Annotated[
        Path, typer.Argument(metavar="DIR|FILE.kcap", help="A recording of a program, or a capture of kernel events.")
    ],
    scale: Annotated[float, typer.Option(help="Pace: 1 takes as long as the recording, 0 does not wait at all.")] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the program's output.")] = False,
    operations: Annotated[
        Path | None, typer.Option("--operations", metavar="FILE.csv", help="FILE.kcap: the operations to judge.")
    ] = None,
    tid: Annotated[
        list[int] | None, typer.Option("--tid", metavar="N", help="FILE.kcap: all recorded time of a thread as one operation.")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option("--rule", metavar="RULE", help="FILE.kcap: what if; 'task=batch -> remove'.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="FILE.kcap: engines that must agree.")] = 2,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="OUT.kcap", help="FILE.kcap: keep a copy with operations and hashes in it.")
    ] = None,
) -> None:
    """Run a recording again, and say where it leaves the recording.

    A capture (FILE.kcap) is folded again: the same verdicts, bit for bit. Exit status: the program's own when the run is
    identical, 0 for a capture; 3 when it left the recording.
    """
    if recording.is_file():
        from cli.f0 import run_capture

        sys.exit(
            run_capture(
                recording, operations=operations, tids=tid or [], rules=rule or [], workers=workers, keep=keep, as_json=json
            )
        )
    from replay import report

    sys.exit(report.run(recording, scale=scale, as_json=json))


@app.command()
def verify(
    recording: Recording,
    program: Annotated[Path, typer.Option(help="The patched program: a binary or a script with a #! line.")],
    replays: Annotated[int, typer.Option(min=1, help="How often the control run must show the failure.")] = 3,
    failure: Annotated[str, typer.Option(metavar="EXPR", help="Over exit_status, stdout and stderr.")] = "exit_status != 0",
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Does a patched program cure the recorded failure? fixed, not_fixed or cannot_tell, with reasons.

    Exit status: 0 fixed, 1 not fixed, 3 cannot tell.
    """
    import json as encoder

    from replay.verify import verify as judge

    answer = judge(recording, program, replays=replays, failure=failure)
    if json:
        print(encoder.dumps(answer))
    else:
        print(answer["verdict"])
        for reason in answer["reasons"]:
            print(f"  {reason}")
    sys.exit({"fixed": 0, "not_fixed": 1}.get(answer["verdict"], 3))
