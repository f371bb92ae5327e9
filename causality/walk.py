"""Why was a thread not done at a time? The bounded backward walk (D3-D5, D7).

For every nanosecond of a window, exactly one root: `Root(start, end, mechanism, culprit, hops, ...)`. A running thread
is its own root (minus interrupts on its CPU); a runnable one's root is who had its CPU; a blocked one's root is, for
each part of the wait, what the thread it waited for was doing then: the holder of the lock, the waker, the journal
thread. So the walk never leaves the window in which the victim waited, and every part of the answer stands for itself:
the explanation of a nanosecond does not depend on the window asked for. Intervals are therefore explained once and
remembered; the walk is a stack of generators, not recursion.

Guards: a thread that is being explained already ends the walk there (cycle), as do `max_depth` hops and `max_intervals`
visits; each is recorded in `limits` and its time is `unknown`. Where events are missing, time is `lost`, and what only a
missing event could prove is `unknown`.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from causality.locks import Held, held_by
from causality.running import Span, spans
from causality.timeline import BLOCKED, RUNNABLE, RUNNING, Interval, Key, Syscall, Timeline, Wake
from causality.window import Follow, Leaf, Who, Window
from causality.window import Wait as MechanismWait
from causality.window import Wake as MechanismWake
from events.syscalls import NAMES

__all__ = ["LOCK_EDGES", "Hop", "Resolver", "Root", "Walk", "wait_label"]

Resolver = Callable[[Window, MechanismWait], Sequence[Leaf | Follow]]
LOCK_EDGES: Final = frozenset({"holds_lock", "holds_futex"})
IRQ_TID: Final = -1  # the culprit key of an interrupt is (IRQ_TID, 0) with a name
_STOPPED: Final = 4 | 8  # TASK_STOPPED, TASK_TRACED
_FROZEN: Final = 0x8000
_STOP_SIGNALS: Final = (19, 20, 21, 22)
_SOCKET_CALLS: Final = frozenset({"connect", "accept", "accept4", "recvfrom", "recvmsg", "sendto", "sendmsg", "recvmmsg"})
_LEAVES: Final = ("sys_exit", "page_fault_user", "page_fault_kernel", "sched_process_exit")
_RETRY_NS: Final = 1_000_000  # what a thread may run between a wait that timed out and the next turn of the same wait
_CONDITION_GROUP_BYTES: Final = 4  # from one of the two words of a condition variable to the other
_SLEEPS: Final = frozenset({"nanosleep", "clock_nanosleep"})


@dataclass(frozen=True, slots=True)
class Hop:
    """`waiter` waited for `other` (None: nobody recorded)."""

    edge: str
    waiter: Key
    other: Key
    evidence: tuple[str, ...] = ()
    confidence: str = "exact"


@dataclass(frozen=True, slots=True)
class Root:
    """What a span of time was spent on. `label`: for the thread that was asked about. `kind`: cause kind, if settled."""

    start_mono_ns: int
    end_mono_ns: int
    label: str
    mechanism: str  # run, sleep, runq, runq_rt, quota, irq, idle, net, leaf, unknown, lost
    culprit: Key | None = None
    name: str = ""  # of an interrupt
    hops: tuple[Hop, ...] = ()
    evidence: tuple[str, ...] = ()
    confidence: str = "exact"
    kind: str | None = None
    cpu: int = -1
    lock: str = ""  # which lock, for convoys
    text: str = ""

    @property
    def ns(self) -> int:
        """Its length."""
        return self.end_mono_ns - self.start_mono_ns


Steps = Generator[Any, list[Root], list[Root]]
_RANK: Final = {"exact": 0, "strong": 1, "inferred": 2, "statistical": 3}


def weaker(a: str, b: str) -> str:
    """The lower of two confidence classes."""
    return a if _RANK[a] >= _RANK[b] else b


def _by_timer(frames: tuple[str, ...]) -> bool:
    return any("timer" in name.lower() for name in frames)


def wait_label(call: Syscall | None) -> str:
    """The ledger label of a wait by the system call the thread is in."""
    if call is None:
        return "wait.other"
    name = NAMES.get(call.nr, "")
    if name in _SLEEPS:
        return "wait.timer"
    if name.startswith("futex"):
        return "wait.futex"
    if name in ("wait4", "waitid"):
        return "wait.child"
    if name in ("pause", "rt_sigtimedwait", "rt_sigsuspend"):
        return "wait.signal"
    if name in ("flock", "fcntl"):
        return "wait.lock"
    if call.object_type == 1 or name in _SOCKET_CALLS:
        return "wait.net"
    if call.object_type == 2:
        return "wait.pipe"
    return "wait.other"


class Walk:
    """Explains threads of one operation. `resolvers` are the mechanisms, asked in order."""

    def __init__(
        self, timeline: Timeline, window: Window, *, lo: int, hi: int, victim: Key, resolvers: Sequence[Resolver],
        network: Callable[[str, Window, MechanismWait], Sequence[Leaf | Follow]] | None = None, max_depth: int = 64,
        max_intervals: int = 20000,
    ) -> None:  # fmt: skip
        self.timeline, self.window, self.victim = timeline, window, victim
        self.lo, self.hi = lo, hi
        self._resolvers, self._network = resolvers, network
        self._max_depth, self._max_intervals = max_depth, max_intervals
        self._memo: dict[tuple[Key, int], list[Root]] = {}
        self._busy: set[tuple[Key, int]] = set()
        self._signallers: dict[tuple[Key, int], tuple[Key, tuple[str, ...]] | None] = {}
        self.limits: dict[str, int] = {}
        self.visited = 0

    def explain(self, key: Key, lo: int, hi: int) -> list[Root]:
        """Roots that cover [lo, hi), in order."""
        stack: list[Steps] = [self._explain(key, lo, hi, 0)]
        answer: list[Root] | None = None
        while True:
            try:
                stack.append(stack[-1].send(answer) if answer is not None else next(stack[-1]))
                answer = None
            except StopIteration as done:
                stack.pop()
                answer = done.value
                if not stack:
                    return answer or []

    def _explain(self, key: Key, lo: int, hi: int, depth: int) -> Steps:
        roots: list[Root] = []
        for interval in self.timeline.states(key, lo, hi):
            a, b = max(lo, interval.start_mono_ns), min(hi, interval.end_mono_ns)
            if interval.lost:
                roots.append(Root(a, b, "lost", "lost", evidence=interval.evidence))
            else:
                roots += yield from self._interval(key, interval, a, b, depth)
        return roots

    def _interval(self, key: Key, interval: Interval, lo: int, hi: int, depth: int) -> Steps:
        self.visited += 1
        if interval.state == RUNNING:
            return self._running(key, interval, lo, hi)
        if interval.state == RUNNABLE:
            return self._runnable(key, interval, lo, hi)
        if interval.state == BLOCKED:
            return (yield from self._blocked(key, interval, lo, hi, depth))
        return [Root(lo, hi, "unknown", "unknown", evidence=interval.evidence)]

    # --- running

    def _running(self, key: Key, interval: Interval, lo: int, hi: int) -> list[Root]:
        roots = []
        for a, b, frame in self._net_frames(interval.cpu, lo, hi):
            if frame is not None:
                label, name, evidence = frame
                roots.append(Root(a, b, label, "irq", (IRQ_TID, 0), name, evidence=evidence, cpu=interval.cpu))
            elif key == self.victim:
                roots += self._own(key, a, b, interval)
            else:
                roots.append(Root(a, b, "run.user", "run", evidence=interval.evidence, cpu=interval.cpu))
        return roots

    def _own(self, key: Key, lo: int, hi: int, interval: Interval) -> list[Root]:
        """The victim's own running time, split where it enters and leaves the kernel, and by what it did there."""
        if self.timeline.task(*key).observer:
            return [Root(lo, hi, "run.observer", "run", evidence=interval.evidence, cpu=interval.cpu)]
        rows = self.timeline.of_task_kinds(key[0], ("sys_enter", "sys_enter_futex", "sys_exit"), lo, hi)
        inside = self.timeline.in_kernel(key, lo)
        roots: list[Root] = []
        at = lo
        for i in range(len(rows)):
            t = int(rows.time[i])
            if t > at:
                roots.append(self._own_piece(at, t, inside, interval))
            inside, at = rows.name(i) != "sys_exit", t
        if hi > at:
            roots.append(self._own_piece(at, hi, inside, interval))
        for span in spans(self.timeline, self.window, key, lo, hi):
            roots = _overlaid(roots, span, interval.cpu)
        return roots

    def _own_piece(self, lo: int, hi: int, inside: bool | None, interval: Interval) -> Root:
        if inside is None:
            return Root(lo, hi, "unknown", "unknown", evidence=interval.evidence, cpu=interval.cpu)
        label = "run.kernel" if inside else "run.user"
        return Root(lo, hi, label, "run", evidence=interval.evidence, cpu=interval.cpu)

    def _net_frames(self, cpu: int, lo: int, hi: int) -> list[tuple[int, int, tuple[str, str, tuple[str, ...]] | None]]:
        """[lo, hi) on a CPU split by the innermost non-maskable, hard or soft interrupt frame (net values)."""
        frames = [f for f in self.timeline.frames(cpu, lo, hi) if f.kind in ("hard", "soft")] if cpu >= 0 else []
        frames += self.timeline.nmis(cpu, lo, hi) if cpu >= 0 else []
        if not frames:
            return [(lo, hi, None)]
        frames.sort(key=lambda f: (f.start_mono_ns, -f.end_mono_ns))
        cuts = sorted({lo, hi, *(f.start_mono_ns for f in frames), *(f.end_mono_ns for f in frames)})
        out: list[tuple[int, int, tuple[str, str, tuple[str, ...]] | None]] = []
        begins = iter(frames)
        following = next(begins, None)
        stack: list[Any] = []
        for i in range(len(cuts) - 1):
            a, b = cuts[i], cuts[i + 1]
            stack = [f for f in stack if f.end_mono_ns > a]
            while following is not None and following.start_mono_ns <= a:
                if following.end_mono_ns > a:
                    stack.append(following)
                following = next(begins, None)
            top = stack[-1] if stack else None
            value = None if top is None else (f"irq.{top.kind}", top.name, top.evidence)
            if out and out[-1][2] == value:
                out[-1] = (out[-1][0], b, value)
            else:
                out.append((a, b, value))
        return out

    # --- runnable

    def _runnable(self, key: Key, interval: Interval, lo: int, hi: int) -> list[Root]:
        if interval.throttled:
            until = self._throttle_end(key, interval)
            if until > lo:
                cut = min(until, hi)
                quota = Root(lo, cut, "runq.quota", "quota", evidence=interval.evidence, cpu=interval.cpu)
                return [quota, *(self._queued(interval, cut, hi) if cut < hi else [])]
        # After a gap, a refill before the thread ran says that it may have been throttled until then.
        if self._after_gap(interval):
            refills = self.timeline.kind("cfs_period_timer", interval.start_mono_ns, interval.end_mono_ns)
            until = min(int(refills.time[-1]), hi) if len(refills) else lo
            if until > lo:
                doubt = Root(lo, until, "unknown", "unknown", evidence=interval.evidence, cpu=interval.cpu)
                return [doubt, *(self._queued(interval, until, hi) if until < hi else [])]
        return self._queued(interval, lo, hi)

    def _after_gap(self, interval: Interval) -> bool:
        """Does the interval begin where events are missing, so that what set it off may be among them?"""
        begin = interval.start_mono_ns
        near = self.timeline.switch_gaps(begin - 1, begin + 1) if interval.inferred else []
        return any(x.end_mono_ns == begin for x in near)

    def _throttle_end(self, key: Key, interval: Interval) -> int:
        """When the quota was refilled: the end of the group's period timer that first follows, else the switch-in."""
        rows = self.timeline.kind("cfs_period_timer", interval.start_mono_ns, interval.end_mono_ns)
        if not len(rows):
            return interval.end_mono_ns
        groups = rows.get("cgroup_id").astype("int64")
        own = self.timeline.task(*key).cgroup_id
        mine = rows.where(groups == own) if own and (groups == own).any() else rows
        return int(mine.time[0])

    def _queued(self, interval: Interval, lo: int, hi: int) -> list[Root]:
        roots: list[Root] = []
        places = interval.places or ((interval.start_mono_ns, interval.cpu),)
        for i, (since, cpu) in enumerate(places):
            a, b = max(lo, since if i else lo), min(hi, places[i + 1][0] if i + 1 < len(places) else hi)
            if a < b:
                roots += self._behind(interval, cpu, a, b)
        return roots

    def _behind(self, interval: Interval, cpu: int, lo: int, hi: int) -> list[Root]:
        confidence = "inferred" if interval.unplaced else "exact"
        roots: list[Root] = []
        frames = self._net_frames(cpu, lo, hi)
        at, k = lo, 0
        for who in self.timeline.occupants(cpu, lo, hi):
            if who.start_mono_ns > at:
                roots.append(Root(at, who.start_mono_ns, "runq", "unknown", evidence=interval.evidence, cpu=cpu))
            while k < len(frames) and frames[k][0] < who.end_mono_ns:
                a, b, frame = max(frames[k][0], who.start_mono_ns), min(frames[k][1], who.end_mono_ns), frames[k][2]
                if a < b and frame is not None:
                    roots.append(Root(a, b, frame[0], "irq", (IRQ_TID, 0), frame[1], evidence=frame[2], cpu=cpu))
                elif a < b and who.key[0] == 0:
                    roots.append(Root(a, b, "runq.idle", "idle", evidence=who.evidence, cpu=cpu, confidence=confidence))
                elif a < b:
                    mechanism = "runq_rt" if who.realtime else "runq"
                    evidence = (*interval.evidence, *who.evidence)
                    roots.append(Root(a, b, "runq", mechanism, who.key, evidence=evidence, cpu=cpu, confidence=confidence))
                if frames[k][1] > who.end_mono_ns:
                    break
                k += 1
            at = who.end_mono_ns
        if at < hi:
            roots.append(Root(at, hi, "runq", "unknown", evidence=interval.evidence, cpu=cpu))
        return roots

    # --- blocked

    def _blocked(self, key: Key, interval: Interval, lo: int, hi: int, depth: int) -> Steps:
        mark = (key, interval.start_mono_ns)
        if mark not in self._memo:
            if mark in self._busy:
                return self._limit("cycle", lo, hi, interval)
            if depth >= self._max_depth:
                return self._limit("depth", lo, hi, interval)
            if self.visited > self._max_intervals:
                return self._limit("fan-out", lo, hi, interval)
            self._busy.add(mark)
            begin, end = max(interval.start_mono_ns, self.lo), min(interval.end_mono_ns, self.hi)
            begin = min(begin, lo)
            self._memo[mark] = yield from self._explain_wait(key, interval, begin, max(end, hi), depth)
            self._busy.discard(mark)
        return clip(self._memo[mark], lo, hi)

    def _limit(self, name: str, lo: int, hi: int, interval: Interval) -> list[Root]:
        self.limits[name] = self.limits.get(name, 0) + 1
        return [Root(lo, hi, "unknown", "unknown", evidence=interval.evidence)]

    def _explain_wait(self, key: Key, interval: Interval, lo: int, hi: int, depth: int) -> Steps:
        call = self.timeline.syscall_at(key, max(interval.start_mono_ns, self.timeline.lo_mono_ns))
        label = wait_label(call)
        if interval.prev_state & (_STOPPED | _FROZEN):
            return [self._stopped(key, interval, lo, hi)]
        if interval.wake is not None and interval.wake.thaws and not interval.wake.frames:
            return self._thawed(key, interval, interval.wake, call, lo, hi)
        if self._after_gap(interval):
            return (yield from self._woken(key, interval, call, lo, hi, depth))
        held = held_by(self.timeline, key, interval, call)
        if held:
            return (yield from self._held(key, interval, held, lo, hi, depth))
        wait = self._mechanism_wait(key, interval, lo, hi, call)
        for resolve in self._resolvers:
            pieces = resolve(self.window, wait)
            if pieces:
                return (yield from self._pieces(key, interval, pieces, lo, hi, depth))
        pieces = self._network(label, self.window, wait) if self._network is not None else []
        if pieces:
            return (yield from self._pieces(key, interval, pieces, lo, hi, depth))
        signaller = self._signaller(key, interval, call)
        if signaller is not None:
            other, evidence = signaller
            hop = Hop("wakes", key, other, (*interval.evidence, *evidence), "inferred")
            found = yield self._explain(other, lo, hi, depth + 1)
            return [self._through(r, hop, label) for r in found]
        return (yield from self._woken(key, interval, call, lo, hi, depth))

    def _signaller(self, key: Key, interval: Interval, call: Syscall | None) -> tuple[Key, tuple[str, ...]] | None:
        """Who a timed wait on a futex word was for, if it timed out and the thread at once waited for the word again, until
        somebody woke it: its waits are one. (Python's threads wait so for their interpreter, in turns of 5 ms.)"""
        turns = []
        while call is not None and call.futex is not None and interval.wake is not None:
            mark = (key, interval.start_mono_ns)
            if mark in self._signallers or not _by_timer(interval.wake.frames):
                break
            turns.append(mark)
            following = self._waits_again(key, interval, call)
            if following is None:
                break
            interval, call = following
        answer = self._signallers.get((key, interval.start_mono_ns))
        if answer is None and turns and interval.wake is not None and not interval.wake.frames and interval.wake.waker[0]:
            answer = interval.wake.waker, interval.wake.evidence
        self._signallers.update(dict.fromkeys(turns, answer))
        return answer if turns else self._signallers.get((key, interval.start_mono_ns))

    def _waits_again(self, key: Key, interval: Interval, call: Syscall) -> tuple[Interval, Syscall] | None:
        """The next wait of a thread, if it is for the same futex word (of a condition variable: for its other group) and the
        thread hardly ran in between."""
        ran = 0
        for i in self.timeline.states(key, interval.end_mono_ns, self.timeline.hi_mono_ns):
            if i.state == RUNNING:
                ran += i.end_mono_ns - i.start_mono_ns
            if i.state not in (RUNNING, RUNNABLE) or ran > _RETRY_NS:
                again = self.timeline.syscall_at(key, i.start_mono_ns) if i.state == BLOCKED and ran <= _RETRY_NS else None
                if again is None or again.futex is None or call.futex is None:
                    return None
                near = abs(again.futex["uaddr"] - call.futex["uaddr"]) <= _CONDITION_GROUP_BYTES
                return (i, again) if near and i.start_mono_ns > interval.start_mono_ns else None
        return None

    def _thawed(self, key: Key, interval: Interval, wake: Wake, call: Syscall | None, lo: int, hi: int) -> list[Root]:
        """Frozen where it slept, without an event, until somebody thawed it: a sleep by its own timer ends when that was due,
        and the rest is the freezer's."""
        cut = lo
        if call is not None and NAMES.get(call.nr) in _SLEEPS:
            timers = self.timeline.of_task_kinds(key[0], ("hrtimer_start",), call.enter_mono_ns or lo, interval.start_mono_ns)
            due = int(timers.get("expires_ns", "hrtimer_start")[-1]) if len(timers) else lo
            cut = min(max(due, lo), hi)
        evidence = (*interval.evidence, *wake.evidence)
        stopped = Root(cut, hi, "wait.signal", "leaf", wake.waker, evidence=evidence, confidence="inferred", kind="stopped")
        slept = Root(lo, cut, "wait.timer", "sleep", evidence=interval.evidence, confidence="inferred")
        return [r for r in (slept, stopped) if r.ns > 0]

    def _stopped(self, key: Key, interval: Interval, lo: int, hi: int) -> Root:
        rows = self.timeline.matching("signal_generate", "tid", key[0], self.timeline.lo_mono_ns, interval.start_mono_ns + 1)
        task = self.timeline.task(*key)
        if not len(rows):
            every = self.timeline.kind("signal_generate", self.timeline.lo_mono_ns, interval.start_mono_ns + 1)
            rows = every.where(every.get("tgid", "signal_generate") == task.tgid) if len(every) else every
        if len(rows):
            signals = rows.get("sig", "signal_generate")
            rows = rows.where((signals == 19) | (signals == 20) | (signals == 21) | (signals == 22))
        culprit = None
        evidence = interval.evidence
        if len(rows):
            last = len(rows) - 1
            culprit = self.timeline.task_at(int(rows["tid"][last]), int(rows.time[last]))
            evidence = (*evidence, rows.id(last))
        elif interval.prev_state & (8 | _FROZEN) and interval.wake is not None and interval.wake.waker[0]:
            culprit = interval.wake.waker
        confidence = "exact" if len(rows) else "inferred"
        return Root(lo, hi, "wait.signal", "leaf", culprit, evidence=evidence, confidence=confidence, kind="stopped")

    def _mechanism_wait(self, key: Key, interval: Interval, lo: int, hi: int, call: Syscall | None) -> MechanismWait:
        task, wake = self.timeline.task(*key), None
        if interval.wake is not None:
            w = interval.wake
            waker = self.timeline.task(*w.waker)
            cpu, seq = (int(part) for part in w.evidence[0].rsplit("/", 2)[1:])
            who = Who(w.waker[0], waker.tgid)
            wake = MechanismWake(w.time_mono_ns, cpu, seq, who, waker.comm, bool(w.frames), _by_timer(w.frames))
        number = call.nr if call is not None else None
        who = Who(key[0], task.tgid)
        return MechanismWait(who, lo, hi, interval.start_mono_ns, interval.prev_state, wake, number)

    def _pieces(
        self, key: Key, interval: Interval, pieces: Sequence[Leaf | Follow], lo: int, hi: int, depth: int
    ) -> Steps:
        roots: list[Root] = []
        for piece in pieces:
            a, b = max(lo, piece.start_mono_ns), min(hi, piece.end_mono_ns)
            if a >= b:
                continue
            evidence = tuple(self.timeline.event_id(*ref) for ref in piece.evidence) or interval.evidence
            if isinstance(piece, Leaf):
                culprit = self._life(piece.culprit, a) if piece.culprit is not None else None
                roots.append(
                    Root(a, b, piece.label, "leaf", culprit, evidence=evidence, confidence=piece.confidence, kind=piece.kind)
                )
                continue
            other = self._life(piece.task, a)
            hop = Hop(piece.edge, key, other, evidence, piece.confidence)
            found = yield self._explain(other, a, b, depth + 1)
            roots += [self._through(r, hop, piece.label) for r in found]
        return roots

    def _life(self, who: Who, time: int) -> Key:
        return self.timeline.task_at(who.tid, time) if who.tid else (0, 0)

    def _through(self, root: Root, hop: Hop, label: str, lock: str = "") -> Root:
        """The root of a thread that was waited for, as the waiter sees it."""
        kept = "lost" if root.label == "lost" else label
        return replace(
            root, label=kept, hops=(hop, *root.hops), confidence=weaker(root.confidence, hop.confidence),
            evidence=(*hop.evidence, *(e for e in root.evidence if e not in hop.evidence)), lock=lock or root.lock,
        )  # fmt: skip

    def _held(
        self, key: Key, interval: Interval, held: list[Held], lo: int, hi: int, depth: int
    ) -> Steps:
        roots: list[Root] = []
        for part in held:
            a, b = max(lo, part.start_mono_ns), min(hi, part.end_mono_ns)
            if a >= b:
                continue
            if part.holder is None or part.holder == key:
                roots.append(Root(a, b, part.label, "unknown", evidence=part.evidence or interval.evidence))
                continue
            hop = Hop(part.edge, key, part.holder, part.evidence or interval.evidence, part.confidence)
            found = yield self._explain(part.holder, a, b, depth + 1)
            roots += [self._through(r, hop, part.label, part.lock) for r in found]
        return roots

    def _woken(self, key: Key, interval: Interval, call: Syscall | None, lo: int, hi: int, depth: int) -> Steps:
        """No mechanism claimed the wait: it ended by its waker."""
        wake, label = interval.wake, wait_label(call)
        if wake is None and interval.open and call is not None and NAMES.get(call.nr) in _SLEEPS:
            return [Root(lo, hi, "wait.timer", "sleep", evidence=interval.evidence)]  # it slept beyond the end
        if wake is None or not wake.certain:
            return [Root(lo, hi, label if wake is None and interval.open else "unknown", "unknown", evidence=interval.evidence)]
        evidence = (*interval.evidence, *wake.evidence)
        follow = self._author(wake.waker, wake.frames, wake.time_mono_ns, call)
        if follow is None:
            return [self._irq_root(call, label, wake.frames, lo, hi, evidence)]
        if follow == key:
            return [Root(lo, hi, "unknown", "unknown", evidence=evidence)]
        confidence = "exact" if wake.exact and not wake.frames else "strong" if wake.frames else "inferred"
        label = self._label_by_waker(label, follow, wake.time_mono_ns)
        edge, lock = "wakes", ""
        if label == "wait.lock" and not self._signalled(follow, wake.time_mono_ns):  # a file lock: its holder lets it go
            edge, lock = "holds_lock", f"file/{call.object if call is not None else 0:x}"
        hop = Hop(edge, key, follow, evidence, confidence)
        until = min(hi, max(wake.time_mono_ns, lo))
        found: list[Root] = []
        if until > lo:
            found = yield self._explain(follow, lo, until, depth + 1)
        roots = [self._through(r, hop, label, lock) for r in found]
        if until < hi:
            roots.append(Root(until, hi, label, "run", hops=(hop,), evidence=evidence, lock=lock))
        return roots

    def _author(self, waker: Key, frames: tuple[str, ...], time: int, call: Syscall | None) -> Key | None:
        """The thread that did the wake-up, or None if an interrupt did."""
        if waker[0] == 0 or waker[0] == 0xFFFFFFFF:
            return None
        hard = any(f.startswith(("irq/", "local_timer", "reschedule", "call_function", "irq_work", "hardirq")) for f in frames)
        soft = [f for f in frames if f.startswith("softirq")]
        if call is not None and NAMES.get(call.nr) in _SLEEPS and (frames or not self._signalled(waker, time)):
            return None
        if not frames:
            inside = self.timeline.syscall_at(waker, time)
            if inside is None and self._user_mode_proven(waker, time):
                return None  # in user mode: an interrupt that was not recorded did it, the thread is innocent
            return waker
        if self.timeline.task(*waker).comm.startswith("ksoftirqd/"):
            return waker
        if not hard and soft and not _by_timer(frames):
            # Loopback: the softirq runs inside the sender's own send call.
            sending = self.timeline.syscall_at(waker, time)
            if sending is not None and wait_label(sending) == "wait.net":
                return waker
        return None

    def _signalled(self, waker: Key, time: int) -> bool:
        rows = self.timeline.kind("signal_generate", time - 1_000_000, time + 1)
        return bool(len(rows)) and bool((rows["tid"] == waker[0]).any())

    def _user_mode_proven(self, waker: Key, time: int) -> bool:
        """The last recorded thing the thread did was to return from a system call, with no fault since."""
        task = self.timeline.task(*waker)
        if task.kthread:
            return False
        rows = self.timeline.of_task_kinds(
            waker[0], _LEAVES, max(0, time - 10_000_000_000), time + 1
        )
        return bool(len(rows)) and rows.name(len(rows) - 1) == "sys_exit"

    def _label_by_waker(self, label: str, waker: Key, time: int) -> str:
        """Waits on many descriptors at once are named after what ended them."""
        if label != "wait.other":
            return label
        doing = wait_label(self.timeline.syscall_at(waker, time))
        return doing if doing in ("wait.net", "wait.pipe") else label

    def _irq_root(
        self, call: Syscall | None, label: str, frames: tuple[str, ...], lo: int, hi: int, evidence: tuple[str, ...]
    ) -> Root:
        timer = _by_timer(frames)
        name = NAMES.get(call.nr, "") if call is not None else ""
        if name in _SLEEPS or (timer and label in ("wait.other", "wait.signal", "wait.timer")):
            confidence = "exact" if timer else "inferred"
            return Root(lo, hi, "wait.timer", "sleep", evidence=evidence, confidence=confidence)
        if timer:  # a timed wait that nobody ended: what it waited for did not come
            kind = "net_peer" if label == "wait.net" else None
            mechanism = "net" if kind else "sleep"
            return Root(lo, hi, label, mechanism, evidence=evidence, confidence="inferred", kind=kind)
        if any("NET_RX" in f or "NET_TX" in f for f in frames) or label == "wait.net":
            return Root(lo, hi, "wait.net", "net", evidence=evidence, confidence="inferred", kind="net_peer")
        if any("BLOCK" in f for f in frames):
            return Root(lo, hi, "wait.disk.device", "leaf", evidence=evidence, confidence="inferred", kind="disk_slow")
        return Root(lo, hi, label, "unknown", evidence=evidence, confidence="inferred")


def _overlaid(roots: list[Root], span: Span, cpu: int) -> list[Root]:
    """Roots with the part that a span covers given to it."""
    out: list[Root] = []
    for root in roots:
        a, b = max(root.start_mono_ns, span.start_mono_ns), min(root.end_mono_ns, span.end_mono_ns)
        if a >= b:
            out.append(root)
            continue
        out += clip([root], root.start_mono_ns, a)
        mechanism = "run" if span.kind is None else "leaf"
        out.append(
            Root(
                a, b, span.label, mechanism, span.culprit, evidence=span.evidence, confidence=span.confidence,
                kind=span.kind, cpu=cpu,
            )
        )  # fmt: skip
        out += clip([root], b, root.end_mono_ns)
    return out


def clip(roots: Sequence[Root], lo: int, hi: int) -> list[Root]:
    """The parts of `roots` within [lo, hi)."""
    out = []
    for root in roots:
        a, b = max(lo, root.start_mono_ns), min(hi, root.end_mono_ns)
        if a < b:
            whole = (a, b) == (root.start_mono_ns, root.end_mono_ns)
            out.append(root if whole else replace(root, start_mono_ns=a, end_mono_ns=b))
    return out

