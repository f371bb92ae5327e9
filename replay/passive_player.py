"""The passive player: runs a passive recording again, without the outside world, and says where it leaves the recording.

What: `PassivePlayer(folder).run()` gives a `PassiveResult`. Calls are matched with the log per thread, in the order in which
they ended; memory calls are made for real and never compared, nor are pointers, only what they point to. Threads run one at a
time; where several could go on, the one whose recorded call ended first does. A clock read without a recorded call (the vDSO's)
gets a time inside the gap between the calls around it; `clock_bound_ns` is the widest such gap. Waits on a futex with a
timeout time out, in virtual time, only when nothing else can run.
`program` runs a patched program on the recording: then calls that it skips or adds are counted, and answered by simple rules,
as far as that can be done without inventing what the world would have said.
Guarantees: two replays of one recording do the same. `identical` only if every recorded call was made, in order, with equal
numbers, numeric arguments and bytes, and the exit status is the same; output that differs is told, with the first difference.
Fails: `InputError` for a recording that is damaged or of another kind.
"""

import errno
import json
import os
import signal
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from events.errors import InputError
from events.syscalls import NUMBERS
from replay import log, machine, ptrace, syscalls
from replay.divergence import Divergence, describe, payload_difference
from replay.fds import FdTable, follow
from replay.log import Event, Kind
from replay.passive import INPUT_MISSING, MEMORY_CALLS, TIMES
from replay.player import Result
from replay.rules import Effects, RuleSet, Subject
from replay.sandbox import BLOB_FD, Sandbox
from replay.tracee import AT_RANDOM, Process, Thread, answer_trap, auxiliary_vector, launch, native_trap, trapped_instruction

__all__ = ["PassivePlayer", "PassiveResult"]

_MMAP, _EXECVE, _FUTEX = NUMBERS["mmap"], NUMBERS["execve"], NUMBERS["futex"]
_SET_TID = NUMBERS["set_tid_address"]
_LEAVES: Final = {NUMBERS["exit"], NUMBERS["exit_group"]}
_CLONES: Final = {NUMBERS[n] for n in ("fork", "vfork", "clone", "clone3")}
_WRITES: Final = {NUMBERS[n] for n in ("write", "writev", "pwrite64", "pwritev", "sendto", "sendmsg")}
_STANDARD: Final = {"stdout", "stderr"}
_CLOCKS: Final = {NUMBERS[n] for n in ("clock_gettime", "gettimeofday", "time", "getcpu", "clock_getres")}
_PRETENDED: Final = {22, 26}  # prctl options that would take our own traps away
_PIECE_AT: Final = {NUMBERS["sched_getaffinity"]: 2, NUMBERS["prctl"]: 1}
_EPOLL_WAITS: Final = {NUMBERS[n] for n in ("epoll_wait", "epoll_pwait", "epoll_pwait2")}
_EPOLL_CTL: Final = NUMBERS["epoll_ctl"]
_CLOCK_REAL, _CLOCK_BOOT, _CLOCK_CPU = (0, 5, 8, 11), (7, 9), (2, 3)
_FUTEX_TIMED: Final = {0, 9, 6, 11, 13}
_MAP_ANONYMOUS: Final = 0x20
_GAP_SHARE: Final = 8  # a clock read moves time on by this part of what is left of its gap
_SEARCH: Final = 400  # calls ahead among which a patched program's call is looked for
_KEPT: Final = 8

# Arguments that hold times or addresses, and inputs that hold times: they are the replay's own.
_LOOSE: Final[Mapping[int, frozenset[int]]] = {
    NUMBERS[name]: frozenset(at)
    for name, at in {
        "poll": (2,), "epoll_wait": (3,), "epoll_pwait": (3,), "prctl": (1, 2, 3, 4), "msync": (0,), "mincore": (0,),
        "get_mempolicy": (2, 3), "mbind": (1, 3, 4), "clone": (0, 1, 2, 3, 4), "clone3": (1,), "alarm": (0,),
        "remap_file_pages": (0,), "set_mempolicy_home_node": (0, 1),
    }.items()
}  # fmt: skip
_OWN_INPUTS: Final = {
    NUMBERS[n]
    for n in ("select", "pselect6", "nanosleep", "clock_nanosleep", "timerfd_settime", "setitimer", "timer_settime",
              "utimensat", "futimesat", "utimes", "utime", "rt_sigtimedwait", "rt_sigsuspend", "mmap", "clone3")
}  # fmt: skip
_LOCK_COMMANDS: Final = {5, 6, 7, 36, 37, 38}
# What a call that the recording does not have is answered, where that says nothing about the world.
_HARMLESS: Final = {
    NUMBERS[n]: 0
    for n in ("close", "fsync", "fdatasync", "sync", "syncfs", "flush", "flock", "fadvise64", "nanosleep", "clock_nanosleep",
              "shutdown", "setsockopt", "ftruncate", "fchmod", "umask", "sched_setaffinity", "setpriority", "alarm")
    if n in NUMBERS
}  # fmt: skip


@dataclass(slots=True)
class PassiveResult(Result):
    """What a passive replay showed, beyond a strict one: derived clock reads and their bound, calls skipped and added."""

    derived_clock_reads: int = 0
    clock_bound_ns: int = 0
    skipped: int = 0
    extra: int = 0
    differing_outputs: int = 0
    first_difference: dict[str, Any] | None = None


@dataclass(slots=True)
class _Step:
    """One recorded event of a thread, with what is known of it beside the log."""

    event: Event
    number: int  # in the order of the whole log
    entry_ns: int
    flags: int
    label: str


