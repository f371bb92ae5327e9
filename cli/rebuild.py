"""`kprobe rebuild`: Neo4j from ClickHouse."""

import sys
from typing import Annotated, Any, Final

import typer

from events.settings import load

__all__ = ["app"]

app = typer.Typer()
_PAGE: Final = 1000


@app.command()
def rebuild(json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON document.")] = False) -> None:
    """Rebuild Neo4j from ClickHouse: everything that kprobe wrote into the graph is removed and written again.

    The graph is a projection of the verdicts in ClickHouse and holds nothing else of kprobe's, so nothing is lost.
    """
    import orjson

    from sinks.clickhouse import ClickHouseStore
    from sinks.graph import GraphStore

    settings = load()
    history = ClickHouseStore(settings.clickhouse)
    graph = GraphStore(settings.neo4j)
    try:
        graph.migrate()
        graph.clear()
        count = _copy(history, graph)
        counts = graph.counts()
    finally:
        history.close()
        graph.close()
    print(f"rebuilt the graph from {count} verdicts", file=sys.stderr)
    if json:
        print(orjson.dumps({"schema": "kprobe.rebuild/1", "verdicts": count, "graph": counts}).decode())


def _copy(history: Any, graph: Any) -> int:
    """Copy page by page, in the order of operation ids; returns how many verdicts there are."""
    import orjson

    from causality.graph import edges_of

    count, after = 0, ""
    while page := history.documents(after, _PAGE):
        # What has not ended is not in the graph, as in the flow.
        verdicts = [v for v in (orjson.loads(document) for _, document in page) if not v.get("provisional")]
        graph.write(verdicts, [edge for verdict in verdicts for edge in edges_of(verdict)])
        count, after = count + len(verdicts), page[-1][0]
        if sys.stderr.isatty():
            print(f"\r{count} verdicts", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return count
