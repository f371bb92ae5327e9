"""`kprobe victims`: every operation that one culprit hurt."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import typer

from cli.render import format_ns
from events.settings import load

__all__ = ["app"]

app = typer.Typer()

_COLUMNS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "OPERATION": lambda r: r["operation_id"],
    "TYPE": lambda r: r["type"],
    "STATUS": lambda r: r["status"],
    "HURT": lambda r: format_ns(r["hurt_ns"]),
    "DURATION": lambda r: format_ns(r["duration_ns"]),
    "CAUSE": lambda r: ", ".join(sorted(r["kinds"])),
    "BY": lambda r: ", ".join(sorted(r["comms"])),
    "PIDS": lambda r: ", ".join(map(str, sorted(r["pids"]))),
    "NODE": lambda r: r["node"],
}


@app.command()
def victims(
    culprit: Annotated[str, typer.Option(help="Whom to blame: comm:GLOB, pid:N, cgroup:PATH or container:ID.")],
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the worst first.")] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON object a line.")] = False,
) -> None:
    """Every operation that one culprit hurt, the worst first, with the nanoseconds that it cost each."""
    from cli.listing import print_listing
    from sinks.documents import CulpritSelector, DocumentStore

    selector = CulpritSelector(culprit)
    store = DocumentStore(load().clickhouse)
    try:
        rows = store.victims(selector, limit)
    finally:
        store.close()
    print_listing("victims", rows, _COLUMNS, json=json, jsonl=jsonl, right=(3, 4))
