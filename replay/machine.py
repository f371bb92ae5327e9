"""Machine code that the tracer runs in its own process: what ctypes alone cannot do, or not fast enough.

`cpuid` executes that instruction. `step` resumes a thread, waits for its next stop and reads its registers: three system
calls in one call from Python. `SharedTraps` gives the tracer the same trapped cpuid as its tracees: the processor's setting is
switched when the kernel changes between two tasks that differ in it, which a virtual machine pays with two exits to its
host, measured 35 us a traced call. A cpuid in the tracer itself (a library asking what the processor can do) takes the trap
off again, in a signal handler that is machine code, too.
"""

import ctypes
import errno
import mmap
import struct
from typing import Final, Self

from replay import ptrace

__all__ = ["SharedTraps", "cpuid", "step"]

# push rbx; mov r8,rdx; mov eax,edi; mov ecx,esi; cpuid; store the four registers behind r8; pop rbx; ret
_CPUID: Final = bytes.fromhex("534989d089f889f10fa241890041895804418948084189500c5bc3")
# step(request, tid, signal, buffer): ptrace(request, tid, 0, signal); wait4(tid, buffer, __WALL); if it stopped:
# ptrace(GETREGS, tid, 0, buffer + 8). Returns 0 or -errno of the first that failed. Entered at +0x1c it only waits.
_STEP: Final = bytes.fromhex(
    "5341544889cb4989f44989d231d2b8650000000f054885c0783feb095341544889cb4989f44c89e74889deba000000404531d2b83d0000000f05"
    "4885c0781a803b7f7519bf0c0000004c89e631d24c8d5308b8650000000f05415c5bc331c0ebf8"
)  # fmt: skip
_WAIT_ONLY: Final = 0x1C
# SIGSEGV handler: if the instruction at the saved RIP is cpuid: arch_prctl(ARCH_SET_CPUID, 1). The handler is installed for
# one fault, so that any other fault meets the default action when the instruction runs again.
_HANDLER: Final = bytes.fromhex("488b82a80000006681380fa27511bf12100000be01000000b89e0000000f05c3")
_SIGSEGV, _SIGINFO_RESET_ONSTACK = 11, 0x4 | 0x80000000 | 0x08000000
_GET_CPUID: Final = 0x1011

_page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
_page.write(_CPUID.ljust(64, b"\xcc") + _STEP.ljust(128, b"\xcc") + _HANDLER)
_base = ctypes.addressof(ctypes.c_char.from_buffer(_page))
_run_cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(_base)
_STEP_TYPE = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_void_p)
_run_step = _STEP_TYPE(_base + 64)
_run_wait = _STEP_TYPE(_base + 64 + _WAIT_ONLY)
_HANDLER_ADDRESS: Final = _base + 192

_STOP: Final = struct.Struct("<i4x27Q")
_buffer = ctypes.create_string_buffer(_STOP.size)
_buffer_ref = ctypes.addressof(_buffer)
_unpack = _STOP.unpack
_libc = ctypes.CDLL(None, use_errno=True)


def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """CPUID of this processor: (eax, ebx, ecx, edx)."""
    trapped = ptrace.arch_prctl(_GET_CPUID, 0) == 0
    if trapped:
        ptrace.arch_prctl(ptrace.ARCH_SET_CPUID, 1)
    out = (ctypes.c_uint32 * 4)()
    _run_cpuid(leaf, subleaf, ctypes.addressof(out))
    if trapped:
        ptrace.arch_prctl(ptrace.ARCH_SET_CPUID, 0)
    return out[0], out[1], out[2], out[3]


def step(tid: int, request: int, signal_number: int = 0) -> tuple[int, ...] | None:
    """Resume a thread and wait for its next stop: (status, its 27 registers). None: a signal to us came first.

    The registers mean nothing when the status is that of an end. `request` 0 only waits.
    """
    run = _run_step if request else _run_wait
    result = run(request, tid, signal_number, _buffer_ref)
    if result < 0:
        if -result == errno.EINTR:
            return None
        if -result in (errno.ESRCH, errno.ECHILD):
            raise ptrace.Gone(tid)
        raise ptrace.PtraceError(f"ptrace request {request:#x} on thread {tid} failed with errno {-result}")
    return _unpack(_buffer.raw)


class SharedTraps:
    """While tracing: cpuid is trapped in this process as in the tracees. `renew` after it may have been taken off."""

    def __init__(self) -> None:
        self._former = ctypes.create_string_buffer(152)
        self._works = False

    def __enter__(self) -> Self:
        _libc.sigaction(_SIGSEGV, None, self._former)
        self._works = True
        self.renew()
        return self

    def renew(self) -> None:
        """Set handler and trap again, where the processor has the trap."""
        if not self._works or ptrace.arch_prctl(_GET_CPUID, 0) == 0:
            return
        action = struct.pack("<Q128siiQ", _HANDLER_ADDRESS, b"", _SIGINFO_RESET_ONSTACK - (1 << 32), 0, 0)
        _libc.sigaction(_SIGSEGV, action, None)
        self._works = ptrace.arch_prctl(ptrace.ARCH_SET_CPUID, 0) == 0

    def __exit__(self, *_: object) -> None:
        ptrace.arch_prctl(ptrace.ARCH_SET_CPUID, 1)
        _libc.sigaction(_SIGSEGV, self._former, None)
