"""`kprobe up`: start the local servers, and keep them in the foreground unless told otherwise."""

import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Annotated, Final

import typer

from events.errors import StoreError
from events.settings import Settings, load

if TYPE_CHECKING:
    from stack.local import LocalStack

__all__ = ["app"]

app = typer.Typer()
_WATCH_INTERVAL_S: Final = 0.5
_RESTART_PAUSE_S: Final = 30.0  # a server that dies again sooner than this has a reason that a restart does not cure


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when all answer; `kprobe down` stops them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --detach: print the addresses as one JSON document.")] = False,
) -> None:
    """Start local Kafka, Neo4j and ClickHouse-protocol servers.

    All listen on loopback and keep their data below `stack.data_dir` (KPROBE_STACK__DATA_DIR, default .kprobe/stack); ports
    are `stack.*_port`. Safe to repeat: what runs is left alone, what was killed is started again on its data. The first
    start fetches the jars of Kafka and Neo4j with Maven.

    Without --detach the command stays, restarts a server that dies, and stops all on Ctrl-C or SIGTERM.
    """
    from cli.status import print_status
    from stack.local import LocalStack

    settings = load()
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    stack = LocalStack(settings.stack, say)
    began = time.monotonic()
    try:
        started = stack.up()
    except _Interrupted:
        say("interrupted: what had been started is stopped again")
        raise typer.Exit(130) from None
    say(f"all servers answer ({time.monotonic() - began:.1f} s)" if started else "all servers were running already")
    _say_where(settings)
    if detach or json or not started:
        print_status(stack.status(), settings, json)
        return
    stop.starting = False
    _stay(stack, stop.asked)


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM during the start; not an error, and not to be caught as one."""


class _Stop:
    """The handler of SIGINT and SIGTERM: breaks off the start; once the servers run, asks the foreground loop to end."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.starting = True

    def __call__(self, _number: int, _frame: object) -> None:
        if self.asked.is_set():
            return  # a second Ctrl-C must not interrupt the clean end that the first one asked for
        self.asked.set()
        if self.starting:
            raise _Interrupted


def _stay(stack: "LocalStack", stop_asked: threading.Event) -> None:
    """Watch the servers until asked to stop; a dead one is started again, one that dies at once is an error."""
    say("Ctrl-C stops them")
    restarted_at: dict[str, float] = {}
    try:
        while not stop_asked.wait(_WATCH_INTERVAL_S):
            for name in stack.dead():
                if time.monotonic() - restarted_at.get(name, float("-inf")) < _RESTART_PAUSE_S:
                    raise StoreError(f"{name} died twice within {_RESTART_PAUSE_S:.0f} s; see its log {stack.log(name)}")
                say(f"{name} died; starting it again")
                restarted_at[name] = time.monotonic()
                stack.up()
    finally:
        stack.down()
    say("all servers stopped")


def _say_where(settings: Settings) -> None:
    """Tell about clients that are configured to talk to somebody else than the servers just started."""
    stack = settings.stack
    for variable, configured, local in (
        ("KPROBE_KAFKA__BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers, f"127.0.0.1:{stack.kafka_port}"),
        ("KPROBE_CLICKHOUSE__URL", settings.clickhouse.url, f"http://127.0.0.1:{stack.clickhouse_port}"),
        ("KPROBE_NEO4J__URI", settings.neo4j.uri, f"bolt://127.0.0.1:{stack.neo4j_port}"),
    ):
        if configured != local:
            say(f"note: the other commands use {configured}; for this server set {variable}={local}")
