"""Payload of system calls: the second, variable-length stream of the probe. Off unless asked for.

What: `PayloadSource(pids_fd, types, plan, ...)` loads the programs of bpf/payload/payload.c, and `drain` gives what watched
processes read and wrote since the last call, as one Arrow batch of `events.records.PAYLOAD`. Which calls and which bytes the
plan says (`PlannedCall`), in the words of replay/syscalls.py: `1:ret` is argument 1 with the length of the result, `0:str` a
string, `iov` and `msg` vectors and message headers.
`mask` sees each batch's bytes in memory before anything else does: what it takes out never reaches a file or a socket.

Guarantees: every record has a number of its CPU, taken before the ring is asked for room, so a gap is the number of lost
records and comes back as a loss row (hop `payload`); what was cut or not in memory is flagged in the record. Watched programs
never wait: a full ring drops.
Fails: ProbeError if the kernel refuses the programs; x86-64 only (the register that carries the number is named there).
"""

import os
import platform
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from events.errors import CapabilityError, ProbeError
from events.records import PAYLOAD
from probe import bpfsys, compiler
from probe.btf import KernelTypes
from probe.ring import CpuLedger, RingMemory

__all__ = ["PayloadSource", "PlannedCall", "compile_plan"]

_FLAG_TAKEN, _FLAG_AT_ENTRY, _FLAG_VECTOR, _FLAG_MESSAGE, _FLAG_RECEIVES = 1, 2, 4, 8, 16
_FIXED, _RESULT, _ARGUMENT, _STRING, _BEHIND, _RESULT_IF, _FD_SET, _IOCTL, _FCNTL, _RESULT_PLUS = range(1, 11)
_ONLY_SUCCESS, _ONLY_INTERRUPTED = 64, 128
_CALLS, _REGIONS = 512, 6
_CALL: Final = struct.Struct("<B7x" + "BBH" * _REGIONS)
_STATE_BYTES: Final = 64
_CPUS_MAX: Final = 1024
_HEAD: Final = struct.Struct("<QQIHBBIIq8QII")  # struct payload_record
_SCRATCH_BYTES: Final = _HEAD.size + 2 * 65536 + 64
_BUSY, _DISCARD = 1 << 31, 1 << 30
_ENTRIES: Final = 65536
_BATCH_BYTES: Final = 64 << 20  # read in one drain at most: the rest waits in the ring

Mask = Callable[[list[bytes]], list[bytes]]


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One call to record. `at_entry`: when it is entered, because it does not come back."""

    nr: int
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    at_entry: bool = False


@dataclass(slots=True)
class _Compiled:
    flags: int = _FLAG_TAKEN
    regions: list[tuple[int, int, int]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, argument: int, kind: int, param: int, bits: int) -> None:
        same = [i for i, r in enumerate(self.regions) if (r[0], r[1] & 63, r[2]) == (argument, kind, param)]
        if same:  # read and written: taken in any case
            self.regions[same[0]] = (argument, kind, param)
        else:
            self.regions.append((argument, kind | bits, param))


def compile_plan(calls: Sequence[PlannedCall]) -> tuple[bytes, dict[int, list[str]]]:
    """The plan as the programs read it, and per call the words that cannot be taken in the kernel."""
    table = bytearray(_CALLS * _CALL.size)
    unknown = {}
    for call in calls:
        if not 0 <= call.nr < _CALLS:
            continue
        done = _Compiled(_FLAG_TAKEN | (_FLAG_AT_ENTRY if call.at_entry else 0))
        for word in call.inputs:
            _compile(done, word, 0)
        outputs, bits = list(call.outputs), _ONLY_SUCCESS
        if outputs[:1] == ["!"]:
            outputs, bits = outputs[1:], _ONLY_INTERRUPTED
        for word in outputs:
            _compile(done, word, bits)
        done.unknown += ["more regions than a plan holds"] if len(done.regions) > _REGIONS else []
        regions = [*done.regions, *[(0, 0, 0)] * _REGIONS][:_REGIONS]
        _CALL.pack_into(table, call.nr * _CALL.size, done.flags, *(v for a, k, p in regions for v in (a, k, p)))
        if done.unknown:
            unknown[call.nr] = done.unknown
    return bytes(table), unknown


def _compile(done: _Compiled, word: str, bits: int) -> None:
    if word in ("iov", "msg"):
        done.flags |= (_FLAG_VECTOR if word == "iov" else _FLAG_MESSAGE) | (_FLAG_RECEIVES if bits else 0)
    elif word.startswith("sockaddr"):
        at = int(word[8:])
        done.add(at + 1, _FIXED, 4, bits)
        done.add(at, _BEHIND, at + 1 | 128 << 3, bits)
    elif word == "sockopt":
        done.add(4, _FIXED, 4, bits)
        done.add(3, _BEHIND, 4 | 4096 << 3, bits)
    elif word in ("ioctl", "fcntl"):
        done.add(2, _IOCTL if word == "ioctl" else _FCNTL, 0, 0)
    elif word[:1].isdigit() and (length := _length(word.partition(":")[2])) is not None:
        done.add(int(word.partition(":")[0]), *length, bits)
    else:
        done.unknown.append(word)


def _length(text: str) -> tuple[int, int] | None:
    """(kind, parameter) of a length's words."""
    head, _, factor = text.partition("*")
    if text.isdigit() and int(text) < 1 << 16:
        return _FIXED, int(text)
    if text == "str":
        return _STRING, 0
    if text == "fds":
        return _FD_SET, 0
    if text.startswith("ret+"):
        return _RESULT_PLUS, int(text[4:])
    if text.startswith("ret?a"):
        return _RESULT_IF, int(text[5:])
    if head == "ret":
        return _RESULT, int(factor or 1)
    if head[:1] == "a" and head[1:].isdigit():
        return _ARGUMENT, int(head[1:]) | int(factor or 1) << 3
    return None


