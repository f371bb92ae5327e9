"""A capture keeps what was written whatever stops the recorder, and says exactly what it no longer holds."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from probe_synth import START_MONO_NS, STEP_NS, columns_of, framer, recording

from events.errors import CaptureFormatError, ProbeError
from events.frames import Frame, Watermark
from probe.capture import CaptureReader, CaptureWriter
from probe.framing import Framer

ROOT = Path(__file__).resolve().parents[2]
HEADER_BYTES = 64


def write(path, sealed, close=True):
    writer = CaptureWriter(path)
    for frame in sealed:
        writer.write_sealed(frame)
    if close:
        writer.close()
    else:
        writer.abandon()
    return path


def numbers(reader):
    return [f.number for f in reader.frames()]


def test_a_capture_gives_back_its_frames(tmp_path):
    sealed = list(recording())
    with CaptureReader(write(tmp_path / "x.kcap", sealed)) as reader:
        frames = list(reader.frames())

        assert reader.closed
        assert reader.verify() == []
    assert [f.encode() for f in frames] == [s.data for s in sealed]
    assert [f.kind for f in frames] == ["session/1", "tasks/1", *["events/1"] * 5]


def test_a_capture_without_index_reads_the_same(tmp_path):
    """The index is rebuilt by scanning after kill -9."""
    sealed = list(recording())
    whole = CaptureReader(write(tmp_path / "whole.kcap", sealed))
    killed = CaptureReader(write(tmp_path / "killed.kcap", sealed, close=False))

    assert (whole.closed, killed.closed) == (True, False)
    assert killed.entries == whole.entries
    assert killed.damage == []
    assert numbers(killed) == numbers(whole)


def test_a_window_leaves_out_events_outside_it_but_no_names(tmp_path):
    reader = CaptureReader(write(tmp_path / "x.kcap", recording(frames=10, rows=20)))
    second = START_MONO_NS + 20 * STEP_NS

    frames = list(reader.frames(second, second + 1))

    assert [f.kind for f in frames] == ["session/1", "tasks/1", "events/1"]
    assert frames[-1].events()["time_mono_ns"].min() == second


def test_a_file_cut_at_every_byte_reads_up_to_its_last_whole_frame(tmp_path):
    sealed = list(recording(frames=3, rows=5))
    data = write(tmp_path / "x.kcap", sealed).read_bytes()
    ends = [e.end for e in CaptureReader(tmp_path / "x.kcap").entries]
    cut = tmp_path / "cut.kcap"
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        if size < HEADER_BYTES:
            with pytest.raises(CaptureFormatError):
                CaptureReader(cut)
            continue
        with CaptureReader(cut) as reader:
            whole = [end for end in ends if end <= size]
            assert [e.number for e in reader.entries] == list(range(len(whole))), size
            if min(abs(size - end) for end in ends) < 3:  # decoding at every size would take long and show the same
                assert numbers(reader) == list(range(len(whole))), size
            assert not reader.closed
            # Every byte after the last whole frame is accounted for.
            at = whole[-1] if whole else HEADER_BYTES
            assert sum(d.size_bytes for d in reader.damage) == size - at
            if len(whole) < len(ends) and size - at >= 104:  # the head of the torn frame is there: its events are known
                torn = sealed[len(whole)]
                assert [d.events for d in reader.damage] == [torn.events]


def test_a_flipped_byte_is_located_and_its_neighbours_live(tmp_path):
    sealed = list(recording(frames=4, rows=5))
    data = write(tmp_path / "x.kcap", sealed).read_bytes()
    entries = CaptureReader(tmp_path / "x.kcap").entries
    bad = tmp_path / "bad.kcap"
    hit = entries[3]
    step = 13  # a prime: meets every field of head and payload over the frames, at every alignment
    for at in range(hit.offset, hit.end, step):
        damaged = bytearray(data)
        damaged[at] ^= 0x40
        bad.write_bytes(damaged)
        with CaptureReader(bad) as reader:
            found = [d for d in reader.verify() if d.reason and d.offset == hit.offset]
            assert len(found) == 1, at
            assert found[0].events == 5
            frames = list(reader.frames())
            assert [f.number for f in frames] == list(range(len(sealed)))
            assert frames[3].kind == "losses/1"
            row = frames[3].batch.to_pylist()[0]
            assert (row["reason"], row["count"]) == ("damaged", 5)
            assert row["from_mono_ns"] == hit.first_mono_ns
            assert row["to_mono_ns"] == hit.last_mono_ns
            assert frames[3].watermark == frames[2].watermark


def test_damage_in_a_file_without_index_is_skipped_to_the_next_frame(tmp_path):
    """With head and index both gone the next head is found by its mark; the hole is still reported as a loss."""
    sealed = list(recording(frames=4, rows=5))
    path = write(tmp_path / "x.kcap", sealed, close=False)
    data = bytearray(path.read_bytes())
    hit = CaptureReader(path).entries[3]
    data[hit.offset + 9] ^= 1
    path.write_bytes(data)

    with CaptureReader(path) as reader:
        frames = list(reader.frames())
        assert [d.offset for d in reader.damage] == [hit.offset]
        assert [f.kind for f in frames] == ["session/1", "tasks/1", "events/1", "losses/1", "events/1", "events/1"]
        row = frames[3].batch.to_pylist()[0]
        assert row["from_mono_ns"] <= hit.first_mono_ns <= hit.last_mono_ns <= row["to_mono_ns"]


@pytest.mark.parametrize("at", [8, 20, 40])
def test_a_damaged_header_is_reported_and_the_frames_are_read(tmp_path, at):
    path = write(tmp_path / "x.kcap", recording())
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    if at == 8:  # the version field
        with pytest.raises(CaptureFormatError, match=r"format version 0; this kprobe reads version 1"):
            CaptureReader(path)
        return
    reader = CaptureReader(path)
    assert [d.offset for d in reader.damage] == [0]
    assert len(list(reader.frames())) == 7


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"time_mono_ns,cpu\n", b"\x89KCAP"], ids=["empty", "zeros", "csv", "five bytes of ours"]
)
def test_a_file_that_is_no_capture_is_refused(tmp_path, content):
    path = tmp_path / "x.kcap"
    path.write_bytes(content)
    with pytest.raises(CaptureFormatError, match=r"not a kprobe capture|cut off inside its header"):
        CaptureReader(path)


def test_an_unknown_version_is_refused_by_name(tmp_path):
    path = write(tmp_path / "x.kcap", recording())
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 8, 7)
    path.write_bytes(data)
    with pytest.raises(CaptureFormatError, match=r"x\.kcap has format version 7; this kprobe reads version 1"):
        CaptureReader(path)


def test_a_removed_frame_breaks_the_chain(tmp_path):
    path = write(tmp_path / "x.kcap", recording(), close=False)
    gone = CaptureReader(path).entries[3]
    data = path.read_bytes()
    path.write_bytes(data[: gone.offset] + data[gone.end :])

    with CaptureReader(path) as reader:
        found = reader.verify()

    assert [d.offset for d in found] == [gone.offset]
    assert "hash chain broken at frame 4" in found[0].reason


def test_a_replaced_frame_breaks_the_chain(tmp_path):
    """A forger who fixes every checksum still cannot fix the chain without rewriting all that follows."""
    sealed = list(recording())
    path = write(tmp_path / "x.kcap", sealed, close=False)
    forged = write(tmp_path / "forged.kcap", [*sealed[:3], *framer_at(3, columns_of(23, seed=5)), *sealed[4:]], close=False)
    original, other = CaptureReader(path).entries[3], CaptureReader(forged).entries[3]
    data, replacement = path.read_bytes(), forged.read_bytes()
    path.write_bytes(data[: original.offset] + replacement[other.offset : other.end] + data[original.end :])

    with CaptureReader(path) as reader:
        assert reader.verify()[0].reason.startswith("hash chain broken at frame 3")


def framer_at(number, columns):
    make = framer()
    make.next_number = number
    return list(make.events(columns, Watermark(0), 100))


def test_frames_of_the_seam_can_be_written_without_sealing_them_first(tmp_path):
    frame = Frame.decode(next(iter(recording())).data)
    with CaptureWriter(tmp_path / "x.kcap") as writer:
        writer.write(frame)
    assert [f.body for f in CaptureReader(tmp_path / "x.kcap").frames()] == [frame.body]


def test_a_capture_being_written_can_be_read(tmp_path):
    writer = CaptureWriter(tmp_path / "x.kcap")
    sealed = list(recording())
    for frame in sealed[:4]:
        writer.write_sealed(frame)

    reader = CaptureReader(tmp_path / "x.kcap")
    writer.write_sealed(sealed[4])

    assert numbers(reader) == [0, 1, 2, 3]
    assert not reader.closed
    writer.close()


def test_a_file_that_is_no_capture_is_not_overwritten(tmp_path):
    path = tmp_path / "thesis.txt"
    path.write_text("three years of work")
    with pytest.raises(CaptureFormatError, match=r"exists and is not a capture; give another name, or remove it first"):
        CaptureWriter(path)
    assert path.read_text() == "three years of work"


def test_an_older_capture_is_replaced(tmp_path):
    path = write(tmp_path / "x.kcap", recording(frames=9))
    write(path, recording(frames=1))
    assert numbers(CaptureReader(path)) == [0, 1, 2]


def test_a_missing_folder_is_an_error_with_the_path(tmp_path):
    with pytest.raises(CaptureFormatError, match=r"cannot create capture .*nowhere/x\.kcap: No such file or directory"):
        CaptureWriter(tmp_path / "nowhere" / "x.kcap")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 256 KiB."""
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("needs root to mount a small tmpfs", pytrace=False)
        pytest.skip("needs root to mount a small tmpfs")
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_full_disk_is_loud_and_leaves_a_whole_file(small_disk):
    path = small_disk / "x.kcap"
    writer = CaptureWriter(path)
    with pytest.raises(ProbeError, match=r"the disk is full; it holds its first \d+ frames"):
        for frame in recording(frames=None, rows=997):
            writer.write_sealed(frame)
    written = writer.frames
    writer.close()

    with CaptureReader(path) as reader:
        assert reader.verify() == []
        assert numbers(reader) == list(range(written))
    assert written > 3


