"""The agent hands on everything it drains, in order, and when it may not go on it says what is missing and why."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from probe_synth import START_MONO_NS, columns_of, framer

from events.errors import ProbeError
from events.frames import Frame, Watermark, empty_events
from events.settings import ProbeSettings
from probe.accounts import Account, RingLedger
from probe.agent import Agent
from probe.capture import CaptureReader, CaptureWriter
from probe.framing import loss_row
from probe.limits import Limits, Usage
from probe.outputs import CaptureOutput
from probe.source import SHED_ORDER

SECOND_NS = 1_000_000_000
MIB = 1 << 20


@dataclass
class Drain:
    columns: dict = field(default_factory=empty_events)
    tasks: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    watermark: Watermark = field(default_factory=lambda: Watermark(0))


class ScriptedSource:
    """A kernel of which every drain is known beforehand; keeps what was done to it."""

    def __init__(self, drains, families=("sched", "syscalls", "block")):
        self.drains = iter(drains)
        self.families = {name: {"attached": True, "missing": [], "reason": None} for name in families}
        self.done = []
        self.last = Watermark(0)

    def session(self):
        return {"kernel": "6.18", "families": {n: dict(s) for n, s in self.families.items()}}

    def drain(self):
        drained = next(self.drains, None)
        if drained is None:
            return Drain(watermark=self.last)
        if isinstance(drained, Exception):
            raise drained
        self.last = drained.watermark
        return drained

    def shed(self, family):
        self.done.append(f"shed {family}")
        self.families[family]["attached"] = False

    def detach(self):
        self.done.append("detach")

    def close(self):
        self.done.append("close")


def drains(count, rows=22):
    for n in range(count):
        start = START_MONO_NS + n * rows * 1000
        columns = columns_of(rows, first_seq=n * rows // 2, start_mono_ns=start)
        tasks = [{"time_mono_ns": start, "reason": "fork", "tid": 500 + n, "tgid": 500 + n, "start_boot_ns": start}]
        yield Drain(columns, tasks, [], Watermark(start + rows * 1000))


class Kept:
    """An output that keeps the frames, decoded."""

    def __init__(self):
        self.frames = []
        self.account = Account("kept")

    def send(self, sealed):
        self.frames.append(Frame.decode(sealed.data))
        self.account.accepted += sealed.events
        self.account.delivered += sealed.events

    def poll(self):
        pass

    def take_losses(self):
        return []

    def finish(self, timeout_s):
        pass

    def health(self):
        return None

    def kinds(self):
        return [f.kind for f in self.frames]


def run(source, turns, outputs=None, usage=None, **settings):
    output = Kept()
    more = {} if usage is None else {"usage": usage}
    quick = ProbeSettings(**{"drain_interval_ms": 1, "batch_linger_ms": 2, **settings})
    agent = Agent(source, framer(), outputs or [output], quick, **more)
    left = itertools.count(turns, -1)
    summary = agent.run(lambda: next(left) == 0)
    return agent, summary, output


def test_everything_drained_arrives_in_order():
    source = ScriptedSource(drains(7))

    _, summary, output = run(source, turns=5)  # two drains are still in the rings when it is told to stop

    assert source.done == ["detach", "close"]
    assert summary.events == 7 * 22
    assert summary.violations == []
    assert summary.incomplete == []
    assert output.kinds()[0] == "session/1"
    assert [f.number for f in output.frames] == list(range(len(output.frames)))
    events = [f.events() for f in output.frames if f.kind == "events/1"]
    assert Counter(np.concatenate([e["seq"] for e in events]).tolist()) == Counter(dict.fromkeys(range(77), 2))
    assert sum(f.batch.num_rows for f in output.frames if f.kind == "tasks/1") == 7


def test_a_watermark_never_runs_ahead_of_what_was_sent():
    """All events before a frame's watermark are in it or in frames before it, also where one drain makes several frames."""
    _, _, output = run(ScriptedSource(drains(5, rows=46)), turns=9, batch_events=10)

    times = [f.events()["time_mono_ns"] for f in output.frames if f.kind == "events/1"]
    marks = [f.watermark.node_mono_ns for f in output.frames if f.kind == "events/1"]
    assert max(len(t) for t in times) <= 10
    assert len(times) > 5
    for at, mark in enumerate(marks):
        later = np.concatenate([*times[at + 1 :], np.empty(0, np.int64)])
        assert (later >= mark).all()
    assert marks[-1] == START_MONO_NS + 5 * 46 * 1000
    assert marks == sorted(marks)


