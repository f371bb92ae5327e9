"""Faults of a PostgreSQL server under a payments service: victims are its clients or its backends."""

import contextlib
import os
import random
from pathlib import Path

from benchmarks.accuracy.lab import Actor, Lab, set_nice
from benchmarks.accuracy.postgres import Cluster, cluster
from benchmarks.accuracy.scenarios_cpu import decoy
from benchmarks.accuracy.scenarios_locks import fifo
from benchmarks.accuracy.truth import Judged, Play, blame, scenario

__all__: list[str] = []

_PAY = "pgquery 1 insert into payments (debtor, creditor, amount_cents) values (1, 2, 1250)"


def _client(lab: Lab, rng: random.Random, server: Cluster, name: str, cpu: int, backend_cpu: int) -> tuple[Actor, int]:
    """A connected client and its backend, each on its CPU; the way between them is a UNIX socket or loopback TCP."""
    client = lab.actor(name, python=True).pin(cpu)
    host = rng.choice((str(server.folder), "127.0.0.1"))
    client.main.run(f"pgconnect 1 {host} {server.port}; pgquery 1 set application_name = 'client-{client.pid}'")
    backend = server.backend_of(client.pid)
    os.sched_setaffinity(backend, {backend_cpu})
    with contextlib.suppress(OSError):  # a session of its own would weigh against all of the lab together
        Path(f"/proc/{backend}/autogroup").write_text("-16")
    return client, backend