class _Ring:
    """The payload ring of one CPU."""

    def __init__(self, fd: int, data_bytes: int) -> None:
        self.memory = RingMemory(fd, data_bytes)

    def read(self, limit_bytes: int) -> tuple[list[bytes], bool]:
        """The committed records as they lie, and whether the ring is empty; their space is given back."""
        position, end = self.memory.consumed, self.memory.produced
        stop = min(end, position + limit_bytes)
        out = []
        while position < stop:
            header = self.memory.word(position)
            if header & _BUSY:
                break
            length = header & ~(_BUSY | _DISCARD)
            if not header & _DISCARD:
                out.append(self.memory.copy(position + 8, length))
            position += 8 + (length + 7 & ~7)
        self.memory.release(position)
        return out, position == end


class PayloadSource:
    """Records payloads of the processes that the watch table `pids_fd` marks."""

    def __init__(
        self, pids_fd: int, types: KernelTypes, plan: Sequence[PlannedCall], *, cpus: int, ring_bytes: int,
        fetch_add: bool, mask: Mask | None = None,
    ) -> None:  # fmt: skip
        if platform.machine() != "x86_64":
            raise CapabilityError(f"payloads are recorded on x86_64, this is {platform.machine()}; record without --payload")
        self.plan_table, self.unknown = compile_plan(plan)
        self._mask = mask
        self._fds: list[int] = []
        self._links: list[int] = []
        self._rings: list[_Ring] = []
        self._ledgers = [CpuLedger(cpu, last_mono_ns=time.monotonic_ns()) for cpu in range(cpus)]
        self._detached = False
        self._state: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        try:
            self._load(pids_fd, types, cpus, ring_bytes, fetch_add)
        except BaseException:
            self.close()
            raise

    def _map(self, *args: Any, **more: Any) -> int:
        self._fds.append(bpfsys.create_map(*args, **more))
        return self._fds[-1]

    def _load(self, pids_fd: int, types: KernelTypes, cpus: int, ring_bytes: int, fetch_add: bool) -> None:
        rings = [self._map(bpfsys.RINGBUF, entries=ring_bytes) for _ in range(cpus)]
        outer = self._map(bpfsys.ARRAY_OF_MAPS, key=4, value=4, entries=cpus, inner_fd=rings[0])
        for cpu, fd in enumerate(rings):
            bpfsys.set_element(outer, struct.pack("<I", cpu), struct.pack("<I", fd))
        state = self._map(bpfsys.ARRAY, key=4, value=_CPUS_MAX * _STATE_BYTES, flags=bpfsys.MMAPABLE)
        plan = self._map(bpfsys.ARRAY, key=4, value=len(self.plan_table))
        bpfsys.set_element(plan, bytes(4), self.plan_table)
        scratch = self._map(bpfsys.ARRAY, key=4, value=_SCRATCH_BYTES, entries=cpus)
        entry = self._map(bpfsys.HASH, key=4, value=8, entries=_ENTRIES)
        linked = {1002: pids_fd, 1011: outer, 1012: state, 1013: plan, 1014: scratch, 1015: entry}
        self._programs = [self._program(name, types, linked, fetch_add) for name in ("payload_exit", "payload_enter")]
        self._rings = [_Ring(fd, ring_bytes) for fd in rings]
        self._state = RingMemory.map_array(state, _CPUS_MAX * _STATE_BYTES)

    def _program(self, name: str, types: KernelTypes, linked: Mapping[int, int], fetch_add: bool) -> int:
        facts = {"CGROUP_SUBSYS": -1, "MEMORY_SUBSYS": -1} | ({"HAVE_FETCH_ADD": 1} if fetch_add else {})
        tracepoints = {"payload_exit": "sys_exit", "payload_enter": "sys_enter"}
        source = compiler.write_payload_source(types, tracepoints, facts)
        code = compiler.compile_source(source.text, list(tracepoints))[name]
        try:
            self._fds.append(bpfsys.load_program(compiler.link(code, linked, fetch_add=fetch_add), name=name))
        except OSError as error:
            raise ProbeError(f"the kernel refuses the payload program {name}: {error.strerror}; record without it") from error
        return self._fds[-1]

    def attach(self) -> None:
        """Switch the recording of payloads on."""
        for program, tracepoint in zip(self._programs, ("sys_exit", "sys_enter"), strict=True):
            self._links.append(bpfsys.attach_raw_tracepoint(program, tracepoint))

    def detach(self) -> None:
        """Switch it off; what was recorded can still be drained."""
        self._detached = True
        while self._links:
            os.close(self._links.pop())

    def drain(self) -> tuple[pa.RecordBatch | None, list[dict[str, Any]]]:
        """Records since the last drain (None if there are none), and loss rows."""
        now = time.monotonic_ns()
        produced = self._state.reshape(-1, _STATE_BYTES // 8)[: len(self._rings), 0].astype(np.int64)
        heads: list[tuple[Any, ...]] = []
        data: list[bytes] = []
        losses = []
        for cpu, (ring, ledger) in enumerate(zip(self._rings, self._ledgers, strict=True)):
            records, complete = ring.read(_BATCH_BYTES)
            mine = [_HEAD.unpack_from(record) for record in records]
            seqs = ledger.extend(np.array([h[2] for h in mine], np.uint32))
            ledger.account(seqs, np.array([h[0] for h in mine], np.int64), now)
            if complete:
                ledger.note_produced(int(produced[cpu]), now)
            # A number is taken and its record sent with preemption off: a hole is a record being written now, or lost.
            losses += [_loss(cpu, hole) for hole in ledger.settle(-1, now, final=self._detached and complete)]
            heads += [(h, seq) for h, seq in zip(mine, seqs.tolist(), strict=True)]
            data += [record[_HEAD.size : _HEAD.size + h[18]] for record, h in zip(records, mine, strict=True)]
        if not heads:
            return None, losses
        if self._mask is not None:
            data = self._mask(data)
        return _batch(heads, data), losses

    def stats(self) -> dict[str, int]:
        """Records since the start: taken, delivered, lost, cut, partly unreadable."""
        state = self._state.reshape(-1, _STATE_BYTES // 8)[: len(self._rings)].astype(np.int64).sum(axis=0)
        return {
            "produced": int(state[0]), "delivered": sum(x.delivered for x in self._ledgers),
            "lost": sum(x.lost for x in self._ledgers), "truncated": int(state[1]), "unreadable": int(state[2]),
        }  # fmt: skip

    def close(self) -> None:
        """Detach and free everything."""
        self.detach()
        self._state = np.empty(0, np.uint64)
        for ring in self._rings:
            ring.memory.close()
        while self._fds:
            os.close(self._fds.pop())


def _loss(cpu: int, hole: Any) -> dict[str, Any]:
    return {
        "cpu": cpu, "reason": "ring_full", "hop": "payload", "family": "payload", "from_mono_ns": hole.from_mono_ns,
        "to_mono_ns": hole.to_mono_ns, "first_seq": hole.first_seq, "last_seq": hole.last_seq, "count": hole.count,
    }  # fmt: skip


def _batch(heads: Sequence[tuple[Any, int]], data: Sequence[bytes]) -> pa.RecordBatch:
    """Heads (with their full sequence numbers) and bytes as one batch, in the order of time."""
    order = sorted(range(len(heads)), key=lambda i: (heads[i][0][0], heads[i][0][3], heads[i][1]))
    rows = [heads[i] for i in order]
    columns: dict[str, list[int]] = {
        "time_mono_ns": [h[0] for h, _ in rows], "entry_mono_ns": [h[1] for h, _ in rows], "seq": [s for _, s in rows],
        "cpu": [h[3] for h, _ in rows], "kind": [h[4] for h, _ in rows], "flags": [h[5] for h, _ in rows],
        "tgid": [h[6] for h, _ in rows], "tid": [h[7] for h, _ in rows], "nr": [h[17] for h, _ in rows],
        "ret": [h[8] for h, _ in rows], **{f"arg{i}": [h[9 + i] for h, _ in rows] for i in range(6)},
    }  # fmt: skip
    arrays = []
    for column in PAYLOAD:
        if column.name == "data":
            pieces = [data[i] for i in order]
            offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int32)
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(pieces))]
            arrays.append(pa.Array.from_buffers(pa.binary(), len(pieces), buffers))
            continue
        values = np.array(columns[column.name], dtype=column.type.to_pandas_dtype())
        arrays.append(pa.Array.from_buffers(column.type, len(values), [None, pa.py_buffer(values)]))
    return pa.RecordBatch.from_arrays(arrays, schema=PAYLOAD)
