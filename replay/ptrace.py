"""The kernel's tracing interface for x86-64 Linux, through ctypes: ptrace, wait, seccomp filter, traps.

What: the requests, structures and constants that the recorder and the player need, and nothing that decides anything.
Guarantees: a request on a thread that has died meanwhile raises `Gone`; every other failure raises `PtraceError` with the
request and the errno. No C build step and no third-party binding.
Fails: on any other architecture `require_machine` refuses by name; aarch64 has other registers and other call numbers.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from events.errors import CapabilityError, KprobeError

__all__ = [
    "ENTRY_SIGNAL_STOP",
    "SCRATCH_ADDRESS",
    "Gone",
    "PtraceError",
    "build_filter",
    "install_filter",
    "require_machine",
]


class PtraceError(KprobeError):
    """A ptrace request failed for a reason other than the thread's death."""


class Gone(Exception):  # noqa: N818 - an outcome, not an error
    """The traced thread does not exist any more (it was killed); its death is reported by wait."""


TRACEME, PEEKTEXT, PEEKUSER, POKETEXT, POKEUSER, CONT, KILL, SINGLESTEP = 0, 1, 3, 4, 6, 7, 8, 9
GETREGS, SETREGS, ATTACH, DETACH, SYSCALL = 12, 13, 16, 17, 24
SETOPTIONS, GETEVENTMSG, GETSIGINFO, SETSIGINFO = 0x4200, 0x4201, 0x4202, 0x4203
SEIZE, INTERRUPT, LISTEN, GETSIGMASK, SETSIGMASK = 0x4206, 0x4207, 0x4208, 0x420A, 0x420B

O_SYSGOOD, O_FORK, O_VFORK, O_CLONE, O_EXEC, O_VFORKDONE, O_EXIT, O_SECCOMP, O_EXITKILL = (
    0x1, 0x2, 0x4, 0x8, 0x10, 0x20, 0x40, 0x80, 0x100000,
)  # fmt: skip
EVENT_FORK, EVENT_VFORK, EVENT_CLONE, EVENT_EXEC, EVENT_VFORK_DONE, EVENT_EXIT, EVENT_SECCOMP, EVENT_STOP = (
    1, 2, 3, 4, 5, 6, 7, 128,
)  # fmt: skip
WALL: Final = 0x40000000
WNOHANG: Final = 1
OPTIONS: Final = O_SYSGOOD | O_FORK | O_VFORK | O_CLONE | O_EXEC | O_SECCOMP | O_EXITKILL
SYSCALL_STOP: Final = 5 | 0x80
ENTRY_SIGNAL_STOP: Final = 5

# Index into the registers as PTRACE_GETREGS orders them (struct user_regs_struct).
R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8, RAX, RCX, RDX, RSI, RDI, ORIG_RAX, RIP, CS, EFLAGS, RSP = range(20)
FS_BASE: Final = 21
ARGUMENT_REGISTERS: Final = (RDI, RSI, RDX, R10, R8, R9)
_REGS: Final = struct.Struct("<27Q")
MASK64: Final = (1 << 64) - 1
_DEBUG_REGISTER: Final = 848  # offsetof(struct user, u_debugreg)

# Our own page in every tracee: calls from its first instruction pass the filter, so that the tracer can make calls
# in the tracee's name. Below the usual places of programs, above what small non-PIE programs grow to.
SCRATCH_ADDRESS: Final = 0x70000000
SCRATCH_BYTES: Final = 0x2000
SCRATCH_DATA: Final = SCRATCH_ADDRESS + 0x1000

_AUDIT_X86_64: Final = 0xC000003E
_RET_TRACE, _RET_ALLOW, _RET_ERRNO = 0x7FF00000, 0x7FFF0000, 0x00050000
FOREIGN_CALL: Final = 0xFFFF  # the filter's data for a 32-bit or x32 call
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_TSC, PR_TSC_SIGSEGV = 38, 22, 26, 2
ADDR_NO_RANDOMIZE: Final = 0x0040000
ARCH_SET_CPUID: Final = 0x1012

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_waitpid = _libc.waitpid
_waitpid.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_status = ctypes.c_int()
_status_ref = ctypes.addressof(_status)
_regs_buffer = ctypes.create_string_buffer(_REGS.size)
_regs_ref = ctypes.addressof(_regs_buffer)
_message = ctypes.c_ulong()


def require_machine() -> None:
    """Refuse what the engine was not built for, by name."""
    machine = platform.machine()
    if machine != "x86_64" or platform.system() != "Linux":
        raise CapabilityError(
            f"replay of programs runs on x86_64 Linux only, this is {machine} {platform.system()}; "
            "record and replay on an x86_64 machine"
        )


def request(code: int, tid: int, address: int = 0, data: int = 0) -> int:
    """One ptrace request; raises Gone when the thread has died."""
    result: int = _ptrace(code, tid, address, data)
    if result < 0:
        error = ctypes.get_errno()
        if error == errno.ESRCH:
            raise Gone(tid)
        raise PtraceError(f"ptrace request {code:#x} on thread {tid} failed: {os.strerror(error)}")
    return result


def wait(tid: int, flags: int = WALL) -> tuple[int, int] | None:
    """(tid, status) of the next stop; None when interrupted by a signal, or nothing to report with WNOHANG.

    No such child is reported as (0, 0).
    """
    got = _waitpid(tid, _status_ref, flags)
    if got > 0:
        return got, _status.value
    if got == 0:
        return None
    if ctypes.get_errno() == errno.EINTR:
        return None
    return 0, 0


def get_regs(tid: int) -> list[int]:
    """The 27 registers, in the order of the constants above."""
    request(GETREGS, tid, 0, _regs_ref)
    return list(_REGS.unpack(_regs_buffer.raw))


