"""The player: runs a recording again, with nothing of the outside world, and says where it leaves the recording.

What: `Player(folder).run()` gives a `Result`. Threads and processes are created for real and memory calls are made for real at
the recorded addresses; every other call is answered from the log. One thread runs at a time, in the log's order.
Every call is compared: number, numeric arguments, and the bytes it reads from memory (paths, data written, addresses).
Guarantees: `identical` only when every event was reached, in order, equal, and the exit status is the same; anything else is
a `Divergence`, never a warning. Standard output is handed to `on_output` as it is produced.
Fails: `InputError` for a recording that is damaged, refused or of another machine.
"""

import hashlib
import json
import os
import resource
import signal
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from events.errors import InputError
from events.syscalls import NUMBERS
from replay import log, machine, ptrace, syscalls
from replay.divergence import Divergence, describe, payload_difference
from replay.fds import FdTable, follow
from replay.log import Event, Kind
from replay.loops import NO_COUNTER, passes_left
from replay.sandbox import BLOB_FD, SHARED_FD, Sandbox
from replay.tracee import Process, Thread, answer_trap, launch, trapped_instruction

__all__ = ["Player", "Result"]

_BREAKPOINT_BUDGET: Final = 100_000
_NEAR_PASSES: Final = 20_000
_FASTEST_PASS_NS: Final = 0.25  # one pass a cycle: no loop is faster
_MEASURABLE_NS: Final = 500_000
_MATCHED_KEPT: Final = 8
_SYNCHRONOUS: Final = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
_MAP_FIXED, _MAP_ANONYMOUS, _MAP_NOREPLACE, _MAP_TYPE = 0x10, 0x20, 0x100000, 0xF
_EXECVEAT, _MMAP, _MREMAP, _BRK = (NUMBERS[n] for n in ("execveat", "mmap", "mremap", "brk"))
_CLONES: Final = {NUMBERS[n] for n in ("fork", "vfork", "clone", "clone3")}
_SIGRETURN: Final = NUMBERS["rt_sigreturn"]
_SIGSUSPEND: Final = NUMBERS["rt_sigsuspend"]
_MASK_AT: Final = {_SIGSUSPEND: 0, NUMBERS["ppoll"]: 3, NUMBERS["epoll_pwait"]: 4, NUMBERS["epoll_pwait2"]: 4}
_PSELECT: Final = NUMBERS["pselect6"]
_WRITES: Final = {NUMBERS[n] for n in ("write", "writev", "pwrite64", "pwritev")}
_SENDFILE: Final = NUMBERS["sendfile"]
_STANDARD: Final = {"stdout", "stderr"}
# Outputs that the table cannot know, because the recorder answered these calls itself: piece to argument.
_PIECE_AT: Final = {NUMBERS["sched_getaffinity"]: 2, NUMBERS["prctl"]: 1, NUMBERS["prlimit64"]: 3}
_CLONE_PIDFD: Final = 0x1000
_AT_EMPTY_PATH: Final = 0x1000
_MAP_FAILED_FROM: Final = -4095


@dataclass(slots=True)
class Result:
    """What a replay showed."""

    identical: bool = False
    divergence: dict[str, Any] | None = None
    exit_status: int | None = None
    calls: int = 0
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)

    @property
    def stdout_sha256(self) -> str:
        """Hash of everything written to standard output."""
        return hashlib.sha256(self.stdout).hexdigest()


class _Feed:
    """The log in order, with a look ahead for each thread."""

    def __init__(self, events: Iterator[Event]) -> None:
        self._events = events
        self._order: deque[Event] = deque()
        self._threads: dict[int, deque[Event]] = {}
        self.position = 0

    def _read(self) -> Event | None:
        event = next(self._events, None)
        if event is not None:
            self._order.append(event)
            self._threads.setdefault(event.thread, deque()).append(event)
        return event

    def pop(self) -> Event | None:
        """The next event of all."""
        if not self._order and self._read() is None:
            return None
        event = self._order.popleft()
        self._threads[event.thread].popleft()
        self.position += 1
        return event

    def peek(self, thread: int) -> Event | None:
        """The next event of one thread."""
        queue = self._threads.setdefault(thread, deque())
        while not queue:
            if self._read() is None:
                return None
        event = queue[0]
        return None if event.kind == Kind.END else event


class _Played(Thread):
    """A thread, and at what stop it stands."""

    def __init__(self, tid: int, index: int, process: Process, table: FdTable) -> None:
        super().__init__(tid, index, process)
        self.table = table
        self.state = "new"
        self.payload = b""
        self.pending = 0  # a signal to hand over at the next resume
        self.fault = 0
        self.last_nr = -1
        self.death: int | None = None
        self.pidfd = -1


