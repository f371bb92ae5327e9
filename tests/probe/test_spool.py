"""The spool gives back what it was given, in order, whatever ended the process before; and never holds more than it may."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from probe_synth import recording

from events.errors import ProbeError
from probe.spool import Spool

ROOT = Path(__file__).resolve().parents[2]
FRAMES = list(recording(frames=120, rows=22))
EVENTS = [f for f in FRAMES if f.kind == "events/1"]


def spool_at(folder, **more):
    return Spool(folder, **{"max_bytes": 1 << 24, "drop": "oldest", "fsync": "never", "segment_bytes": 20_000, **more})


def drain(spool):
    numbers = []
    while (sealed := spool.next()) is not None:
        numbers.append(sealed.number)
        spool.acknowledge()
    return numbers


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
def test_frames_come_back_in_order(tmp_path, fsync):
    spool = spool_at(tmp_path, fsync=fsync)
    for frame in FRAMES[:23]:
        assert spool.append(frame)
    spool.sync()

    assert [spool.next() for _ in range(23)] == FRAMES[:23]
    assert spool.next() is None
    assert spool.pending_events == 21 * 22
    for _ in range(23):
        spool.acknowledge()
    assert spool.empty
    assert (spool.pending_events, spool.size_bytes) == (0, 0)
    assert list(tmp_path.glob("*.spool")) == []
    spool.close()


def test_frames_not_acknowledged_are_given_again(tmp_path):
    spool = spool_at(tmp_path)
    for frame in FRAMES[:9]:
        spool.append(frame)
    taken = [spool.next().number for _ in range(6)]
    for _ in range(2):
        spool.acknowledge()

    spool.rewind()

    assert taken == list(range(6))
    assert drain(spool) == list(range(2, 9))
    spool.close()


def test_what_was_in_flight_goes_in_front(tmp_path):
    spool = spool_at(tmp_path)
    for frame in FRAMES[5:9]:
        spool.append(frame)
    spool.put_front(FRAMES[:5])
    spool.append(FRAMES[9])
    assert drain(spool) == list(range(10))
    spool.close()


def test_the_next_start_finds_what_was_left(tmp_path):
    spool = spool_at(tmp_path)
    spool.put_front(FRAMES[:3])
    for frame in FRAMES[3:40]:
        spool.append(frame)
    spool.close()

    again = spool_at(tmp_path)

    assert again.pending_events == 38 * 22
    assert drain(again) == list(range(40))
    again.close()


def test_two_probes_cannot_share_a_folder(tmp_path):
    spool = spool_at(tmp_path)
    with pytest.raises(ProbeError, match=r"in use by another probe; set probe\.spool_dir"):
        spool_at(tmp_path)
    spool.close()


def test_a_torn_tail_is_cut_off_and_told(tmp_path):
    spool = spool_at(tmp_path)
    for frame in EVENTS[:2]:
        spool.append(frame)
    whole = spool.size_bytes
    spool.append(EVENTS[2])
    spool.close()
    path = next(tmp_path.glob("*.spool"))
    data = path.read_bytes()
    for size in range(whole + 1, len(data), 97):
        path.write_bytes(data[:size])
        again = spool_at(tmp_path)
        found = [again.next().number for _ in range(2)]
        assert (found, again.next()) == ([f.number for f in EVENTS[:2]], None)
        assert [r["reason"] for r in again.tally.take()] == ["damaged"]
        again.close()
        path.write_bytes(data)


def test_damaged_bytes_are_left_out_and_told(tmp_path):
    spool = spool_at(tmp_path)
    for frame in EVENTS[:5]:
        spool.append(frame)
    path = next(tmp_path.glob("*.spool"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    assert drain(spool) == [f.number for f in EVENTS[:5] if f is not EVENTS[2]]
    assert spool.damaged == 22
    row = spool.tally.take()[0]
    assert (row["reason"], row["count"]) == ("damaged", 22)
    assert (row["from_mono_ns"], row["to_mono_ns"]) == (EVENTS[2].first_mono_ns, EVENTS[2].last_mono_ns)
    spool.close()


def fill(spool, frames):
    return [f.number for f in frames if spool.append(f)]


def test_a_full_spool_gives_up_its_oldest_events_and_keeps_names(tmp_path):
    spool = spool_at(tmp_path, max_bytes=150_000)
    accepted = fill(spool, FRAMES)

    assert accepted == [f.number for f in FRAMES]
    assert spool.size_bytes <= 150_000
    assert sum(p.stat().st_size for p in tmp_path.glob("*.spool")) == spool.size_bytes
    left = drain(spool)
    assert left[:2] == [0, 1]  # session and names outlive the events of their time
    newest = left[2:]
    assert newest == list(range(newest[0], len(FRAMES)))
    rows = spool.tally.take()
    assert [(r["reason"], r["hop"]) for r in rows] == [("spool_full", "spool")]
    assert rows[0]["count"] == spool.dropped == (120 - len(newest)) * 22
    assert rows[0]["from_mono_ns"] == EVENTS[0].first_mono_ns
    assert rows[0]["to_mono_ns"] == EVENTS[120 - len(newest) - 1].last_mono_ns
    spool.close()


def test_a_full_spool_refuses_the_newest_if_told_so(tmp_path):
    spool = spool_at(tmp_path, max_bytes=150_000, drop="newest")
    accepted = fill(spool, FRAMES)

    assert accepted == list(range(len(accepted)))
    assert len(accepted) < len(FRAMES)
    assert spool.append(FRAMES[1])  # names still have their reserve
    assert drain(spool) == [*accepted, 1]
    row = spool.tally.take()[0]
    assert (row["count"], row["to_mono_ns"]) == (spool.dropped, EVENTS[-1].last_mono_ns)
    spool.close()


def test_segments_being_sent_are_not_given_up(tmp_path):
    spool = spool_at(tmp_path, max_bytes=150_000)
    fill(spool, EVENTS[:30])
    in_flight = spool.next()
    fill(spool, EVENTS[30:])
    spool.acknowledge()

    assert in_flight == EVENTS[0]
    left = drain(spool)
    assert left == sorted(left)
    assert EVENTS[0].number not in left
    assert (len(left) + 1) * 22 + spool.dropped == len(EVENTS) * 22
    spool.close()


def test_no_room_at_all_means_every_event_is_counted(tmp_path):
    spool = spool_at(tmp_path, max_bytes=0)
    assert fill(spool, FRAMES) == []
    spool.put_front(EVENTS[:2])
    assert spool.empty
    assert spool.dropped == 122 * 22
    spool.close()


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("needs root to mount a small tmpfs", pytrace=False)
        pytest.skip("needs root to mount a small tmpfs")
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_full_disk_drops_counted_and_leaves_no_torn_record(small_disk, capsys):
    spool = spool_at(small_disk, drop="newest")
    accepted = fill(spool, FRAMES)
    spool.close()

    again = spool_at(small_disk, drop="newest")

    assert 0 < len(accepted) < len(FRAMES)
    assert again.tally.take() == []
    assert drain(again) == accepted
    assert len(accepted) * 22 + spool.dropped >= len(EVENTS) * 22
    assert "No space left on device" in capsys.readouterr().err
    again.close()


_ENDLESS = """
import sys
from pathlib import Path
from probe.spool import Spool
from probe_synth import recording
spool = Spool(Path(sys.argv[1]), max_bytes=1 << 26, drop="oldest", fsync="never", segment_bytes=50_000)
for frame in recording(frames=None, rows=22):
    spool.append(frame)
    print(frame.number, flush=True)
