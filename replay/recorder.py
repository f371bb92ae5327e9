"""The traced recorder: runs a program and its whole process tree, one thread at a time, and logs all that enters it.

What: `record(command, folder)` writes a recording (see `log`) and returns the program's exit status. stdin, stdout and
stderr are the caller's own. Threads and processes are really created, but only one runs in user code at a time and changes
only at calls (or, for a thread that spins without calls, at a point whose registers repeat), so that the log's one
order is the order of everything.
Guarantees: the program's own results are never altered, except: rseq, io_uring, legacy AIO, perf events and userfaultfd
answer ENOSYS; splice to standard output answers EINVAL. A call without a model runs, and the recording says by name that
it cannot be replayed.
Fails: `InputError` for a command that cannot be run or an output folder in use.
"""

import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import struct
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from events.errors import InputError
from events.syscalls import NUMBERS
from replay import log, machine, ptrace, syscalls
from replay.fds import RECEIVED, FdTable, follow
from replay.log import Kind
from replay.loops import NO_COUNTER, passes_left
from replay.tracee import Process, Thread, answer_trap, launch, native_trap, trapped_instruction

__all__ = ["record"]

_TICK_S: Final = 0.02
_ENTRY_STOP: Final = ptrace.EVENT_SECCOMP << 16 | signal.SIGTRAP << 8 | 0x7F
_EXIT_STOP: Final = ptrace.SYSCALL_STOP << 8 | 0x7F
_ASYNC_PATIENCE_TICKS: Final = 3
_SPIN_STEPS: Final = 400
_COUNTING_INTERRUPTS: Final = 4  # a quarter of a second
_GIVE_UP_INTERRUPTS: Final = 100  # six seconds of computing while others wait: a thread that spins is found long before
_SYNCHRONOUS: Final = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP}
_STOPPING: Final = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
_MAP_ANONYMOUS, _MAP_SHARED_BITS, _PROT_WRITE = 0x20, 0x3, 2
_EINVAL: Final = -22
_EXIT, _EXIT_GROUP, _EXECVE = NUMBERS["exit"], NUMBERS["exit_group"], NUMBERS["execve"]
_CLONE3: Final = NUMBERS["clone3"]
_CLONES: Final = {NUMBERS[n] for n in ("fork", "vfork", "clone", "clone3")}
_SWITCH: Final = {NUMBERS[n] for n in ("sched_yield", "nanosleep", "clock_nanosleep")}
_MMAP: Final = NUMBERS["mmap"]
_PTRACE: Final = NUMBERS["ptrace"]
_FUTEX: Final = NUMBERS["futex"]
_PI_WAITS: Final = {6, 11, 13}
_EXECS: Final = {NUMBERS["execve"], NUMBERS["execveat"]}
_SIGRETURN: Final = NUMBERS["rt_sigreturn"]
_SPLICES: Final = {NUMBERS["splice"]: 2, NUMBERS["tee"]: 1, NUMBERS["copy_file_range"]: 2, NUMBERS["vmsplice"]: 0}
_SENDFILE: Final = NUMBERS["sendfile"]
_CLOCKS: Final = {0, 1, 4, 5, 6, 7, 11}
_STANDARD: Final = {"stdout", "stderr"}


class Unrecordable(InputError):  # noqa: N818 - names the outcome
    """The program does what no recording can hold; it was ended."""


class _Recorded(Thread):
    """A thread, with what the recorder has to remember about it."""

    def __init__(self, tid: int, index: int, process: Process, table: FdTable) -> None:
        super().__init__(tid, index, process)
        self.table = table
        self.status: int | None = None  # a stop that has not been handled yet
        self.due: tuple[int, int] | None = None  # the request and signal with which it goes on
        self.entered = False  # a call was let into the kernel and its exit is outstanding
        self.payload = b""
        self.boundary: tuple[int, ...] | None = None  # registers behind the last call: a signal here is at a boundary
        self.held: deque[tuple[int, bytes]] = deque()  # signals that came in user code
        self.stop: tuple[int, ...] = ()  # status and registers of the latest stop
        self.ticks = 0
        self.preempted = False
        self.last_nr = -1
        self.interrupts = 0  # since its last call