class Player:
    """One replay of one recording."""

    def __init__(
        self, folder: Path, on_output: Callable[[str, bytes], None] | None = None, scale: float = 0.0
    ) -> None:
        ptrace.require_machine()
        self.folder = folder
        self.meta = log.load_meta(folder)
        self.blobs = log.BlobStore(folder)
        self.feed = _Feed(iter(log.LogReader(folder)))
        self.on_output = on_output
        self.scale = scale
        self.result = Result()
        self.threads: dict[int, _Played] = {}
        self.by_tid: dict[int, _Played] = {}
        self.matched: deque[str | tuple[int, Any, bytes]] = deque(maxlen=_MATCHED_KEPT)
        self.early: dict[int, int] = {}
        self.root_index = 0

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Replay to the end, or to the first difference."""
        if self.meta["refused"]:
            reason = "; ".join(self.meta["refused"])
            self.result.divergence = Divergence("unmodelled", 0, "a recording of modelled calls", reason).report
            return self.result
        sandbox = Sandbox(self.blobs)
        self.sandbox = sandbox
        affinity = os.sched_getaffinity(0)
        try:
            with machine.SharedTraps():
                self._play()
        except Divergence as divergence:
            self._diverged(divergence)
        except ptrace.Gone as gone:
            self._diverged(Divergence("exit", -1, "a living thread", f"thread {gone} died"))
        except log.TruncatedLog as error:
            self._diverged(Divergence("truncated_log", -1, "a complete log", str(error)))
        finally:
            os.sched_setaffinity(0, affinity)
            self._kill_all()
            sandbox.close()
        return self.result

    def _play(self) -> None:
        first = self.feed.pop()
        if first is None or first.kind != Kind.EXEC:
            raise InputError(f"{self.folder}: the log does not begin with a program start; record again")
        self._launch(first)
        began_ns = time.monotonic_ns()
        while True:
            event = self.feed.pop()
            if event is None:
                raise log.TruncatedLog(f"{self.folder}: the log has no end: the recorder was killed")
            if event.kind == Kind.END:
                break
            if self.scale:
                time.sleep(max(0.0, event.time_ns * self.scale - (time.monotonic_ns() - began_ns)) / 1e9)
            _APPLY[Kind(event.kind)](self, event)
        self._finish()

    def _finish(self) -> None:
        alive = [t.index for t in self.threads.values() if t.death is None]
        if alive:
            raise Divergence("missing_call", alive[0], "all threads ended", f"threads {alive} live on")
        if self.result.exit_status != self.meta["exit_status"]:
            raise Divergence("exit", 0, f"exit status {self.meta['exit_status']}", f"exit status {self.result.exit_status}")
        self.result.identical = True

    def _diverged(self, divergence: Divergence) -> None:
        report = divergence.report
        report["event"] = self.feed.position
        report["last_matched"] = [
            item if isinstance(item, str) else syscalls.decode_call(item[0], item[1], item[2]) for item in self.matched
        ]
        thread = self.threads.get(report["thread"])
        if thread is not None and thread.death is None:
            report["call_site"] = _call_site(thread)
        report["invalidates"] = self.meta["fidelity"]
        self.result.identical = False
        self.result.divergence = report

    def _kill_all(self) -> None:
        for thread in self.threads.values():
            if thread.death is None:
                try:
                    os.kill(thread.process.tgid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        while self.by_tid:
            got = ptrace.wait(-1)
            if got is None:
                continue
            if got[0] == 0:
                break
            if os.WIFEXITED(got[1]) or os.WIFSIGNALED(got[1]):
                self.by_tid.pop(got[0], None)
        for thread in self.threads.values():
            thread.process.close()

    # ---- start ----------------------------------------------------------------------------------------------------

    def _launch(self, event: Event) -> None:
        layout = json.loads(event.pieces[0])
        self.sandbox.place_images(layout["images"])
        cwd = self.meta["cwd"]
        self.sandbox.make_directory(cwd)
        environment = {os.fsencode(k): os.fsencode(v) for k, v in self.meta["environment"].items()}
        cpu = sorted(os.sched_getaffinity(0))[os.getpid() % len(os.sched_getaffinity(0))]
        limit = self.meta["stack_limit"]
        path = self.meta["exec_path"]
        pid, _ = launch(path, self.meta["command"], environment, cpu, lambda: self.sandbox.enter(cwd, limit))
        os.sched_setaffinity(0, {cpu})
        thread = self._add(pid, 0, Process(pid), FdTable())
        self._after_exec(thread, event)
        self._advance(thread)

    def _add(self, tid: int, index: int, process: Process, table: FdTable) -> _Played:
        thread = _Played(tid, index, process, table)
        self.threads[index] = thread
        self.by_tid[tid] = thread
        return thread

    def _after_exec(self, thread: _Played, event: Event) -> None:
        layout = json.loads(event.pieces[0])
        thread.place_scratch()
        thread.hide_vdso()
        regs = ptrace.get_regs(thread.tid)
        wanted = (layout["entry"], layout["stack_top"])
        if (regs[ptrace.RIP], regs[ptrace.RSP]) != wanted:
            raise Divergence(
                "layout", thread.index, "entry {:#x}, stack {:#x}".format(*wanted),
                f"entry {regs[ptrace.RIP]:#x}, stack {regs[ptrace.RSP]:#x}",
            )  # fmt: skip
        thread.process.write(layout["stack_top"], event.pieces[1])
        thread.state = "boundary"

    # ---- stops ----------------------------------------------------------------------------------------------------

    def _wait(self, thread: _Played) -> int:
        """The next stop of one thread."""
        status = self.early.pop(thread.tid, None)
        while status is None:
            got = ptrace.wait(thread.tid)
            if got is None:
                continue
            if got[0] == 0:
                raise ptrace.Gone(thread.tid)
            status = got[1]
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            self._dead(thread, status)
        return status

    def _dead(self, thread: _Played, status: int) -> None:
        thread.death = status
        thread.state = "dead"
        self.by_tid.pop(thread.tid, None)
        thread.process.threads.discard(thread.tid)

    def _advance(self, thread: _Played, number: int = 0) -> None:
        """Let a thread run to its next event; stays where it is when that event is a signal at this very point."""
        following = self.feed.peek(thread.index)
        if following is not None and following.kind == Kind.SIGNAL and following.args[0] == 0:
            thread.state, thread.pending = "boundary", number
            return
        if following is not None and following.kind == Kind.DEATH and following.nr == -1 and not number:
            thread.state = "boundary"  # killed before it made another call: it need not run on
            return
        if following is not None and (
            following.kind == Kind.PREEMPT or (following.kind == Kind.SIGNAL and following.args[0] == 1)
        ):
            packed = following.payload if following.kind == Kind.PREEMPT else following.pieces[0]
            self._run_to(thread, struct.unpack("<27Q", packed), number)
            return
        thread.state = "running"
        ptrace.request(ptrace.CONT, thread.tid, 0, number)
        self._to_stop(thread)

    def _to_stop(self, thread: _Played) -> None:
        while True:
            status = self._wait(thread)
            if thread.state == "dead":
                return
            event = status >> 16
            if event == ptrace.EVENT_SECCOMP:
                thread.load_call()
                thread.state = "entry"
                self._check(thread)
                return
            number = os.WSTOPSIG(status)
            if not event and number in _SYNCHRONOUS and self._faulted(thread, number):
                return
            # A signal of the kernel's own (a child's real end, a stop): the recorded ones are sent by us.
            ptrace.request(ptrace.CONT, thread.tid, 0, 0)

    def _faulted(self, thread: _Played, number: int) -> bool:
        if struct.unpack_from("<i", ptrace.get_siginfo(thread.tid), 8)[0] <= 0:
            return False
        thread.state, thread.fault = "fault", number
        return True

    def _run_to(self, thread: _Played, wanted: tuple[int, ...], number: int) -> None:
        """Run until the registers are as recorded, where a thread was stopped without a call.

        Each pass of the place costs a stop. A loop with a counter in a register is brought near the place first.
        """
        passes: list[tuple[int, ...]] = []
        for _ in range(_BREAKPOINT_BUDGET):
            regs = ptrace.get_regs(thread.tid)
            if (*regs[:15], regs[ptrace.RIP], regs[ptrace.RSP]) == (*wanted[:15], wanted[ptrace.RIP], wanted[ptrace.RSP]):
                ptrace.set_breakpoint(thread.tid, 0)
                thread.state = "preempted"
                return
            if regs[ptrace.RIP] == wanted[ptrace.RIP]:
                passes = [*passes[-2:], tuple(regs)]
                if len(passes) == 3 and passes_left(passes, wanted) > _NEAR_PASSES:
                    self._approach(thread, wanted, passes)
                    passes = []
                    continue
            self._to_breakpoint(thread, wanted[ptrace.RIP], number)
            number = 0
        raise Divergence("order", thread.index, f"registers of the stop at {wanted[ptrace.RIP]:#x}", "not seen again")

    def _to_breakpoint(self, thread: _Played, address: int, number: int = 0) -> None:
        ptrace.set_breakpoint(thread.tid, address)
        got = machine.step(thread.tid, ptrace.CONT, number)
        while got is None:
            got = machine.step(thread.tid, 0)
        status = got[0]
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            self._dead(thread, status)
        if thread.state == "dead" or status >> 8 != signal.SIGTRAP:
            actual = "its end" if thread.state == "dead" else f"stop {status:#x}"
            raise Divergence("order", thread.index, f"a stop at {address:#x}", actual)

    def _approach(self, thread: _Played, wanted: tuple[int, ...], passes: list[tuple[int, ...]]) -> None:
        """Let a counting loop run freely for a part of the way; the speed comes from the way already run."""
        address, left, pass_ns = wanted[ptrace.RIP], passes_left(passes, wanted), _FASTEST_PASS_NS
        restore = _preempt_at_once(thread.tid)
        try:
            while left > _NEAR_PASSES:
                ran_ns = self._run_freely(thread, int(left * pass_ns / 2))
                seen = []
                for _ in range(3):
                    self._to_breakpoint(thread, address)
                    seen.append(tuple(ptrace.get_regs(thread.tid)))
                now = passes_left(seen, wanted)
                if now < 0:
                    what = "the loop ran past them" if now != NO_COUNTER else "another loop"
                    raise Divergence("order", thread.index, f"registers of the stop at {address:#x}", what)
                if ran_ns > _MEASURABLE_NS and left > now:  # short runs are mostly the stop itself
                    pass_ns = 0.7 * ran_ns / (left - now)
                left = now
        finally:
            restore()

    def _run_freely(self, thread: _Played, share_ns: int) -> int:
        """Run for some processor time; returns how much it was."""
        ptrace.set_breakpoint(thread.tid, 0)
        began_ns = now_ns = _processor_time_ns(thread.tid)
        ptrace.request(ptrace.CONT, thread.tid)
        while now_ns - began_ns < share_ns:
            time.sleep((share_ns - now_ns + began_ns) / 1e9)
            now_ns = _processor_time_ns(thread.tid)
        ptrace.request(ptrace.INTERRUPT, thread.tid)
        status = self._wait(thread)
        if thread.state == "dead" or status >> 16 != ptrace.EVENT_STOP:
            raise Divergence("order", thread.index, "a loop without calls", f"stop {status:#x}")
        return _processor_time_ns(thread.tid) - began_ns

    def _check(self, thread: _Played) -> None:
        """Compare the call at whose entry the thread stands with the next one of the log."""
        event = self.feed.peek(thread.index)
        nr, args = thread.nr, thread.args
        shape = syscalls.MODELS.get(nr)
        thread.payload = syscalls.input_of(shape, thread.process, args) if shape else b""
        actual = syscalls.decode_call(nr, args, thread.payload)
        if event is None:
            raise Divergence("extra_call", thread.index, describe(None), actual)
        if event.kind not in (Kind.CALL, Kind.EXEC, Kind.LEAVE, Kind.SPAWN, Kind.DEATH) or event.nr != nr:
            kind = "unmodelled" if shape is None else "control_flow"
            raise Divergence(kind, thread.index, describe(event), actual)
        if event.kind == Kind.SPAWN or shape is None:
            return  # a call that no kernel here has answered but with an error: nothing to compare
        for letter, mine, theirs in zip(shape.args, args, event.args, strict=False):
            if (letter in "fi" and (mine ^ theirs) & 0xFFFFFFFF) or (letter == "l" and mine != theirs):
                raise Divergence("arguments", thread.index, describe(event), actual)
        if event.kind in (Kind.CALL, Kind.EXEC) and log.digest_payload(thread.payload) != event.payload:
            raise Divergence(
                "payload", thread.index, describe(event), actual, difference=payload_difference(event.payload, thread.payload)
            )

    def _at(self, event: Event, state: str) -> _Played:
        thread = self.threads.get(event.thread)
        if thread is None or thread.state != state:
            where = "no such thread" if thread is None else f"the thread is at: {thread.state}"
            raise Divergence("order", event.thread, describe(event), where)
        return thread

    # ---- events ---------------------------------------------------------------------------------------------------

    def _call(self, event: Event) -> None:
        thread = self.threads.get(event.thread)
        if thread is None or thread.state not in ("entry", "spawned"):
            raise Divergence("order", event.thread, describe(event), thread.state if thread else "no such thread")
        self.result.calls += 1
        self.matched.append((event.nr, event.args, event.payload))
        shape = syscalls.MODELS.get(event.nr) or syscalls.unknown(event.nr)
        if thread.state == "spawned":
            self._spawn_returns(thread, event)
        elif shape.nr in _REAL and (event.result >= 0 or event.result < _MAP_FAILED_FROM or shape.nr == _SIGRETURN):
            _REAL[shape.nr](self, thread, event)
        else:
            self._serve(thread, event, shape)
        follow(thread.table, shape.name, event.args, event.result, thread.payload, event.pieces)
        self._advance(thread)

    def _serve(self, thread: _Played, event: Event, shape: syscalls.Model) -> None:
        """Answer from the log."""
        result = event.result
        if event.nr == syscalls.RESTART_SYSCALL and thread.last_nr >= 0:
            shape = syscalls.MODELS.get(thread.last_nr) or shape
        elif event.nr != syscalls.RESTART_SYSCALL:
            thread.last_nr = event.nr
        if event.nr in _PIECE_AT and event.pieces:
            thread.process.write(thread.args[_PIECE_AT[event.nr]], event.pieces[0])
        elif event.pieces:
            regions = syscalls.output_regions(shape, thread.process, thread.args, result)
            for (address, size), piece in zip(regions, event.pieces, strict=False):
                thread.process.write(address, piece[:size])
        if result > 0 and thread.table.label(thread.args[0]) in _STANDARD:
            self._output(thread, event)
        if -516 <= result <= -512:
            self._serve_restart(thread, event)
        elif result == -4 and self._mask_of(thread) and self._signal_follows(thread):
            self._suspend(thread, event)
        else:
            thread.skip_call(result)

    def _output(self, thread: _Played, event: Event) -> None:
        if event.nr in _WRITES:
            data = thread.payload[: event.result]
        elif event.nr == _SENDFILE and event.pieces:
            data = event.pieces[-1]
        else:
            return
        name = thread.table.label(thread.args[0])
        (self.result.stdout if name == "stdout" else self.result.stderr).extend(data)
        if self.on_output is not None:
            self.on_output(name, data)

    def _mask_of(self, thread: _Played) -> int:
        if thread.nr == _PSELECT:
            raw = thread.process.read(thread.args[5], 8) if thread.args[5] else b""
            return int.from_bytes(raw, "little")
        return thread.args[_MASK_AT[thread.nr]] if thread.nr in _MASK_AT else 0

    def _signal_follows(self, thread: _Played) -> bool:
        following = self.feed.peek(thread.index)
        # The call itself has been taken from the feed already, so this is what comes behind it.
        return following is not None and following.kind == Kind.SIGNAL and following.args[0] == 0

    def _serve_restart(self, thread: _Played, event: Event) -> None:
        """An interrupted call: leave the kernel to decide between EINTR and a restart, as it did at recording."""
        if self._mask_of(thread) and self._signal_follows(thread):
            self._suspend(thread, event)
            return
        thread.skip_call(event.result)
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._wait(thread)
        ptrace.poke_user(thread.tid, ptrace.ORIG_RAX, event.nr)
        ptrace.poke_user(thread.tid, ptrace.RAX, event.result)

    def _suspend(self, thread: _Played, event: Event) -> None:
        """A call with a signal mask of its own was interrupted: wait for the signal under that mask for real."""
        following = self.feed.peek(thread.index)
        assert following is not None
        regs = list(thread.regs)
        regs[ptrace.ORIG_RAX], regs[ptrace.RDI], regs[ptrace.RSI] = _SIGSUSPEND, self._mask_of(thread), 8
        ptrace.set_regs(thread.tid, regs)
        ptrace.tgkill(thread.process.tgid, thread.tid, following.nr)
        ptrace.request(ptrace.CONT, thread.tid)
        self._until_signal(thread, following.nr)
        regs = list(thread.regs)
        regs[ptrace.RAX], regs[ptrace.ORIG_RAX] = event.result & ptrace.MASK64, event.nr
        ptrace.set_regs(thread.tid, regs)
        thread.state = "suspended"

    def _until_signal(self, thread: _Played, number: int) -> None:
        while True:
            status = self._wait(thread)
            if thread.state == "dead":
                raise Divergence("signal", thread.index, f"signal {number}", f"death with wait status {status:#x}")
            if not status >> 16 and os.WSTOPSIG(status) == number:
                return
            if status >> 16 == ptrace.EVENT_SECCOMP:
                thread.load_call()
                raise Divergence("signal", thread.index, f"signal {number}", syscalls.decode_call(thread.nr, thread.args))
            ptrace.request(ptrace.CONT, thread.tid)

    def _signal(self, event: Event) -> None:
        thread = self.threads[event.thread]
        how, number = event.args[0], event.nr
        if how == 2:
            self._at(event, "fault")
            if thread.fault != number:
                raise Divergence("signal", thread.index, describe(event), f"signal {thread.fault}")
            self._advance(thread, number)
            return
        if thread.state == "boundary" and thread.death is None and event.result and not how:
            self._advance(thread, thread.pending)  # a stop: only time passed
            return
        if thread.state != "suspended":
            if thread.state not in ("boundary", "preempted"):
                raise Divergence("order", event.thread, describe(event), f"the thread is at: {thread.state}")
            ptrace.tgkill(thread.process.tgid, thread.tid, number)
            ptrace.request(ptrace.CONT, thread.tid, 0, thread.pending)
            thread.pending = 0
            self._until_signal(thread, number)
        ptrace.set_siginfo(thread.tid, event.payload)
        self._advance(thread, number)

    def _start(self, event: Event) -> None:
        thread = self.threads.get(event.thread)
        if thread is None or thread.state not in ("new", "preempted"):
            raise Divergence("order", event.thread, "the start of a thread", thread.state if thread else "no such thread")
        self._advance(thread)

    def _trap(self, event: Event) -> None:
        thread = self._at(event, "fault")
        trap = trapped_instruction(thread)
        if trap is None or trap[0] != event.nr:
            raise Divergence("control_flow", thread.index, "a trapped rdtsc or cpuid", f"signal {thread.fault}")
        answer_trap(thread, trap, event.args[:4])
        self._advance(thread)

    def _write(self, event: Event) -> None:
        thread = self.threads.get(event.args[1])
        if thread is None or thread.death is not None:
            raise Divergence("order", event.args[1], "a thread whose memory the kernel writes", "no such thread")
        thread.process.write(event.args[0], event.payload)

    def _preempt(self, event: Event) -> None:
        self._at(event, "preempted")

    def _leave(self, event: Event) -> None:
        thread = self._at(event, "entry")
        self.matched.append((event.nr, event.args, b""))
        thread.state = "leaving"
        if event.nr == NUMBERS["exit_group"]:
            thread.process.leaving = True
        ptrace.request(ptrace.CONT, thread.tid)

    def _death(self, event: Event) -> None:
        thread = self.threads.get(event.thread)
        if thread is None:
            raise Divergence("order", event.thread, describe(event), "no such thread")
        if thread.death is None and thread.state != "leaving" and not thread.process.leaving:
            if not (os.WIFSIGNALED(event.result) or thread.process.leaving):
                raise Divergence("exit", thread.index, describe(event), f"the thread is at: {thread.state}")
            thread.process.leaving = True
            os.kill(thread.process.tgid, signal.SIGKILL)
        while thread.death is None:
            self._reap(thread)
        self._compare_death(thread, event)

    def _reap(self, wanted: _Played) -> None:
        got = ptrace.wait(-1)
        if got is None:
            return
        tid, status = got
        if tid == 0:
            raise ptrace.Gone(wanted.tid)
        thread = self.by_tid.get(tid)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread is not None:
                self._dead(thread, status)
        elif thread is wanted or (thread is not None and thread.process is wanted.process):
            ptrace.request(ptrace.CONT, tid)
        else:
            self.early[tid] = status

    def _compare_death(self, thread: _Played, event: Event) -> None:
        mine, theirs = (thread.death or 0) & ~0x80, event.result & ~0x80
        if mine != theirs and not (thread.process.leaving and os.WIFSIGNALED(theirs)):
            raise Divergence("exit", thread.index, describe(event), f"death with wait status {mine:#x}")
        if thread.index == self.root_index:
            status = event.result
            self.result.exit_status = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    # ---- calls that are made again --------------------------------------------------------------------------------

    def _spawn(self, event: Event) -> None:
        thread = self._at(event, "entry")
        ptrace.request(ptrace.CONT, thread.tid)
        status = self._wait(thread)
        if status >> 16 not in (ptrace.EVENT_FORK, ptrace.EVENT_VFORK, ptrace.EVENT_CLONE):
            raise Divergence("control_flow", thread.index, describe(event), f"no new process: stop {status:#x}")
        tid = ptrace.event_message(thread.tid)
        got = None
        while got is None:
            got = ptrace.wait(tid)
        same_process, _, flags = event.args[:3]
        process = thread.process if same_process else Process(tid, thread.process)
        table = thread.table if flags & 0x400 else thread.table.copy()
        self._add(tid, event.result, process, table)
        for address, in_child in _id_addresses(thread):
            if in_child:
                process.write(address, event.args[3].to_bytes(4, "little"))
        ptrace.request(ptrace.SYSCALL, thread.tid)
        thread.state = "spawned"
        thread.pidfd = event.args[4] if flags & _CLONE_PIDFD else -1

    def _spawn_returns(self, thread: _Played, event: Event) -> None:
        status = self._wait(thread)
        if thread.state == "dead" or os.WSTOPSIG(status) != ptrace.SYSCALL_STOP:
            raise Divergence("control_flow", thread.index, describe(event), f"stop {status:#x} instead of its return")
        ptrace.poke_user(thread.tid, ptrace.RAX, event.result)
        for address, in_child in _id_addresses(thread):
            if not in_child:
                thread.process.write(address, event.result.to_bytes(4, "little"))
        if thread.pidfd >= 0:
            raw = thread.process.read(thread.args[0] + 8, 8) if thread.nr == NUMBERS["clone3"] else b""
            thread.process.write(int.from_bytes(raw, "little") or thread.args[2], thread.pidfd.to_bytes(4, "little"))

    def _run_real(self, thread: _Played, regs: list[int], restore: bool) -> int:
        ptrace.set_regs(thread.tid, regs)
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._wait(thread)
        result = ptrace.peek_result(thread.tid)
        if restore:
            again = list(thread.regs)
            again[ptrace.RAX], again[ptrace.ORIG_RAX] = result & ptrace.MASK64, ptrace.MASK64
            ptrace.set_regs(thread.tid, again)
        return result

    def _mmap(self, thread: _Played, event: Event) -> None:
        address = event.result & ptrace.MASK64
        flags = thread.args[3] & ~_MAP_NOREPLACE | _MAP_FIXED
        if event.pieces and event.pieces[0] != b"zero":
            self._map_file(thread, event, flags)
            return
        regs = list(thread.regs)
        regs[ptrace.RDI], regs[ptrace.R10] = address, flags | (_MAP_ANONYMOUS if event.pieces else 0)
        if event.pieces:
            regs[ptrace.R8], regs[ptrace.R9] = ptrace.MASK64, 0
        got = self._run_real(thread, regs, True)
        if got & ptrace.MASK64 != address:
            raise Divergence("layout", thread.index, describe(event), f"mapping at {got:#x}")

    def _map_file(self, thread: _Played, event: Event, flags: int) -> None:
        name = event.pieces[0].decode()
        if len(event.pieces) > 1 and thread.args[2] & 2:
            identity = self.sandbox.shared_file(event.pieces[1].decode(), name)
            directory, file, mode = SHARED_FD, identity, os.O_RDWR
        else:
            self.blobs.path(name)
            directory, file, mode = BLOB_FD, name, os.O_RDONLY
        thread.skip_call(event.result)
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._wait(thread)
        key = f"{directory}/{file}/{mode}"
        fd = thread.process.blob_fds.get(key, -1)
        if fd < 0:
            thread.process.write(ptrace.SCRATCH_DATA, file.encode() + b"\0")
            fd = thread.inject("openat", directory, ptrace.SCRATCH_DATA, mode)
            thread.process.blob_fds[key] = fd
        _, length, prot, _, _, offset = thread.args
        got = thread.inject("mmap", event.result, length, prot, flags, fd, offset)
        if got != event.result:
            raise Divergence("layout", thread.index, describe(event), f"file mapping gives {got:#x} (descriptor {fd})")
        ptrace.poke_user(thread.tid, ptrace.RAX, event.result)

    def _mremap(self, thread: _Played, event: Event) -> None:
        regs = list(thread.regs)
        if event.result & ptrace.MASK64 != thread.args[0]:
            regs[ptrace.R10], regs[ptrace.R8] = thread.args[3] | 3, event.result & ptrace.MASK64
        got = self._run_real(thread, regs, True)
        if got != event.result:
            raise Divergence("layout", thread.index, describe(event), f"mapping at {got:#x}")

    def _same_result(self, thread: _Played, event: Event) -> None:
        got = self._run_real(thread, thread.regs, False)
        if got != event.result:
            raise Divergence("layout", thread.index, describe(event), f"result {got:#x}")

    def _sigreturn(self, thread: _Played, event: Event) -> None:
        got = self._run_real(thread, thread.regs, False)
        if thread.death is None and got != event.result:
            raise Divergence("layout", thread.index, describe(event), f"a return to other registers: rax {got:#x}")

    def _set_tid_address(self, thread: _Played, event: Event) -> None:
        self._run_real(thread, thread.regs, False)
        ptrace.poke_user(thread.tid, ptrace.RAX, event.result)

    def _exec(self, event: Event) -> None:
        thread = self._at(event, "entry")
        self.result.calls += 1
        self.matched.append((event.nr, event.args, event.payload))
        layout = json.loads(event.pieces[0])
        self.sandbox.place_images(layout["images"])
        if not event.payload.startswith(b"/"):
            self._change_directory(thread, layout["cwd"])
        resource.prlimit(thread.tid, resource.RLIMIT_STACK, tuple(layout["stack_limit"]))
        if event.nr == _EXECVEAT and event.args[4] & _AT_EMPTY_PATH and not event.payload:
            self._place_descriptor(thread, layout["images"][0][1])
        ptrace.request(ptrace.CONT, thread.tid)
        self._until_exec(thread, event)
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._wait(thread)
        self._new_space(thread)
        self._after_exec(thread, event)
        self._advance(thread)

    def _until_exec(self, thread: _Played, event: Event) -> None:
        """The other threads end, and the caller takes over the first one's id."""
        tgid = thread.process.tgid
        while True:
            got = ptrace.wait(-1)
            if got is None:
                continue
            tid, status = got
            if tid == tgid and status >> 16 == ptrace.EVENT_EXEC:
                break
            other = self.by_tid.get(tid)
            if tid == 0 or tid == thread.tid or other is None:
                raise Divergence("missing_input", thread.index, describe(event), f"it cannot be started: stop {status:#x}")
            if not os.WIFSTOPPED(status):
                self._dead(other, status)
            elif other.process is thread.process:
                ptrace.request(ptrace.CONT, tid)
            else:
                self.early[tid] = status
        if tgid != thread.tid:
            leader = self.by_tid[tgid]
            self._dead(leader, 0)
            self.by_tid.pop(thread.tid)
            thread.tid = tgid
            self.by_tid[tgid] = thread
            thread.process.threads = {tgid}
            self.root_index = thread.index if leader.index == self.root_index else self.root_index

    def _place_descriptor(self, thread: _Played, name: str) -> None:
        """fexecve: the image must lie behind the recorded descriptor number."""
        wanted = thread.args[0] & 0xFFFFFFFF
        self._leave_call(thread)
        thread.process.write(ptrace.SCRATCH_DATA, name.encode() + b"\0")
        fd = thread.inject("openat", BLOB_FD, ptrace.SCRATCH_DATA, os.O_RDONLY)
        if fd != wanted:
            thread.inject("dup2", fd, wanted)
        held = thread.process.blob_fds
        thread.process.blob_fds = {key: number for key, number in held.items() if number != wanted}
        self._again(thread)

    def _change_directory(self, thread: _Played, path: str) -> None:
        self.sandbox.make_directory(path)
        self._leave_call(thread)
        saved = thread.process.read(ptrace.SCRATCH_DATA, len(os.fsencode(path)) + 1)
        thread.process.write(ptrace.SCRATCH_DATA, os.fsencode(path) + b"\0")
        thread.inject("chdir", ptrace.SCRATCH_DATA)
        thread.process.write(ptrace.SCRATCH_DATA, saved)
        self._again(thread)

    def _leave_call(self, thread: _Played) -> None:
        """From a call's entry to its exit, without making it."""
        thread.skip_call(0)
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._wait(thread)

    def _again(self, thread: _Played) -> None:
        """From a call's exit back to its entry."""
        regs = list(thread.regs)
        regs[ptrace.RIP] -= 2
        regs[ptrace.RAX], regs[ptrace.ORIG_RAX] = thread.nr, ptrace.MASK64
        ptrace.set_regs(thread.tid, regs)
        ptrace.request(ptrace.CONT, thread.tid)
        while self._wait(thread) >> 16 != ptrace.EVENT_SECCOMP:
            ptrace.request(ptrace.CONT, thread.tid)

    def _new_space(self, thread: _Played) -> None:
        if thread.process.tgid == thread.tid:
            thread.process.reopen()
        else:
            thread.process.threads.discard(thread.tid)
            thread.process = Process(thread.tid, thread.process)
            thread.process.threads.add(thread.tid)
        thread.table = thread.table.copy()
        thread.table.after_exec()


