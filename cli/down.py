"""`kprobe down`: stop the local servers."""

import typer

from events.settings import load

__all__ = ["app"]

app = typer.Typer()


@app.command()
def down() -> None:
    """Stop the local servers; their data stays below `stack.data_dir`.

    Safe to repeat. Each server is asked to end, and killed only if it has not ended after 30 seconds.
    """
    from cli.up import say
    from stack.local import LocalStack

    settings = load()
    stopped = LocalStack(settings.stack, say).down()
    say(f"stopped {', '.join(stopped)}" if stopped else f"nothing of {settings.stack.data_dir.absolute()} was running")
