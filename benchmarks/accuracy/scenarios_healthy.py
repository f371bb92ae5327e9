"""Nobody is to be blamed: operations in time on a machine in trouble, and operations whose own work took the time while others
were in trouble beside them. Every way of waiting of `scenarios_waits` has its punctual twin here."""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.accuracy.lab import Actor, Lab
from benchmarks.accuracy.scenarios_cpu import decoy, one_of
from benchmarks.accuracy.scenarios_locks import fifo
from benchmarks.accuracy.scenarios_waits import HANDOFFS, LOCKS, Side
from benchmarks.accuracy.truth import NOBODY, Judged, Play, scenario

__all__: list[str] = []


def _in_time(victim: Actor) -> list[Judged]:
    return [Judged(op, NOBODY, op.in_time) for op in victim.main.operations]


def _own(victim: Actor) -> list[Judged]:
    """Operations without a deadline that were hardly held up by others."""
    return [Judged(op, NOBODY, op.run_delay_ns < op.duration_ns // 8) for op in victim.main.operations]


def _punctual(name: str, build: Callable[[Lab], Side]) -> None:
    def play(lab: Lab, rng: random.Random) -> Play:
        side = build(lab)
        side.victim.pin(0)
        side.other.pin(1)
        decoy(lab, rng, rng.choice((0, 1)))
        yield side.watch
        for i in range(3):
            side.other.send(side.answer.format(work=f"cpu {rng.randint(300, 1500)}"))
            side.victim.run(f"op punctual-{name}-{i} payment 400000000; {side.ask}; end")
            side.other.done()
        return [Judged(op, NOBODY, op.in_time) for op in side.victim.operations]

    play.__name__, play.__doc__ = f"healthy_{name}", f"Waits by {name.replace('_', ' ')}, answered in time beside a hog."
    scenario(healthy=True)(play)


for _name, _build in {**HANDOFFS, **LOCKS}.items():
    _punctual(_name, _build)


# --- in time, although something did happen to it


@scenario(healthy=True)
def healthy_rt_burst(lab: Lab, rng: random.Random) -> Play:
    """A real-time burst takes the victim's CPU for a while; it is in time all the same."""
    victim, burst = lab.actor("payments").pin(0), lab.actor("feed-handler").pin(0)
    fifo(burst, rng)
    yield [victim.pid]
    victim.main.send("op burst payment 400000000; cpu 40000; end")
    burst.main.run("sleep 5000; cpu 40000")
    victim.main.done()
    return _in_time(victim)


@scenario(healthy=True)
def healthy_convoy(lab: Lab, rng: random.Random) -> Play:
    """Three threads pass a lock on before the victim has it, in time."""
    app = lab.actor("ledger", 4)
    victim, *others = app.threads
    yield [app.pid]
    for other in others:
        other.send(f"lock 1; sleep {rng.randint(5000, 20000)}; unlock 1")
    victim.run("op convoy-in-time payment 400000000; lock 1; cpu 300; unlock 1; end")
    return _in_time(app)


@scenario(healthy=True)
def healthy_slow_disk(lab: Lab, rng: random.Random) -> Play:
    """Reads from a slow device, in time."""
    disk = lab.slow_disk(64)
    victim = lab.actor("payments")
    victim.main.run(f"open 1 {disk.device} rd")
    disk.set_service_us(rng.randint(10000, 20000))
    yield [victim.pid]
    for i in range(3):
        victim.main.run(f"op slow-disk-{i} payment 400000000; read 1 4096 {i << 20}; end")
    disk.set_service_us(0)
    return _in_time(victim)


@scenario(healthy=True)
def healthy_own_quota(lab: Lab, rng: random.Random) -> Play:
    """The victim is throttled by its own quota once, and in time."""
    victim, group = lab.actor("payments").pin(0), lab.cgroup("cpu")
    (group / "cpu.cfs_period_us").write_text("100000")
    (group / "cpu.cfs_quota_us").write_text("30000")
    (group / "cpu.shares").write_text("30000")
    (group / "cgroup.procs").write_text(str(victim.pid))
    yield [victim.pid]
    victim.main.run("op own-quota payment 800000000; cpu 45000; end")
    return _in_time(victim)


@scenario(healthy=True)
def healthy_child(lab: Lab, rng: random.Random) -> Play:
    """A child and a program are awaited, in time."""
    victim = lab.actor("payments")
    decoy(lab, rng, 1)
    yield [victim.pid]
    for i, how in enumerate(("child", "run", "join")):
        victim.main.run(f"op child-{i} payment 800000000; {how} cpu {rng.randint(1000, 5000)}; end")
    return _in_time(victim)


@scenario(healthy=True)
def healthy_python_threads(lab: Lab, rng: random.Random) -> Play:
    """A Python program whose threads compete for the interpreter, in time."""
    app = lab.actor("pyapp", 3, python=True)
    victim, *others = app.threads
    yield [app.pid]
    for other in others:
        other.send("cpu 150000")
    for i in range(3):
        victim.run(f"op python-{i} payment 800000000; cpu 2000; sleep 2000; end")
    for other in others:
        other.done()
    return _in_time(app)


@scenario(healthy=True)
def healthy_unpinned(lab: Lab, rng: random.Random) -> Play:
    """Nobody is pinned; light hogs everywhere; in time."""
    victim = lab.actor("payments")
    for _ in range(4):
        hog = lab.actor(one_of(rng))
        os.setpriority(os.PRIO_PROCESS, hog.pid, 15)
        hog.main.send("forever")
    yield [victim.pid]
    for i in range(5):
        victim.main.run(f"op unpinned-{i} payment 400000000; cpu 5000; sleep 3000; end")
    return _in_time(victim)


@scenario(healthy=True)
def healthy_journal(lab: Lab, rng: random.Random) -> Play:
    """Another process fills the journal of a quick device; the victim's fsync is in time."""
    where, _ = lab.disk(256)
    (where / "d").mkdir()
    victim, filler = lab.actor("payments"), lab.actor("unpacker")
    victim.main.run(f"open 1 {where}/ledger rwc; write 1 65536 0; fsync 1")
    yield [victim.pid]
    filler.main.send(f"creates {where}/d 3000")
    for i in range(3):
        victim.main.run(f"op journal-{i} payment 2000000000; write 1 4096 0; fsync 1; end")
    filler.main.done()
    return _in_time(victim)


@scenario(healthy=True)
def healthy_stop_in_time(lab: Lab, rng: random.Random) -> Play:
    """Stopped and continued quickly, in time."""
    victim, sender = lab.actor("payments").pin(0), lab.actor("operator")
    yield [victim.pid]
    victim.main.send("op stop-in-time payment 400000000; cpu 40000; end")
    sender.main.run(f"sleep 5000; kill {victim.pid} 19; sleep 20000; kill {victim.pid} 18")
    victim.main.done()
    return _in_time(victim)


# --- its own work, while others are in trouble; no deadline


def _beside(name: str, summary: str, trouble: Callable[[Lab, random.Random], Callable[[], object]]) -> None:
    """`trouble` sets the stage and returns what starts the trouble."""

    def play(lab: Lab, rng: random.Random) -> Play:
        victim = lab.actor("payments").pin(0)
        start = trouble(lab, rng)
        yield [victim.pid]
        victim.main.send(f"op {name} payment 0; cpu {rng.randint(20000, 40000)}; {rng.choice(_PAUSES)} 20000; cpu 10000; end")
        start()
        victim.main.done()
        return _own(victim)

    play.__name__, play.__doc__ = f"healthy_beside_{name}", f"Own work and sleep, while {summary}."
    scenario(healthy=True)(play)


_PAUSES = ("sleep", "usleep", "pollsleep", "selectsleep", "epollsleep")


def _throttled(lab: Lab, rng: random.Random) -> Callable[[], object]:
    hog, group = lab.actor("batch-recon").pin(1), lab.cgroup("cpu")
    (group / "cpu.cfs_quota_us").write_text("10000")
    (group / "cgroup.procs").write_text(str(hog.pid))
    return lambda: hog.main.send("forever")


def _oom_killed(lab: Lab, rng: random.Random) -> Callable[[], object]:
    other, group = lab.actor("memory-hog").pin(1), lab.cgroup("memory")
    (group / "memory.limit_in_bytes").write_text(str(40 << 20))
    (group / "cgroup.procs").write_text(str(other.pid))
    return lambda: other.main.send("map 1 100; touch 1")


def _stopped(lab: Lab, rng: random.Random) -> Callable[[], object]:
    other, operator = lab.actor("cpu-hog").pin(1), lab.actor("operator").pin(1)
    other.main.send("forever")
    return lambda: operator.main.run(f"kill {other.pid} 19; sleep 20000; kill {other.pid} 18; kill {other.pid} 9")


def _frozen(lab: Lab, rng: random.Random) -> Callable[[], object]:
    other, group = lab.actor("cpu-hog").pin(1), lab.cgroup("freezer")
    (group / "cgroup.procs").write_text(str(other.pid))
    other.main.send("forever")

    def freeze() -> None:
        (group / "freezer.state").write_text("FROZEN")
        (group / "freezer.state").write_text("THAWED")

    lab.undo(lambda: (group / "freezer.state").write_text("THAWED"))
    return freeze


def _chatter(lab: Lab, rng: random.Random) -> Callable[[], object]:
    port = rng.randint(32000, 33000)
    sink, noisy = lab.actor("dashboard").pin(1), lab.actor("market-data").pin(1)
    sink.main.run(f"listen 3 {port}")
    sink.main.send("accept 2 3; repeat -1; recv 2 1400; send 2 100")
    noisy.main.run(f"connect 1 {port}")
    return lambda: noisy.main.send("repeat -1; send 1 1400; recv 1 100")


def _children(lab: Lab, rng: random.Random) -> Callable[[], object]:
    other = lab.actor("payments-killer").pin(1)
    return lambda: other.main.send("repeat 60; child cpu 500")


def _signals(lab: Lab, rng: random.Random) -> Callable[[], object]:
    other, target = lab.actor("killer-bot").pin(1), lab.actor("target").pin(1)
    return lambda: other.main.run(f"repeat 30; kill {target.pid} 23; usleep 500")


def _io_errors(lab: Lab, rng: random.Random) -> Callable[[], object]:
    backing = lab.path / (lab.unique("disk") + ".img")
    device = lab.loop(backing, 32)
    other = lab.actor("archiver").pin(1)
    other.main.run(f"open 1 {device} rd")
    os.truncate(backing, 1 << 20)
    return lambda: other.main.send(f"op bad read 0; read 1 4096 {16 << 20}; end")


def _loss(lab: Lab, rng: random.Random) -> Callable[[], object]:
    a, b, _, to = lab.netns_pair()
    client, server = lab.actor("market-data", netns=a).pin(1), lab.actor("gateway", netns=b).pin(1)
    port = rng.randint(20000, 30000)
    server.main.run(f"listen 3 {port} {to}")
    server.main.send("accept 2 3")
    client.main.run(f"connect 1 {port} {to}")
    rule = ["INPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP"]
    subprocess.run(["ip", "netns", "exec", b, "iptables", "-I", *rule], check=True, timeout=10)
    return lambda: client.main.send("send 1 200")


def _slow_disk_elsewhere(lab: Lab, rng: random.Random) -> Callable[[], object]:
    disk = lab.slow_disk(64)
    other = lab.actor("disk-hog", 2).pin(1)
    for thread in other.threads:
        thread.run(f"open {10 + thread.tid % 40} {disk.device} rd")
    disk.set_service_us(3000)
    return lambda: [t.send(f"repeat -1; read {10 + t.tid % 40} 65536 0") for t in other.threads]


def _convoy_elsewhere(lab: Lab, rng: random.Random) -> Callable[[], object]:
    other = lab.actor("ledger", 4).pin(1)
    return lambda: [t.send("repeat 3; lock 1; usleep 5000; unlock 1") for t in other.threads]


for _key, _summary, _trouble in (
    ("quota", "a neighbour is throttled by its quota", _throttled),
    ("oom", "a neighbour is killed for its memory", _oom_killed),
    ("stop", "a neighbour is stopped, continued and killed", _stopped),
    ("freezer", "a neighbour is frozen and thawed", _frozen),
    ("chatter", "neighbours chatter over the loopback interface", _chatter),
    ("children", "a neighbour with a terrible name starts one child after the other", _children),
    ("signals", "neighbours signal each other", _signals),
    ("io_errors", "a neighbour's device fails", _io_errors),
    ("loss", "a neighbour's packets are lost", _loss),
    ("slow_disk", "neighbours keep another device busy", _slow_disk_elsewhere),
    ("convoy", "neighbours stand in line for their lock", _convoy_elsewhere),
):
    _beside(_key, _summary, _trouble)


@scenario(healthy=True)
def healthy_own_disk(lab: Lab, rng: random.Random) -> Play:
    """Reads of its own device alone, no deadline, while neighbours keep another device busy."""
    mine, theirs = lab.slow_disk(64), lab.slow_disk(64)
    victim, other = lab.actor("payments").pin(0), lab.actor("disk-hog").pin(1)
    victim.main.run(f"open 1 {mine.device} rd")
    other.main.run(f"open 1 {theirs.device} rd")
    mine.set_service_us(rng.randint(5000, 20000))
    theirs.set_service_us(2000)
    yield [victim.pid]
    other.main.send("repeat -1; read 1 65536 0")
    victim.main.run("op own-disk payment 0; read 1 4096 0; read 1 4096 1048576; read 1 4096 2097152; end")
    mine.set_service_us(0)
    return _own(victim)


@scenario(healthy=True)
def healthy_declined(lab: Lab, rng: random.Random) -> Play:
    """The program itself declines the payment; the kernel had no part in it, and the loud neighbour neither."""
    victim = lab.actor("payments").pin(0)
    decoy(lab, rng, 1)
    yield [victim.pid]
    victim.main.run(f"op declined payment 400000000; cpu {rng.randint(5000, 15000)}; decline; end")
    op = victim.main.operations[-1]
    return [Judged(op, NOBODY, op.outcome == "failed" and op.run_delay_ns < op.duration_ns // 8)]


@scenario(healthy=True)
def healthy_swap_elsewhere(lab: Lab, rng: random.Random) -> Play:
    """A neighbour reads its pages back from swap while the victim works; no deadline."""
    disk = lab.slow_disk(256)
    subprocess.run(["mkswap", disk.device], check=True, timeout=10, capture_output=True)
    subprocess.run(["swapon", disk.device], check=True, timeout=10)
    lab.undo(lambda: subprocess.run(["swapoff", disk.device], check=True, timeout=120))
    group = lab.cgroup("memory")
    (group / "memory.limit_in_bytes").write_text(str(200 << 20))
    victim, other = lab.actor("payments").pin(0), lab.actor("memory-hog").pin(1)
    (group / "cgroup.procs").write_text(str(other.pid))
    other.main.run("map 1 10; touch 1; pageout 1")
    Path(group / "memory.force_empty").write_text("0")
    disk.set_service_us(300)
    yield [victim.pid]
    other.main.send("peek 1")
    victim.main.run(f"op swap-elsewhere payment 0; cpu {rng.randint(20000, 40000)}; end")
    disk.set_service_us(0)
    other.main.done()
    return _own(victim)
