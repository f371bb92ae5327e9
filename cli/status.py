"""`kprobe status`: addresses and health of the local servers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from events.settings import Settings, load

if TYPE_CHECKING:
    from stack.local import ServerStatus

__all__ = ["app", "print_status"]

app = typer.Typer()


@app.command()
def status(json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Addresses and health of the local servers, asked with a real request each.

    Exit status 0 if all three answer, else 1.
    """
    from stack.local import LocalStack

    settings = load()
    found = LocalStack(settings.stack).status()
    print_status(found, settings, json)
    if any(s.state != "up" for s in found):
        raise typer.Exit(1)


def print_status(found: "Sequence[ServerStatus]", settings: Settings, json: bool) -> None:
    """The table, or the document, of `kprobe status` on stdout."""
    if json:
        import orjson

        document = {
            "schema": "kprobe.stack/1",
            "data_dir": str(settings.stack.data_dir.absolute()),
            "servers": [s.as_json() for s in found],
        }
        print(orjson.dumps(document).decode())
        return
    for s in found:
        print(f"{s.name:<12}{s.state:<11}{s.address:<28}{f'pid {s.pid}' if s.pid else '-':<14}{s.detail}".rstrip())
