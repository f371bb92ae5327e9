"""The `kprobe` command.

Each subcommand is a module of this folder with a `typer.Typer` named `app` and is imported only when it runs or when
its help is shown, because some need packages that take half a second to import.

Exit status: 0 done; 1 the tool failed; 2 wrong usage or bad input; 3 done, but the evidence is incomplete. Data goes to
stdout, everything else to stderr.
"""

import importlib
import os
import sys
from typing import Any, Final

import typer
from typer.core import TyperGroup

from events.errors import KprobeError

__all__ = ["COMMANDS", "app", "main"]

# name -> (module, one line for `kprobe --help`), in the order in which a newcomer meets them
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "demo": ("cli.demo", "Everything at once on real kernel events, ending with the sentence."),
    "doctor": ("cli.doctor", "What this kernel and machine can record, and which causes that leaves out."),
    "up": ("cli.up", "Start local Kafka, Neo4j and ClickHouse-protocol servers."),
    "down": ("cli.down", "Stop the local servers."),
    "status": ("cli.status", "Addresses and health of the local servers."),
    "record": ("cli.record", "Flight recorder: kernel events to a .kcap file, without any server."),
    "probe": ("cli.probe", "The agent: kernel events to Kafka, to a spool while Kafka is away."),
    "flow": ("cli.flow", "Run the dataflow: Kafka to verdicts (N processes)."),
    "info": ("cli.info", "What a capture holds: kinds, clocks, losses, tasks."),
    "events": ("cli.events", "List the events of a capture."),
    "states": ("cli.states", "List the thread states of a capture."),
    "import": ("cli.import_", "Turn another tool's trace into a capture."),
    "analyze": ("cli.analyze", "Judge the operations of a capture, offline."),
    "why": ("cli.why", "The verdict of one operation, from the stores."),
    "operations": ("cli.operations", "All operations seen."),
    "incidents": ("cli.incidents", "Operations that were late or failed."),
    "victims": ("cli.victims", "Every operation that one culprit hurt."),
    "tail": ("cli.tail", "Follow edges or verdicts as they appear."),
    "graph": ("cli.graph", "The causal graph of one operation."),
    "migrate": ("cli.migrate", "Bring the stores' schemas up to date."),
    "rebuild": ("cli.rebuild", "Rebuild Neo4j from ClickHouse."),
    "replay": ("cli.replay", "Replay an incident; prove a fix against it."),
}


class _LazyGroup(TyperGroup):
    """Subcommands by name from COMMANDS; imports a module only when its command is used.

    The context and command types are Any: typer carries them in a private module.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        module.app.rich_markup_mode = None  # one plain form of help for all: readable in a pipe, and in an issue
        module.app._add_completion = False  # offered once, by `kprobe` itself
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


app = typer.Typer(
    cls=_LazyGroup,
    name="kprobe",
    help="Flight recorder and debugger: why was this operation late, down to the kernel.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Flight recorder and debugger: why was this operation late, down to the kernel."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line; never shows a traceback for an error that kprobe raised on purpose (KPROBE_DEBUG=1 does)."""
    try:
        app(args=argv, prog_name="kprobe")
    except KprobeError as error:
        if os.environ.get("KPROBE_DEBUG"):
            raise
        print(f"kprobe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
