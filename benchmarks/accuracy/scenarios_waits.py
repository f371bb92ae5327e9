"""Waiting for others in the many ways that programs have: hand-offs and locks, whose other side is slow or preempted.

`HANDOFFS` and `LOCKS` say how each kind of wait is set up; every one is played with the other side at work or asleep, and
with the other side's CPU taken by a third process.
"""

import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.accuracy.lab import Actor, Lab, Thread, set_nice
from benchmarks.accuracy.scenarios_cpu import decoy
from benchmarks.accuracy.scenarios_locks import fifo
from benchmarks.accuracy.truth import Judged, Play, blame, scenario

__all__ = ["HANDOFFS", "LOCKS", "Side", "two_threads"]

_PREEMPTED = {"cpu_preempted", "cpu_preempted_rt"}


@dataclass(slots=True)
class Side:
    """A victim and who it waits for. `ask`: the victim's steps; `answer`: the other's, with {work} in them."""

    victim: Thread
    other: Thread
    watch: list[int]
    ask: str
    answer: str


def two_threads(ask: str, answer: str) -> Callable[[Lab], Side]:
    """Both are threads of one process."""

    def build(lab: Lab) -> Side:
        app = lab.actor("matching", 2)
        return Side(app.threads[0], app.threads[1], [app.pid], ask, answer)

    return build


def _eventfd(lab: Lab) -> Side:
    fd = os.eventfd(0)
    os.set_inheritable(fd, True)
    lab.undo(lambda: os.close(fd))
    victim, other = (lab.actor(name, fds=(fd,)) for name in ("payments", "notifier"))
    for actor in (victim, other):
        actor.main.run(f"use 1 {fd}")
    return Side(victim.main, other.main, [victim.pid, other.pid], "read 1 8", "{work}; write 1 8")


def _unix_socket(kind: socket.SocketKind) -> Callable[[Lab], Side]:
    def build(lab: Lab) -> Side:
        ours = socket.socketpair(socket.AF_UNIX, kind)
        for end in ours:
            end.set_inheritable(True)
            lab.undo(end.close)
        victim, other = (lab.actor(n, fds=(e.fileno(),)) for n, e in zip(("payments", "accounts"), ours, strict=True))
        for actor, end in zip((victim, other), ours, strict=True):
            actor.main.run(f"use 1 {end.fileno()}")
        return Side(victim.main, other.main, [victim.pid], "write 1 64; read 1 64", "read 1 64; {work}; write 1 64")

    return build


def _readable(how: str) -> Callable[[Lab], Side]:
    def build(lab: Lab) -> Side:
        read_end, write_end = lab.pipe()
        victim, other = lab.actor("payments", fds=(read_end,)), lab.actor("feeder", fds=(write_end,))
        victim.main.run(f"use 1 {read_end}")
        other.main.run(f"use 1 {write_end}")
        return Side(victim.main, other.main, [victim.pid], f"{how} 1; read 1 64", "{work}; write 1 64")

    return build


def _signal(lab: Lab) -> Side:
    victim, other = lab.actor("payments"), lab.actor("scheduler")
    return Side(victim.main, other.main, [victim.pid], "sigwait 10", f"{{work}}; kill {victim.pid} 10")


HANDOFFS: dict[str, Callable[[Lab], Side]] = {
    "semaphore": two_threads("semwait 1", "{work}; sempost 1"),
    "barrier": two_threads("barrier 1", "{work}; barrier 1"),
    "eventfd": _eventfd,
    "unix_stream": _unix_socket(socket.SOCK_STREAM),
    "unix_datagram": _unix_socket(socket.SOCK_DGRAM),
    "poll_pipe": _readable("pollin"),
    "epoll_pipe": _readable("epollin"),
    "signal": _signal,
}


def _file_lock(lock: str, unlock: str) -> Callable[[Lab], Side]:
    def build(lab: Lab) -> Side:
        path = lab.path / lab.unique("lockfile")
        lab.undo(lambda: path.unlink(missing_ok=True))
        victim, other = lab.actor("payments"), lab.actor("cron")
        for actor in (victim, other):
            actor.main.run(f"open 1 {path} rwc")
        ask = f"{lock} 1; cpu 300; {unlock} 1"
        return Side(victim.main, other.main, [victim.pid], ask, f"{lock} 1; mark held; {{work}}; {unlock} 1")

    return build


