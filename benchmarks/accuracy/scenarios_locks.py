"""Faults of locks and of waiting for others: holders asleep, preempted, convoys, kernel locks, pipes, children, peers."""

import os
import random

from benchmarks.accuracy.lab import Actor, Lab, Thread, set_nice
from benchmarks.accuracy.scenarios_cpu import decoy
from benchmarks.accuracy.truth import Judged, Play, blame, scenario

__all__ = ["fifo"]


def fifo(actor: Actor, rng: random.Random) -> None:
    """Makes `actor` a real-time task."""
    os.sched_setscheduler(actor.pid, os.SCHED_FIFO, os.sched_param(rng.randint(1, 50)))


def _locked(victim: Thread, name: str, lock: str = "lock 1; cpu 500; unlock 1") -> None:
    victim.send(f"op {name} payment 30000000; cpu 1000; {lock}; end")


@scenario()
def lock_holder_asleep(lab: Lab, rng: random.Random) -> Play:
    """The holder of a pthread mutex sleeps; a hog burns the other CPU."""
    cpu = rng.choice((0, 1))
    app = lab.actor("ledger", 2).pin(cpu)
    decoy(lab, rng, 1 - cpu)
    victim, holder = app.threads
    yield [app.pid]
    holder.send(f"lock 1; mark held; sleep {rng.randint(120000, 220000)}; unlock 1")
    holder.until_mark("held")
    _locked(victim, "holder-asleep")
    victim.done()
    op = victim.operations[-1]
    return [Judged(op, blame("lock_holder", holder.tid, path=(victim.tid, holder.tid)), op.duration_ns > 90_000_000)]


@scenario()
def lock_holder_works(lab: Lab, rng: random.Random) -> Play:
    """The holder of a pthread mutex computes on its own CPU; a decoy sits on the victim's CPU."""
    cpu = rng.choice((0, 1))
    app = lab.actor("ledger", 2)
    victim, holder = app.threads
    victim.pin(cpu)
    holder.pin(1 - cpu)
    decoy(lab, rng, cpu)
    yield [app.pid]
    holder.send(f"lock 1; mark held; cpu {rng.randint(120000, 220000)}; unlock 1")
    holder.until_mark("held")
    _locked(victim, "holder-works")
    victim.done()
    op = victim.operations[-1]
    return [Judged(op, blame("lock_holder", holder.tid, path=(victim.tid, holder.tid)), op.duration_ns > 90_000_000)]


@scenario()
def priority_inversion(lab: Lab, rng: random.Random) -> Play:
    """A batch job takes the CPU of the lock's holder; the victim's own CPU is burnt by a decoy."""
    cpu = rng.choice((0, 1))
    app, batch = lab.actor("ledger", 2), lab.actor("recon").pin(1 - cpu)
    victim, holder = app.threads
    victim.pin(cpu)
    holder.pin(1 - cpu)
    decoy(lab, rng, cpu)
    real_time = rng.random() < 0.5
    if real_time:
        fifo(batch, rng)
    else:
        set_nice(batch.pid, -10)
    yield [app.pid]
    holder.send("lock 1; mark held; cpu 60000; unlock 1")
    holder.until_mark("held")
    batch.main.send(f"cpu {rng.randint(300000, 400000)}")
    _locked(victim, "inversion")
    victim.done()
    op = victim.operations[-1]
    truth = blame("priority_inversion", batch.pid, path=(victim.tid, holder.tid, batch.pid))
    return [Judged(op, truth, op.duration_ns > 100_000_000)]


@scenario()
def lock_convoy(lab: Lab, rng: random.Random) -> Play:
    """Three holders one after the other; the longest hold is the culprit."""
    app = lab.actor("ledger", 4)
    victim, *others = app.threads
    holds = [60000, 60000, 60000]
    longest = rng.randrange(3)
    holds[longest] = 110000
    yield [app.pid]
    for thread, us in zip(others, holds, strict=True):
        work = rng.choice(("sleep", "sleep", "cpu"))
        thread.send(f"lock 1; {work} {us}; unlock 1")
        app.main.run("sleep 3000")
    _locked(victim, "convoy")
    victim.done()
    op = victim.operations[-1]
    return [Judged(op, blame("lock_convoy", others[longest].tid), op.duration_ns > 180_000_000)]


