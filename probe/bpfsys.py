"""The bpf() system call, by ctypes: what BCC cannot do with the instructions that it compiled.

What: create maps (ring buffers, an array of maps, arrays that can be mapped into memory), load programs of any type,
attach them to raw tracepoints, run an iterator over all tasks, ask a program what the kernel refused to run.
Guarantees: every file descriptor is close-on-exec; nothing is pinned, so all of it ends with the process.
Fails: OSError with the kernel's errno; a rejected program carries the end of the verifier's log in its message.
"""

import ctypes
import os
from typing import Final

from events.errors import CapabilityError

__all__ = [
    "ARRAY",
    "ARRAY_OF_MAPS",
    "HASH",
    "MMAPABLE",
    "RAW_TRACEPOINT",
    "RINGBUF",
    "TRACE_ITER",
    "TRACE_RAW_TP",
    "TRACING",
    "attach_iterator",
    "attach_raw_tracepoint",
    "create_map",
    "delete_element",
    "iterate",
    "load_program",
    "missed_runs",
    "set_element",
]

# include/uapi/linux/bpf.h
_MAP_CREATE, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD, _INFO_BY_FD, _RAW_TP_OPEN = 0, 2, 3, 5, 15, 17
_LINK_CREATE, _ITER_CREATE = 28, 33
HASH: Final = 1
ARRAY: Final = 2
ARRAY_OF_MAPS: Final = 12
RINGBUF: Final = 27
MMAPABLE: Final = 1 << 10
RAW_TRACEPOINT: Final = 17
TRACING: Final = 26
TRACE_RAW_TP: Final = 23
TRACE_ITER: Final = 28

_SYSCALL_NUMBER: Final = {"x86_64": 321, "aarch64": 280}
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Attr(ctypes.Structure):
    """Base of the argument blocks; the kernel takes any length and treats what is absent as 0."""


class _MapAttr(_Attr):
    _fields_ = [(n, ctypes.c_uint32) for n in ("type", "key", "value", "entries", "flags", "inner_fd", "numa")] + [
        ("name", ctypes.c_char * 16)
    ]


class _ElementAttr(_Attr):
    _fields_ = [("map_fd", ctypes.c_uint64), ("key", ctypes.c_uint64), ("value", ctypes.c_uint64), ("flags", ctypes.c_uint64)]


class _ProgramAttr(_Attr):
    _fields_ = [
        ("type", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("instructions", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log", ctypes.c_uint64),
        ("kernel_version", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("btf_fd", ctypes.c_uint32),
        ("func_info_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("func_info_count", ctypes.c_uint32),
        ("line_info_size", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64),
        ("line_info_count", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
    ]


class _RawTracepointAttr(_Attr):
    _fields_ = [("name", ctypes.c_uint64), ("program_fd", ctypes.c_uint32), ("pad", ctypes.c_uint32)]


class _LinkAttr(_Attr):
    _fields_ = [(n, ctypes.c_uint32) for n in ("program_fd", "target_fd", "attach_type", "flags")]


class _IteratorAttr(_Attr):
    _fields_ = [("link_fd", ctypes.c_uint32), ("flags", ctypes.c_uint32)]


class _InfoAttr(_Attr):
    _fields_ = [("fd", ctypes.c_uint32), ("size", ctypes.c_uint32), ("info", ctypes.c_uint64)]


_INFO_BYTES: Final = 232
_MISSES_AT: Final = 208  # bpf_prog_info.recursion_misses, since Linux 5.12


_NUMBER: Final = _SYSCALL_NUMBER.get(os.uname().machine)  # asked once: `_bpf` runs for every program in every drain


def _bpf(command: int, attr: _Attr) -> int:
    number = _NUMBER
    if number is None:
        raise CapabilityError(f"kprobe knows no bpf() on {os.uname().machine}; it runs on x86_64 and aarch64")
    result = int(_libc.syscall(number, command, ctypes.byref(attr), ctypes.sizeof(attr)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def create_map(
    kind: int, *, key: int = 0, value: int = 0, entries: int = 1, flags: int = 0, inner_fd: int = 0, name: str = "kprobe"
) -> int:
    """File descriptor of a new map."""
    attr = _MapAttr(type=kind, key=key, value=value, entries=entries, flags=flags, inner_fd=inner_fd, name=name.encode())
    return _bpf(_MAP_CREATE, attr)


def set_element(map_fd: int, key: bytes, value: bytes) -> None:
    """Store `value` under `key`."""
    k, v = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
    _bpf(_MAP_UPDATE, _ElementAttr(map_fd=map_fd, key=ctypes.addressof(k), value=ctypes.addressof(v)))


def delete_element(map_fd: int, key: bytes) -> None:
    """Forget `key`; FileNotFoundError if it is not there."""
    k = ctypes.create_string_buffer(key, len(key))
    _bpf(_MAP_DELETE, _ElementAttr(map_fd=map_fd, key=ctypes.addressof(k)))


def load_program(
    instructions: bytes, *, kind: int = RAW_TRACEPOINT, attach_type: int = 0, btf_id: int = 0, name: str = "kprobe"
) -> int:
    """File descriptor of a verified program. TRACING programs name their target by `btf_id`."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")
    attr = _ProgramAttr(
        type=kind,
        count=len(instructions) // 8,
        instructions=ctypes.addressof(code),
        license=ctypes.addressof(licence),
        name="".join(c if c.isalnum() else "_" for c in name)[:15].encode(),
        attach_type=attach_type,
        attach_btf_id=btf_id,
    )
    try:
        return _bpf(_PROG_LOAD, attr)
    except OSError:
        log = ctypes.create_string_buffer(1 << 22)
        attr.log_level, attr.log_size, attr.log = 1, len(log), ctypes.addressof(log)
        try:
            return _bpf(_PROG_LOAD, attr)  # once more, to hear why
        except OSError as error:
            said = log.value.decode(errors="replace").strip()[-800:]
            raise OSError(error.errno, f"{error.strerror}: {said}" if said else error.strerror) from None


def attach_raw_tracepoint(program_fd: int, tracepoint: str | None) -> int:
    """File descriptor whose closing detaches the program. `tracepoint` is None for TRACING programs, which name theirs."""
    name = ctypes.create_string_buffer(tracepoint.encode()) if tracepoint else None
    return _bpf(_RAW_TP_OPEN, _RawTracepointAttr(name=ctypes.addressof(name) if name else 0, program_fd=program_fd))


def attach_iterator(program_fd: int) -> int:
    """File descriptor of a link that `iterate` runs."""
    return _bpf(_LINK_CREATE, _LinkAttr(program_fd=program_fd, attach_type=TRACE_ITER))


def iterate(link_fd: int) -> bytes:
    """All that the iterator's program wrote in one run over its objects."""
    fd = _bpf(_ITER_CREATE, _IteratorAttr(link_fd=link_fd))
    with os.fdopen(fd, "rb", buffering=0) as file:
        return file.readall()


def missed_runs(program_fds: list[int]) -> list[int]:
    """How often the kernel refused to run each program because it was already running on that CPU (0 before 5.12)."""
    info = ctypes.create_string_buffer(_INFO_BYTES)
    attr = _InfoAttr(size=_INFO_BYTES, info=ctypes.addressof(info))
    misses = ctypes.c_uint64.from_buffer(info, _MISSES_AT)
    out = []
    for fd in program_fds:
        ctypes.memset(info, 0, _INFO_BYTES)  # the kernel reads lengths of arrays it may fill in
        attr.fd, attr.size = fd, _INFO_BYTES
        _bpf(_INFO_BY_FD, attr)
        out.append(misses.value)
    return out
