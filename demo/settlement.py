"""A small settlement service: payments come in over TCP, become ledger entries, and are confirmed to a clearing house.

    python -m demo.settlement --port-file FILE --clearing HOST:PORT --journal FILE --log FILE [--cpu N]

One request is one JSON line `{"settlement": 4821, "payment": 98721, "amount": "1203.50"}`; the answer is one line
`{"settlement": 4821, "status": "settled"}`. The thread `ledger-writer` takes the request from a queue, locks the ledger,
derives the entries (a hash chain over the accounts: real work on the CPU), appends them to the journal, makes them durable
with fdatasync, and has the clearing house confirm.

The log is the service's own record of each ledger write, in the format of kprobe's operations file (interface section 2):
what a service that logs "settlement N took X" already knows. Times are CLOCK_MONOTONIC.

Fails with exit status 1 if the clearing house goes away or the journal cannot be written.
"""

import argparse
import ctypes
import hashlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ledger", "main"]

LOG_HEADER = "operation_id,type,tid,start_mono_ns,end_mono_ns,deadline_ns,outcome,title,triggered_by\n"
ACCOUNTS = 60_000  # entries the hash chain runs over: some milliseconds of work for one settlement
_PR_SET_NAME = 15


def set_thread_name(name: str) -> None:
    """Name the calling thread, so that `ps -L` and everything else shows what it is for."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Request:
    """One payment to settle, and where its answer goes."""

    settlement: int
    payment: int
    amount: str
    reply: socket.socket


class Ledger:
    """The accounts and their journal; every entry is chained to the one before it."""

    def __init__(self, journal: Path) -> None:
        self._lock = threading.Lock()
        self._chain = hashlib.sha256(b"genesis").digest()
        self._fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, request: Request) -> str:
        """Derive, append and make durable the entries of one settlement; returns the chain's new head."""
        with self._lock:
            digest = hashlib.sha256(self._chain)
            for account in range(ACCOUNTS):
                digest.update(b"%d:%s;" % (account, request.amount.encode()))
            self._chain = digest.digest()
            line = f"{request.settlement} {request.payment} {request.amount} {self._chain.hex()}\n"
            os.write(self._fd, line.encode())
            os.fdatasync(self._fd)
            return self._chain.hex()


class LedgerWriter(threading.Thread):
    """The one thread that writes the ledger, pinned to its CPU as latency-critical writers are."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        clearing: tuple[str, int],
        log: Path,
        deadline_ns: int,
        cpu: int | None,
        on_failure: Callable[[], None],
    ) -> None:
        super().__init__(name="ledger-writer", daemon=True)
        self.requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.failed = threading.Event()
        self._on_failure = on_failure
        self._ledger, self._deadline_ns, self._cpu = ledger, deadline_ns, cpu
        self._clearing = socket.create_connection(clearing, timeout=10)
        self._clearing.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._log = log.open("a", buffering=1)
        if self._log.tell() == 0:
            self._log.write(LOG_HEADER)

    def run(self) -> None:
        set_thread_name(self.name)
        if self._cpu is not None:
            os.sched_setaffinity(0, {self._cpu})
        try:
            while True:
                self._settle(self.requests.get())
        except OSError as error:
            print(f"settlement: the ledger writer stopped: {error}", file=sys.stderr, flush=True)
            self.failed.set()
            self._on_failure()

    def _settle(self, request: Request) -> None:
        start_mono_ns = time.monotonic_ns()
        head = self._ledger.write(request)
        self._clearing.sendall(f"{request.settlement} {head}\n".encode())
        if not self._clearing.recv(64):
            raise ConnectionError("the clearing house closed the connection")
        end_mono_ns = time.monotonic_ns()
        self._log.write(
            f"{request.settlement},settlement,{threading.get_native_id()},{start_mono_ns},{end_mono_ns},{self._deadline_ns},ok,"
            f"settlement {request.settlement} ledger write,payment {request.payment}\n"
        )
        answer = {"settlement": request.settlement, "status": "settled"}
        request.reply.sendall(json.dumps(answer).encode() + b"\n")


def serve(connection: socket.socket, writer: LedgerWriter) -> None:
    """Read requests from one client until it hangs up."""
    with connection, connection.makefile("rb") as lines:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for line in lines:
            body = json.loads(line)
            writer.requests.put(Request(body["settlement"], body["payment"], body["amount"], connection))


def main(argv: list[str] | None = None) -> int:
    """Run the service until it is told to stop (SIGTERM) or cannot go on."""
    parser = argparse.ArgumentParser(prog="settlement", description="a small settlement service")
    parser.add_argument("--port-file", type=Path, required=True, help="the port it listens on is written here")
    parser.add_argument("--clearing", required=True, help="HOST:PORT of the clearing house")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--deadline-ms", type=int, default=250)
    parser.add_argument("--cpu", type=int, help="CPU of the ledger writer")
    options = parser.parse_args(argv)
    set_thread_name("settlement")
    host, _, port = options.clearing.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as server:
        writer = LedgerWriter(
            ledger=Ledger(options.journal),
            clearing=(host, int(port)),
            log=options.log,
            deadline_ns=options.deadline_ms * 1_000_000,
            cpu=options.cpu,
            on_failure=lambda: server.shutdown(socket.SHUT_RDWR),  # ends `accept`: nobody polls while a payment is settled
        )
        writer.start()
        options.port_file.write_text(str(server.getsockname()[1]))
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                if writer.failed.is_set():
                    return 1
                raise
            threading.Thread(target=serve, args=(connection, writer), daemon=True, name="gateway").start()


if __name__ == "__main__":
    sys.exit(main())