def _processor_time_ns(tid: int) -> int:
    return int(Path(f"/proc/{tid}/schedstat").read_text().split()[0])


def _preempt_at_once(tid: int) -> Callable[[], None]:
    """Let the tracer's timers stop the tracee within microseconds: they share one processor. Returns how to undo it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
        return lambda: os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
    return lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _id_addresses(thread: _Played) -> list[tuple[int, bool]]:
    """Where clone stored the new thread's id, and whether it did so in the child's memory."""
    if thread.nr == NUMBERS["clone"]:
        flags, _, parent, child = thread.args[:4]
    elif thread.nr == NUMBERS["clone3"]:
        raw = thread.process.read(thread.args[0], 64)
        flags, _, child, parent = struct.unpack_from("<4Q", raw)
    else:
        return []
    out = [(parent, False)] if flags & 0x100000 else []
    return out + ([(child, True)] if flags & 0x1000000 else [])


def _call_site(thread: _Played) -> str:
    """The mapping and offset of the instruction that made the call."""
    try:
        at = ptrace.get_regs(thread.tid)[ptrace.RIP]
        for line in Path(f"/proc/{thread.tid}/maps").read_text().splitlines():
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            if low <= at < high:
                return f"{line.split()[-1]}+{at - low + int(line.split()[2], 16):#x}"
    except (OSError, ptrace.Gone):
        return "unknown"
    return f"{at:#x}"


_REAL: Final[dict[int, Callable[[Player, _Played, Event], None]]] = {
    _MMAP: Player._mmap,
    _MREMAP: Player._mremap,
    _BRK: Player._same_result,
    NUMBERS["rt_sigprocmask"]: Player._same_result,
    _SIGRETURN: Player._sigreturn,
    NUMBERS["set_tid_address"]: Player._set_tid_address,
}
_APPLY: Final[dict[Kind, Callable[[Player, Event], None]]] = {
    Kind.CALL: Player._call, Kind.START: Player._start, Kind.SPAWN: Player._spawn, Kind.SIGNAL: Player._signal,
    Kind.LEAVE: Player._leave, Kind.DEATH: Player._death, Kind.TRAP: Player._trap, Kind.PREEMPT: Player._preempt,
    Kind.EXEC: Player._exec, Kind.WRITE: Player._write,
}  # fmt: skip