def test_the_writer_goes_on_when_the_disk_has_room_again(small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 200_000)
    writer = CaptureWriter(small_disk / "x.kcap")
    pending = None
    for frame in recording(frames=8, rows=997):
        try:
            writer.write_sealed(frame)
        except ProbeError:
            pending = frame
            break
    assert pending is not None
    filler.unlink()
    writer.write_sealed(pending)
    writer.close()

    with CaptureReader(small_disk / "x.kcap") as reader:
        assert reader.closed
        assert reader.verify() == []
        assert numbers(reader) == list(range(pending.number + 1))


_ENDLESS = """
import sys
from probe.capture import CaptureWriter
from probe_synth import recording
writer = CaptureWriter(sys.argv[1])
for frame in recording(frames=None, rows=499):
    writer.write_sealed(frame)
    print(frame.number, flush=True)
"""


def test_kill_9_loses_no_frame_whose_write_returned(tmp_path):
    path = tmp_path / "x.kcap"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    child = subprocess.Popen([sys.executable, "-c", _ENDLESS, path], stdout=subprocess.PIPE, text=True, env=environment)
    for line in child.stdout:
        if int(line) == 37:
            break
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().split("\n")
    child.wait()
    child.stdout.close()
    acknowledged = max([37, *(int(n) for n in rest[:-1])])

    with CaptureReader(path) as reader:
        found = numbers(reader)
        assert found == list(range(len(found)))
        assert len(found) > acknowledged
        assert not reader.closed


def test_a_frame_too_large_for_kafka_is_cut_in_two():
    """Random columns do not compress; every part stays under the limit and no event is lost or doubled."""
    rng = np.random.default_rng(23)
    columns = columns_of(10_000)
    for name in ("a0", "a1", "a2", "a3", "a4"):
        columns[name][:] = rng.integers(0, 1 << 63, 10_000)
    make = Framer(node="n", boot_id="b" * 32, recording="r", max_frame_bytes=100_000)
    sealed = list(make.events(columns, Watermark(7), 10_000))

    assert all(len(s.data) <= 100_000 for s in sealed)
    frames = [Frame.decode(s.data) for s in sealed]
    assert [f.number for f in frames] == list(range(len(frames)))
    assert [f.watermark.node_mono_ns for f in frames] == [0] * (len(frames) - 1) + [7]
    assert np.array_equal(np.concatenate([f.events()["a0"] for f in frames]), columns["a0"])
