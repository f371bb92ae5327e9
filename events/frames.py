"""A frame: the unit that travels. The same bytes are a Kafka message on `kprobe.raw.v1` and a frame of a `.kcap` file.

A frame is one Arrow IPC stream (zstd) of one schema, whose schema metadata says what it is and where it comes from:

    kprobe.frame      "events/1" | "tasks/1" | "losses/1" | "payload/1" | "session/1"
    kprobe.node, kprobe.boot_id
    kprobe.number     counts the frames of one recording from 0, over all kinds: a hole is a lost frame
    kprobe.recording  random id of the recording (a restart of the probe begins a new one)
    kprobe.clocks     JSON [mono_ns, boot_ns, real_ns], read together when the frame was closed
    kprobe.watermark  JSON {"node": ns, "cpus": {"0": ns, ...}}: everything that happened before these times has been
                      sent, in this frame or in one with a lower number
    kprobe.body       JSON document of a "session" frame (which has no rows)

A session frame opens every recording and is repeated when capabilities change: kernel release, families attached and
missing with reasons, the watch set, CPU count, start time. Decoding never trusts its input: any defect raises FrameError.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from events.errors import FrameError
from events.records import EVENTS, LOSSES, PAYLOAD, TASKS, columns_from_arrow, columns_to_arrow

__all__ = ["SCHEMAS", "Clocks", "Frame", "Watermark"]

SCHEMAS: Final[Mapping[str, pa.Schema]] = {
    "events/1": EVENTS,
    "tasks/1": TASKS,
    "losses/1": LOSSES,
    "payload/1": PAYLOAD,
    "session/1": pa.schema([]),
}
_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1))


@dataclass(frozen=True, slots=True)
class Clocks:
    """The three clocks of one machine, read together."""

    mono_ns: int
    boot_ns: int
    real_ns: int


@dataclass(frozen=True, slots=True)
class Watermark:
    """Times before which nothing more will come: of the whole node, and per CPU."""

    node_mono_ns: int
    cpu_mono_ns: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, decoded. `batch` has the schema of `kind`; `body` is the document of a session frame, else empty."""

    kind: str
    node: str
    boot_id: str
    recording: str
    number: int
    clocks: Clocks
    watermark: Watermark
    batch: pa.RecordBatch
    body: Mapping[str, Any] = field(default_factory=dict)

    def events(self) -> dict[str, npt.NDArray[Any]]:
        """The columns of an events frame as numpy arrays (read-only views). Raises FrameError for other kinds or nulls."""
        if self.kind != "events/1":
            raise FrameError(f"frame {self.number} holds {self.kind}, not events/1")
        try:
            return columns_from_arrow(self.batch)
        except pa.ArrowInvalid as error:
            raise FrameError(f"frame {self.number}: an event column has nulls or a wrong type: {error}") from error

    def encode(self) -> bytes:
        """The frame as bytes."""
        metadata = {
            "kprobe.frame": self.kind,
            "kprobe.node": self.node,
            "kprobe.boot_id": self.boot_id,
            "kprobe.recording": self.recording,
            "kprobe.number": str(self.number),
            "kprobe.clocks": orjson.dumps([self.clocks.mono_ns, self.clocks.boot_ns, self.clocks.real_ns]),
            "kprobe.watermark": orjson.dumps(
                {
                    "node": self.watermark.node_mono_ns,
                    "cpus": {str(c): t for c, t in sorted(self.watermark.cpu_mono_ns.items())},
                }
            ),
        }
        if self.body:
            metadata["kprobe.body"] = orjson.dumps(self.body, option=orjson.OPT_SORT_KEYS)
        schema = self.batch.schema.with_metadata(metadata)
        out = pa.BufferOutputStream()
        with pa.ipc.new_stream(out, schema, options=_OPTIONS) as writer:
            writer.write_batch(self.batch.replace_schema_metadata(metadata))
        return bytes(out.getvalue())

    @classmethod
    def decode(cls, data: bytes | memoryview) -> "Frame":
        """The frame that `data` holds. Raises FrameError, naming the defect, for anything else."""
        try:
            reader = pa.ipc.open_stream(pa.py_buffer(data))
            batches = list(reader)
        except (pa.ArrowException, OSError, ValueError, EOFError, MemoryError) as error:
            raise FrameError(f"not an Arrow IPC stream: {error}") from error
        metadata = reader.schema.metadata or {}
        kind = metadata.get(b"kprobe.frame", b"").decode(errors="replace")
        if kind not in SCHEMAS:
            raise FrameError(f"frame of unknown kind {kind!r}: this kprobe reads {', '.join(SCHEMAS)}")
        if not reader.schema.equals(SCHEMAS[kind]):
            raise FrameError(f"frame {kind}: its columns are not those of that schema version")
        if len(batches) != 1:
            raise FrameError(f"frame {kind}: {len(batches)} batches instead of 1")
        return cls._from_metadata(kind, metadata, batches[0])

    @classmethod
    def _from_metadata(cls, kind: str, metadata: Mapping[bytes, bytes], batch: pa.RecordBatch) -> "Frame":
        try:
            clocks = orjson.loads(metadata[b"kprobe.clocks"])
            watermark = orjson.loads(metadata[b"kprobe.watermark"])
            body = orjson.loads(metadata[b"kprobe.body"]) if b"kprobe.body" in metadata else {}
            frame = cls(
                kind=kind,
                node=metadata[b"kprobe.node"].decode(),
                boot_id=metadata[b"kprobe.boot_id"].decode(),
                recording=metadata[b"kprobe.recording"].decode(),
                number=int(metadata[b"kprobe.number"]),
                clocks=Clocks(*(int(c) for c in clocks)),
                watermark=Watermark(int(watermark["node"]), {int(c): int(t) for c, t in watermark["cpus"].items()}),
                batch=batch,
                body=body,
            )
            batch.validate(full=True)
        except (KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
            raise FrameError(f"frame {kind}: bad metadata or content: {error!r}") from error
        return frame


def events_frame(columns: Mapping[str, npt.NDArray[Any]], **head: Any) -> Frame:
    """An events frame from columns named and typed as `EVENTS`; `head` gives the other fields of `Frame`."""
    return Frame(kind="events/1", batch=columns_to_arrow(columns), **head)


def empty_events() -> dict[str, npt.NDArray[Any]]:
    """Event columns without rows."""
    return {f.name: np.empty(0, f.type.to_pandas_dtype()) for f in EVENTS}
