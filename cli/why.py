"""`kprobe why`: the verdict of one operation, from the stores."""

import sys
from typing import Annotated

import typer

from events.errors import InputError
from events.settings import load

__all__ = ["app", "fetch_verdict"]

app = typer.Typer()


@app.command()
def why(
    operation: Annotated[str, typer.Argument(help="The operation's id, as in the operations file or topic.")],
    json: Annotated[bool, typer.Option("--json", help="Print the verdict as it was stored, byte for byte.")] = False,
) -> None:
    """Why was this operation late, or failed: the sentence, where its time went, who caused it, with evidence.

    Exit status 0 if the evidence is complete, 3 if events were lost or could not be recorded, 2 if nobody knows the operation.
    """
    import orjson

    from cli.listing import write_line
    from cli.render import format_ns, verdict_text, wants_colour

    document = fetch_verdict(operation)
    verdict = orjson.loads(document)
    if json:
        write_line(document)
    else:
        print(verdict_text(verdict, colour=wants_colour(sys.stdout)), end="")
        if verdict.get("provisional"):
            print(f"PROVISIONAL: it has not ended; this is what is known as of {format_ns(verdict['duration_ns'])} of it")
    if not verdict["completeness"]["complete"]:
        raise typer.Exit(3)


def fetch_verdict(operation_id: str) -> bytes:
    """The stored verdict. Raises InputError saying whether the operation is unknown or only not judged yet."""
    from sinks.documents import DocumentStore

    store = DocumentStore(load().clickhouse)
    try:
        document = store.verdict(operation_id)
        if document is not None:
            return document
        if store.operation(operation_id) is not None:
            raise InputError(
                f"operation {operation_id!r} was announced, but is not judged yet: its events have not arrived, or no flow runs"
            )
    finally:
        store.close()
    raise InputError(f"no operation {operation_id!r} is known; `kprobe operations` lists those that are")
