"""The probe's BPF programs: compiled, loaded, attached by family, and asked what the kernel refused to run.

What: `Maps` creates the memory that programs and reader share; `ProgramSet` finds for every kind of events/kinds.py the
tracepoint of this kernel, loads its program (with typed loads where the verifier accepts them) and attaches it.
Guarantees: a tracepoint or field that this kernel lacks is a missing capability with a reason, never an error. Nothing is
pinned: when the process ends, however it ends, the kernel detaches everything.
Fails: CapabilityError without root or BTF or BCC, ProbeError if not even sched_switch can be attached.
"""

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from events.errors import CapabilityError, ProbeError
from events.kinds import FAMILIES, KINDS, c_header
from events.syscalls import NUMBERS
from probe import bpfsys, compiler
from probe.btf import FUNC, KernelTypes
from probe.capabilities import Capabilities, FamilyState
from probe.cgroups import Hierarchy
from probe.watch import PIDS_MAX, glob_masks

__all__ = ["CPUS_MAX", "Maps", "Program", "ProgramSet", "Refusals"]

CPUS_MAX: Final = 1024
_STATE_BYTES: Final = 64  # struct cpu_state
_TEXT_RING_BYTES: Final = 4 << 20
_CGROUPS_MAX: Final = 16384
_PATTERNS_MAX: Final = 8
_PORTS_MAX: Final = 8
_SYSCALLS_MAX: Final = 512
_CONFIG_WORDS: Final = 6 + 4 * _PATTERNS_MAX + _PORTS_MAX
_CONFIG_BYTES: Final = 8 * _CONFIG_WORDS + _SYSCALLS_MAX

_PLACEHOLDERS: Final = {"state": 1001, "pids": 1002, "config": 1003, "rings": 1004, "text": 1005, "cgroups": 1006}

# Programs whose event has another name than their tracepoint: the names to try, newest first.
_TRACEPOINTS: Final[Mapping[str, tuple[str, ...]]] = {
    "cfs_period_timer": ("hrtimer_expire_exit",),
    "folio_wait_writeback": ("folio_wait_writeback", "wait_on_page_writeback"),
    "filemap_fault": ("mm_filemap_fault",),
    "sys_enter_futex": ("sys_enter",),
}
# Kinds that another program emits.
_PART_OF: Final = {"sys_enter_futex": "sys_enter"}

# System calls whose first argument is a file descriptor, and those that return one: their events name the object.
_TAKES_FD: Final = """
read write close fstat lseek ioctl pread64 pwrite64 readv writev sendfile connect accept sendto recvfrom
sendmsg recvmsg shutdown bind listen setsockopt getsockopt flock fsync fdatasync ftruncate fallocate accept4 preadv pwritev
preadv2 pwritev2 recvmmsg sendmmsg sync_file_range syncfs epoll_wait epoll_pwait epoll_pwait2 getdents64 splice tee vmsplice
copy_file_range timerfd_settime fadvise64 readahead dup dup2 dup3 fcntl
"""
_GIVES_FD: Final = "open openat openat2 creat socket accept accept4 eventfd2 epoll_create1 timerfd_create dup dup2 dup3"

_TAKES, _GIVES, _FUTEX = 1, 2, 4


@dataclass(slots=True)
class Program:
    """One program: the kind it emits, the tracepoint it is for on this kernel, and its descriptors once loaded, attached."""

    kind: str
    family: str
    tracepoint: str | None
    typed: bool = False
    fd: int = -1
    link_fd: int = -1
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refusals:
    """How often the kernel refused to run programs of one family since the last question."""

    family: str
    kind: str
    count: int


