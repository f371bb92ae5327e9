"""The 64-byte record of one kernel event, and the columns it becomes.

`EVENT_DTYPE` is the layout that the BPF programs write into the ring (native little endian, no padding) and
`EVENTS` the Arrow schema of the same fields as columns; the only difference is `seq`: 32 bits in the ring, extended to
64 by the reader, so that (node, boot id, cpu, seq) names an event for ever. `TASKS` and `LOSSES` are the two other streams.

Times are nanoseconds: `*_mono_ns` CLOCK_MONOTONIC, `*_boot_ns` CLOCK_BOOTTIME, `*_real_ns` CLOCK_REALTIME.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = [
    "EVENTS",
    "EVENT_COLUMNS",
    "EVENT_DTYPE",
    "FLAG_HARDIRQ",
    "FLAG_OBSERVER",
    "FLAG_SOFTIRQ",
    "FLAG_WATCHED",
    "LOSSES",
    "LOSS_HIDDEN",
    "LOSS_REASONS",
    "PAYLOAD",
    "PAYLOAD_CALL",
    "PAYLOAD_ENTRY",
    "PAYLOAD_IMAGE",
    "PAYLOAD_TRUNCATED",
    "PAYLOAD_UNREADABLE",
    "RECORD_BYTES",
    "TASKS",
    "TASK_REASONS",
    "UNKNOWN_CPU",
    "UNKNOWN_TID",
    "columns_from_arrow",
    "columns_to_arrow",
    "numbers_of",
    "rows_to_arrow",
]

RECORD_BYTES: Final = 64

EVENT_DTYPE: Final = np.dtype(
    [
        ("time_mono_ns", "<u8"),
        ("seq", "<u4"),
        ("cpu", "<u2"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("tgid", "<u4"),
        ("tid", "<u4"),
        ("a0", "<u8"),
        ("a1", "<u8"),
        ("a2", "<u8"),
        ("a3", "<u8"),
        ("a4", "<u8"),
    ]
)

# Bits of `flags`.
FLAG_WATCHED: Final = 1  # current was in the watch set
FLAG_OBSERVER: Final = 2  # current is kprobe itself, or a server it was told to leave out
# The next two only where the source says so itself (imported traces): the event happened in an interrupt, even if the trace
# holds no irq events that would show it; `tid` is then the interrupted task, not the author.
FLAG_HARDIRQ: Final = 4
FLAG_SOFTIRQ: Final = 8

# What an imported trace does not tell. The probe always knows both.
UNKNOWN_TID: Final = 0xFFFF_FFFF  # current (head `tid`, `tgid`)
UNKNOWN_CPU: Final = 0xFFFF  # a wake-up's `target_cpu`

EVENTS: Final = pa.schema(
    [
        ("time_mono_ns", pa.int64()),
        ("seq", pa.uint64()),
        ("cpu", pa.uint16()),
        ("kind", pa.uint8()),
        ("flags", pa.uint8()),
        ("tgid", pa.uint32()),
        ("tid", pa.uint32()),
        ("a0", pa.uint64()),
        ("a1", pa.uint64()),
        ("a2", pa.uint64()),
        ("a3", pa.uint64()),
        ("a4", pa.uint64()),
    ]
)
EVENT_COLUMNS: Final[tuple[str, ...]] = tuple(EVENTS.names)

TASK_REASONS: Final = ("snapshot", "fork", "exec", "rename", "exit", "cgroup")

# One row states what is true of a thread from `time_mono_ns` on. `snapshot` rows also carry the state the thread was in when
# the recording began: `state` (letter of /proc/PID/stat), the CPU it was on or last on, and for a blocked thread the system
# call it sits in. Columns that a row says nothing about are null.
TASKS: Final = pa.schema(
    [
        ("time_mono_ns", pa.int64()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
        ("tid", pa.uint32()),
        ("tgid", pa.uint32()),
        ("start_boot_ns", pa.int64()),
        ("comm", pa.string()),
        ("cmdline", pa.string()),
        ("parent_tid", pa.uint32()),
        ("parent_tgid", pa.uint32()),
        ("parent_start_boot_ns", pa.int64()),
        ("cgroup_id", pa.uint64()),
        ("cgroup", pa.string()),
        ("container", pa.string()),
        ("kthread", pa.bool_()),
        ("observer", pa.bool_()),
        ("watched", pa.bool_()),
        ("prio", pa.int16()),  # kernel priority: 0-98 real time, 100-139 fair, -1 deadline
        ("policy", pa.uint8()),
        ("exit_code", pa.int32()),
        ("state", pa.string()),
        ("cpu", pa.int32()),
        ("syscall_nr", pa.int64()),
        ("syscall_arg0", pa.uint64()),
        ("syscall_arg1", pa.uint64()),
        ("syscall_arg2", pa.uint64()),
        ("wchan", pa.string()),
    ]
)

LOSS_REASONS: Final = (
    "ring_full",  # reservation failed: a hole in the CPU's sequence numbers
    "recursion",  # the kernel refused to run the program (nested in itself): counted by the kernel, never numbered
    "hidden_task",  # the kernel runs no BPF program while a task that it hides is current: its switch-out, whatever it did
    "not_run",  # the kernel switched tasks without running the program, for no reason that is known
    "shed",  # the probe detached a family to stay under its CPU or memory cap
    "spool_full",  # Kafka was away for longer than the spool could hold
    "producer",  # Kafka refused the batch for good
    "filter_full",  # the watch set's table was full: a descendant may be missing
    "unreadable",  # a payload or name could not be read from the task's memory
    "detached",  # the probe stopped recording altogether
    "disk_full",  # the disk of the capture file was full or failed
    "damaged",  # bytes of a capture file or spool are not what was written: their frame could not be read back
)

# Not lost by us: what this kernel shows to nobody. When such a task ran is recorded; what it did is not.
LOSS_HIDDEN: Final = "hidden_task"

# Events missing on `cpu` (null: on any) within (from_mono_ns, to_mono_ns); `first_seq`..`last_seq` inclusive where they have
# numbers. `hop` says where they were lost.
LOSSES: Final = pa.schema(
    [
        ("cpu", pa.uint16()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
        ("hop", pa.dictionary(pa.int8(), pa.string())),
        ("family", pa.dictionary(pa.int8(), pa.string())),
        ("from_mono_ns", pa.int64()),
        ("to_mono_ns", pa.int64()),
        ("first_seq", pa.uint64()),
        ("last_seq", pa.uint64()),
        ("count", pa.uint64()),
    ]
)

# Kinds of payload records: a finished call; a call that was entered and will not come back as it went (exit, execve); the
# initial stack of a new program.
PAYLOAD_CALL: Final = 1
PAYLOAD_ENTRY: Final = 2
PAYLOAD_IMAGE: Final = 3

# Bits of a payload record's flags.
PAYLOAD_TRUNCATED: Final = 1  # more bytes, or more vectors, than a record holds
PAYLOAD_UNREADABLE: Final = 2  # some of the memory was not resident

# What one system call read from and wrote to memory. `seq` counts the payload records of a CPU, apart from its events.
# `data` holds regions one after the other: address (u64), bytes that follow (u32), bytes wanted (u32), the bytes, padded to 8.
PAYLOAD: Final = pa.schema(
    [
        ("time_mono_ns", pa.int64()),  # when the call ended
        ("entry_mono_ns", pa.int64()),  # when it began; 0 if that was not seen
        ("seq", pa.uint64()),
        ("cpu", pa.uint16()),
        ("kind", pa.uint8()),
        ("flags", pa.uint8()),
        ("tgid", pa.uint32()),
        ("tid", pa.uint32()),
        ("nr", pa.uint32()),
        ("ret", pa.int64()),
        *((f"arg{i}", pa.uint64()) for i in range(6)),
        ("data", pa.binary()),
    ]
)


def columns_to_arrow(columns: Mapping[str, npt.NDArray[Any]]) -> pa.RecordBatch:
    """Event columns (the names and types of `EVENTS`) as one Arrow batch, without copying arrays of the right type."""
    return pa.RecordBatch.from_arrays([_column(columns[f.name], f.type) for f in EVENTS], schema=EVENTS)


def _column(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """A column without nulls. Not `pa.array`: its first call imports pandas, half a second and 60 MB in the probe."""
    whole = np.ascontiguousarray(values)
    if whole.dtype != kind.to_pandas_dtype():
        return pa.array(whole, type=kind)
    return pa.Array.from_buffers(kind, len(whole), [None, pa.py_buffer(whole)])


def columns_from_arrow(batch: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
    """The columns of an events batch as numpy arrays, without copying. Raises pa.ArrowInvalid if any has nulls."""
    return {name: numbers_of(batch.column(name)) for name in EVENT_COLUMNS}


def numbers_of(column: pa.Array) -> npt.NDArray[Any]:
    """A numeric column without nulls as a read-only numpy view. Not `to_numpy`: it imports pandas."""
    if column.null_count:
        raise pa.ArrowInvalid(f"{column.null_count} nulls in a column that has none")
    numbers = np.frombuffer(column.buffers()[1] or b"", dtype=column.type.to_pandas_dtype())
    numbers.flags.writeable = False
    return numbers[column.offset : column.offset + len(column)]


def rows_to_arrow(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows (None or absent = null) as one Arrow batch of `TASKS` or `LOSSES`. Raises pa.ArrowInvalid if a value does not fit.

    Like RecordBatch.from_pylist, but without pyarrow's import of pandas (half a second and 60 MB in the probe).
    """
    return pa.RecordBatch.from_arrays([_array([row.get(f.name) for row in rows], f.type) for f in schema], schema=schema)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        words = list(dict.fromkeys(v for v in values if v is not None))
        places = {word: at for at, word in enumerate(words)}
        indices = _array([None if v is None else places[v] for v in values], kind.index_type)
        return pa.DictionaryArray.from_arrays(indices, _array(words, kind.value_type))
    valid = np.array([v is not None for v in values], dtype=bool)
    mask = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    if pa.types.is_string(kind):
        # Names come from the kernel as bytes read by others: what is no UTF-8 was replaced there, lone surrogates are here.
        texts = [b"" if v is None else str(v).encode(errors="replace") for v in values]
        offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)), mask)
    filled = [0 if v is None else v for v in values]
    if pa.types.is_boolean(kind):
        return pa.Array.from_buffers(
            kind, len(values), [mask, pa.py_buffer(np.packbits(np.array(filled, dtype=bool), bitorder="little"))]
        )
    try:
        numbers = np.array(filled, dtype=kind.to_pandas_dtype())
    except OverflowError as error:
        raise pa.ArrowInvalid(f"{kind} cannot hold one of {filled[:5]}...: {error}") from error
    return pa.Array.from_buffers(kind, len(values), [mask, pa.py_buffer(numbers)])
