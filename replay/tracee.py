"""One traced thread and its process: memory, calls made in its name, set-up after exec, start of a first process.

Shared by recorder and player, so that both prepare a program in exactly the same way: own page at a fixed address,
vDSO hidden, rdtsc and cpuid trapped, rseq and io_uring absent, no address randomisation, one CPU.
Fails: `TraceeError` when the program cannot be started; `ptrace.Gone` when it died meanwhile.
"""

import errno
import os
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from events.errors import InputError
from events.syscalls import NUMBERS
from replay import machine, ptrace, syscalls

__all__ = ["Process", "Thread", "TraceeError", "launch"]

AT_IGNORE, AT_RANDOM, AT_SYSINFO_EHDR = 1, 25, 33
STACK_END: Final = 0x7FFFFFFFF000
SYSCALL_INSTRUCTION: Final = b"\x0f\x05"
_CPUID_HIDDEN: Final = {(1, 2): 1 << 30, (7, 1): (1 << 18) | (1 << 11)}  # RDRAND; RDSEED and RTM: values no tracer can see


class TraceeError(InputError):
    """The program could not be started."""


class Process:
    """One address space: its memory file and the process id that the kernel knows it by."""

    def __init__(self, tgid: int, shares: "Process | None" = None) -> None:
        self.tgid = tgid
        self.memory_fd = os.open(f"/proc/{tgid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self.threads: set[int] = set()
        self.blob_fds: dict[str, int] = dict(shares.blob_fds) if shares else {}
        self.leaving = False

    def read(self, address: int, length: int) -> bytes:
        """Memory; short or empty where nothing is mapped."""
        if length <= 0 or address <= 0 or address >= 1 << 47:
            return b""
        try:
            return os.pread(self.memory_fd, length, address)
        except OSError:
            return b""

    def write(self, address: int, data: bytes) -> bool:
        """Write memory, whatever its protection; False when it is not mapped."""
        try:
            return os.pwrite(self.memory_fd, data, address) == len(data)
        except (OSError, OverflowError):
            return False

    def reopen(self) -> None:
        """After exec the address space is another one."""
        os.close(self.memory_fd)
        self.memory_fd = os.open(f"/proc/{self.tgid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Release the memory file."""
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1


class Thread:
    """One thread under ptrace."""

    def __init__(self, tid: int, index: int, process: Process) -> None:
        self.tid = tid
        self.index = index
        self.process = process
        process.threads.add(tid)
        self.regs: list[int] = []
        self.nr = -1
        self.args: tuple[int, ...] = (0,) * 6

    def load_call(self) -> None:
        """Read number and arguments of the call at whose entry the thread stands."""
        regs = ptrace.get_regs(self.tid)
        self.regs = regs
        self.nr = regs[ptrace.ORIG_RAX]
        self.args = (regs[14], regs[13], regs[12], regs[7], regs[9], regs[8])

    def skip_call(self, result: int) -> None:
        """At a call's entry: do not make it, return `result`."""
        ptrace.poke_user(self.tid, ptrace.ORIG_RAX, ptrace.MASK64)
        ptrace.poke_user(self.tid, ptrace.RAX, result)

    def inject(self, name: str, *args: int) -> int:
        """Make a call in the thread's name from our own page; it must stand at any stop but a call's entry."""
        return self.inject_at(ptrace.SCRATCH_ADDRESS, name, *args)

    def inject_at(self, address: int, name: str, *args: int) -> int:
        """As `inject`, from a syscall instruction anywhere."""
        saved = ptrace.get_regs(self.tid)
        regs = list(saved)
        regs[ptrace.RIP], regs[ptrace.RAX], regs[ptrace.ORIG_RAX] = address, NUMBERS[name], ptrace.MASK64
        for register, value in zip(ptrace.ARGUMENT_REGISTERS, (*args, 0, 0, 0, 0, 0, 0), strict=False):
            regs[register] = value & ptrace.MASK64
        ptrace.set_regs(self.tid, regs)
        self._step()
        result = ptrace.peek_result(self.tid)
        saved[ptrace.ORIG_RAX] = ptrace.MASK64
        ptrace.set_regs(self.tid, saved)
        return result

    def _step(self) -> None:
        while True:
            ptrace.request(ptrace.SINGLESTEP, self.tid)
            got = None
            while got is None:
                got = ptrace.wait(self.tid)
            if got[0] == 0 or os.WIFEXITED(got[1]) or os.WIFSIGNALED(got[1]):
                raise ptrace.Gone(self.tid)
            if got[1] >> 8 == signal.SIGTRAP:
                return

    def place_scratch(self) -> bool:
        """After exec: map our page, and trap cpuid. Returns whether cpuid is trapped."""
        at = ptrace.get_regs(self.tid)[ptrace.RIP]
        original = self.process.read(at, 2)
        self.process.write(at, SYSCALL_INSTRUCTION)
        got = self.inject_at(at, "mmap", ptrace.SCRATCH_ADDRESS, ptrace.SCRATCH_BYTES, 7, 0x100022, ptrace.MASK64, 0)
        self.process.write(at, original)
        if got != ptrace.SCRATCH_ADDRESS:
            raise TraceeError(f"the page at {ptrace.SCRATCH_ADDRESS:#x} is taken by the program itself; it cannot be recorded")
        self.process.write(ptrace.SCRATCH_ADDRESS, SYSCALL_INSTRUCTION)
        return self.inject("arch_prctl", ptrace.ARCH_SET_CPUID, 0) == 0

    def hide_vdso(self) -> bytes:
        """After exec: take the vDSO from the auxiliary vector; returns the initial stack, as it then is."""
        top = ptrace.get_regs(self.tid)[ptrace.RSP]
        stack = bytearray(self.process.read(top, STACK_END - top))
        for at, kind, _ in auxiliary_vector(bytes(stack)):
            if kind == AT_SYSINFO_EHDR:
                struct.pack_into("<Q", stack, at, AT_IGNORE)
                self.process.write(top + at, bytes(stack[at : at + 8]))
        return bytes(stack)


def auxiliary_vector(stack: bytes) -> list[tuple[int, int, int]]:
    """(offset, type, value) of each entry of the auxiliary vector on an initial stack."""
    words = struct.unpack(f"<{len(stack) // 8}Q", stack[: len(stack) // 8 * 8])
    at = 1 + words[0] + 1
    while words[at]:
        at += 1
    at += 1
    found = []
    while words[at]:
        found.append((at * 8, words[at], words[at + 1]))
        at += 2
    return found


_cpuid_cache: dict[tuple[int, int], tuple[int, int, int, int]] = {}


def trapped_instruction(thread: Thread) -> tuple[int, int] | None:
    """(kind, length) of the trapped instruction at which a SIGSEGV stopped the thread: 1 rdtsc, 2 rdtscp, 3 cpuid."""
    code = thread.process.read(ptrace.get_regs(thread.tid)[ptrace.RIP], 3)
    if code[:2] == b"\x0f\x31":
        return 1, 2
    if code == b"\x0f\x01\xf9":
        return 2, 3
    return (3, 2) if code[:2] == b"\x0f\xa2" else None


def native_trap(kind: int, eax: int, ecx: int, now_ns: int) -> tuple[int, int, int, int]:
    """The values that the processor would give (rdtsc: nanoseconds as ticks); random-number instructions are hidden."""
    if kind != 3:
        return now_ns & 0xFFFFFFFF, 0, 0, now_ns >> 32 & 0xFFFFFFFF
    key = (eax & 0xFFFFFFFF, ecx & 0xFFFFFFFF)
    if key not in _cpuid_cache:
        values = list(machine.cpuid(*key))
        for (leaf, register), bits in _CPUID_HIDDEN.items():
            if key[0] == leaf and (leaf != 7 or key[1] == 0):
                values[register] &= ~bits
        _cpuid_cache[key] = (values[0], values[1], values[2], values[3])
    return _cpuid_cache[key]


def answer_trap(thread: Thread, trap: tuple[int, int], values: Sequence[int]) -> None:
    """Write the values where the instruction would, and step over it."""
    kind, length = trap
    regs = ptrace.get_regs(thread.tid)
    regs[ptrace.RIP] += length
    regs[ptrace.RAX] = values[0]
    if kind == 3:
        regs[ptrace.RBX], regs[ptrace.RCX] = values[1], values[2]
    elif kind == 2:
        regs[ptrace.RCX] = 0
    regs[ptrace.RDX] = values[3]
    ptrace.set_regs(thread.tid, regs)


def engine_filter() -> bytes:
    """The seccomp filter of every tracee, from the table of calls."""
    allowed = [m.nr for m in syscalls.MODELS.values() if m.kind == "allow"]
    absent = [(m.nr, errno.ENOSYS) for m in syscalls.MODELS.values() if m.kind == "absent"]
    return ptrace.build_filter(allowed, absent)


def launch(
    path: str, argv: Sequence[str], environment: Mapping[bytes, bytes], cpu: int, prepare: Callable[[], None]
) -> tuple[int, int]:
    """Fork, seize, exec. Returns (pid, status of the exec stop); `prepare` runs in the child before exec."""
    program = engine_filter()
    ready_read, ready_write = os.pipe()
    failed_read, failed_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready_write)
            os.read(ready_read, 1)
            _child_setup(cpu, program, prepare)
            os.execve(path, list(argv), environment)
        except BaseException as error:
            os.write(failed_write, str(error).encode())
        os._exit(127)
    os.close(ready_read)
    os.close(failed_write)
    try:
        ptrace.request(ptrace.SEIZE, pid, 0, ptrace.OPTIONS)
        os.close(ready_write)
        return pid, _until_exec(pid, path, failed_read)
    finally:
        os.close(failed_read)


def _child_setup(cpu: int, program: bytes, prepare: Callable[[], None]) -> None:
    os.sched_setaffinity(0, {cpu})
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    prepare()
    ptrace.disable_randomization()
    ptrace.trap_tsc()
    ptrace.install_filter(program)


def _until_exec(pid: int, path: str, failed_read: int) -> int:
    while True:
        got = ptrace.wait(pid)
        if got is None:
            continue
        status = got[1]
        if got[0] == 0 or os.WIFEXITED(status) or os.WIFSIGNALED(status):
            reason = os.read(failed_read, 4096).decode(errors="replace") or f"wait status {status:#x}"
            raise TraceeError(f"cannot run {path}: {reason}")
        if status >> 16 == ptrace.EVENT_EXEC:
            # Still inside execve: its return would overwrite registers, so go on to its exit.
            ptrace.request(ptrace.SYSCALL, pid)
            got = None
            while got is None:
                got = ptrace.wait(pid)
            return got[1]
        number = 0 if status >> 16 else os.WSTOPSIG(status)
        if number == signal.SIGSEGV and _answer_own_trap(pid):
            number = 0
        ptrace.request(ptrace.CONT, pid, 0, number)


def _answer_own_trap(pid: int) -> bool:
    process = Process(pid)
    thread = Thread(pid, 0, process)
    trap = trapped_instruction(thread)
    if trap is not None:
        answer_trap(thread, trap, native_trap(trap[0], 0, 0, 0))
    process.close()
    return trap is not None
