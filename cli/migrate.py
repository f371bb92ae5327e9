"""`kprobe migrate`: bring the stores' schemas up to date."""

import sys
from typing import Annotated, Any

import typer

from events.settings import load

__all__ = ["app"]

app = typer.Typer()


@app.command()
def migrate(json: Annotated[bool, typer.Option("--json", help="Print what was done as one JSON document.")] = False) -> None:
    """Bring ClickHouse's tables, Neo4j's constraints and Kafka's topics up to date.

    Safe to repeat, and safe beside running writers: every step is recorded, and what is there already is left alone. The
    flow does the same when it starts. Topics that exist keep their number of partitions.
    """
    import orjson

    from sinks.clickhouse import ClickHouseStore
    from sinks.graph import GraphStore
    from stack.topics import create_topics

    settings = load()
    history = ClickHouseStore(settings.clickhouse)
    graph = GraphStore(settings.neo4j)
    try:
        done: dict[str, Any] = {"schema": "kprobe.migrate/1", "clickhouse": history.migrate(), "neo4j": graph.migrate()}
    finally:
        history.close()
        graph.close()
    kafka = settings.kafka
    done["topics"] = sorted(create_topics(kafka.bootstrap_servers, settings.stack.partitions, kafka.extra))
    for name in ("clickhouse", "neo4j", "topics"):
        what = ", ".join(map(str, done[name])) if done[name] else "nothing to do"
        print(f"{name}: {what}", file=sys.stderr)
    if json:
        print(orjson.dumps(done).decode())