"""


def test_kill_9_loses_no_frame_whose_append_returned(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    child = subprocess.Popen([sys.executable, "-c", _ENDLESS, tmp_path], stdout=subprocess.PIPE, text=True, env=environment)
    acknowledged = next(int(line) for line in child.stdout if int(line) >= 41)
    child.send_signal(signal.SIGKILL)
    acknowledged = max([acknowledged, *(int(n) for n in child.stdout.read().split("\n")[:-1])])
    child.wait()
    child.stdout.close()

    spool = spool_at(tmp_path)

    found = drain(spool)
    assert found == list(range(len(found)))
    assert len(found) > acknowledged
    spool.close()


class SpoolModel(RuleBasedStateMachine):
    """Any order of appends, sends, acknowledgements, outages and crashes: what is accepted and not dropped arrives in order."""

    @initialize(drop=st.sampled_from(["oldest", "newest"]), max_bytes=st.sampled_from([60_000, 150_000, 1 << 24]))
    def start(self, drop, max_bytes):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.more = {"drop": drop, "max_bytes": max_bytes}
        self.spool = spool_at(Path(self.folder.name), **self.more)
        self.source = itertools.cycle(EVENTS)
        self.given = self.sent = self.dropped_before = 0
        self.in_flight = []
        self.last = None

    @rule(count=st.integers(1, 15))
    def append(self, count):
        for _ in range(count):
            self.given += 22
            self.spool.append(next(self.source))

    @rule(count=st.integers(1, 8))
    def send(self, count):
        for _ in range(count):
            sealed = self.spool.next()
            if sealed is not None:
                self.in_flight.append(sealed)

    @precondition(lambda self: self.in_flight)
    @rule()
    def put_back(self):
        self.spool.put_back()
        self.in_flight.pop()

    @precondition(lambda self: self.in_flight)
    @rule()
    def acknowledge(self):
        self.in_flight.pop(0)
        self.spool.acknowledge()
        self.sent += 22

    @rule()
    def outage(self):
        self.spool.rewind()
        self.in_flight.clear()

    @rule()
    def crash(self):
        self.dropped_before += self.spool.dropped
        self.spool.close()
        before = self.spool.pending_events
        self.spool = spool_at(Path(self.folder.name), **self.more)
        again = self.spool.pending_events - before  # acknowledged frames of the first segment come once more
        assert again >= 0
        self.given += again
        self.in_flight.clear()

    @invariant()
    def nothing_is_lost_unseen(self):
        if hasattr(self, "spool"):
            dropped = self.dropped_before + self.spool.dropped
            assert self.given == self.sent + self.spool.pending_events + dropped
            assert self.spool.size_bytes <= max(self.more["max_bytes"], 0)
            on_disk = sum(p.stat().st_size for p in Path(self.folder.name).glob("*.spool"))
            assert on_disk == self.spool.size_bytes

    def teardown(self):
        if hasattr(self, "spool"):
            self.spool.close()
            self.folder.cleanup()


TestSpoolModel = SpoolModel.TestCase
TestSpoolModel.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