def test_names_and_losses_come_before_the_events_they_belong_to():
    lost = loss_row("ring_full", "ring", from_mono_ns=1, to_mono_ns=2, count=23, cpu=1, first_seq=11, last_seq=33)
    drain = next(drains(1))
    drain.losses.append(lost)
    drain.columns["seq"][11:] += 34  # CPU 1 goes on after the hole

    _, summary, output = run(ScriptedSource([drain]), turns=1)

    assert output.kinds() == ["session/1", "tasks/1", "losses/1", "events/1"]
    assert output.frames[2].batch.to_pylist() == [lost]
    assert output.frames[2].watermark.node_mono_ns == 0  # not yet: the events of that time are still to come
    assert summary.incomplete == ["23 events lost (ring_full)"]


def test_the_watermark_moves_on_while_nothing_happens():
    marks = [Watermark(START_MONO_NS + n) for n in range(400)]

    _, _, output = run(ScriptedSource(Drain(watermark=m) for m in marks), turns=400)

    empty = [f for f in output.frames if f.kind == "events/1"]
    assert 2 <= len(empty) < 20  # a heartbeat, not a frame a drain
    assert empty[-1].watermark == marks[-1]


def test_a_source_that_fails_ends_the_recording_and_keeps_what_was_drained(tmp_path):
    source = ScriptedSource([*drains(3), ProbeError("ring 1 is gone")])
    writer = CaptureWriter(tmp_path / "x.kcap")

    with pytest.raises(ProbeError, match="ring 1 is gone"):
        run(source, turns=99, outputs=[CaptureOutput(writer)])

    assert source.done == ["close"]
    with CaptureReader(tmp_path / "x.kcap") as reader:
        assert reader.closed
        assert sum(e.rows for e in reader.entries if e.kind == "events/1") == 66


def climbing(cpu_share, rss_bytes=MIB):
    """A clock that moves one second a reading, with a process that uses that share of a CPU."""
    seconds = itertools.count(1)
    return lambda: (lambda s: Usage(s * SECOND_NS, int(s * SECOND_NS * cpu_share), rss_bytes))(next(seconds))


def limits(families, **more):
    return Limits(**{"cpu_share_max": 0.5, "memory_max_bytes": 64 * MIB, "window_s": 3, "families": families, **more})


def test_load_is_shed_family_by_family_and_at_last_the_probe_detaches():
    caps, use = limits(("sched", "block", "syscalls")), climbing(0.9)

    steps = [(second, step.family) for second in range(1, 30) if (step := caps.check(use())) is not None]

    # One whole window between steps; syscalls first, the scheduler last, then everything.
    assert steps == [(4, "syscalls"), (7, "block"), (10, "sched"), (13, None)]


def test_a_process_inside_its_caps_keeps_everything():
    caps, use = limits(("sched", "syscalls")), climbing(0.49)
    assert [caps.check(use()) for _ in range(60)] == [None] * 60


def test_memory_above_the_cap_is_a_step_too():
    caps, use = limits(("sched",)), climbing(0.0, rss_bytes=65 * MIB)
    steps = [step for _ in range(10) if (step := caps.check(use())) is not None]
    assert [s.family for s in steps] == ["sched", None]
    assert steps[0].reason == "resident memory 68157440 bytes is above probe.memory_max_bytes 67108864"


def test_every_family_has_its_place_in_the_order():
    from events.kinds import FAMILIES

    assert sorted(SHED_ORDER) == sorted(FAMILIES)
    assert (SHED_ORDER[0], SHED_ORDER[-1]) == ("syscalls", "sched")


