"""`kprobe demo`: everything at once on real kernel events, ending with the sentence.

A settlement service settles payments; during settlement 4821 a batch job takes its CPU. What is printed comes out of the
stores, with the numbers of this very run. Exit status: 0 if the live and the offline verdict agree, 1 if
anything failed, 3 if the evidence is incomplete.
"""

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

__all__ = ["app"]

app = typer.Typer()


@app.command()
def demo(
    healthy: bool = typer.Option(False, "--healthy", help="The same run without the batch job: it says that all was well."),
    keep: bool = typer.Option(False, "--keep", help="Leave the servers, the service, the probe and the flow running."),
    folder: Path = typer.Option(Path(".kprobe/demo"), help="Where logs, the capture and the service's log go."),
    config: Path | None = typer.Option(None, help="Settings (default: kprobe.yaml, or those of `kprobe up`)."),
) -> None:
    """Everything at once on real kernel events, ending with the sentence.

    Starts the servers (unless they run), a settlement service, the probe and the flow; lets a batch job disturb settlement
    4821; prints why it was late, from the stores and from the capture file. Needs root. Leaves nothing running unless --keep.
    """
    from demo.run import Demo, remove_old_runs
    from events.settings import load

    run_folder = folder.resolve() / f"run-{datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  a folder's name, in local time
    outcome = Demo(settings=load(config), folder=run_folder, say=_step, healthy=healthy, keep=keep).run()
    remove_old_runs(folder.resolve())
    _report(outcome)
    if outcome.live["hash"] != outcome.offline["hash"]:
        _step("the live and the offline verdict differ: this is a defect of kprobe; please report it with the folder above")
        raise typer.Exit(1)
    raise typer.Exit(0 if outcome.live["completeness"]["complete"] else 3)


def _step(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _report(outcome: Any) -> None:
    """The sentence, the ledger, the edges, and where to see the same."""
    from causality.graph import edges_of
    from cli.render import render_verdict

    print()
    print(render_verdict(outcome.live, color=sys.stdout.isatty()))
    edges = edges_of(outcome.live)
    print(f"\nCausal edges ({len(edges)}):")
    for edge in edges[:12]:
        span = f"{edge['edge']} {edge['ns'] / 1e6:.3f} ms"
        print(f"  {_name(edge['from'])} --{span}--> {_name(edge['to'])}  [{edge['confidence']}]")
    operation = outcome.live["operation_id"]
    print("\nThe same in Neo4j (Cypher) and ClickHouse (SQL):")
    print(f"  MATCH path = (o:Operation {{id: '{operation}'}})<-[:CAUSED]-{{1,8}}(t) RETURN path LIMIT 50")
    print(f"  SELECT edge, from_comm, to_comm, ns, evidence FROM kprobe.causal_edges FINAL "
          f"WHERE operation_id = '{operation}'")
    print("\nLive and offline:")
    print(f"  kprobe why {operation}                        {outcome.live['hash']}")
    print(f"  kprobe analyze {outcome.capture.name} --operations {outcome.operations.name}   {outcome.offline['hash']}")
    print(f"  everything of this run: {outcome.folder}")


def _name(task: dict[str, Any] | None) -> str:
    return f"{task['comm']} ({task['tid']})" if task else "-"
