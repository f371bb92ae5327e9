"""A frame survives the journey unchanged, and bytes that are not a frame are refused with their defect named."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.errors import FrameError
from events.frames import SCHEMAS, Clocks, Frame, Watermark, empty_events, events_frame
from events.records import EVENT_DTYPE, EVENTS, RECORD_BYTES

HEAD = {
    "node": "node-23",
    "boot_id": "b" * 32,
    "recording": "r1",
    "number": 7,
    "clocks": Clocks(11, 12, 13),
    "watermark": Watermark(99, {0: 99, 1: 101}),
}


def make_events(rows, seed=23):
    rng = np.random.default_rng(seed)
    columns = {}
    for f in EVENTS:
        info = np.iinfo(f.type.to_pandas_dtype())
        columns[f.name] = rng.integers(max(info.min, 0), info.max, rows, dtype=f.type.to_pandas_dtype())
    return columns


def test_the_record_is_one_cache_line():
    assert EVENT_DTYPE.itemsize == RECORD_BYTES == 64
    assert list(EVENT_DTYPE.names) == EVENTS.names


@pytest.mark.parametrize("rows", [0, 1, 23, 4096])
def test_an_events_frame_comes_back_equal(rows):
    columns = make_events(rows)

    frame = Frame.decode(events_frame(columns, **HEAD).encode())

    assert (frame.node, frame.boot_id, frame.recording, frame.number) == ("node-23", "b" * 32, "r1", 7)
    assert (frame.clocks, frame.watermark) == (HEAD["clocks"], HEAD["watermark"])
    for name, values in frame.events().items():
        assert values.dtype == columns[name].dtype
        assert np.array_equal(values, columns[name])


def test_a_session_frame_carries_its_document():
    batch = pa.RecordBatch.from_arrays([], schema=SCHEMAS["session/1"])
    body = {"kernel": "6.18", "families": {"sched": {"attached": True}}}

    frame = Frame.decode(Frame(kind="session/1", batch=batch, body=body, **HEAD).encode())

    assert frame.body == body
    with pytest.raises(FrameError, match="holds session/1, not events/1"):
        frame.events()


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1, -9])
def test_a_truncated_frame_is_refused(cut):
    data = events_frame(make_events(23), **HEAD).encode()

    with pytest.raises(FrameError):
        Frame.decode(data[:cut])


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_flipped_byte_never_crashes_the_reader(position, flip):
    """Checksums belong to the transport; here any damage is either an error of ours or a frame of the right shape."""
    data = bytearray(events_frame(make_events(23), **HEAD).encode())
    data[position % len(data)] ^= flip

    try:
        frame = Frame.decode(bytes(data))
    except FrameError:
        return
    assert frame.batch.schema.equals(SCHEMAS[frame.kind])


def test_another_schema_under_our_name_is_refused():
    schema = pa.schema([("time_mono_ns", pa.int32())], metadata={"kprobe.frame": "events/1"})
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array([1], pa.int32())], schema=schema))

    with pytest.raises(FrameError, match="columns are not those"):
        Frame.decode(out.getvalue().to_pybytes())


def test_an_unknown_kind_is_refused_by_name():
    schema = pa.schema([], metadata={"kprobe.frame": "events/2"})
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, schema):
        pass

    with pytest.raises(FrameError, match="unknown kind 'events/2'"):
        Frame.decode(out.getvalue().to_pybytes())


def test_empty_columns_have_the_schema_of_events():
    assert {n: c.dtype for n, c in empty_events().items()} == {f.name: f.type.to_pandas_dtype() for f in EVENTS}
