"""`kprobe flow`: run the dataflow, as N processes that each own partitions of the raw topic.

Ends with 0 after SIGTERM or Ctrl-C (drained, snapshot taken), and with `--stop-at-end` when the topics have been read. A
process that dies is named and started again where it stopped; one that keeps dying ends the command with status 1.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer()


@app.command()
def flow(
    config: Annotated[Path | None, typer.Option(help="Settings file; default KPROBE_CONFIG, then ./kprobe.yaml.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Processes; each owns every N-th partition of the raw topic. Default flow.processes."),
    ] = None,
    stop_at_end: Annotated[bool, typer.Option("--stop-at-end", help="End when the topics have been read.")] = False,
    restart: Annotated[bool, typer.Option(help="Start a process that died again.")] = True,
) -> None:
    """Run the dataflow: Kafka to verdicts, in ClickHouse, Neo4j and the output topics.

    Reads kernel events and operations from their topics, judges each operation when everything before its end has arrived,
    and writes rows, verdicts and causal edges. Positions are kept in flow.recovery_dir: killed and started again, it goes on
    where it was, and no effect is doubled.

    Metrics and health: flow.listen (process N: that port + N), /metrics and /healthz.
    """
    from events.settings import load
    from flows.supervisor import Supervisor

    settings = load(config).flow
    changes = {"processes": processes or settings.processes, "stop_at_end": stop_at_end or settings.stop_at_end}
    settings = settings.model_copy(update=changes)
    environment = dict(os.environ) | ({"KPROBE_CONFIG": str(config)} if config else {})
    if settings.stop_at_end:
        environment["KPROBE_FLOW__STOP_AT_END"] = "true"
    Supervisor(settings, environment, lambda line: print(f"kprobe: {line}", file=sys.stderr), restart=restart).run()
