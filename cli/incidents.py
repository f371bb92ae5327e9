"""`kprobe incidents`: operations that were late or failed."""

from typing import Annotated

import typer

from cli.operations import list_operations

__all__ = ["app"]

app = typer.Typer()


@app.command()
def incidents(
    kind: Annotated[str, typer.Option("--type", help="Only operations of this type.")] = "",
    node: Annotated[str, typer.Option(help="Only operations of this node.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the latest first.")] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON object a line.")] = False,
) -> None:
    """Operations that were late or failed, the latest first. `kprobe why OPERATION` says why."""
    list_operations("incidents", ("late", "failed"), kind=kind, node=node, limit=limit, json=json, jsonl=jsonl)