def set_regs(tid: int, regs: Sequence[int]) -> None:
    """Write all registers back."""
    _REGS.pack_into(_regs_buffer, 0, *regs)
    request(SETREGS, tid, 0, _regs_ref)


def poke_user(tid: int, register: int, value: int) -> None:
    """Write one register."""
    request(POKEUSER, tid, register * 8, value & MASK64)


def peek_result(tid: int) -> int:
    """RAX as a signed number."""
    ctypes.set_errno(0)
    result: int = _ptrace(PEEKUSER, tid, RAX * 8, 0)
    if result == -1 and ctypes.get_errno() == errno.ESRCH:
        raise Gone(tid)
    return result


def event_message(tid: int) -> int:
    """The number that belongs to the current ptrace event (the new thread, or the old id at exec)."""
    request(GETEVENTMSG, tid, 0, ctypes.addressof(_message))
    return _message.value


def get_siginfo(tid: int) -> bytes:
    """The 128 bytes of siginfo_t of the signal about to be delivered."""
    buffer = ctypes.create_string_buffer(128)
    request(GETSIGINFO, tid, 0, ctypes.addressof(buffer))
    return buffer.raw


def set_siginfo(tid: int, info: bytes) -> None:
    """Replace the siginfo_t of the signal about to be delivered."""
    buffer = ctypes.create_string_buffer(info, 128)
    request(SETSIGINFO, tid, 0, ctypes.addressof(buffer))


def set_breakpoint(tid: int, address: int) -> None:
    """Hardware breakpoint 0 on an instruction; address 0 clears it."""
    request(POKEUSER, tid, _DEBUG_REGISTER + 7 * 8, 0)
    if address:
        request(POKEUSER, tid, _DEBUG_REGISTER, address)
        request(POKEUSER, tid, _DEBUG_REGISTER + 7 * 8, 1)


def tgkill(tgid: int, tid: int, number: int) -> None:
    """Send a signal to one thread."""
    _libc.syscall(ctypes.c_long(234), ctypes.c_long(tgid), ctypes.c_long(tid), ctypes.c_long(number))


def robust_words(tid: int, read: Callable[[int, int], bytes]) -> list[tuple[int, bytes]]:
    """(address, value) of each robust futex that a thread holds, from the list that it registered with the kernel."""
    head, size = ctypes.c_ulong(), ctypes.c_ulong()
    if _libc.syscall(ctypes.c_long(274), ctypes.c_long(tid), ctypes.byref(head), ctypes.byref(size)) != 0 or not head.value:
        return []
    raw = read(head.value, 24)
    if len(raw) < 24:
        return []
    entry, offset, pending = struct.unpack("<QqQ", raw)
    found: list[int] = []
    while entry & ~1 != head.value and len(found) < 2048:
        found.append((entry & ~1) + offset)
        entry = int.from_bytes(read(entry & ~1, 8), "little")
        if not entry:
            break
    if pending:
        found.append((pending & ~1) + offset)
    return [(address, read(address, 4)) for address in found]


def same_file(tid: int, fd: int, other_tid: int, other_fd: int) -> bool:
    """Whether two descriptors are one open file (kcmp; False where the kernel does not have it)."""
    words = (ctypes.c_long(n) for n in (312, tid, other_tid, 0, fd, other_fd))
    return bool(_libc.syscall(*words) == 0)


def arch_prctl(code: int, value: int) -> int:
    """Return 0 when the kernel and the processor accept it."""
    result: int = _libc.syscall(ctypes.c_long(158), ctypes.c_long(code), ctypes.c_long(value))
    return result


def _instruction(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, k)


def build_filter(allowed: Iterable[int], refused: Iterable[tuple[int, int]]) -> bytes:
    """A classic BPF program: allow `allowed` and our own page, answer `refused` (number, errno), trace all others."""
    load, equal, ret = 0x20, 0x15, 0x06
    code = [
        _instruction(load, 4),
        _instruction(equal, _AUDIT_X86_64, 1, 0),
        _instruction(ret, _RET_TRACE | FOREIGN_CALL),
        _instruction(load, 12),
        _instruction(equal, 0, 0, 3),
        _instruction(load, 8),
        _instruction(equal, SCRATCH_ADDRESS + 2, 0, 1),
        _instruction(ret, _RET_ALLOW),
        _instruction(load, 0),
    ]
    for number in sorted(allowed):
        code += [_instruction(equal, number, 0, 1), _instruction(ret, _RET_ALLOW)]
    for number, error in sorted(refused):
        code += [_instruction(equal, number, 0, 1), _instruction(ret, _RET_ERRNO | error)]
    code.append(_instruction(0x35, 0x40000000, 0, 1))  # jge: x32
    code.append(_instruction(ret, _RET_TRACE | FOREIGN_CALL))
    code.append(_instruction(ret, _RET_TRACE))
    return b"".join(code)


def install_filter(program: bytes) -> None:
    """Install a filter on the calling thread; raises OSError. Runs in the child between fork and exec."""
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    head_buffer = ctypes.create_string_buffer(head, len(head))
    if os.geteuid() != 0:
        _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(head_buffer)), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot install the seccomp filter")


def disable_randomization() -> None:
    """Fixed addresses from the next exec on."""
    persona = _libc.personality(ctypes.c_ulong(0xFFFFFFFF))
    _libc.personality(ctypes.c_ulong((persona & 0xFFFFFFFF) | ADDR_NO_RANDOMIZE))


def trap_tsc() -> None:
    """Make rdtsc fault from now on (kept over fork and exec)."""
    _libc.prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0)