@dataclass(slots=True)
class _Cursor:
    steps: deque[_Step] = field(default_factory=deque)
    last_ns: int = 0


class _Played(Thread):
    def __init__(self, tid: int, index: int, process: Process, table: FdTable, cursor: _Cursor) -> None:
        super().__init__(tid, index, process)
        self.table, self.cursor = table, cursor
        self.state = "running"  # running, gated, ready, futex, dead
        self.payload = b""
        self.deadline_ns: int | None = None  # of a futex wait, in virtual time
        self.expiring = False
        self.number = 0  # a signal to hand over at the next resume


class PassivePlayer:
    """One replay of one passive recording."""

    def __init__(
        self, folder: Path, on_output: Callable[[str, bytes], None] | None = None, *, program: Path | None = None,
        rules: RuleSet | None = None,
    ) -> None:  # fmt: skip
        ptrace.require_machine()
        self.meta = log.load_meta(folder)
        if self.meta.get("recorder") != "passive":
            raise InputError(f"{folder} is not a passive recording: kprobe replay run plays it")
        self.folder, self.program, self.rules = folder, program, rules
        self.blobs = log.BlobStore(folder)
        self.on_output = on_output
        self.result = PassiveResult()
        self.threads: dict[int, _Played] = {}
        self.clock_floor: dict[int, int] = {}
        self.matched: deque[str] = deque(maxlen=_KEPT)
        self.shift_ns = 0  # by interventions: how much later than recorded everything is
        self.epoll: dict[tuple[int, int], bytes] = {}
        self.epoll_recorded: dict[tuple[int, bytes], int] = {}
        self.early: dict[int, int] = {}
        self.overlay = self._overlay()

    def _overlay(self) -> dict[str, bytes]:
        """A patched script: its bytes stand for those that were recorded under the program's path."""
        if self.program is None:
            return {}
        content = self.program.read_bytes()
        return {self._script(): content} if not content.startswith(b"\x7fELF") else {}

    def _script(self) -> str:
        """The path of the script that was run: the program itself, or the argument of its interpreter."""
        images = json.loads(self._first().pieces[0])["images"]
        head = self.blobs.path(images[0][1]).read_bytes()[:4] if images else b""
        if head[:2] == b"#!":
            return str(images[0][0])
        script = next((a for a in self.meta["command"][1:] if not a.startswith("-")), "")
        return script if script.startswith("/") else os.path.join(self.meta["cwd"], script)

    def _first(self) -> Event:
        return next(iter(log.LogReader(self.folder)))

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> PassiveResult:
        """Replay to the end, or to the first difference that leaves nothing to go on with."""
        if self.meta["refused"]:
            reason = "; ".join(self.meta["refused"])
            self.result.divergence = Divergence("unmodelled", 0, "a recording that can be replayed", reason).report
            return self.result
        self._load()
        self.sandbox = Sandbox(self.blobs)
        affinity = os.sched_getaffinity(0)
        try:
            with machine.SharedTraps():
                self._launch()
                while any(t.state != "dead" for t in self.threads.values()):
                    self._turn()
            self._finish()
        except Divergence as divergence:
            self._diverged(divergence)
        except ptrace.Gone as gone:
            self._diverged(Divergence("exit", -1, "a living thread", f"thread {gone} died"))
        finally:
            os.sched_setaffinity(0, affinity)
            self._kill_all()
            self.sandbox.close()
        return self.result

    def _load(self) -> None:
        """The whole log, by thread, each call with the label of its descriptor."""
        times = np.fromfile(self.folder / "passive.bin", TIMES)
        self.cursors: dict[int, _Cursor] = {}
        tables: dict[int, FdTable] = {0: FdTable()}
        for number, event in enumerate(log.LogReader(self.folder)):
            if event.kind == Kind.END:
                break
            table = tables.setdefault(event.thread, tables[0])
            label = table.label(event.args[0]) if _takes_fd(event) else ""
            if event.kind == Kind.CALL and event.nr == _MMAP:
                continue  # made for real; its content is in `files`
            step = _Step(event, number, int(times[number]["entry_ns"]), int(times[number]["flags"]), label)
            self.cursors.setdefault(event.thread, _Cursor()).steps.append(step)
            if event.kind == Kind.CALL:
                follow(table, syscalls.name_of(event.nr), event.args, event.result, event.payload, event.pieces)
                if event.nr == _EPOLL_CTL and len(event.payload) == 12:
                    self.epoll_recorded[event.args[0], event.payload[4:]] = event.args[2] & 0xFFFFFFFF
            elif event.kind == Kind.EXEC:
                table.after_exec()
        if self.overlay:
            for cursor in self.cursors.values():
                cursor.steps = deque(s for s in cursor.steps if not (s.label in self.overlay and _is_file_read(s.event)))

    def _launch(self) -> None:
        cursor = self.cursors[0]
        layout = json.loads(cursor.steps.popleft().event.pieces[0])
        self._place(layout)
        self.sandbox.make_directory(self.meta["cwd"])
        cpus = sorted(os.sched_getaffinity(0))
        cpu = cpus[os.getpid() % len(cpus)]
        environment = {os.fsencode(k): os.fsencode(v) for k, v in layout["environment"].items()}
        limit = [-1 if v < 0 else v for v in self.meta["stack_limit"]]
        path, cwd = self.meta["exec_path"], self.meta["cwd"]
        pid, _ = launch(path, layout["argv"], environment, cpu, lambda: self.sandbox.enter(cwd, limit))
        os.sched_setaffinity(0, {cpu})
        thread = _Played(pid, 0, Process(pid), FdTable(), cursor)
        self.threads[pid] = thread
        self._after_exec(thread, layout)
        self._resume(thread)

    def _place(self, layout: Mapping[str, Any]) -> None:
        images = layout["images"]
        self.sandbox.place_images(images)
        if self.program is not None and images and images[0][0] in (self.meta["program"], self._script()):
            self.sandbox.place(images[0][0], self.program)

    def _after_exec(self, thread: _Played, layout: Mapping[str, Any]) -> None:
        thread.place_scratch()
        stack = thread.hide_vdso()
        random = next((value for _, kind, value in auxiliary_vector(stack) if kind == AT_RANDOM), 0)
        if random and layout["random"]:
            thread.process.write(random, bytes.fromhex(layout["random"]))

    def _turn(self) -> None:
        """Let one thread run to its next stop; if none runs, decide which goes on."""
        running = next((t for t in self.threads.values() if t.state == "running"), None)
        if running is not None:
            self._stop(running, self._wait(running))
            return
        self._collect()
        ready = [t for t in self.threads.values() if t.state == "ready"]
        if ready:
            chosen = min(ready, key=lambda t: (t.cursor.steps[0].number if t.cursor.steps else 1 << 62, t.index))
            self._resume(chosen)
            return
        gated = [t for t in self.threads.values() if t.state == "gated"]
        if gated:
            self._serve(min(gated, key=lambda t: (_next_number(t), t.index)))
            return
        self._expire()

    def _collect(self) -> None:
        """Threads that a futex let go meanwhile."""
        for thread in list(self.threads.values()):
            self._settle(thread)

    def _arrived(self, tid: int, status: int) -> None:
        thread = self.threads.get(tid)
        if thread is None:
            self.early[tid] = status
        elif os.WIFEXITED(status) or os.WIFSIGNALED(status):
            self._dead(thread, status)
        elif thread.state == "futex":
            self._futex_over(thread, status)
        else:
            self.early[tid] = status

    def _expire(self) -> None:
        """Everything waits: the earliest timeout ends, in virtual time; without one only recorded deaths are left."""
        timed = [t for t in self.threads.values() if t.state == "futex" and t.deadline_ns is not None]
        if timed:
            thread = min(timed, key=lambda t: (t.deadline_ns, t.index))
            thread.expiring = True
            ptrace.request(ptrace.INTERRUPT, thread.tid)
            while thread.state == "futex":
                got = ptrace.wait(-1)
                if got is not None:
                    self._arrived(*got)
            return
        waiting = [t for t in self.threads.values() if t.state == "futex"]
        killed = [t for t in waiting if t.cursor.steps and t.cursor.steps[0].event.kind == Kind.DEATH]
        if killed:
            self._die(killed[0])
            return
        step = next((t.cursor.steps[0] for t in waiting if t.cursor.steps), None)
        expected = describe(step.event) if step else "an end"
        raise Divergence("order", waiting[0].index if waiting else 0, expected, "all threads wait for each other")

    def _wait(self, thread: _Played) -> int:
        status = self.early.pop(thread.tid, None)
        while status is None:
            got = ptrace.wait(thread.tid)
            if got is None:
                continue
            if got[0] == 0:
                raise ptrace.Gone(thread.tid)
            status = got[1]
        return status

    def _resume(self, thread: _Played, request: int = ptrace.CONT) -> None:
        thread.state = "running"
        number, thread.number = thread.number, 0
        ptrace.request(request, thread.tid, 0, number)

    def _dead(self, thread: _Played, status: int) -> None:
        thread.state = "dead"
        thread.process.threads.discard(thread.tid)
        rest = [s for s in thread.cursor.steps if s.event.kind in (Kind.CALL, Kind.EXEC, Kind.SPAWN)]
        death = next((s.event for s in thread.cursor.steps if s.event.kind == Kind.DEATH), None)
        if rest and self.program is None:
            raise Divergence("missing_call", thread.index, describe(rest[0].event), f"its end (wait status {status:#x})")
        self.result.skipped += len(rest)
        killed = death is not None and death.result & 0x7F
        if thread.index == 0:
            if os.WIFSIGNALED(status) and killed and os.WTERMSIG(status) == signal.SIGKILL:
                status = int(killed)
            self.result.exit_status = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    # ---- stops ----------------------------------------------------------------------------------------------------

    def _stop(self, thread: _Played, status: int) -> None:
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            self._dead(thread, status)
            return
        event = status >> 16
        if event == ptrace.EVENT_SECCOMP:
            thread.load_call()
            self._entry(thread)
        elif event == ptrace.EVENT_STOP or event:
            self._resume(thread)
        else:
            self._signalled(thread, os.WSTOPSIG(status))

    def _signalled(self, thread: _Played, number: int) -> None:
        info = ptrace.get_siginfo(thread.tid)
        code = struct.unpack_from("<i", info, 8)[0]
        if number == signal.SIGSEGV and code == 0x80:
            trap = trapped_instruction(thread)
            if trap is not None:
                regs = ptrace.get_regs(thread.tid)
                now = self._derived(thread, 1)
                answer_trap(thread, trap, native_trap(trap[0], regs[ptrace.RAX], regs[ptrace.RCX], now))
                self._resume(thread)
                return
        steps = thread.cursor.steps
        if steps and steps[0].event.kind == Kind.SIGNAL and steps[0].event.nr == number:
            ptrace.set_siginfo(thread.tid, steps.popleft().event.payload)
            thread.number = number
        elif number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT):
            thread.number = number
        self._resume(thread)

    def _entry(self, thread: _Played) -> None:
        """At a call's entry: make it for real, answer it from derived time, or wait for its turn in the log."""
        nr, args = thread.nr, thread.args
        shape = syscalls.MODELS.get(nr)
        if nr == _FUTEX:
            self._futex(thread)
        elif nr in MEMORY_CALLS:
            self._memory_call(thread)
        elif nr == _MMAP:
            self._mmap(thread)
        elif nr in _CLOCKS and not self._recorded_clock(thread):
            self._clock(thread)
        elif nr == NUMBERS["prctl"] and args[0] & 0xFFFFFFFF in _PRETENDED:
            self._answer(thread, 0)
        elif shape is None:
            raise Divergence("unmodelled", thread.index, "a modelled call", syscalls.decode_call(nr, args))
        elif self.overlay and self._overlaid(thread):
            return
        else:
            thread.payload = syscalls.input_of(shape, thread.process, args)
            thread.state = "gated"

    def _answer(self, thread: _Played, result: int) -> None:
        thread.skip_call(result)
        self._resume(thread)

    def _memory_call(self, thread: _Played) -> None:
        if thread.nr != _SET_TID:
            self._resume(thread)
            return
        self._real(thread)
        ptrace.poke_user(thread.tid, ptrace.RAX, int(self.meta["tids"].get(str(thread.index), thread.tid)))
        self._resume(thread)

    def _real(self, thread: _Played) -> int:
        """Make the call at whose entry the thread stands; its result."""
        ptrace.request(ptrace.SYSCALL, thread.tid)
        status = self._wait(thread)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            raise ptrace.Gone(thread.tid)
        return ptrace.peek_result(thread.tid)

    # ---- memory and futexes -----------------------------------------------------------------------------------------

    def _mmap(self, thread: _Played) -> None:
        address, length, prot, flags, fd, offset = thread.args
        if flags & _MAP_ANONYMOUS or fd & 1 << 31:
            self._resume(thread)
            return
        label = thread.table.label(fd)
        if label == "/dev/zero":
            self._map_zero(thread)
            return
        name = self.meta["files"].get(label)
        if name is None:
            raise Divergence("missing_input", thread.index, f"a mapping of {label or fd}", "no such content in the recording")
        thread.skip_call(0)
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._wait(thread)
        got = self._map_blob(thread, name, (address, length, prot, flags, offset))
        ptrace.poke_user(thread.tid, ptrace.RAX, got)
        self._resume(thread)

    def _map_zero(self, thread: _Played) -> None:
        regs = list(thread.regs)
        regs[ptrace.R10], regs[ptrace.R8], regs[ptrace.R9] = thread.args[3] | _MAP_ANONYMOUS, ptrace.MASK64, 0
        ptrace.set_regs(thread.tid, regs)
        self._resume(thread)

    def _map_blob(self, thread: _Played, name: str, call: tuple[int, int, int, int, int]) -> int:
        address, length, prot, flags, offset = call
        fd = thread.process.blob_fds.get(name, -1)
        if fd < 0:
            self.blobs.path(name)
            saved = thread.process.read(ptrace.SCRATCH_DATA, len(name) + 1)
            thread.process.write(ptrace.SCRATCH_DATA, name.encode() + b"\0")
            fd = thread.inject("openat", BLOB_FD, ptrace.SCRATCH_DATA, os.O_RDONLY)
            thread.process.write(ptrace.SCRATCH_DATA, saved)
            thread.process.blob_fds[name] = fd
        return thread.inject("mmap", address, length, prot, flags, fd, offset)

    def _futex(self, thread: _Played) -> None:
        """A futex is real; a wait has no timeout in real time, but a deadline in virtual time."""
        operation = thread.args[1] & 0x7F
        thread.deadline_ns = None
        if operation in _FUTEX_TIMED and thread.args[3]:
            seconds, nanoseconds = struct.unpack("<qq", thread.process.read(thread.args[3], 16).ljust(16, b"\0"))
            wanted = seconds * 1_000_000_000 + nanoseconds
            now = self._now(thread, 0 if thread.args[1] & 256 else 1)
            thread.deadline_ns = thread.cursor.last_ns + (wanted if operation == 0 else max(0, wanted - now))
            ptrace.poke_user(thread.tid, ptrace.R10, 0)
        thread.state = "futex"
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._settle(thread)

    def _settle(self, thread: _Played) -> None:
        """Wait until a thread in a futex call has come out of it, or is asleep in it.

        A wake-up makes its target runnable before the waker's call returns, so a thread that the kernel shows asleep was not
        woken: what comes next hangs on the program alone, never on how busy this machine is.
        """
        while thread.state == "futex":
            asleep = _asleep(thread.tid)  # read first: a stop that follows is then taken
            got = ptrace.wait(thread.tid, ptrace.WALL | ptrace.WNOHANG)
            if got is not None and not got[0]:
                raise ptrace.Gone(thread.tid)
            if got is not None:
                self._arrived(*got)
            elif asleep:
                return
            else:
                os.sched_yield()

    def _futex_over(self, thread: _Played, status: int) -> None:
        if os.WSTOPSIG(status) != ptrace.SYSCALL_STOP or status >> 16:
            ptrace.request(ptrace.SYSCALL, thread.tid)
            return
        result = ptrace.peek_result(thread.tid)
        if thread.expiring or (-516 <= result <= -512 and thread.deadline_ns is not None):
            thread.expiring = False
            if -516 <= result <= -512:
                ptrace.poke_user(thread.tid, ptrace.RAX, -errno.ETIMEDOUT)
        if thread.deadline_ns is not None:
            ptrace.poke_user(thread.tid, ptrace.R10, thread.args[3])
        thread.state = "ready"

    # ---- time -------------------------------------------------------------------------------------------------------

    def _recorded_clock(self, thread: _Played) -> bool:
        step = thread.cursor.steps[0] if thread.cursor.steps else None
        return step is not None and step.event.kind == Kind.CALL and step.event.nr == thread.nr

    def _offset(self, clock: int) -> int:
        base = self.meta["clock"]
        if clock in _CLOCK_REAL:
            return int(base["t0_mono_ns"]) + int(base["real_less_mono_ns"])
        if clock in _CLOCK_BOOT:
            return int(base["t0_mono_ns"]) + int(base["boot_less_mono_ns"])
        return 0 if clock in _CLOCK_CPU else int(base["t0_mono_ns"])

    def _now(self, thread: _Played, clock: int) -> int:
        return max(thread.cursor.last_ns + self.shift_ns + self._offset(clock), self.clock_floor.get(clock, 0))

    def _derived(self, thread: _Played, clock: int) -> int:
        """A time inside the gap between the recorded calls around this moment; never before one given out already."""
        cursor = thread.cursor
        upper = next((s.entry_ns for s in cursor.steps if s.entry_ns), cursor.last_ns)
        left = max(0, upper - cursor.last_ns)
        self.result.clock_bound_ns = max(self.result.clock_bound_ns, left)
        self.result.derived_clock_reads += 1
        cursor.last_ns += max(1, left // _GAP_SHARE) if left > 1 else 0
        value = self._now(thread, clock)
        self.clock_floor[clock] = value
        return value

    def _clock(self, thread: _Played) -> None:
        nr, args, memory = thread.nr, thread.args, thread.process
        if nr == NUMBERS["getcpu"]:
            for address in args[:2]:
                memory.write(address, bytes(4))
            self._answer(thread, 0)
            return
        if nr == NUMBERS["clock_getres"]:
            memory.write(args[1], struct.pack("<qq", 0, 1))
            self._answer(thread, 0)
            return
        clock = args[0] & 0xFFFFFFFF if nr == NUMBERS["clock_gettime"] else 0
        seconds, nanoseconds = divmod(self._derived(thread, clock), 1_000_000_000)
        if nr == NUMBERS["clock_gettime"]:
            memory.write(args[1], struct.pack("<qq", seconds, nanoseconds))
        elif nr == NUMBERS["gettimeofday"]:
            memory.write(args[0], struct.pack("<qq", seconds, nanoseconds // 1000))
        elif args[0]:
            memory.write(args[0], struct.pack("<q", seconds))
        self._answer(thread, seconds if nr == NUMBERS["time"] else 0)

    # ---- the log ----------------------------------------------------------------------------------------------------

    def _serve(self, thread: _Played) -> None:
        """It is this thread's turn: match its call with the log, and answer it."""
        steps = thread.cursor.steps
        step = steps[0] if steps else None
        if step is not None and step.event.kind == Kind.SIGNAL:
            self._interrupt(thread, step.event)
            return
        if step is not None and step.event.kind == Kind.DEATH and thread.nr not in _LEAVES:
            self._die(thread)
            return
        found = self._match(thread)
        if found is None:
            self._extra(thread)
            return
        steps.popleft()
        event = found.event
        self.matched.append(syscalls.decode_call(thread.nr, thread.args, thread.payload))
        self.result.calls += 1
        if event.kind == Kind.LEAVE:
            self._leave(thread)
        elif event.kind == Kind.EXEC:
            self._exec(thread, event)
        elif event.kind == Kind.SPAWN:
            self._spawn(thread, event)
        else:
            self._reply(thread, found)

    def _match(self, thread: _Played) -> _Step | None:
        """The recorded call that this one is, after skipping what a patched program left out; None for one it added."""
        steps = thread.cursor.steps
        step = steps[0] if steps else None
        if step is not None and self._agrees(thread, step, bytes_too=True):
            return step
        if step is not None and self._agrees(thread, step, bytes_too=False) and thread.nr in _WRITES:
            self._differs(thread, step)
            return step
        if self.program is None:
            self._no_match(thread, step)
        for bytes_too in (True, False):
            for at in range(1, min(len(steps), _SEARCH)):
                if steps[at - 1].event.kind != Kind.CALL:
                    break
                if self._agrees(thread, steps[at], bytes_too=bytes_too) and (bytes_too or thread.nr in _WRITES):
                    for _ in range(at):
                        self._skip(thread, steps.popleft())
                    if not bytes_too:
                        self._differs(thread, steps[0])
                    return steps[0]
        return None

    def _skip(self, thread: _Played, step: _Step) -> None:
        """A recorded call that the patched program does not make: descriptors follow all the same."""
        self.result.skipped += 1
        event = step.event
        if event.kind == Kind.CALL and event.nr != NUMBERS["close"]:
            follow(thread.table, syscalls.name_of(event.nr), event.args, event.result, event.payload, event.pieces)

    def _agrees(self, thread: _Played, step: _Step, *, bytes_too: bool) -> bool:
        event, nr, args = step.event, thread.nr, thread.args
        if event.kind not in (Kind.CALL, Kind.LEAVE, Kind.EXEC, Kind.SPAWN) or event.nr != nr:
            return False
        if event.kind == Kind.SPAWN:
            return True
        shape = syscalls.MODELS[nr]
        loose = _LOOSE.get(nr, frozenset())
        if nr == NUMBERS["fcntl"] and args[1] & 0xFFFFFFFF in _LOCK_COMMANDS:
            loose = frozenset((2,))
        if nr in _WRITES and not bytes_too:
            loose = frozenset((2,))
        for at, (letter, mine, theirs) in enumerate(zip(shape.args, args, event.args, strict=False)):
            if at in loose:
                continue
            if (letter in "fi" and (mine ^ theirs) & 0xFFFFFFFF) or (letter == "l" and mine != theirs):
                return False
        if event.kind == Kind.LEAVE or nr in _OWN_INPUTS or not bytes_too:
            return True
        mine_bytes, theirs_bytes = _comparable(nr, thread.payload), _comparable(nr, event.payload)
        if step.flags & INPUT_MISSING:
            return mine_bytes.startswith(theirs_bytes)
        return mine_bytes == theirs_bytes

    def _differs(self, thread: _Played, step: _Step) -> None:
        self.result.differing_outputs += 1
        if self.result.first_difference is None:
            difference = payload_difference(step.event.payload, thread.payload)
            told = {"class": "payload", "thread": thread.index, "event": step.number, "expected": describe(step.event),
                    "actual": syscalls.decode_call(thread.nr, thread.args, thread.payload)}  # fmt: skip
            self.result.first_difference = told | {"difference": difference, "clock_bound_ns": self.result.clock_bound_ns}

    def _no_match(self, thread: _Played, step: _Step | None) -> None:
        actual = syscalls.decode_call(thread.nr, thread.args, thread.payload)
        if step is None:
            raise Divergence("extra_call", thread.index, describe(None), actual)
        same = step.event.kind in (Kind.CALL, Kind.LEAVE, Kind.EXEC) and step.event.nr == thread.nr
        kind = "control_flow" if not same else "arguments" if not self._agrees(thread, step, bytes_too=False) else "payload"
        raise Divergence(
            kind, thread.index, describe(step.event), actual,
            **({"difference": payload_difference(step.event.payload, thread.payload)} if kind == "payload" else {}),
        )  # fmt: skip

    def _extra(self, thread: _Played) -> None:
        """A call that the recording does not have, by a patched program."""
        nr = thread.nr
        self.result.extra += 1
        self.matched.append("added: " + syscalls.decode_call(nr, thread.args, thread.payload))
        if nr in _WRITES:
            size = len(thread.payload)
            self._output(thread, thread.payload)
            self._answer(thread, size)
        elif nr in _LEAVES:
            self._leave(thread)
        elif nr in _HARMLESS:
            name = syscalls.name_of(nr)
            follow(thread.table, name, thread.args, 0, thread.payload, ())
            self._answer(thread, _HARMLESS[nr])
        else:
            actual = syscalls.decode_call(nr, thread.args, thread.payload)
            raise Divergence("extra_call", thread.index, "a call whose answer the recording holds", actual)

    def _reply(self, thread: _Played, step: _Step) -> None:
        """Answer a call from the log."""
        event = step.event
        thread.cursor.last_ns = max(thread.cursor.last_ns, event.time_ns)
        effects = self._intervene(thread, step)
        result = event.result
        if effects is not None and effects.errno is not None:
            result = -effects.errno
        elif effects is not None and effects.result is not None:
            result = effects.result
        if result == event.result:
            self._write_outputs(thread, event)
        if event.nr == _EPOLL_CTL and len(thread.payload) == 12:
            self.epoll[thread.args[0], thread.args[2] & 0xFFFFFFFF] = thread.payload[4:]
        if event.nr in _WRITES and result >= 0:
            if thread.payload != event.payload and not step.flags & INPUT_MISSING:
                result = len(thread.payload) if event.result == len(event.payload) else min(result, len(thread.payload))
            self._output(thread, thread.payload[:result])
        follow(thread.table, syscalls.name_of(event.nr), event.args, result, event.payload, event.pieces)
        thread.skip_call(result)
        following = thread.cursor.steps[0].event if thread.cursor.steps else None
        if following is not None and following.kind == Kind.SIGNAL:
            ptrace.tgkill(thread.process.tgid, thread.tid, following.nr)
        self._resume(thread)

    def _intervene(self, thread: _Played, step: _Step) -> Effects | None:
        if not self.rules:
            return None
        event = step.event
        subject = Subject(syscalls.name_of(event.nr), step.label, thread.index, "", event.payload, event.time_ns)
        effects = self.rules.effects(subject)
        if effects is not None:
            took = max(0, event.time_ns - step.entry_ns)
            shift = 0 if effects.duration_ns is None else effects.duration_ns - took
            self.shift_ns += max(-took, shift + (effects.delay_ns or 0)) + (effects.clock_ns or 0)
            for clock in list(self.clock_floor):  # a delay taken away moves the clocks back with the call
                self.clock_floor[clock] = min(self.clock_floor[clock], event.time_ns + self.shift_ns + self._offset(clock))
        return effects

    def _write_outputs(self, thread: _Played, event: Event) -> None:
        shape = syscalls.MODELS[event.nr]
        if event.nr in _PIECE_AT:
            if event.pieces:
                thread.process.write(thread.args[_PIECE_AT[event.nr]], event.pieces[0])
            return
        pieces = list(event.pieces)
        if event.nr in _EPOLL_WAITS and pieces:
            pieces[0] = self._epoll_events(thread, pieces[0])
        regions = syscalls.output_regions(shape, thread.process, thread.args, event.result)
        for (address, size), piece in zip(regions, pieces, strict=False):
            thread.process.write(address, piece[:size])

    def _epoll_events(self, thread: _Played, piece: bytes) -> bytes:
        """The program's own tags (often addresses) in place of the recorded ones."""
        out = bytearray(piece)
        for at in range(0, len(piece) - 11, 12):
            fd = self.epoll_recorded.get((thread.args[0], piece[at + 4 : at + 12]))
            own = self.epoll.get((thread.args[0], fd)) if fd is not None else None
            if own is not None:
                out[at + 4 : at + 12] = own
        return bytes(out)

    def _output(self, thread: _Played, data: bytes) -> None:
        name = thread.table.label(thread.args[0])
        if name not in _STANDARD:
            return
        (self.result.stdout if name == "stdout" else self.result.stderr).extend(data)
        if self.on_output is not None:
            self.on_output(name, data)

    def _overlaid(self, thread: _Played) -> bool:
        """Reads of a patched script come from the patch."""
        label = thread.table.label(thread.args[0])
        if label not in self.overlay or thread.nr not in _FILE_READS:
            return False
        content = self.overlay[label]
        self._answer(thread, _FILE_READS[thread.nr](thread, content))
        return True

    # ---- processes --------------------------------------------------------------------------------------------------

    def _interrupt(self, thread: _Played, event: Event) -> None:
        """A signal at a call's entry: let the handler run first, then the call is made again."""
        regs = list(thread.regs)
        regs[ptrace.RIP] -= 2
        regs[ptrace.RAX], regs[ptrace.ORIG_RAX] = thread.nr, ptrace.MASK64
        ptrace.set_regs(thread.tid, regs)
        ptrace.tgkill(thread.process.tgid, thread.tid, event.nr)
        ptrace.request(ptrace.CONT, thread.tid)
        status = self._wait(thread)
        if status >> 16 == ptrace.EVENT_SECCOMP:  # the signal is blocked here: it was taken in by other means
            thread.cursor.steps.popleft()
            thread.load_call()
            self._entry(thread)
            return
        self._stop(thread, status)

    def _leave(self, thread: _Played) -> None:
        if thread.nr == NUMBERS["exit_group"]:
            for other in self.threads.values():
                if other is not thread:
                    other.cursor.steps.clear()
        thread.state = "running"
        ptrace.request(ptrace.CONT, thread.tid)

    def _die(self, thread: _Played) -> None:
        """The process was killed here."""
        for other in self.threads.values():
            if other.process is thread.process and other is not thread:
                other.cursor.steps = deque(s for s in other.cursor.steps if s.event.kind == Kind.DEATH)
        os.kill(thread.process.tgid, signal.SIGKILL)
        while thread.state != "dead":
            got = ptrace.wait(-1)
            if got is None:
                continue
            if got[0] == 0:
                raise ptrace.Gone(thread.tid)
            victim = self.threads.get(got[0])
            if victim is not None and (os.WIFEXITED(got[1]) or os.WIFSIGNALED(got[1])):
                self._dead(victim, got[1])

    def _exec(self, thread: _Played, event: Event) -> None:
        layout = json.loads(event.pieces[0])
        self._place(layout)
        thread.cursor.last_ns = event.time_ns
        ptrace.request(ptrace.CONT, thread.tid)
        status = self._wait(thread)
        if status >> 16 != ptrace.EVENT_EXEC:
            raise Divergence("missing_input", thread.index, describe(event), f"the program cannot be started: stop {status:#x}")
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._wait(thread)
        thread.process.reopen()
        thread.process.blob_fds.clear()
        thread.table.after_exec()
        self._after_exec(thread, layout)
        self._resume(thread)

    def _spawn(self, thread: _Played, event: Event) -> None:
        """A new thread: made for real, known by its recorded id."""
        ptrace.request(ptrace.CONT, thread.tid)
        status = self._wait(thread)
        if status >> 16 != ptrace.EVENT_CLONE:
            raise Divergence("control_flow", thread.index, describe(event), f"no new thread: stop {status:#x}")
        tid = ptrace.event_message(thread.tid)
        got = self.early.pop(tid, None)
        while got is None:
            arrived = ptrace.wait(tid)
            got = arrived[1] if arrived else None
        recorded, index = event.args[3], event.result
        child = _Played(tid, index, thread.process, thread.table, self.cursors.setdefault(index, _Cursor()))
        child.cursor.last_ns = event.time_ns
        child.state = "ready"
        self.threads[tid] = child
        ptrace.request(ptrace.SYSCALL, thread.tid)
        self._wait(thread)
        for address in _id_addresses(thread):
            thread.process.write(address, recorded.to_bytes(4, "little"))
        ptrace.poke_user(thread.tid, ptrace.RAX, recorded)
        steps = thread.cursor.steps
        if steps and steps[0].event.kind == Kind.CALL and steps[0].event.nr == event.nr:
            thread.cursor.last_ns = max(thread.cursor.last_ns, steps.popleft().event.time_ns)
        thread.state = "ready"

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self.result.exit_status != self.meta["exit_status"]:
            expected = f"exit status {self.meta['exit_status']}"
            self.result.divergence = Divergence("exit", 0, expected, f"exit status {self.result.exit_status}").report
        elif self.result.first_difference is not None:
            self.result.divergence = self.result.first_difference
        elif self.result.skipped or self.result.extra:
            told = f"{self.result.skipped} recorded calls not made, {self.result.extra} calls added"
            self.result.divergence = Divergence("control_flow", 0, "the recorded calls", told).report
        else:
            self.result.identical = True

    def _diverged(self, divergence: Divergence) -> None:
        self.result.identical = False
        self.result.divergence = divergence.report | {
            "last_matched": list(self.matched), "event": self.result.calls, "invalidates": self.meta["fidelity"]
        }  # fmt: skip

    def _kill_all(self) -> None:
        living = [t for t in self.threads.values() if t.state != "dead"]
        for thread in living:
            try:
                os.kill(thread.process.tgid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        waiting = {t.tid for t in living}
        while waiting:
            got = ptrace.wait(-1)
            if got is None:
                continue
            if got[0] == 0:
                break
            if os.WIFEXITED(got[1]) or os.WIFSIGNALED(got[1]):
                waiting.discard(got[0])
        for thread in self.threads.values():
            thread.process.close()


def _asleep(tid: int) -> bool:
    """Does this thread sleep, or wait to be reaped after its siblings (procfs, proc_pid_stat(5), field 3)?"""
    try:
        stat = Path(f"/proc/{tid}/stat").read_text()
    except OSError:
        return False  # gone: the next wait tells
    return stat[stat.rindex(")") + 2] in "SZX"


def _next_number(thread: _Played) -> int:
    return thread.cursor.steps[0].number if thread.cursor.steps else 1 << 62


def _id_addresses(thread: _Played) -> list[int]:
    """Where clone stored the new thread's id, for the parent and for the child: they share the memory."""
    if thread.nr == NUMBERS["clone"]:
        flags, _, parent, child = thread.args[:4]
    else:
        flags, _, child, parent = struct.unpack_from("<4Q", thread.process.read(thread.args[0], 64).ljust(64, b"\0"))
    return ([parent] if flags & 0x100000 else []) + ([child] if flags & 0x1000000 else [])


def _takes_fd(event: Event) -> bool:
    shape = syscalls.MODELS.get(event.nr)
    return event.kind == Kind.CALL and shape is not None and shape.args[:1] == "f"


def _comparable(nr: int, payload: bytes) -> bytes:
    """What of a call's input is the program's own words: not results of former calls, not addresses."""
    if nr == _EPOLL_CTL:
        return payload[:4]
    if nr == NUMBERS["poll"]:
        return _without_revents(payload)
    if nr == NUMBERS["ppoll"]:
        size = int.from_bytes(payload[:4], "little")
        return _without_revents(payload[4 : 4 + size])
    return payload


def _without_revents(payload: bytes) -> bytes:
    return b"".join(payload[at : at + 6] for at in range(0, len(payload), 8))


def _is_file_read(event: Event) -> bool:
    return event.kind == Kind.CALL and event.nr in _FILE_READS


# ---- a patched script's file, served from memory ---------------------------------------------------------------------


def _positions(thread: _Played) -> dict[int, int]:
    positions: dict[int, int] = thread.table.__dict__.setdefault("overlay_positions", {})
    return positions


def _read(thread: _Played, content: bytes) -> int:
    fd, at = thread.args[0] & 0xFFFFFFFF, _positions(thread)
    piece = content[at.get(fd, 0) : at.get(fd, 0) + thread.args[2]]
    thread.process.write(thread.args[1], piece)
    at[fd] = at.get(fd, 0) + len(piece)
    return len(piece)


def _pread(thread: _Played, content: bytes) -> int:
    piece = content[thread.args[3] : thread.args[3] + thread.args[2]]
    thread.process.write(thread.args[1], piece)
    return len(piece)


def _lseek(thread: _Played, content: bytes) -> int:
    fd, at = thread.args[0] & 0xFFFFFFFF, _positions(thread)
    offset = thread.args[1] - (1 << 64) if thread.args[1] >> 63 else thread.args[1]
    base = {0: 0, 1: at.get(fd, 0), 2: len(content)}.get(thread.args[2] & 0xFFFFFFFF)
    if base is None or base + offset < 0:
        return -errno.EINVAL
    at[fd] = base + offset
    return at[fd]


def _fstat(thread: _Played, content: bytes) -> int:
    stat = bytearray(144)
    struct.pack_into("<QQQIII", stat, 0, 1, 1, 1, 0o100755, 0, 0)
    struct.pack_into("<QQQ", stat, 48, len(content), 4096, (len(content) + 511) // 512)
    thread.process.write(thread.args[1 if thread.nr == NUMBERS["fstat"] else 2], bytes(stat))
    return 0


def _no_terminal(_thread: _Played, _content: bytes) -> int:
    return -errno.ENOTTY


_FILE_READS: Final[Mapping[int, Callable[[_Played, bytes], int]]] = {
    NUMBERS["read"]: _read, NUMBERS["pread64"]: _pread, NUMBERS["lseek"]: _lseek, NUMBERS["fstat"]: _fstat,
    NUMBERS["newfstatat"]: _fstat, NUMBERS["ioctl"]: _no_terminal,
}  # fmt: skip


def show_limits(result: PassiveResult) -> Sequence[str]:
    """What a report says about how far a passive replay may be from the recorded run."""
    out = []
    if result.derived_clock_reads:
        out.append(f"{result.derived_clock_reads} clock reads derived, each within a gap of at most {result.clock_bound_ns} ns")
    if result.skipped or result.extra:
        out.append(f"{result.skipped} recorded calls skipped, {result.extra} calls added")
    if result.differing_outputs:
        out.append(f"{result.differing_outputs} outputs differ from the recorded ones")
    return out
