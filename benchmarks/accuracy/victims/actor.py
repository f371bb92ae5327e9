"""The Python victim: threads that share one interpreter, driven like `actor.c` (a subset of its steps).

usage: actor.py NAME FD...     one thread a file descriptor; NAME becomes the process name

Steps beside those of `actor.c`: `run SECONDS` (a subprocess that sleeps), `put N`, `get N` (queue.Queue), and for PostgreSQL,
by its wire protocol without a driver: `pgconnect SLOT HOST PORT` (HOST a directory: UNIX socket), `pgquery SLOT SQL`.
"""

import ctypes
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

_LOCKS = [threading.Lock() for _ in range(64)]
_SOCKETS: dict[int, socket.socket] = {}
_FILES: dict[int, int] = {}
_CONDITIONS = [threading.Semaphore(0) for _ in range(64)]
_QUEUES: list[queue.Queue] = [queue.Queue() for _ in range(64)]


def _burn(us):
    limit = time.thread_time_ns() + us * 1000
    x = 1
    while time.thread_time_ns() < limit:
        for _ in range(500):
            x = x * 1103515245 + 12345 & 0xFFFFFFFF


def _recv(slot, size):
    while size:
        data = _SOCKETS[slot].recv(min(size, 1 << 20))
        if not data:
            raise ConnectionResetError(104, "peer closed")
        size -= len(data)


def _listen(slot, port):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("127.0.0.1", port))
    s.listen()
    _SOCKETS[slot] = s


def _accept(slot, listener):
    _SOCKETS[slot] = _SOCKETS[listener].accept()[0]


def _connect(slot, port):
    _SOCKETS[slot] = socket.create_connection(("127.0.0.1", port))


def _pg_message(kind, body):
    return kind + struct.pack("!I", len(body) + 4) + body


def _pg_exactly(sock, size):
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionResetError(104, "the server closed the connection")
        data += more
    return data


def _pg_until_ready(sock):
    """Reads to ReadyForQuery. An error of the statement is raised then; after a fatal one the server closes."""
    error = None
    while True:
        kind, size = struct.unpack("!cI", _pg_exactly(sock, 5))
        body = _pg_exactly(sock, size - 4)
        if kind == b"E":
            error = OSError(125, body.decode(errors="replace"))
        elif kind == b"Z":
            if error is not None:
                raise error
            return


def _pg_connect(slot, host, port):
    s = socket.socket(socket.AF_UNIX if host.startswith("/") else socket.AF_INET)
    s.connect(f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port)))
    _SOCKETS[slot] = s
    hello = b"user\0postgres\0database\0postgres\0\0"
    s.sendall(struct.pack("!II", len(hello) + 8, 196608) + hello)
    _pg_until_ready(s)


def _pg_query(slot, sql):
    _SOCKETS[slot].sendall(_pg_message(b"Q", sql.encode() + b"\0"))
    _pg_until_ready(_SOCKETS[slot])


_STEPS = {
    "cpu": lambda w: _burn(int(w[1])),
    "sleep": lambda w: time.sleep(int(w[1]) / 1e6),
    "lock": lambda w: _LOCKS[int(w[1])].acquire(),
    "unlock": lambda w: _LOCKS[int(w[1])].release(),
    "condwait": lambda w: _CONDITIONS[int(w[1])].acquire(),
    "condsignal": lambda w: _CONDITIONS[int(w[1])].release(),
    "listen": lambda w: _listen(int(w[1]), int(w[2])),
    "accept": lambda w: _accept(int(w[1]), int(w[2])),
    "connect": lambda w: _connect(int(w[1]), int(w[2])),
    "send": lambda w: _SOCKETS[int(w[1])].sendall(b"k" * int(w[2])),
    "recv": lambda w: _recv(int(w[1]), int(w[2])),
    "open": lambda w: _FILES.__setitem__(int(w[1]), os.open(w[2], os.O_CREAT | os.O_RDWR, 0o600)),
    "write": lambda w: os.write(_FILES[int(w[1])], b"k" * int(w[2])),
    "fsync": lambda w: os.fsync(_FILES[int(w[1])]),
    "run": lambda w: subprocess.run(["sleep", w[1]], check=True),
    "put": lambda w: _QUEUES[int(w[1])].put(1),
    "get": lambda w: _QUEUES[int(w[1])].get(),
    "pgconnect": lambda w: _pg_connect(int(w[1]), w[2], w[3]),
    "pgquery": lambda w: _pg_query(int(w[1]), " ".join(w[2:])),
}


def _delay():
    """(the kernel's count of run-queue ns, the time at which it is true), again if the thread was held up in between."""
    for _ in range(20):
        before = _now()
        delay = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
        at = _now()
        if at - before < 150_000:
            break
    return delay, at


def _now():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def _run(control, line):
    op, failed = None, False
    for text in line.split(";"):
        words = text.split()
        if not words:
            continue
        if words[0] == "op":
            failed = False
            delay, at = _delay()
            op = [*words[1:4], at, delay]
        elif words[0] == "end":
            delay, end = _delay()
            outcome = "failed" if failed else "ok"
            head = f"op {op[0]} {op[1]} {threading.get_native_id()} {op[3]} {end} {op[2]} {outcome}"
            control.sendall(f"{head} {delay - op[4]}\n".encode())
            op, failed = None, False
        elif failed:
            continue
        elif words[0] == "mark":
            control.sendall(f"mark {words[1]} {_now()}\n".encode())
        else:
            try:
                _STEPS[words[0]](words)
            except OSError as error:
                failed = True
                if op is None:
                    control.sendall(f"fail {words[0]} {error.errno or 5}\n".encode())
    control.sendall(f"done {_now()}\n".encode())


def _serve(fd):
    control = socket.socket(fileno=fd)
    control.sendall(f"hello {os.getpid()} {threading.get_native_id()}\n".encode())
    for line in control.makefile("r"):
        _run(control, line.strip())
    os._exit(0)


def main(argv):
    ctypes.CDLL(None).prctl(15, argv[1].encode()[:15], 0, 0, 0)
    for fd in argv[3:]:
        threading.Thread(target=_serve, args=(int(fd),), daemon=True).start()
    _serve(int(argv[2]))


if __name__ == "__main__":
    main(sys.argv)