class Maps:
    """Memory shared between programs and reader: a ring a CPU, counters, the watch table, the configuration."""

    def __init__(self, cpus: int, ring_bytes: int) -> None:
        self.cpus, self.ring_bytes, self.text_bytes = cpus, ring_bytes, _TEXT_RING_BYTES
        self.fds: dict[str, int] = {}
        self.ring_fds: list[int] = []
        try:
            self._create()
        except OSError as error:
            self.close()
            raise _explain_refusal(error) from error
        self.state = mmap.mmap(self.fds["state"], CPUS_MAX * _STATE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)

    def _create(self) -> None:
        def shared_array(size: int) -> int:
            return bpfsys.create_map(bpfsys.ARRAY, key=4, value=size, flags=bpfsys.MMAPABLE)

        self.ring_fds.extend(bpfsys.create_map(bpfsys.RINGBUF, entries=self.ring_bytes) for _ in range(self.cpus))
        self.fds["state"] = shared_array(CPUS_MAX * _STATE_BYTES)
        self.fds["pids"] = shared_array(PIDS_MAX)
        self.fds["config"] = shared_array(_CONFIG_BYTES)
        self.fds["text"] = bpfsys.create_map(bpfsys.RINGBUF, entries=self.text_bytes)
        self.fds["cgroups"] = bpfsys.create_map(bpfsys.HASH, key=8, value=4, entries=_CGROUPS_MAX)
        self.fds["rings"] = bpfsys.create_map(
            bpfsys.ARRAY_OF_MAPS, key=4, value=4, entries=self.cpus, inner_fd=self.ring_fds[0]
        )
        for cpu, fd in enumerate(self.ring_fds):
            bpfsys.set_element(self.fds["rings"], struct.pack("<I", cpu), struct.pack("<I", fd))

    def configure(self, *, hierarchy: Hierarchy, comms: Iterable[str], ports: Iterable[int], cgroups: bool) -> bool:
        """Write struct config of bpf/common.h; False if the kernel hides the address of the quota's timer."""
        symbols = _kernel_symbols(("sched_cfs_period_timer", "sched_cfs_slack_timer"))
        patterns = [masks for masks in map(glob_masks, comms) if masks][:_PATTERNS_MAX]
        wanted_ports = list(ports)[:_PORTS_MAX]
        words = [
            symbols.get("sched_cfs_period_timer", 0),
            symbols.get("sched_cfs_slack_timer", 0),
            len(patterns),
            len(wanted_ports),
            int(cgroups),
            hierarchy.number,
            *[w for p in patterns for w in p],
            *[0] * 4 * (_PATTERNS_MAX - len(patterns)),
            *wanted_ports,
            *[0] * (_PORTS_MAX - len(wanted_ports)),
        ]
        with mmap.mmap(self.fds["config"], _CONFIG_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as config:
            config[:] = struct.pack(f"<{_CONFIG_WORDS}Q", *words) + _syscall_traits()
        return "sched_cfs_period_timer" in symbols

    def watch_cgroup(self, key: int) -> None:
        """Put a cgroup into the watch set: who joins it is watched from then on."""
        bpfsys.set_element(self.fds["cgroups"], struct.pack("<Q", key), struct.pack("<I", 1))

    def linked(self) -> dict[int, int]:
        """File descriptors by the placeholders of bpf/common.h."""
        return {number: self.fds[name] for name, number in _PLACEHOLDERS.items()}

    def bytes(self) -> int:
        """Kernel memory that the maps take."""
        return self.cpus * self.ring_bytes + self.text_bytes + PIDS_MAX + CPUS_MAX * _STATE_BYTES + _CONFIG_BYTES

    def close(self) -> None:
        """Give the memory back; mappings made of it stay valid until they are closed."""
        for fd in [*self.ring_fds, *self.fds.values()]:
            os.close(fd)
        self.ring_fds.clear()
        self.fds.clear()
        with contextlib.suppress(AttributeError):
            self.state.close()


def _explain_refusal(error: OSError) -> CapabilityError | ProbeError:
    if isinstance(error, PermissionError):
        return CapabilityError("the kernel refuses BPF to this user: run kprobe as root (sudo kprobe ...)")
    return ProbeError(f"the kernel cannot make the probe's maps: {error.strerror}; a smaller probe.ring_bytes_per_cpu may help")


def _syscall_traits() -> bytes:
    traits = bytearray(_SYSCALLS_MAX)
    if os.uname().machine != "x86_64":  # the table of numbers is that of x86-64
        return bytes(traits)
    for names, bit in ((_TAKES_FD, _TAKES), (_GIVES_FD, _GIVES), ("futex", _FUTEX)):
        for name in names.split():
            traits[NUMBERS[name]] |= bit
    return bytes(traits)


def _kernel_symbols(names: tuple[str, ...], path: Path = Path("/proc/kallsyms")) -> dict[str, int]:
    """Addresses of kernel functions; empty where the kernel hides them (kptr_restrict=2)."""
    wanted = {name.encode() for name in names}
    found = {}
    with contextlib.suppress(OSError), path.open("rb") as lines:
        for line in lines:
            words = line.split()
            if words[2] in wanted and int(words[0], 16):
                found[words[2].decode()] = int(words[0], 16)
                if len(found) == len(wanted):
                    break
    return found


@dataclass(slots=True)
class ProgramSet:
    """All programs for this kernel. `load` compiles and verifies them, `attach` switches them on."""

    types: KernelTypes
    hierarchy: Hierarchy
    off: frozenset[str] = frozenset()
    programs: dict[str, Program] = field(default_factory=dict)
    missing_fields: tuple[str, ...] = ()
    fetch_add: bool = True
    _iterator_fd: int = -1
    _misses: dict[str, int] = field(default_factory=dict)

    def load(self, maps: Maps) -> None:
        """Compile and load everything that this kernel has a tracepoint for."""
        self.fetch_add = _has_fetch_add()
        self.programs = {k.name: Program(k.name, k.family, self._tracepoint(k.name)) for k in KINDS}
        for program in self.programs.values():
            if program.tracepoint is None:
                program.reason = "no such tracepoint on this kernel"
        source = compiler.write_source(
            self.types, {p.kind: p.tracepoint for p in self.programs.values()}, self._facts(), c_header()
        )
        self.missing_fields = source.missing_fields
        for kind, names in source.missing_arguments.items():
            self.programs[kind].reason = self.programs[kind].reason or f"its arguments lack {', '.join(names)}"
        functions = [prefix + kind for kind in self.programs for prefix in ("btf_", "raw_")] + ["iter_task"]
        code = compiler.compile_source(source.text, functions)
        linked = maps.linked()
        code = {name: compiler.link(text, linked, fetch_add=self.fetch_add) for name, text in code.items()}
        for program in self.programs.values():
            if not program.reason and program.kind not in _PART_OF:
                self._load_one(program, code)
        self._load_iterator(code)

    def _tracepoint(self, kind: str) -> str | None:
        names = _TRACEPOINTS.get(kind, (kind,))
        return next((n for n in names if self.types.owner(n, compiler.MODULES) is not None), None)

    def _facts(self) -> dict[str, int]:
        subsystems = {"MEMORY_SUBSYS": "memory_cgrp_id", "CPU_SUBSYS": "cpu_cgrp_id"}
        values = {k: self.types.vmlinux.enum_value("cgroup_subsys_id", v) for k, v in subsystems.items()}
        memory, cpu = values["MEMORY_SUBSYS"], values["CPU_SUBSYS"]
        facts = {"CGROUP_SUBSYS": -1, "MEMORY_SUBSYS": -1 if memory is None else memory}
        if self.hierarchy.version_1 and cpu is not None:
            facts["CGROUP_SUBSYS"] = cpu
        facts["TICK_NS"] = _coarse_tick_ns()
        facts["PAGE_BYTES"] = mmap.PAGESIZE
        facts["SIZE_percpu_counter"] = self.types.vmlinux.size("percpu_counter") or 0
        if self.fetch_add:
            facts["HAVE_FETCH_ADD"] = 1
        return facts

    def _load_one(self, program: Program, code: Mapping[str, bytes]) -> None:
        blob = self.types.owner(program.tracepoint or "", compiler.MODULES)
        target = blob.prototype_id(program.tracepoint or "") if blob is self.types.vmlinux and blob else None
        if f"btf_{program.kind}" in code and target is not None:
            with contextlib.suppress(OSError):  # an older or stricter verifier: helper calls work everywhere
                program.fd = bpfsys.load_program(
                    code[f"btf_{program.kind}"],
                    kind=bpfsys.TRACING,
                    attach_type=bpfsys.TRACE_RAW_TP,
                    btf_id=target,
                    name=program.kind,
                )
                program.typed = True
                return
        if f"raw_{program.kind}" not in code:
            program.reason = "its arguments on this kernel are not those that kprobe knows"
            return
        try:
            program.fd = bpfsys.load_program(code[f"raw_{program.kind}"], name=program.kind)
        except OSError as error:
            program.reason = f"the kernel refuses its program: {error.strerror}"

    def _load_iterator(self, code: Mapping[str, bytes]) -> None:
        target = self.types.vmlinux.find("bpf_iter_task", (FUNC,))
        if target is None or "iter_task" not in code:
            raise CapabilityError("this kernel cannot list its tasks to BPF (bpf_iter): kprobe needs Linux 5.8 or newer")
        program = bpfsys.load_program(
            code["iter_task"], kind=bpfsys.TRACING, attach_type=bpfsys.TRACE_ITER, btf_id=target, name="iter_task"
        )
        self._iterator_fd = bpfsys.attach_iterator(program)
        os.close(program)

    def leave_out(self, kind: str, reason: str) -> None:
        """Do not attach the program of one kind."""
        program = self.programs[kind]
        if program.fd >= 0:
            os.close(program.fd)
            program.fd, program.reason = -1, reason

    def tasks(self) -> bytes:
        """struct task_row of every thread, as it is now."""
        return bpfsys.iterate(self._iterator_fd)

    def attach(self) -> None:
        """Switch on every loaded program whose family is not switched off by configuration."""
        for program in self.programs.values():
            if program.family in self.off:
                program.reason = "switched off by configuration (probe.families_off)"
            elif program.fd >= 0:
                self._attach_one(program)
        switch = self.programs["sched_switch"]
        if switch.link_fd < 0 and "sched" not in self.off:
            raise ProbeError(f"cannot attach to sched_switch, on which everything hangs: {switch.reason}")

    @staticmethod
    def _attach_one(program: Program) -> None:
        try:
            program.link_fd = bpfsys.attach_raw_tracepoint(program.fd, None if program.typed else program.tracepoint)
        except OSError as error:
            program.reason = f"cannot be attached: {error.strerror}"

    def detach(self, family: str | None = None) -> None:
        """Switch off one family, or all. Switches go last, as they came first: no event follows one that is not recorded."""
        for program in reversed(self.programs.values()):
            if program.link_fd >= 0 and family in (None, program.family):
                os.close(program.link_fd)
                program.link_fd = -1
                program.reason = "shed" if family else "detached"

    def refusals(self) -> list[Refusals]:
        """Runs that the kernel refused since the last call, because the program was already running on that CPU."""
        attached = [p for p in self.programs.values() if p.link_fd >= 0]
        out = []
        for program, total in zip(attached, bpfsys.missed_runs([p.fd for p in attached]), strict=True):
            count = total - self._misses.get(program.kind, 0)
            if count:
                out.append(Refusals(program.family, program.kind, count))
                self._misses[program.kind] = total
        return out

    def missed(self) -> dict[str, int]:
        """All refused runs so far, per kind."""
        return dict(self._misses)

    def capabilities(self) -> Capabilities:
        """What is recorded now, and what is not, with the reason."""
        families = {name: FamilyState() for name in FAMILIES}
        for program in self.programs.values():
            state, leader = families[program.family], self.programs[_PART_OF.get(program.kind, program.kind)]
            if leader.link_fd >= 0:
                state.attached = True
                state.present.append(program.kind)
            else:
                state.missing.append(program.kind)
                state.reason = state.reason or leader.reason
        return Capabilities(families, self.missing_fields)

    def close(self) -> None:
        """Detach and forget all programs."""
        self.detach()
        for program in self.programs.values():
            if program.fd >= 0:
                os.close(program.fd)
                program.fd = -1
        if self._iterator_fd >= 0:
            os.close(self._iterator_fd)
            self._iterator_fd = -1


def _coarse_tick_ns() -> int:
    """One jiffy: the resolution of CLOCK_MONOTONIC_COARSE."""
    clock_monotonic_coarse = 6
    seconds, nanoseconds = ctypes.c_long(), ctypes.c_long()
    pair = (ctypes.c_long * 2)()
    ctypes.CDLL(None).clock_getres(clock_monotonic_coarse, pair)
    seconds.value, nanoseconds.value = pair
    return seconds.value * 1_000_000_000 + nanoseconds.value


def _has_fetch_add() -> bool:
    """Does the verifier know fetch-and-add (5.12)? Asked by loading the smallest program that has one."""
    program = struct.pack(
        "<" + "BBhi" * 6,
        *(0x7A, 0x0A, -8, 0),  # *(u64 *)(r10 - 8) = 0
        *(0xB7, 0x01, 0, 1),  # r1 = 1
        *(0xDB, 0x1A, -8, 1),  # r1 = fetch_add(r10 - 8, r1)
        *(0xB7, 0x00, 0, 0),  # r0 = 0
        *(0xB7, 0x02, 0, 0),  # r2 = 0
        *(0x95, 0x00, 0, 0),  # exit
    )
    try:
        os.close(bpfsys.load_program(program))
    except PermissionError as error:
        raise _explain_refusal(error) from error
    except OSError:
        return False
    return True