@scenario()
def pg_backend_preempted(lab: Lab, rng: random.Random) -> Play:
    """The backend waits for its CPU behind a third process."""
    server = cluster(lab)
    victim, backend = _client(lab, rng, server, "payments", 0, 1)
    hog = lab.actor("reindex").pin(1)
    decoy(lab, rng, 0)
    fifo(hog, rng)
    yield [victim.pid, server.pid]
    hog.main.send(f"sleep 5000; cpu {rng.randint(200000, 300000)}")
    query = f"pgquery 1 select sum(sqrt(i)) from generate_series(1, {rng.randint(200000, 300000)}) i"
    victim.main.run(f"op pg-preempted payment 60000000; {query}; end")
    op = victim.main.operations[-1]
    truth = blame("cpu_preempted_rt", hog.pid, path=(victim.pid, backend, hog.pid))
    return [Judged(op, truth, op.duration_ns > 200_000_000 and op.run_delay_ns < op.duration_ns // 3)]


@scenario()
def pg_row_lock_sleeping(lab: Lab, rng: random.Random) -> Play:
    """Another transaction holds the row and its backend sleeps."""
    server = cluster(lab)
    victim, _ = _client(lab, rng, server, "payments", 0, 0)
    other, holder = _client(lab, rng, server, "backoffice", 1, 1)
    decoy(lab, rng, 0)
    yield [victim.pid, server.pid]
    seconds = rng.randint(150, 250) / 1000
    other.main.run("pgquery 1 begin; pgquery 1 update accounts set balance_cents = 1 where id = 7")
    other.main.send(f"mark asleep; pgquery 1 select pg_sleep({seconds}); pgquery 1 commit")
    other.main.until_mark("asleep")
    victim.main.run("op pg-row payment 60000000; pgquery 1 update accounts set balance_cents = 2 where id = 7; end")
    op = victim.main.operations[-1]
    truth = blame({"peer_slow", "lock_holder"}, holder)
    return [Judged(op, truth, op.duration_ns > 100_000_000 and op.run_delay_ns < op.duration_ns // 3)]


@scenario()
def pg_idle_in_transaction(lab: Lab, rng: random.Random) -> Play:
    """Another transaction holds the row while its client computes or sleeps before it commits."""
    server = cluster(lab)
    victim, waiting = _client(lab, rng, server, "payments", 0, 0)
    other, holder = _client(lab, rng, server, "backoffice", 1, 1)
    decoy(lab, rng, 0)
    yield [victim.pid, other.pid, server.pid]
    other.main.run("pgquery 1 begin; pgquery 1 update accounts set balance_cents = 1 where id = 7")
    other.main.send(f"mark busy; {rng.choice(('cpu', 'sleep'))} {rng.randint(150000, 250000)}; pgquery 1 commit")
    other.main.until_mark("busy")
    victim.main.run("op pg-idle payment 60000000; pgquery 1 update accounts set balance_cents = 2 where id = 7; end")
    op = victim.main.operations[-1]
    truth = blame({"peer_slow", "lock_holder"}, other.pid, path=(victim.pid, waiting, holder, other.pid))
    return [Judged(op, truth, op.duration_ns > 100_000_000 and op.run_delay_ns < op.duration_ns // 3)]


@scenario()
def pg_row_lock_preempted(lab: Lab, rng: random.Random) -> Play:
    """The backend that holds the row computes, and a third process takes its CPU."""
    server = cluster(lab)
    victim, _ = _client(lab, rng, server, "payments", 0, 0)
    other, _holder = _client(lab, rng, server, "backoffice", 1, 1)
    hog = lab.actor("reindex").pin(1)
    fifo(hog, rng)
    decoy(lab, rng, 0)
    yield [victim.pid, server.pid]
    other.main.run("pgquery 1 begin; pgquery 1 update accounts set balance_cents = 1 where id = 7")
    other.main.send("mark busy; pgquery 1 select sum(sqrt(i)) from generate_series(1, 300000) i; pgquery 1 commit")
    other.main.until_mark("busy")
    hog.main.send(f"sleep 5000; cpu {rng.randint(250000, 350000)}")
    victim.main.run("op pg-inverted payment 60000000; pgquery 1 update accounts set balance_cents = 2 where id = 7; end")
    op = victim.main.operations[-1]
    truth = blame({"priority_inversion", "cpu_preempted_rt"}, hog.pid)
    return [Judged(op, truth, op.duration_ns > 200_000_000 and op.run_delay_ns < op.duration_ns // 3)]


@scenario()
def pg_wal_disk_slow(lab: Lab, rng: random.Random) -> Play:
    """A commit waits for the write-ahead log's device, which is slow, with nobody else in it."""
    disk = lab.slow_disk(256)
    where = lab.filesystem(disk.device)
    server = cluster(lab, wal=where)
    victim, _ = _client(lab, rng, server, "payments", 0, 0)
    decoy(lab, rng, 1)
    victim.main.run(_PAY)
    yield [victim.pid, server.pid]
    disk.set_service_us(rng.randint(50000, 90000))
    victim.main.run(f"op pg-wal-slow payment 40000000; {_PAY}; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("disk_slow"), op.duration_ns > 50_000_000 and op.run_delay_ns < op.duration_ns // 3)]


@scenario()
def pg_wal_contention(lab: Lab, rng: random.Random) -> Play:
    """A bulk load writes the log's device full while the victim commits."""
    disk = lab.slow_disk(384)
    where = lab.filesystem(disk.device)
    server = cluster(lab, wal=where)
    victim, _ = _client(lab, rng, server, "payments", 0, 0)
    loaders = [_client(lab, rng, server, "bulk-load", 1, 1) for _ in range(2)]
    victim.main.run(_PAY)
    disk.set_service_us(rng.randint(3000, 5000))
    yield [victim.pid, server.pid]
    rows = "select i, 1, i from generate_series(1, 20000) i"
    for loader, _ in loaders:
        loader.main.send(f"mark on; pgquery 1 insert into ledger (payment, account, amount_cents) {rows};" * 3)
    for loader, _ in loaders:
        loader.main.until_mark("on")
    victim.main.run(f"sleep 200000; op pg-wal payment 30000000; {_PAY}; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    kinds = {"disk_contention", "journal_commit", "lock_holder", "lock_convoy", "peer_slow"}
    truth = blame(kinds, *(b for _, b in loaders))
    return [Judged(op, truth, op.duration_ns > 60_000_000 and op.run_delay_ns < op.duration_ns // 3)]


@scenario()
def pg_backend_terminated(lab: Lab, rng: random.Random) -> Play:
    """An administrator ends the session in the middle of a query."""
    server = cluster(lab)
    victim, backend = _client(lab, rng, server, "payments", 0, 1)
    admin, terminator = _client(lab, rng, server, "dba", 1, 1)
    decoy(lab, rng, 0)
    yield [victim.pid, server.pid]
    victim.main.send("op pg-terminated payment 1000000000; pgquery 1 select pg_sleep(5); end")
    admin.main.run(f"sleep {rng.randint(30000, 80000)}; pgquery 1 select pg_terminate_backend({backend})")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame({"peer_exited", "killed_signal"}, backend, terminator), op.outcome == "failed")]


@scenario(healthy=True)
def healthy_pg(lab: Lab, rng: random.Random) -> Play:
    """Payments in time, a report on the other CPU, a hog beside the client."""
    server = cluster(lab)
    victim, _ = _client(lab, rng, server, "payments", 0, 0)
    report, _ = _client(lab, rng, server, "batch-report", 1, 1)
    decoy(lab, rng, 0)
    yield [victim.pid, server.pid]
    report.main.send("pgquery 1 select sum(sqrt(i)) from generate_series(1, 500000) i")
    for i in range(5):
        victim.main.run(f"op healthy-pg-{i} payment 400000000; {_PAY}; end")
    return [Judged(op, blame(set()), op.in_time) for op in victim.main.operations]


@scenario(healthy=True)
def healthy_pg_other_row(lab: Lab, rng: random.Random) -> Play:
    """Another transaction holds other rows for long; the payment is in time."""
    server = cluster(lab)
    victim, _ = _client(lab, rng, server, "payments", 0, 0)
    other, _ = _client(lab, rng, server, "row-locker", 1, 1)
    set_nice(lab.hog("cpu-hog", 0).pid, 5)
    yield [victim.pid, server.pid]
    other.main.send(
        "pgquery 1 begin; pgquery 1 update accounts set balance_cents = 1 where id < 5; sleep 200000; pgquery 1 commit"
    )
    for i in range(3):
        victim.main.run(
            f"op healthy-row-{i} payment 400000000; pgquery 1 update accounts set balance_cents = 3 where id = 9; end"
        )
    other.main.done()
    return [Judged(op, blame(set()), op.in_time) for op in victim.main.operations]