class Recorder:
    """Runs the tree to its end."""

    def __init__(self, folder: Path, cpu: int, affinity: set[int]) -> None:
        self.folder = folder
        self.writer = log.LogWriter(folder)
        self.blobs = log.BlobStore(folder)
        self.cpu = cpu
        self.affinity = sum(1 << n for n in affinity)
        self.threads: dict[int, _Recorded] = {}
        self.ready: deque[_Recorded] = deque()
        self.early: dict[int, int] = {}
        self.next_index = 0
        self.refused: list[str] = []
        self.notes: set[str] = set()
        self.limits: set[str] = set()  # why the recording is not exact
        self.root_status: int | None = None
        self.root_tid = 0
        self.calls = 0
        self.alarms = 0  # ticks of the timer
        self.turn_began = 0
        self.traps = machine.SharedTraps()
        self.t0_ns = time.monotonic_ns()

    def on_alarm(self, *_: object) -> None:
        """Each tick; also ends a wait early."""
        self.alarms += 1
        self.traps.renew()

    def abandon(self) -> None:
        """End the whole tree."""
        for thread in list(self.threads.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(thread.process.tgid, signal.SIGKILL)
        while (got := ptrace.wait(-1)) is None or got[0]:
            continue
        self.writer.close()

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self, pid: int, path: str) -> None:
        """From the first exec stop to the last death."""
        process = Process(pid)
        first = self._add(pid, process, FdTable())
        self.root_tid = pid
        first.payload = os.fsencode(path)
        self._after_exec(first)
        self.writer.add(Kind.EXEC, first.index, _EXECVE, 0, 0, pieces=self._exec_pieces(first))
        self._resume(first)
        self._drive(first)
        while self.threads:
            thread = self._next_ready()
            if thread is not None:
                self._drive(thread)
        self.writer.close()

    def _add(self, tid: int, process: Process, table: FdTable) -> _Recorded:
        thread = _Recorded(tid, self.next_index, process, table)
        self.next_index += 1
        self.threads[tid] = thread
        return thread

    def _next_ready(self) -> _Recorded | None:
        while True:
            got = ptrace.wait(-1, ptrace.WALL | ptrace.WNOHANG)
            if got is None or got[0] == 0:
                break
            self._arrived(*got)
        while not self.ready:
            got = ptrace.wait(-1)
            if got is None:
                continue
            if got[0] == 0:
                self.threads.clear()
                return None
            self._arrived(*got)
        thread = self.ready.popleft()
        return thread if self.threads.get(thread.tid) is thread else None

    def _arrived(self, tid: int, status: int) -> None:
        thread = self.threads.get(tid)
        if thread is None:
            self.early[tid] = status
        elif os.WIFEXITED(status) or os.WIFSIGNALED(status):
            self._death(thread, status)
        else:
            thread.status = status
            self.ready.append(thread)

    def _drive(self, thread: _Recorded) -> None:
        """Run one thread until it blocks, ends or has had its share."""
        self._running = thread
        self.turn_began = self.alarms
        try:
            while True:
                status = thread.status
                if status is None:
                    status = self._go_on(thread)
                else:
                    thread.status = None
                    self._load(thread, status)
                if status == _EXIT_STOP:
                    more = self._exit(thread)
                elif status == _ENTRY_STOP:
                    more = self._entry(thread)
                elif status & 0xFF != 0x7F:
                    self._death(thread, status)
                    return
                else:
                    more = self._on_stop(thread, status)
                if not more:
                    self._let_go(thread)
                    return
        except ptrace.Gone:
            self._await_death(thread)

    def _await_death(self, thread: _Recorded) -> None:
        while thread.tid in self.threads:
            got = ptrace.wait(-1)
            if got is None:
                continue
            if got[0] == 0:
                self.threads.pop(thread.tid, None)
                return
            self._arrived(*got)

    def _go_on(self, thread: _Recorded) -> int:
        """Resume a thread and wait for its next stop; on each tick look whether it spins while others or signals wait."""
        request, number = thread.due or (0, 0)
        thread.due = None
        got = machine.step(thread.tid, request, number)
        while got is None:
            self._tick(thread)
            if thread.status is not None:  # the look at the others saw this one's stop
                status, thread.status = thread.status, None
                self._load(thread, status)
                return status
            got = machine.step(thread.tid, 0)
        thread.stop = got
        return got[0]

    def _let_go(self, thread: _Recorded) -> None:
        """Resume a thread that is not waited for."""
        if thread.due is not None:
            (request, number), thread.due = thread.due, None
            ptrace.request(request, thread.tid, 0, number)

    def _load(self, thread: _Recorded, status: int) -> None:
        if status in (_EXIT_STOP, _ENTRY_STOP):
            thread.stop = (status, *ptrace.get_regs(thread.tid))

    def _tick(self, thread: _Recorded) -> None:
        thread.ticks += 1
        if thread.ticks < _ASYNC_PATIENCE_TICKS:
            return
        if not thread.held and len(self.threads) == 1:
            return
        if thread.entered or not (thread.held or self._others_wait()):
            return
        thread.ticks = 0
        ptrace.request(ptrace.INTERRUPT, thread.tid)

    def _others_wait(self) -> bool:
        while True:
            got = ptrace.wait(-1, ptrace.WALL | ptrace.WNOHANG)
            if got is None or got[0] == 0:
                return bool(self.ready)
            self._arrived(*got)
            if self.ready and self.ready[-1].tid == got[0] and self.threads.get(got[0]) is self._running:
                self.ready.pop()
                return False

    _running: "_Recorded | None" = None

    # ---- stops ----------------------------------------------------------------------------------------------------

    def _on_stop(self, thread: _Recorded, status: int) -> bool:
        """Handle one stop; True: the thread runs on and is waited for, False: another thread's turn."""
        event = status >> 16
        if event in (ptrace.EVENT_FORK, ptrace.EVENT_VFORK, ptrace.EVENT_CLONE):
            return self._spawned(thread, event)
        if event == ptrace.EVENT_EXEC:
            return self._executed(thread)
        if event == ptrace.EVENT_STOP:
            return self._event_stop(thread, os.WSTOPSIG(status))
        return self._signal(thread, os.WSTOPSIG(status))

    def _now(self) -> int:
        return time.monotonic_ns() - self.t0_ns

    def _resume(self, thread: _Recorded, number: int = 0) -> None:
        thread.due = (ptrace.CONT, number)

    def _entry(self, thread: _Recorded) -> bool:
        if self.alarms - self.turn_began > 1 and len(self.threads) > 1 and self._others_wait():
            thread.status = _ENTRY_STOP  # it has had its share: it makes this call in its next turn
            self.ready.append(thread)
            return False
        _, *regs = thread.stop
        thread.regs = regs
        nr = thread.nr = regs[15]
        thread.args = (regs[14], regs[13], regs[12], regs[7], regs[9], regs[8])
        shape = syscalls.MODELS.get(nr)
        if nr == _PTRACE:
            raise Unrecordable("the program calls ptrace, and a process has one tracer only: it cannot be recorded")
        thread.payload = syscalls.input_of(shape, thread.process, thread.args) if shape else b""
        if nr in _EMULATED and _EMULATED[nr](self, thread):
            return True
        if thread.held:
            number, _ = thread.held[0]
            ptrace.tgkill(thread.process.tgid, thread.tid, number)
        if nr in (_EXIT, _EXIT_GROUP):
            return self._leave(thread)
        if nr in _SPLICES and self._to_standard_output(thread, _SPLICES[nr]):
            thread.skip_call(_EINVAL)
            return self._finish(thread, _EINVAL)
        thread.entered = True
        thread.due = (ptrace.SYSCALL, 0)
        alone = len(thread.process.threads) == 1 if nr in _EXECS else len(self.threads) == 1
        if (alone or (shape is not None and shape.kind not in ("block", "exec"))) and nr not in _CLONES:
            return True
        self._let_go(thread)
        if nr in _EXECS:
            return self._exec_among_threads(thread)
        return self._try_finish(thread, nr)

    def _try_finish(self, thread: _Recorded, nr: int) -> bool:
        """A call that may block: does it end at once? If not, and others can run, it is their turn."""
        if len(self.threads) == 1 and nr not in _CLONES:
            return True
        for _ in range(2):
            os.sched_yield()
            got = ptrace.wait(thread.tid, ptrace.WALL | ptrace.WNOHANG)
            if got is not None and got[0]:
                thread.status = got[1]
                if nr in _SWITCH and self._others_wait():
                    self.ready.append(thread)
                    return False
                return True
        if nr == _FUTEX and thread.args[1] & 0x7F in _PI_WAITS:
            self._write_beside(thread.process, thread.args[0], 4)  # the waiters' bit is set before the wait
        return False

    def _write_beside(self, process: Process, address: int, size: int) -> None:
        """Log memory that the kernel has written outside a call's return."""
        index = next((t.index for t in self.threads.values() if t.process is process), None)
        if index is not None:
            arguments = (address, index, 0, 0, 0, 0)
            self.writer.add(Kind.WRITE, log.NO_THREAD, time_ns=self._now(), args=arguments, payload=process.read(address, size))

    def _to_standard_output(self, thread: _Recorded, index: int) -> bool:
        return thread.table.label(thread.args[index]) in _STANDARD

    def _exit(self, thread: _Recorded) -> bool:
        thread.entered = False
        result = thread.stop[11]  # RAX
        return self._finish(thread, result - (1 << 64) if result >> 63 else result)

    def _finish(self, thread: _Recorded, result: int) -> bool:
        """Log a finished call and let the thread run on."""
        nr, args = thread.nr, thread.args
        shape = syscalls.MODELS.get(nr)
        if nr == syscalls.RESTART_SYSCALL and thread.last_nr >= 0:
            shape = syscalls.MODELS.get(thread.last_nr)
        elif nr != syscalls.RESTART_SYSCALL:
            thread.last_nr = nr
        pieces: list[bytes] = []
        if (shape is None or shape.kind == "refuse") and (result >= 0 or result < -4095):
            self._refuse(f"{syscalls.name_of(nr)} is not modelled")
        if shape is not None:
            memory = thread.process
            pieces = [memory.read(*region) for region in syscalls.output_regions(shape, memory, args, result)]
            pieces += self._extras(thread, shape, result)
        self.writer.add(Kind.CALL, thread.index, nr, result, self._now(), args, log.digest_payload(thread.payload), pieces)
        if shape is not None:
            follow(thread.table, shape.name, args, result, thread.payload, pieces)
        self.calls += 1
        thread.interrupts = thread.ticks = 0
        thread.boundary = thread.stop[1:] if nr == _SIGRETURN else (thread.regs[16], thread.regs[19])
        self._resume(thread)
        return True

    def _extras(self, thread: _Recorded, shape: syscalls.Model, result: int) -> list[bytes]:
        if (shape.nr == _MMAP and result >= 0) or (shape.nr == _MMAP and result < -4095):
            return self._mapped(thread)
        if shape.nr == _SENDFILE and result > 0 and self._to_standard_output(thread, 0):
            return [self._sent(thread, result)]
        if shape.name == "ioctl" and result >= 0 and not syscalls.ioctl_known(thread.args[1]):
            target = thread.table.label(thread.args[0]) or "a descriptor"
            self._refuse(f"ioctl {thread.args[1] & 0xFFFFFFFF:#x} on {target} is not modelled")
        if shape.name == "prctl":
            return _prctl_output(thread, result)
        if shape.name in ("recvmsg", "pidfd_getfd") and result >= 0:
            return self._received(thread, shape, result)
        if shape.name == "prlimit64" and result >= 0 and thread.args[3]:
            return [thread.process.read(thread.args[3], 16)]
        return []

    def _mapped(self, thread: _Recorded) -> list[bytes]:
        """The content behind a file mapping, by hash."""
        flags, fd = thread.args[3:5]
        fd &= 0xFFFFFFFF
        if flags & _MAP_ANONYMOUS or fd >= 1 << 31:
            return []
        label = thread.table.label(fd)
        try:
            own = os.open(f"/proc/{thread.tid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._refuse(f"mmap of {label or fd}: content cannot be read ({error.strerror})")
            return []
        try:
            info = os.fstat(own)
            if (info.st_mode & 0o170000) == 0o020000:
                if info.st_rdev != os.makedev(1, 5):
                    self._refuse(f"mmap of the device {label or fd} is not modelled")
                return [b"zero"]
            name = self.blobs.add_fd(own)
        finally:
            os.close(own)
        shared = flags & _MAP_SHARED_BITS in (1, 3)
        if not shared:
            return [name.encode()]
        self._judge_sharing(label or f"inode {info.st_ino}", info, bool(thread.args[2] & _PROT_WRITE))
        return [name.encode(), f"{info.st_dev:x}-{info.st_ino:x}".encode()]

    def _judge_sharing(self, name: str, info: os.stat_result, writable: bool) -> None:
        """A file mapped shared: do processes outside the recording write to it, or could they?"""
        ours = {thread.process.tgid for thread in self.threads.values()}
        if outsiders := _writers_of(info) - ours:
            who = ", ".join(map(str, sorted(outsiders)))
            self.limits.add(f"{name} is shared with processes outside the recording (pid {who}): their writes are not seen")
        elif writable:
            self.notes.add(f"shared mapping of {name}: changes by processes outside the recording are not seen")

    def _received(self, thread: _Recorded, shape: syscalls.Model, result: int) -> list[bytes]:
        """Descriptors that came from elsewhere: which of them are the program's standard output?"""
        fds = [result] if shape.name == "pidfd_getfd" else syscalls.passed_fds(thread.process, thread.args[1])
        if not fds:
            return []
        labels = {}
        for fd in fds:
            same = [name for own, name in ((1, "stdout"), (2, "stderr")) if ptrace.same_file(thread.tid, fd, os.getpid(), own)]
            labels[fd] = same[0] if same else "received"
        return [RECEIVED + json.dumps(labels).encode()]

    def _sent(self, thread: _Recorded, result: int) -> bytes:
        own = os.open(f"/proc/{thread.tid}/fd/{thread.args[1] & 0xFFFFFFFF}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if thread.args[2]:
                end = int.from_bytes(thread.process.read(thread.args[2], 8), "little")
            else:
                fields = Path(f"/proc/{thread.tid}/fdinfo/{thread.args[1] & 0xFFFFFFFF}").read_text().split()
                end = int(fields[1])
            return os.pread(own, result, end - result)
        finally:
            os.close(own)

    def _refuse(self, reason: str) -> None:
        if reason not in self.refused:
            self.refused.append(reason)

    # ---- processes ------------------------------------------------------------------------------------------------

    def _spawned(self, thread: _Recorded, event: int) -> bool:
        tid = ptrace.event_message(thread.tid)
        status = self.early.pop(tid, None)
        while status is None:
            got = ptrace.wait(tid)
            status = got[1] if got and got[0] else None
            if got and got[0] == 0:
                raise ptrace.Gone(thread.tid)
        flags = self._clone_flags(thread)
        same_process, shares_memory = bool(flags & 0x10000), bool(flags & 0x100)
        process = thread.process if same_process else Process(tid)
        table = thread.table if flags & 0x400 else thread.table.copy()
        child = self._add(tid, process, table)
        child.status = status
        if os.WIFSTOPPED(status):
            self.ready.append(child)
        pidfd = self._pidfd(thread, flags)
        self.writer.add(
            Kind.SPAWN, thread.index, thread.nr, child.index, self._now(), (same_process, shares_memory, flags, tid, pidfd, 0)
        )
        thread.due = (ptrace.SYSCALL, 0)
        if event != ptrace.EVENT_VFORK:
            return True
        self._let_go(thread)
        return self._try_finish(thread, thread.nr)

    def _pidfd(self, thread: _Recorded, flags: int) -> int:
        if not flags & 0x1000:
            return 0
        address = thread.args[2]
        if thread.nr == _CLONE3:
            address = int.from_bytes(thread.process.read(thread.args[0] + 8, 8), "little")
        return int.from_bytes(thread.process.read(address, 4), "little")

    def _clone_flags(self, thread: _Recorded) -> int:
        if thread.nr == NUMBERS["clone"]:
            return thread.args[0]
        if thread.nr == _CLONE3:
            return int.from_bytes(thread.process.read(thread.args[0], 8), "little")
        return 0x4100 if thread.nr == NUMBERS["vfork"] else 0

    def _executed(self, thread: _Recorded) -> bool:
        thread.process = self._own_space(thread)
        thread.table = thread.table.copy()
        thread.table.after_exec()
        ptrace.request(ptrace.SYSCALL, thread.tid)
        got = None
        while got is None:
            got = ptrace.wait(thread.tid)
        if got[0] == 0 or not os.WIFSTOPPED(got[1]):
            raise ptrace.Gone(thread.tid)
        self._after_exec(thread)
        self.writer.add(
            Kind.EXEC, thread.index, thread.nr, 0, self._now(), thread.args, thread.payload, self._exec_pieces(thread)
        )
        thread.entered = False
        self.calls += 1
        regs = ptrace.get_regs(thread.tid)
        thread.boundary = (regs[ptrace.RIP], regs[ptrace.RSP])
        self._resume(thread)
        return True

    def _exec_among_threads(self, thread: _Recorded) -> bool:
        """The kernel ends the other threads, and the caller takes over the first one's id."""
        tgid = thread.process.tgid
        ended: list[tuple[_Recorded, int]] = []
        while True:
            got = ptrace.wait(-1)
            if got is None:
                continue
            tid, status = got
            if tid == 0:
                raise ptrace.Gone(thread.tid)
            if tid == tgid and status >> 16 == ptrace.EVENT_EXEC:
                break
            if tid == thread.tid:  # it failed, or was killed
                thread.status = status
                return True
            if tid in thread.process.threads and not os.WIFSTOPPED(status):
                ended.append((self.threads.pop(tid), status))
            else:
                self._arrived(tid, status)
        if tgid != thread.tid:
            ended.append((self.threads.pop(tgid), 0))
            del self.threads[thread.tid]
            thread.tid = tgid
            self.threads[tgid] = thread
        thread.process.threads = {tgid}
        self._executed(thread)
        for other, status in ended:
            self.writer.add(Kind.DEATH, other.index, other.nr if other.entered else -1, status, self._now(), other.args)
        return True

    def _own_space(self, thread: _Recorded) -> Process:
        """After exec the process has an address space of its own, also a vfork child."""
        if thread.process.tgid == thread.tid:
            thread.process.reopen()
            return thread.process
        return Process(thread.tid)

    def _after_exec(self, thread: _Recorded) -> None:
        if not thread.place_scratch():
            self.limits.add("cpuid cannot be trapped here: a replay sees the identity of the processor it runs on")
        self.stack = thread.hide_vdso()
        self.stack_top = ptrace.get_regs(thread.tid)[ptrace.RSP]
        self.entry_point = ptrace.get_regs(thread.tid)[ptrace.RIP]

    def _exec_pieces(self, thread: _Recorded) -> list[bytes]:
        """Images by path and hash, the initial stack, and where execution begins."""
        images = _images(self.blobs, thread.tid, thread.payload)
        layout = {"images": images, "stack_top": self.stack_top, "entry": self.entry_point, "cwd": _cwd(thread.tid),
                  "stack_limit": resource.prlimit(thread.tid, resource.RLIMIT_STACK)}  # fmt: skip
        return [json.dumps(layout).encode(), self.stack]

    def _leave(self, thread: _Recorded) -> bool:
        self.writer.add(Kind.LEAVE, thread.index, thread.nr, 0, self._now(), thread.args)
        whole = thread.nr == _EXIT_GROUP or len(thread.process.threads) == 1
        leaving = list(thread.process.threads) if whole else [thread.tid]
        robust = [item for tid in leaving for item in ptrace.robust_words(tid, thread.process.read)]
        self._resume(thread)
        self._let_go(thread)
        if not whole and thread.tid == thread.process.tgid:
            self._await_zombie(thread)
            return False
        tids = list(thread.process.threads) if whole else [thread.tid]
        for tid in tids:
            other = self.threads.get(tid)
            if other is not None:
                self._await_death(other)
        for address, before in robust:
            self._log_if_changed(address, before)
        return False

    def _log_if_changed(self, address: int, before: bytes) -> None:
        """A robust mutex whose owner has died, seen through a process that still lives."""
        for process in {t.process for t in self.threads.values()}:
            now = process.read(address, 4)
            if now != before and int.from_bytes(now, "little") & 0x40000000:
                self._write_beside(process, address, 4)
                return

    def _await_zombie(self, thread: _Recorded) -> None:
        while True:
            try:
                state = Path(f"/proc/{thread.tid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return
            if state in "ZX":
                return
            os.sched_yield()

    def _death(self, thread: _Recorded, status: int) -> None:
        unfinished = thread.nr if thread.entered else -1
        self.writer.add(Kind.DEATH, thread.index, unfinished, status, self._now(), thread.args)
        self.threads.pop(thread.tid, None)
        thread.process.threads.discard(thread.tid)
        if not thread.process.threads:
            thread.process.close()
        if thread.tid == self.root_tid:
            self.root_status = status

    # ---- signals --------------------------------------------------------------------------------------------------

    def _signal(self, thread: _Recorded, number: int) -> bool:
        info = ptrace.get_siginfo(thread.tid)
        code = struct.unpack_from("<i", info, 8)[0]
        if number == signal.SIGSEGV and code == 0x80 and self._trapped(thread):
            return True
        if number in _SYNCHRONOUS and code > 0:
            return self._deliver(thread, number, info, 2)
        if thread.held and thread.held[0][0] == number:
            info = thread.held.popleft()[1]
        if self._at_boundary(thread):
            return self._deliver(thread, number, info, 0)
        if number >= 32 or all(number != held for held, _ in thread.held):  # the kernel, too, keeps one of each
            thread.held.append((number, info))
        self._resume(thread)
        return True

    def _at_boundary(self, thread: _Recorded) -> bool:
        regs = ptrace.get_regs(thread.tid)
        if thread.boundary is not None and len(thread.boundary) > 2:  # behind sigreturn: nothing has run when all is the same
            return (*regs[:15], *regs[16:20]) == (*thread.boundary[:15], *thread.boundary[16:20])
        return thread.boundary == (regs[ptrace.RIP], regs[ptrace.RSP]) and regs[ptrace.RCX] == regs[ptrace.RIP]

    def _deliver(self, thread: _Recorded, number: int, info: bytes, how: int) -> bool:
        stops = number in _STOPPING and not _caught(thread.tid, number)
        self.writer.add(
            Kind.SIGNAL, thread.index, number, int(stops), self._now(), (how, 0, 0, 0, 0, 0), info
        )
        ptrace.set_siginfo(thread.tid, info)
        self._resume(thread, number)
        return True

    def _trapped(self, thread: _Recorded) -> bool:
        trap = trapped_instruction(thread)
        if trap is None:
            return False
        regs = ptrace.get_regs(thread.tid)
        values = native_trap(trap[0], regs[ptrace.RAX], regs[ptrace.RCX], time.monotonic_ns())
        self.writer.add(Kind.TRAP, thread.index, trap[0], 0, self._now(), (*values, regs[ptrace.RAX], regs[ptrace.RCX]))
        answer_trap(thread, trap, values)
        self._resume(thread)
        return True

    def _event_stop(self, thread: _Recorded, number: int) -> bool:
        if number in _STOPPING:
            ptrace.request(ptrace.LISTEN, thread.tid)
            return False
        if thread.boundary is None or thread.preempted:
            thread.preempted = False
            if thread.boundary is None:
                regs = ptrace.get_regs(thread.tid)
                thread.boundary = (regs[ptrace.RIP], regs[ptrace.RSP])
            self.writer.add(Kind.START, thread.index, time_ns=self._now())
            self._resume(thread)
            return True
        return self._interrupted(thread)

    def _interrupted(self, thread: _Recorded) -> bool:
        """Our own INTERRUPT: does the thread spin? Then its registers repeat, and a replay can stop at the same point."""
        thread.interrupts += 1
        if thread.held or self.ready:
            regs, counts = self._spinning(thread)
            patience = _COUNTING_INTERRUPTS if thread.held or counts else _GIVE_UP_INTERRUPTS
            if regs is None and thread.status is None and thread.interrupts > patience:
                regs = ptrace.get_regs(thread.tid)
                what = f"signal {thread.held[0][0]} was delivered" if thread.held else "a thread was interrupted"
                self.limits.add(f"{what} within a computation: a replay has to find the point by its registers")
            if regs is not None:
                return self._switch_here(thread, regs)
        if thread.status is not None:
            return True
        self._resume(thread)
        return True

    def _spinning(self, thread: _Recorded) -> tuple[list[int] | None, bool]:
        """Single steps: registers that repeat, and whether the thread is in a loop that only counts."""
        start = ptrace.get_regs(thread.tid)
        passes = [start]
        for _ in range(_SPIN_STEPS):
            ptrace.request(ptrace.SINGLESTEP, thread.tid)
            got = None
            while got is None:
                got = ptrace.wait(thread.tid)
            if got[0] == 0 or not os.WIFSTOPPED(got[1]):
                raise ptrace.Gone(thread.tid)
            if got[1] >> 8 != signal.SIGTRAP:
                thread.status = got[1]
                return None, False
            regs = ptrace.get_regs(thread.tid)
            if regs[:17] == start[:17] and regs[ptrace.RSP] == start[ptrace.RSP]:
                return regs, False
            if regs[ptrace.RIP] == start[ptrace.RIP]:
                passes.append(regs)
                if len(passes) == 3:
                    return None, passes_left(passes, start) != NO_COUNTER
        return None, False

    def _switch_here(self, thread: _Recorded, regs: Sequence[int]) -> bool:
        packed = struct.pack("<27Q", *regs)
        if thread.held:
            number, info = thread.held.popleft()
            self.writer.add(Kind.SIGNAL, thread.index, number, 0, self._now(), (1, 0, 0, 0, 0, 0), info, (packed,))
            ptrace.tgkill(thread.process.tgid, thread.tid, number)
            ptrace.request(ptrace.CONT, thread.tid)
            got = None
            while got is None:
                got = ptrace.wait(thread.tid)
            ptrace.set_siginfo(thread.tid, info)
            self._resume(thread, number)
            return True
        self.writer.add(Kind.PREEMPT, thread.index, time_ns=self._now(), payload=packed)
        thread.preempted = True
        thread.status = ptrace.EVENT_STOP << 16 | signal.SIGTRAP << 8 | 0x7F
        self.ready.append(thread)
        return False


def _caught(tid: int, number: int) -> bool:
    for line in Path(f"/proc/{tid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _writers_of(info: os.stat_result) -> set[int]:
    """Processes that have the file mapped, shared and writable."""
    device, inode = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}", str(info.st_ino)
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            lines = (folder / "maps").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split(maxsplit=5)
            if fields[4] == inode and fields[3] == device and "w" in fields[1] and fields[1].endswith("s"):
                found.add(int(folder.name))
    return found


def _prctl_output(thread: _Recorded, result: int) -> list[bytes]:
    sizes = {2: 4, 16: 16, 5: 4, 9: 4, 11: 4, 25: 4, 19: 4, 37: 4, 40: 8}
    size = sizes.get(thread.args[0] & 0xFFFFFFFF, 0)
    return [thread.process.read(thread.args[1], size)] if size and result >= 0 else []


def _cwd(tid: int) -> str:
    try:
        return os.readlink(f"/proc/{tid}/cwd")
    except OSError:
        return "/"


def _images(blobs: log.BlobStore, tid: int, payload: bytes) -> list[list[str]]:
    """[path as the kernel opened it, hash] of the program, and of the script and the loader that belong to it."""
    root = f"/proc/{tid}/root"
    found: dict[str, str] = {}
    path = os.fsdecode(payload) or os.readlink(f"/proc/{tid}/exe")
    exe = f"/proc/{tid}/exe"
    for _ in range(5):  # script -> interpreter -> loader; the kernel follows four levels at most
        absolute = path if path.startswith("/") else os.path.join(_cwd(tid), path)
        try:
            fd = os.open(root + absolute if not absolute.startswith("/proc/self/") else exe, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            fd = os.open(exe, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found[absolute] = blobs.add_fd(fd)
            following = image_successor(fd)
        finally:
            os.close(fd)
        if following is None:
            break
        path = following
    return [list(item) for item in found.items()]


def image_successor(fd: int) -> str | None:
    """The interpreter of a `#!` script or the loader of an ELF program."""
    head = os.pread(fd, 4096, 0)
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n")[0].split()
        return os.fsdecode(words[0]) if words else None
    if head[:4] != b"\x7fELF":
        return None
    offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
    for i in range(count):
        entry = os.pread(fd, 56, offset + i * size)
        if struct.unpack_from("<I", entry)[0] == 3:
            at, length = struct.unpack_from("<Q", entry, 8)[0], struct.unpack_from("<Q", entry, 32)[0]
            return os.fsdecode(os.pread(fd, length, at).rstrip(b"\0"))
    return None


# ---- calls that the tracer answers itself, so that they cost one stop ------------------------------------------------


def _clock_gettime(recorder: Recorder, thread: _Recorded) -> bool:
    clock = thread.args[0] & 0xFFFFFFFF
    if clock not in _CLOCKS or not thread.args[1] or thread.held:
        return False
    now = time.clock_gettime_ns(clock)
    if not thread.process.write(thread.args[1], struct.pack("<qq", *divmod(now, 1_000_000_000))):
        return False
    thread.skip_call(0)
    return recorder._finish(thread, 0)


def _sched_getaffinity(recorder: Recorder, thread: _Recorded) -> bool:
    size = min(thread.args[1] & 0xFFFFFFFF, 128) // 8 * 8
    if size < 8 or thread.held:
        return False
    size = min(size, 8 * ((recorder.affinity.bit_length() + 63) // 64))
    data = recorder.affinity.to_bytes(size, "little")
    if not thread.process.write(thread.args[2], data):
        return False
    thread.skip_call(size)
    # Logged as an output by hand: the table has none for this call, whose real answer would be the one CPU.
    recorder.writer.add(Kind.CALL, thread.index, thread.nr, size, recorder._now(), thread.args, b"", [data])
    recorder.calls += 1
    thread.boundary = (thread.regs[ptrace.RIP], thread.regs[ptrace.RSP])
    recorder._resume(thread)
    return True


def _pretend_success(recorder: Recorder, thread: _Recorded) -> bool:
    thread.skip_call(0)
    return recorder._finish(thread, 0)


def _prctl(recorder: Recorder, thread: _Recorded) -> bool:
    option = thread.args[0] & 0xFFFFFFFF
    if option in (26, 22):  # PR_SET_TSC and PR_SET_SECCOMP would take our own traps away
        return _pretend_success(recorder, thread)
    return False


_EMULATED: Final[dict[int, Any]] = {
    NUMBERS["clock_gettime"]: _clock_gettime,
    NUMBERS["sched_getaffinity"]: _sched_getaffinity,
    NUMBERS["sched_setaffinity"]: _pretend_success,
    NUMBERS["seccomp"]: _pretend_success,
    NUMBERS["prctl"]: _prctl,
}


def record(command: Sequence[str], folder: Path) -> int:
    """Record a command into a new folder; returns the exit status as a shell would show it."""
    ptrace.require_machine()
    path = shutil.which(command[0])
    if path is None:
        raise InputError(f"cannot run {command[0]!r}: no such program, or not executable; give a path or a name on PATH")
    _make_folder(folder)
    affinity = os.sched_getaffinity(0)
    cpu = _choose_cpu(affinity)
    meta = _describe(command, path)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    environment = dict(os.environb)
    pid, _ = launch(path, list(command), environment, cpu, _own_group)
    os.sched_setaffinity(0, {cpu})
    _hand_terminal(pid)
    recorder = Recorder(folder, cpu, affinity)
    signal.signal(signal.SIGALRM, recorder.on_alarm)
    signal.setitimer(signal.ITIMER_REAL, _TICK_S, _TICK_S)
    try:
        with recorder.traps:
            recorder.run(pid, path)
    except Unrecordable as reason:
        recorder.abandon()
        recorder.refused.insert(0, str(reason))
        log.save_meta(folder, meta | _outcome(recorder, 128 + signal.SIGKILL))
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.sched_setaffinity(0, affinity)
        _hand_terminal(os.getpgrp())
    status = recorder.root_status if recorder.root_status is not None else 0
    code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    log.save_meta(folder, meta | _outcome(recorder, code))
    return code


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the recording folder {folder}: {error.strerror}") from error
    if any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: name a new folder, so that no recording is overwritten")
    folder.chmod(0o700)


def _choose_cpu(affinity: set[int]) -> int:
    usable = sorted(affinity)
    return usable[os.getpid() % len(usable)]


def _own_group() -> None:
    """The program's signals to its own group must not reach the recorder."""
    for number in (signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)


def _hand_terminal(group: int) -> None:
    for fd in (0, 1, 2):
        try:
            if os.isatty(fd):
                os.tcsetpgrp(fd, group)
                return
        except OSError:
            continue


def _describe(command: Sequence[str], path: str) -> dict[str, Any]:
    return {
        "schema": log.SCHEMA, "command": list(command), "exec_path": path, "program": os.path.abspath(path), "cwd": os.getcwd(),
        "environment": {os.fsdecode(k): os.fsdecode(v) for k, v in os.environb.items()},
        "machine": platform.machine(), "kernel": platform.release(), "cpu_model": _cpu_model(),
        "stack_limit": resource.getrlimit(resource.RLIMIT_STACK), "started_real_ns": time.time_ns(),
    }  # fmt: skip


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _outcome(recorder: Recorder, code: int) -> dict[str, Any]:
    exact = ["F5 (instruction-exact) needs a processor counter; use rr where one exists"]
    reasons = [f"F4 (exact) is not reached: {limit}" for limit in sorted(recorder.limits)]
    reasons += [f"F1 and above need every call modelled: {reason}" for reason in recorder.refused]
    return {
        "exit_status": code, "calls": recorder.calls, "threads": recorder.next_index,
        "fidelity": "F0" if recorder.refused else "F3" if recorder.limits else "F4",
        "refused": recorder.refused, "notes": sorted(recorder.notes | recorder.limits), "why_not_higher": exact + reasons,
    }  # fmt: skip