LOCKS: dict[str, Callable[[Lab], Side]] = {
    "pi_mutex": two_threads("pilock 1; cpu 300; piunlock 1", "pilock 1; mark held; {work}; piunlock 1"),
    "write_behind_reader": two_threads("wrlock 1; rwunlock 1", "rdlock 1; mark held; {work}; rwunlock 1"),
    "flock": _file_lock("flock", "unflock"),
    "record_lock": _file_lock("setlk", "unlk"),
}
_WITHOUT_OWNER = frozenset({"write_behind_reader"})


def _placed(lab: Lab, rng: random.Random, side: Side) -> int:
    """Each side on a CPU of its own, a decoy on the victim's; returns the other side's CPU."""
    cpu = rng.choice((0, 1))
    side.victim.pin(cpu)
    side.other.pin(1 - cpu)
    decoy(lab, rng, cpu)
    return 1 - cpu


def _third(lab: Lab, rng: random.Random, cpu: int) -> tuple[Actor, str]:
    """A process that will take `cpu` from its user, and the kind of cause that makes."""
    hog = lab.actor("reindex").pin(cpu)
    if rng.random() < 0.5:
        fifo(hog, rng)
        return hog, "cpu_preempted_rt"
    set_nice(hog.pid, -15)
    return hog, "cpu_preempted"


