"""`kprobe operations`: all operations seen."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final

import typer

from cli.render import format_ns
from events.settings import load

__all__ = ["app", "list_operations"]

app = typer.Typer()
_STATUSES: Final = ("ok", "late", "failed", "unjudged", "pending")

COLUMNS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "OPERATION": lambda r: r["operation_id"],
    "TYPE": lambda r: r["type"],
    "STATUS": lambda r: r["status"],
    "DURATION": lambda r: format_ns(r["duration_ns"]),
    "DEADLINE": lambda r: "-" if r["deadline_ns"] is None else format_ns(r["deadline_ns"]),
    "CAUSE": lambda r: r["cause"] or "-",
    "CULPRIT": lambda r: r["culprits"][0] if r["culprits"] else "-",
    "NODE": lambda r: r["node"],
}


@app.command()
def operations(
    status: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(_STATUSES)}. May be repeated.")] = None,
    kind: Annotated[str, typer.Option("--type", help="Only operations of this type.")] = "",
    node: Annotated[str, typer.Option(help="Only operations of this node.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the latest first.")] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON object a line.")] = False,
) -> None:
    """All operations seen, the latest first, with what was judged about them. `pending`: announced, not judged yet."""
    list_operations("operations", status or (), kind=kind, node=node, limit=limit, json=json, jsonl=jsonl)


def list_operations(name: str, statuses: Sequence[str], *, kind: str, node: str, limit: int, json: bool, jsonl: bool) -> None:
    """Print operations with one of these statuses (none: all). Raises InputError for a status that does not exist."""
    from cli.listing import print_listing
    from events.errors import InputError
    from sinks.documents import DocumentStore

    wrong = sorted(set(statuses) - set(_STATUSES))
    if wrong:
        raise InputError(f"status {wrong[0]!r} is not one of {', '.join(_STATUSES)}")
    store = DocumentStore(load().clickhouse)
    try:
        rows = store.operations(statuses=statuses, kind=kind, node=node, limit=limit)
    finally:
        store.close()
    print_listing(name, rows, COLUMNS, json=json, jsonl=jsonl, right=(3, 4))
