"""`kprobe demo`: everything at once on real kernel events, ending with the sentence.

A settlement service settles payments; during settlement 4821 a batch job takes its CPU. What is printed comes out of the
stores, with the numbers of this very run. Exit status: 0 if the live and the offline verdict agree, 1 if
anything failed, 3 if the evidence is incomplete.
"""

import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import typer

__all__ = ["app"]

app = typer.Typer()

_EDGES_SHOWN: Final = 10


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
    """The sentence, the ledger, the edges, the same from both stores, and the two hashes."""
    from causality.graph import edges_of
    from cli.render import aligned, format_ns, task_name, verdict_text, wants_colour

    operation = outcome.live["operation_id"]
    print()
    print(verdict_text(outcome.live, colour=wants_colour(sys.stdout)), end="")
    edges = edges_of(outcome.live)
    print(f"\nCausal edges ({len(edges)}, the longest first):")
    longest = sorted(edges, key=lambda e: -e["ns"])[:_EDGES_SHOWN]
    table = [
        [task_name(e["from"]), f"--{e['edge']}-->", task_name(e["to"]), format_ns(e["ns"]), e["confidence"]] for e in longest
    ]
    print("\n".join(f"  {line}" for line in aligned(table, right=(3,))))
    print("\nThe same in Neo4j (Cypher) and in ClickHouse (SQL), as they answer now:")
    for query, rows in outcome.queries:
        _show(query, rows)
    print("\nLive from the stores, and offline from the capture recorded alongside:")
    analyze = f"kprobe analyze {outcome.capture.name} --operations {outcome.operations.name}"
    print(f"  {f'kprobe why {operation}':<{len(analyze)}}  {outcome.live['hash']}")
    print(f"  {analyze}  {outcome.offline['hash']}")
    print(f"\nEverything of this run: {outcome.folder}")


def _show(query: str, rows: list[dict[str, Any]]) -> None:
    from cli.render import aligned

    print(f"  {query}")
    print("\n".join(f"    {line}" for line in aligned([[str(v) for v in row.values()] for row in rows])) or "    (no rows)")