@scenario()
def lock_no_owner(lab: Lab, rng: random.Random) -> Play:
    """A read-write lock, which has no readable owner, is held by a sleeper."""
    app = lab.actor("ledger", 2)
    victim, holder = app.threads
    decoy(lab, rng, 1)
    app.pin(0)
    yield [app.pid]
    holder.send(f"wrlock 1; mark held; sleep {rng.randint(120000, 200000)}; rwunlock 1")
    holder.until_mark("held")
    _locked(victim, "no-owner", "rdlock 1; rwunlock 1")
    victim.done()
    op = victim.operations[-1]
    truth = blame({"peer_slow", "lock_holder"}, holder.tid, path=(victim.tid, holder.tid))
    return [Judged(op, truth, op.duration_ns > 90_000_000)]


@scenario()
def python_lock(lab: Lab, rng: random.Random) -> Play:
    """A threading.Lock is held by a sleeping thread of a Python program."""
    app = lab.actor("pyledger", 2, python=True)
    victim, holder = app.threads
    decoy(lab, rng, 1)
    yield [app.pid]
    holder.send(f"lock 1; mark held; sleep {rng.randint(120000, 200000)}; unlock 1")
    holder.until_mark("held")
    _locked(victim, "python-lock", "lock 1; unlock 1")
    victim.done()
    op = victim.operations[-1]
    truth = blame({"peer_slow", "lock_holder"}, holder.tid, path=(victim.tid, holder.tid))
    return [Judged(op, truth, op.duration_ns > 90_000_000)]


@scenario()
def kernel_lock_inode(lab: Lab, rng: random.Random) -> Play:
    """Two processes write the same file; the other one's large write holds the inode."""
    victim, writer = lab.actor("payments"), lab.actor("exporter")
    shared = lab.path / lab.unique("shared")
    for actor in (victim, writer):
        actor.main.run(f"open 1 {shared} rwc")
    lab.undo(lambda: shared.unlink(missing_ok=True))
    writer.main.run("map 1 150; touch 1")
    victim.pin(0)
    writer.pin(1)
    yield [victim.pid]
    writer.main.send("mark go; bigwrite 1 1")
    writer.main.until_mark("go")
    victim.main.run("sleep 15000; op inode payment 15000000; write 1 4096 0; end")
    writer.main.done()
    op = victim.main.operations[-1]
    truth = blame("lock_holder", writer.pid, path=(victim.pid, writer.pid))
    return [Judged(op, truth, op.duration_ns > 30_000_000)]


@scenario()
def kernel_lock_mmap(lab: Lab, rng: random.Random) -> Play:
    """A thread changes the protection of a large mapping; the victim's small mappings wait."""
    app = lab.actor("pricing", 2)
    victim, other = app.threads
    victim.pin(0)
    other.pin(1)
    other.run("map 1 1200; touch 1")
    yield [app.pid]
    other.send("mark go; mprotect 1 16")
    other.until_mark("go")
    victim.run("op mmap payment 10000000; smallmaps 12; end")
    op = victim.operations[-1]
    other.done()
    truth = blame({"lock_holder", "lock_convoy"}, other.tid, path=(victim.tid, other.tid))
    return [Judged(op, truth, op.duration_ns > 25_000_000)]


def _pipes(lab: Lab, work: str) -> tuple[Actor, Actor, str]:
    """A victim that asks a worker through pipes: (victim, worker, the victim's steps)."""
    there, back = lab.pipe(), lab.pipe()
    victim = lab.actor("payments", fds=(there[1], back[0]))
    worker = lab.actor("scoring", fds=(there[0], back[1]))
    victim.main.run(f"use 1 {there[1]}; use 2 {back[0]}")
    worker.main.run(f"use 1 {there[0]}; use 2 {back[1]}")
    worker.main.send(f"repeat -1; read 1 64; {work}; write 2 64")
    return victim, worker, "write 1 64; read 2 64"