def test_each_step_down_is_recorded(monkeypatch, capsys):
    """Sessions say what was given up, loss rows cover the time without it, and the end by a cap leaves the future unknown."""
    monkeypatch.setattr("probe.agent._SECOND_NS", 0)  # check the limits at every turn
    source = ScriptedSource(drains(40), families=("sched", "syscalls"))

    _, summary, output = run(source, turns=40, usage=climbing(0.9), limit_window_s=3.0, batch_linger_ms=1, batch_events=1)

    assert source.done[:3] == ["shed syscalls", "shed sched", "detach"]
    assert [s.family for s in summary.steps] == ["syscalls", "sched", None]
    sessions = [f.body for f in output.frames if f.kind == "session/1"]
    assert [(s["shed"], s["detached"]) for s in sessions] == [
        ([], False), (["syscalls"], False), (["syscalls", "sched"], False), (["syscalls", "sched"], True),
    ]  # fmt: skip
    assert "CPU share 0.90 over 3 s is above probe.cpu_share_max 0.5" in sessions[1]["steps"][0]["reason"]
    rows = [row for f in output.frames if f.kind == "losses/1" for row in f.batch.to_pylist()]
    shed = [(r["from_mono_ns"], r["to_mono_ns"]) for r in rows if r["reason"] == "shed" and r["family"] == "syscalls"]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(shed))  # no time is left out
    assert [r["to_mono_ns"] > 1 << 61 for r in rows if r["reason"] == "detached"] == [True]
    assert "shedding family syscalls" in capsys.readouterr().err
    assert any("detached" in line for line in summary.incomplete)


def test_an_account_that_does_not_add_up_is_told(capsys):
    class Leaky(Kept):
        def send(self, sealed):
            self.account.accepted += sealed.events

    agent, summary, _ = run(ScriptedSource(drains(2)), turns=3, outputs=[Leaky()])

    assert len(summary.violations) == 1
    assert "hop kept: 44 events came in, but 0 delivered + 0 pending + dropped (none) make 0" in summary.violations[0]
    assert agent.failures() == summary.violations
    assert "accounts do not add up" in capsys.readouterr().err


def test_the_ring_ledger_finds_a_hole_that_nobody_reported():
    ledger = RingLedger()
    columns = columns_of(22)
    columns["seq"][15:] += 5
    ledger.add(columns, [])

    assert ledger.violations(final=False) == []  # a record may still be on its way
    assert ledger.violations(final=True) == ["CPU 1: 16 sequence numbers used, but 11 delivered + 0 lost make 11"]
    assert ledger.unexplained() == {1: 5}


def test_the_ring_ledger_finds_an_event_delivered_twice():
    ledger = RingLedger()
    ledger.add(columns_of(22), [])
    ledger.add(columns_of(22), [])
    assert len(ledger.violations(final=False)) == 2


def test_losses_of_the_capture_file_are_told_in_the_file_when_there_is_room_again(tmp_path, capsys):
    class FullFor:
        """A writer whose disk is full for frames 3 to 5."""

        def __init__(self, writer):
            self.writer = writer

        def write_sealed(self, sealed):
            if 3 <= sealed.number <= 5:
                raise ProbeError("the disk is full")
            self.writer.write_sealed(sealed)

        def close(self):
            self.writer.close()

    output = CaptureOutput(FullFor(CaptureWriter(tmp_path / "x.kcap")))
    gap = [Drain(columns_of(22, first_seq=11 * n, start_mono_ns=START_MONO_NS + n * 2 * SECOND_NS)) for n in range(8)]

    _, summary, _ = run(ScriptedSource(gap), turns=8, outputs=[output], batch_events=22)

    lost = summary.lost["disk_full"]
    assert lost >= 22
    assert summary.violations == []
    assert capsys.readouterr().err.count("the disk is full") == 1
    with CaptureReader(tmp_path / "x.kcap") as reader:
        rows = [row for f in reader.frames() if f.kind == "losses/1" for row in f.batch.to_pylist()]
        kept = sum(e.rows for e in reader.entries if e.kind == "events/1")
    assert (kept, sum(r["count"] for r in rows)) == (8 * 22 - lost, lost)
    assert {r["hop"] for r in rows} == {"capture"}