def _slow_handoff(name: str, build: Callable[[Lab], Side]) -> None:
    def play(lab: Lab, rng: random.Random) -> Play:
        side = build(lab)
        _placed(lab, rng, side)
        work = f"{rng.choice(('cpu', 'sleep'))} {rng.randint(100000, 180000)}"
        yield side.watch
        side.other.send(side.answer.format(work=work))
        side.victim.run(f"op slow-{name} payment 30000000; {side.ask}; end")
        op = side.victim.operations[-1]
        truth = blame("peer_slow", side.other.tid, path=(side.victim.tid, side.other.tid))
        return [Judged(op, truth, op.duration_ns > 70_000_000 and op.run_delay_ns < op.duration_ns // 3)]

    play.__name__, play.__doc__ = f"{name}_slow", f"Waits by {name.replace('_', ' ')} for somebody who takes his time."
    scenario()(play)


def _preempted_handoff(name: str, build: Callable[[Lab], Side]) -> None:
    def play(lab: Lab, rng: random.Random) -> Play:
        side = build(lab)
        hog, kind = _third(lab, rng, _placed(lab, rng, side))
        yield side.watch
        side.other.send(side.answer.format(work="cpu 30000"))
        hog.main.send(f"cpu {rng.randint(250000, 350000)}")
        side.victim.run(f"op preempted-{name} payment 30000000; {side.ask}; end")
        op = side.victim.operations[-1]
        truth = blame(kind, hog.pid, path=(side.victim.tid, side.other.tid, hog.pid))
        return [Judged(op, truth, op.duration_ns > 100_000_000 and op.run_delay_ns < op.duration_ns // 3)]

    play.__name__, play.__doc__ = f"{name}_preempted", f"Waits by {name.replace('_', ' ')} for somebody whose CPU is taken."
    scenario()(play)


def _slow_lock(name: str, build: Callable[[Lab], Side]) -> None:
    def play(lab: Lab, rng: random.Random) -> Play:
        side = build(lab)
        _placed(lab, rng, side)
        work = f"{rng.choice(('cpu', 'sleep'))} {rng.randint(120000, 200000)}"
        yield side.watch
        side.other.send(side.answer.format(work=work))
        side.other.until_mark("held")
        side.victim.run(f"op lock-{name} payment 30000000; {side.ask}; end")
        op = side.victim.operations[-1]
        kinds = {"lock_holder", "peer_slow"} if name in _WITHOUT_OWNER else {"lock_holder"}
        truth = blame(kinds, side.other.tid, path=(side.victim.tid, side.other.tid))
        return [Judged(op, truth, op.duration_ns > 80_000_000 and op.run_delay_ns < op.duration_ns // 3)]

    play.__name__, play.__doc__ = f"{name}_held", f"The {name.replace('_', ' ')} is held by somebody at work or asleep."
    scenario()(play)


def _inverted_lock(name: str, build: Callable[[Lab], Side]) -> None:
    def play(lab: Lab, rng: random.Random) -> Play:
        side = build(lab)
        hog, kind = _third(lab, rng, _placed(lab, rng, side))
        yield side.watch
        side.other.send(side.answer.format(work="cpu 60000"))
        side.other.until_mark("held")
        hog.main.send(f"cpu {rng.randint(300000, 400000)}")
        side.victim.run(f"op inverted-{name} payment 30000000; {side.ask}; end")
        op = side.victim.operations[-1]
        kinds = {"priority_inversion", kind} if name in _WITHOUT_OWNER else {"priority_inversion"}
        truth = blame(kinds, hog.pid, path=(side.victim.tid, side.other.tid, hog.pid))
        return [Judged(op, truth, op.duration_ns > 100_000_000 and op.run_delay_ns < op.duration_ns // 3)]

    play.__name__, play.__doc__ = f"{name}_inverted", f"The CPU of who holds the {name.replace('_', ' ')} is taken by a third."
    scenario()(play)


for _name, _build in HANDOFFS.items():
    _slow_handoff(_name, _build)
for _name in ("semaphore", "unix_stream", "epoll_pipe"):
    _preempted_handoff(_name, HANDOFFS[_name])
for _name, _build in LOCKS.items():
    _slow_lock(_name, _build)
for _name in ("pi_mutex", "flock"):
    _inverted_lock(_name, LOCKS[_name])


@scenario()
def thread_joined(lab: Lab, rng: random.Random) -> Play:
    """The operation joins a thread of its own that works or sleeps."""
    victim = lab.actor("payments").pin(0)
    decoy(lab, rng, 1)
    yield [victim.pid]
    victim.main.run(f"op joined payment 30000000; join {rng.choice(('cpu', 'sleep'))} {rng.randint(100000, 180000)}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("peer_slow", -1), op.run_delay_ns < op.duration_ns // 3)]


@scenario()
def program_run(lab: Lab, rng: random.Random) -> Play:
    """The operation runs another program and waits for it."""
    victim = lab.actor("payments").pin(0)
    decoy(lab, rng, 1)
    yield [victim.pid]
    victim.main.run(f"op ran payment 30000000; run {rng.choice(('cpu', 'sleep'))} {rng.randint(100000, 180000)}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("peer_slow", -1), op.run_delay_ns < op.duration_ns // 3)]


@scenario()
def own_doze(lab: Lab, rng: random.Random) -> Play:
    """The operation sleeps on purpose by one of the calls that can; harmless signals and a hog on its CPU around."""
    cpu = rng.choice((0, 1))
    victim, other = lab.actor("payments").pin(cpu), lab.actor("watchdog")
    decoy(lab, rng, cpu)
    how = rng.choice(("usleep", "pollsleep", "selectsleep", "epollsleep"))
    yield [victim.pid]
    other.main.send(f"repeat 5; sleep 9000; kill {victim.pid} 0")
    victim.main.run(f"op doze payment 20000000; {how} {rng.randint(80000, 150000)}; end")
    other.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("own_sleep"), op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def frozen(lab: Lab, rng: random.Random) -> Play:
    """The victim's cgroup is frozen for a while."""
    group = lab.cgroup("freezer")
    victim, operator = lab.actor("payments").pin(0), lab.actor("operator")
    (group / "cgroup.procs").write_text(str(victim.pid))
    decoy(lab, rng, 1)
    state = group / "freezer.state"
    lab.undo(lambda: state.write_text("THAWED"))
    work = rng.choice(("cpu", "sleep"))
    yield [victim.pid]
    victim.main.send(f"op frozen payment 60000000; {work} 40000; end")
    operator.main.run(f"sleep 10000; echo {state} FROZEN; sleep {rng.randint(150000, 250000)}; echo {state} THAWED")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("stopped", operator.pid), op.duration_ns > 140_000_000)]


@scenario()
def traced(lab: Lab, rng: random.Random) -> Play:
    """A debugger attaches and stops the victim."""
    victim, debugger = lab.actor("payments").pin(0), lab.actor("debugger")
    decoy(lab, rng, 1)
    yield [victim.pid]
    victim.main.send("op traced payment 60000000; cpu 40000; end")
    debugger.main.run(f"sleep 10000; trace {victim.pid} {rng.randint(120000, 200000)}")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("stopped", debugger.pid), op.duration_ns > 130_000_000)]
