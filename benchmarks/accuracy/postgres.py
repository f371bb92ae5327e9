"""A PostgreSQL cluster of the lab's own, with the tables of a small payments service.

The cluster runs as user `postgres` under the lab's folder, speaks on a UNIX socket and on a loopback port, and is stopped with
the scope. It is initialised once a lab; each scenario gets a copy. Who is which backend is asked of the database itself.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.lab import Lab, wait_until

__all__ = ["Cluster", "cluster"]

_SETTINGS = """
listen_addresses = '127.0.0.1'
shared_buffers = 32MB
autovacuum = off
checkpoint_timeout = 1h
max_wal_size = 4GB
bgwriter_delay = 10s
wal_writer_delay = 10s
jit = off
max_parallel_workers_per_gather = 0
"""
_SCHEMA = """
create table accounts (id int primary key, owner text, balance_cents bigint not null);
create table payments (id bigserial primary key, debtor int references accounts, creditor int references accounts,
  amount_cents bigint not null, end_to_end_id text, status text not null default 'accepted', at timestamptz default now());
create table ledger (id bigserial primary key, payment bigint, account int, amount_cents bigint);
insert into accounts select i, 'customer ' || i, 100000000 from generate_series(1, 1000) i;
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running server: where it listens, and its postmaster."""

    folder: Path
    port: int
    pid: int

    def sql(self, text: str) -> str:
        """The answer of psql, rows as lines."""
        command = [_program("psql"), "-XAtq", "-h", str(self.folder), "-p", str(self.port), "-U", "postgres", "-d", "postgres"]
        done = subprocess.run([*command, "-c", text], check=True, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def backend_of(self, client_pid: int) -> int:
        """The backend that serves the one session of a client, known by the name the client gave."""
        return int(self.sql(f"select pid from pg_stat_activity where application_name = 'client-{client_pid}'"))


def _program(name: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if not found:
        raise FileNotFoundError(f"no {name} under /usr/lib/postgresql: apt-get install postgresql")
    return str(found[-1])


def _as_postgres(command: list[str], folder: Path, timeout_s: float = 120) -> None:
    subprocess.run(command, check=True, user="postgres", group="postgres", extra_groups=[], cwd=folder, timeout=timeout_s,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def _template(lab: Lab) -> Path:
    template = lab.path / "postgres-template"
    if not template.exists():
        template.mkdir(mode=0o700)
        user = pwd.getpwnam("postgres")
        os.chown(template, user.pw_uid, user.pw_gid)
        _as_postgres(
            [_program("initdb"), "-D", str(template), "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"], template
        )
        with (template / "postgresql.conf").open("a") as out:
            out.write(_SETTINGS)
        with lab.scope():
            _start(lab, template).sql(_SCHEMA)
    return template


def cluster(lab: Lab, wal: Path | None = None) -> Cluster:
    """A started cluster with the payments tables; its write-ahead log in the folder `wal`, if given."""
    template = _template(lab)
    data = lab.path / lab.unique("postgres")
    subprocess.run(["cp", "-a", str(template), str(data)], check=True, timeout=60)
    lab.undo(lambda: shutil.rmtree(data))
    if wal is not None:
        subprocess.run(["cp", "-a", str(data / "pg_wal"), str(wal / "pg_wal")], check=True, timeout=60)
        shutil.rmtree(data / "pg_wal")
        (data / "pg_wal").symlink_to(wal / "pg_wal")
    return _start(lab, data)


def _start(lab: Lab, data: Path) -> Cluster:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [_program("postgres"), "-D", str(data), "-p", str(port), "-k", str(data)]
    log = (data / "server.log").open("wb")
    process = subprocess.Popen(
        command, user="postgres", group="postgres", extra_groups=[], cwd=data, stdout=log, stderr=log, process_group=0
    )
    log.close()

    def stop() -> None:
        process.send_signal(signal.SIGINT)  # fast shutdown: sessions are ended
        process.wait(timeout=60)

    lab.undo(stop)
    started = Cluster(data, port, process.pid)
    ready = [_program("pg_isready"), "-q", "-h", str(data), "-p", str(port), "-U", "postgres"]
    wait_until(lambda: subprocess.run(ready, check=False, timeout=10).returncode == 0, "PostgreSQL to accept connections")
    return started
