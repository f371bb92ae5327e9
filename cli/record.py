"""`kprobe record`: the flight recorder. Kernel events to a capture file, without any server.

With a command its process tree is watched from before its first instruction; stdin, stdout, stderr and the terminal are the
command's own, and so is the exit status (128 + N for signal N). What kprobe has to say goes to stderr. Without a command it
records until Ctrl-C, SIGTERM or the end of `--duration`.

Exit status: the command's own; without one 0, or 3 if evidence is incomplete. 1 and 2 as everywhere (nothing was run then).
"""

import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from events.errors import InputError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_EPILOG = """\b
Examples:
  kprobe record -o run.kcap -- ./settle --batch 7     one program and all its children
  kprobe record -o box.kcap --duration 30             everything on this machine for 30 s
  kprobe record -o pay.kcap --watch comm:'pay*'       all processes of that name, until Ctrl-C

Then: kprobe info run.kcap; kprobe analyze run.kcap --operations operations.csv
"""


_WATCH_HELP = """What to watch, may be repeated: pid:N (with descendants), comm:GLOB, cgroup:PATH, container:ID, port:N, all.
Default: the command's tree; without a command, all."""

_PAYLOAD_HELP = """Also take what the command's system calls read and write, from its first instruction on, so that it can run
again (kprobe replay import). The capture then holds the program's data."""


@app.command(epilog=_EPILOG, context_settings={"allow_interspersed_args": False})
def record(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Capture file (.kcap) to write; an older capture is replaced.")
    ],
    watch: Annotated[list[str] | None, typer.Option("--watch", metavar="SEL", help=_WATCH_HELP)] = None,
    duration: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Stop recording after S seconds; the command runs on.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (section `probe`: ring size, limits).")] = None,
    payload: Annotated[bool, typer.Option("--payload", help=_PAYLOAD_HELP)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary; errors and losses are still told.")] = False,
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- CMD ARG...]", help="Command to run and watch.")] = None,
) -> None:
    """Record kernel events to a capture file: what ran, what waited, and who woke whom.

    On CPUs where a watched task runs or waits, everything needed to name the others is recorded whoever causes it. Needs
    root; `kprobe doctor` says what this kernel can record.
    """
    from events.settings import load

    settings = load(config)
    began = time.monotonic()
    if payload and not command:
        raise InputError("--payload takes the data of a command from its first instruction on: give the command after --")
    agent, writer, child, stop = _begin(settings, output, watch, duration, command or [], payload=payload)
    summary = agent.run(stop)
    status = child.wait() if child is not None else None
    _tell(writer, summary, time.monotonic() - began, quiet)
    if status is None:
        status = 1 if summary.violations else 3 if summary.incomplete else 0
    raise typer.Exit(status)


def _begin(
    settings: Any, output: Path, watch: list[str] | None, duration: float | None, command: list[str], *, payload: bool = False
) -> tuple[Any, ...]:
    """Everything up to the first instruction of the command; if any of it fails nothing was run and nothing is attached."""
    from probe.agent import Agent
    from probe.capture import CaptureWriter
    from probe.child import PausedChild
    from probe.outputs import CaptureOutput
    from probe.source import KernelSource
    from probe.watch import Selector
    from stack.local import LocalStack

    if command and shutil.which(command[0]) is None:
        raise InputError(f"cannot run {command[0]!r}: no such program; give a path, or a name that is in PATH")
    selectors = [Selector.parse(text) for text in watch or ([] if command else settings.probe.watch)]
    with ExitStack() as undo:
        child = PausedChild(command) if command else None
        if child is not None:
            undo.callback(child.abandon)
            selectors.append(Selector.parse(f"pid:{child.pid}"))
        exclude = LocalStack(settings.stack).pids().values() if settings.probe.exclude_servers else ()
        source = KernelSource(settings.probe, selectors, exclude=list(exclude), **(_payload(child) if payload else {}))
        undo.callback(source.close)
        source.open()
        writer = CaptureWriter(output)  # last: an older capture of that name is only replaced by one that begins
        undo.callback(writer.abandon)
        agent = Agent(source, _framer(settings), [CaptureOutput(writer)], settings.probe)
        stop = _until(agent, child, duration)
        if child is not None:
            child.release()
        undo.pop_all()
    return agent, writer, child, stop


def record_payload(output: Path, command: list[str]) -> int:
    """Record a command with its payloads into a capture; returns its exit status. What kprobe has to say goes to stderr."""
    from events.settings import load

    agent, writer, child, stop = _begin(load(None), output, None, None, command, payload=True)
    summary = agent.run(stop)
    status: int = child.wait()
    _tell(writer, summary, 0.0, quiet=True)
    return status


def _payload(child: Any) -> dict[str, Any]:
    """What the source is told for payloads: which calls, and what the command starts with."""
    from probe.payload import PlannedCall
    from replay.passive import capture_plan, start_of

    return {"payload": [PlannedCall(*call) for call in capture_plan()], "notes": {"start": start_of(child.command, child.pid)}}


def _framer(settings: Any) -> Any:
    import uuid

    from events.identity import read_boot_id, read_node_name
    from probe.framing import Framer

    return Framer(node=settings.probe.node or read_node_name(), boot_id=read_boot_id(), recording=uuid.uuid4().hex)


def _until(agent: Any, child: Any, duration: float | None) -> Callable[[], bool]:
    """When to stop; also installs the signal handlers that make it so."""
    stopped: list[int] = []

    def on_signal(number: int, _frame: Any) -> None:
        stopped.append(number)
        agent.wake()

    def pass_on(number: int, _frame: Any) -> None:
        child.send_signal(number)

    if child is None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, on_signal)
    else:
        # The terminal sends these two to the command as well, and it is the command's to decide what they mean.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGQUIT, lambda *_: None)
        signal.signal(signal.SIGTERM, pass_on)
        signal.signal(signal.SIGHUP, pass_on)
        signal.signal(signal.SIGCHLD, lambda *_: agent.wake())
    ends = None if duration is None else time.monotonic() + duration

    def stop() -> bool:
        ended = child is not None and child.poll() is not None
        return ended or bool(stopped) or (ends is not None and time.monotonic() >= ends)

    return stop


def _tell(writer: Any, summary: Any, seconds: float, quiet: bool) -> None:
    if not quiet:
        size = f"{writer.size_bytes / 1e6:.1f} MB"
        print(f"kprobe: {writer.path}: {summary.events} events in {seconds:.1f} s, {size}", file=sys.stderr)
    for note in summary.notes:
        print(f"kprobe: {note}", file=sys.stderr)
    for reason in summary.incomplete:
        print(f"kprobe: evidence is incomplete: {reason}", file=sys.stderr)