@scenario()
def slow_pipe_peer(lab: Lab, rng: random.Random) -> Play:
    """The worker at the other end of a pipe takes its time; a hog burns the victim's CPU."""
    work = rng.choice(("sleep", "cpu"))
    victim, worker, ask = _pipes(lab, f"{work} {rng.randint(100000, 180000)}")
    victim.pin(0)
    worker.pin(1)
    decoy(lab, rng, 0)
    yield [victim.pid, worker.pid]
    victim.main.run(f"op pipe payment 30000000; {ask}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("peer_slow", worker.pid, path=(victim.pid, worker.pid)), op.duration_ns > 80_000_000)]


@scenario()
def pipe_peer_preempted(lab: Lab, rng: random.Random) -> Play:
    """The worker at the other end of a pipe waits for its CPU behind a third process."""
    victim, worker, ask = _pipes(lab, "cpu 30000")
    hog = lab.actor("reindex").pin(1)
    victim.pin(0)
    worker.pin(1)
    decoy(lab, rng, 0)
    set_nice(hog.pid, -10)
    yield [victim.pid]
    hog.main.send("cpu 400000")
    victim.main.run(f"op pipe-preempted payment 30000000; {ask}; end")
    op = victim.main.operations[-1]
    truth = blame("cpu_preempted", hog.pid, path=(victim.pid, worker.pid, hog.pid))
    return [Judged(op, truth, op.duration_ns > 100_000_000)]


@scenario()
def slow_child(lab: Lab, rng: random.Random) -> Play:
    """The operation waits for a child that computes or sleeps."""
    victim = lab.actor("payments").pin(0)
    decoy(lab, rng, 0 if rng.random() < 0.3 else 1)
    work = rng.choice(("cpu", "sleep"))
    yield [victim.pid]
    victim.main.send(f"op child payment 30000000; child {work} {rng.randint(100000, 180000)}; end")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame({"peer_slow"}, _CHILD), op.run_delay_ns < op.duration_ns // 3)]


_CHILD = -1  # "a child of the victim": its pid is known to the kernel only; the judge accepts any task other than the decoys


@scenario()
def child_preempted(lab: Lab, rng: random.Random) -> Play:
    """The operation waits for a child that waits for its CPU behind a third process."""
    victim, hog = lab.actor("payments").pin(1), lab.actor("reindex").pin(1)
    fifo(hog, rng)
    yield [victim.pid]
    victim.main.send("op child-preempted payment 30000000; child cpu 30000; end")
    hog.main.run("sleep 10000; cpu 200000")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("cpu_preempted_rt", hog.pid), op.duration_ns > 150_000_000)]


@scenario()
def condition_late(lab: Lab, rng: random.Random) -> Play:
    """A thread signals a condition variable late, after its own work."""
    app = lab.actor("matching", 2)
    victim, worker = app.threads
    victim.pin(0)
    worker.pin(1)
    decoy(lab, rng, 0)
    work = rng.choice(("cpu", "sleep"))
    yield [app.pid]
    worker.send(f"{work} {rng.randint(100000, 180000)}; condsignal 1")
    victim.run("op condition payment 30000000; condwait 1; end")
    op = victim.operations[-1]
    return [Judged(op, blame("peer_slow", worker.tid, path=(victim.tid, worker.tid)), op.duration_ns > 70_000_000)]


@scenario()
def stopped(lab: Lab, rng: random.Random) -> Play:
    """SIGSTOP from another process, SIGCONT later."""
    victim = lab.actor("payments").pin(0)
    sender = lab.actor("operator")
    decoy(lab, rng, 1)
    yield [victim.pid]
    victim.main.send("op stopped payment 60000000; cpu 40000; end")
    sender.main.run(f"sleep 10000; kill {victim.pid} 19; sleep {rng.randint(100000, 200000)}; kill {victim.pid} 18")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("stopped", sender.pid), op.duration_ns > 120_000_000)]


@scenario(healthy=True)
def healthy_lock(lab: Lab, rng: random.Random) -> Play:
    """A lock is taken in turn, in time, with hogs around."""
    app = lab.actor("ledger", 2)
    victim, other = app.threads
    decoy(lab, rng, 1)
    yield [app.pid]
    other.send("repeat 20; lock 1; sleep 1000; unlock 1; sleep 3000")
    for i in range(5):
        victim.run(f"op healthy-lock-{i} payment 150000000; lock 1; cpu 200; unlock 1; end")
    other.done()
    return [Judged(op, blame(set()), op.in_time) for op in victim.operations]


@scenario(healthy=True)
def healthy_lock_elsewhere(lab: Lab, rng: random.Random) -> Play:
    """Another lock of the program is held for long, which the operation does not need; no deadline."""
    app = lab.actor("ledger", 3)
    victim, holder, waiter = app.threads
    yield [app.pid]
    holder.send("lock 2; mark held; sleep 150000; unlock 2")
    holder.until_mark("held")
    waiter.send("lock 2; unlock 2")
    victim.run("op healthy-elsewhere payment 0; sleep 20000; lock 1; cpu 30000; unlock 1; sleep 20000; end")
    op = victim.operations[-1]
    return [Judged(op, blame(set()), op.run_delay_ns < op.duration_ns // 8)]


@scenario(healthy=True)
def healthy_pipe(lab: Lab, rng: random.Random) -> Play:
    """Quick answers through a pipe, in time, beside a hog."""
    victim, _worker, ask = _pipes(lab, "cpu 1000")
    decoy(lab, rng, 1)
    yield [victim.pid]
    for i in range(5):
        victim.main.run(f"op healthy-pipe-{i} payment 150000000; {ask}; end")
    return [Judged(op, blame(set()), op.in_time) for op in victim.main.operations]
