"""`kprobe probe`: the agent. Kernel events to Kafka; to a spool on disk while Kafka is away; optionally to a capture as well.

Runs until SIGTERM or Ctrl-C: it then detaches, drains to the last event, sends what it can and keeps the rest in the spool
for the next start. SIGKILL leaves nothing attached in the kernel, and the spool is found by the next start.

Exit status: 0; 3 if evidence is incomplete (events lost, families shed, or the probe detached to stay within its limits); 1 if
it failed.
"""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_EPILOG = """\b
Examples:
  kprobe probe                                        everything, to the Kafka of `kprobe up`
  kprobe probe --config /etc/kprobe.yaml              as the site's settings say
  kprobe probe --watch comm:'pay*' --capture pay.kcap these processes, recorded to a file as well

\b
Settings (section `probe` of kprobe.yaml, or KPROBE_PROBE__NAME):
  watch, ring_bytes_per_cpu, cpu_share_max, memory_max_bytes, spool_dir, spool_max_bytes, spool_drop, spool_fsync, listen
Health and metrics: curl http://127.0.0.1:9464/healthz and /metrics
"""


@app.command(epilog=_EPILOG)
def probe(
    config: Annotated[Path | None, typer.Option(help="Settings file; default: KPROBE_CONFIG, then ./kprobe.yaml.")] = None,
    watch: Annotated[
        list[str] | None,
        typer.Option(metavar="SEL", help="Instead of probe.watch: pid:N, comm:GLOB, cgroup:PATH, container:ID, port:N, all."),
    ] = None,
    capture: Annotated[Path | None, typer.Option(metavar="FILE.kcap", help="Write the same frames to a capture file.")] = None,
    duration: Annotated[float | None, typer.Option(metavar="S", min=0, help="End after S seconds.")] = None,
) -> None:
    """Record kernel events and send them to Kafka (topic kprobe.raw.v1), within the limits of the settings."""
    from events.settings import load

    settings = load(config)
    with ExitStack() as stack:
        agent = _begin(stack, settings, watch or settings.probe.watch, capture)
        summary = agent.run(_until(agent, duration))
    for note in summary.notes:
        print(f"kprobe: {note}", file=sys.stderr)
    for reason in summary.incomplete:
        print(f"kprobe: evidence is incomplete: {reason}", file=sys.stderr)
    kept = next((o.account.pending for o in agent.outputs if o.account.hop == "kafka"), 0)
    rest = f"; {kept} wait in the spool for the next start" if kept else ""
    print(f"kprobe: ended after {summary.events} events{rest}", file=sys.stderr)
    raise typer.Exit(1 if summary.violations else 3 if summary.incomplete else 0)


def _begin(stack: ExitStack, settings: Any, watch: list[str], capture: Path | None) -> Any:
    """Everything up to the first drain; if any of it fails nothing is left attached."""
    import uuid

    from events.identity import read_boot_id, read_node_name
    from probe.agent import Agent
    from probe.capture import CaptureWriter
    from probe.framing import Framer
    from probe.metrics import MetricsServer
    from probe.outputs import CaptureOutput
    from probe.producer import KafkaOutput
    from probe.source import KernelSource
    from probe.watch import Selector
    from stack.local import LocalStack

    node = settings.probe.node or read_node_name()
    selectors = [Selector.parse(text) for text in watch]
    exclude = LocalStack(settings.stack).pids().values() if settings.probe.exclude_servers else ()
    with ExitStack() as undo:
        source = KernelSource(settings.probe, selectors, exclude=list(exclude))
        undo.callback(source.close)
        kafka = KafkaOutput(settings.kafka, settings.probe, node)
        undo.callback(kafka.finish, 0.0)
        source.open()
        outputs: list[Any] = [kafka] if capture is None else [kafka, CaptureOutput(CaptureWriter(capture))]
        framer = Framer(node=node, boot_id=read_boot_id(), recording=uuid.uuid4().hex)
        agent = Agent(source, framer, outputs, settings.probe)
        server = stack.enter_context(MetricsServer(agent, settings.probe.listen))
        undo.pop_all()
    found = f", {kafka.recovered_events} events found in the spool" if kafka.recovered_events else ""
    where = f"to Kafka at {settings.kafka.bootstrap_servers}; http://{server.address}/healthz"
    print(f"kprobe: recording {', '.join(map(str, selectors))} {where}{found}", file=sys.stderr)
    return agent


def _until(agent: Any, duration: float | None) -> Callable[[], bool]:
    stopped: list[int] = []

    def on_signal(number: int, _frame: Any) -> None:
        stopped.append(number)
        agent.wake()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    ends = None if duration is None else time.monotonic() + duration
    return lambda: bool(stopped) or (ends is not None and time.monotonic() >= ends)
