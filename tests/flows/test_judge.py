"""The state of a shard without servers: what it keeps stays bounded, what is open is shown, one bad operation stops nobody."""

import itertools
import json
from dataclasses import replace

import pytest
from world import node_frames

from causality.engine import NodeEngine
from causality.operations import from_row
from causality.tasks import TaskTable
from events.settings import FlowSettings
from flows.judge import ShardLogic
from flows.messages import DeadLetter, FrameMessage, Judgement, Message, NodeSeen, Submission
from flows.metrics import FlowMetrics
from flows.shards import Share, _murmur2


def submission(**row):
    base = {"type": "t", "node": "node-a", "deadline_ns": 5000, "outcome": ""}
    return Submission(from_row(base | row), Message("operations", 0, 0, b"", json.dumps(row).encode(), 0))


def world(**settings):
    frames, truth = node_frames("node-a", 11)
    messages = [FrameMessage(Message("raw", 0, i, b"node-a", f.encode(), 0)) for i, f in enumerate(frames)]
    logic = ShardLogic("s", FlowSettings(stop_at_end=True, **settings), FlowMetrics(), None)
    states = truth.states(truth.tasks[0])
    return logic, messages, truth.tasks[0].tid, states[0][0], states[-1][1]


def outputs(logic, messages):
    found = []
    for message in messages:
        found += logic.on_batch([message])[0]
        while (at := logic.notify_at()) is not None and logic._boots and any(
            b.engine.due_since_mono_ns() is not None for b in logic._boots.values()
        ):
            assert at
            found += logic.on_notify()[0]
    return found + list(logic.on_eof()[0])


def test_an_open_operation_is_shown_and_its_final_verdict_is_the_same_as_without():
    logic, messages, tid, start, end = world(provisional_s=1e-5)
    shown = outputs(logic, [submission(operation_id="a", tid=tid, start_mono_ns=start, end_mono_ns=end), *messages])
    logic, messages, *_ = world(provisional_s=0)
    plain = outputs(logic, [submission(operation_id="a", tid=tid, start_mono_ns=start, end_mono_ns=end), *messages])

    provisional, final = shown[:-1], shown[-1]
    assert provisional
    assert all(j.verdict["provisional"] and j.edges == () for j in provisional)
    spans = [j.verdict["duration_ns"] for j in provisional]
    assert all(b >= 2 * a and a % 10_000 == 0 for a, b in itertools.pairwise(spans))
    assert not final.verdict["provisional"]
    assert [j.verdict["hash"] for j in plain] == [final.verdict["hash"]]


def test_an_operation_on_which_the_judgement_fails_is_set_aside_and_its_neighbours_live(monkeypatch, capsys):
    logic, messages, tid, start, end = world()
    judge = NodeEngine.judge

    def broken(self, operation, **options):
        if operation.operation_id == "bad":
            raise AssertionError("totals do not sum")
        return judge(self, operation, **options)

    monkeypatch.setattr(NodeEngine, "judge", broken)
    rows = [submission(operation_id=i, tid=tid, start_mono_ns=start, end_mono_ns=end) for i in ("a", "bad", "c")]

    found = outputs(logic, [*rows, *messages])

    assert sorted(f.key for f in found if isinstance(f, Judgement)) == ["a", "c"]
    (letter,) = [f for f in found if isinstance(f, DeadLetter)]
    assert "'bad' cannot be judged: AssertionError: totals do not sum" in letter.reason
    assert "AssertionError" in capsys.readouterr().err


def test_an_operation_that_never_ends_is_given_up_and_does_not_hold_events_for_ever():
    logic, messages, tid, start, _ = world(provisional_s=0, hold_s=5e-5)

    found = outputs(logic, [submission(operation_id="a", tid=tid, start_mono_ns=start, end_mono_ns=None), *messages])

    (letter,) = found
    assert letter.reason.startswith("operation 'a' has not ended within 5e-05 s")


@pytest.mark.parametrize(("process", "known", "letters"), [(0, False, 1), (1, False, 0), (0, True, 0)])
def test_of_several_processes_the_one_that_would_read_a_node_speaks_for_it(process, known, letters):
    node = next(n for n in (f"node-{i}" for i in range(99)) if Share(2, 0, 4).owns(n))
    share = Share(2, process, 4)
    logic = ShardLogic("s", FlowSettings(stop_at_end=True, processes=2), FlowMetrics(), None, share.owns)
    logic.on_batch([submission(operation_id="a", tid=7, start_mono_ns=1, end_mono_ns=9, node=node)])
    if known:
        logic.on_batch([NodeSeen(node)])

    assert len(list(logic.on_eof()[0])) == letters


def test_the_owner_of_a_node_is_kafkas_own_choice():
    """Truth from outside: the vectors of Kafka's UtilsTest.testMurmur2."""
    vectors = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536, b"abc": 479470107}

    assert {k: (_murmur2(k) ^ 1 << 31) - (1 << 31) for k in vectors} == vectors


def row(time, tid, start, reason="fork", **facts):
    return {"time_mono_ns": time, "tid": tid, "start_boot_ns": start, "reason": reason, **facts}


def test_who_is_who_stays_bounded_while_threads_come_and_go_and_names_stay_right():
    """GIVEN a thread that lives for ever and tids that are used again and again WHEN old times are forgotten THEN the rows
    held do not grow, and every question about later times has the answer of a table that forgot nothing."""
    table, whole, sizes = TaskTable(), TaskTable(), []
    for now in range(1000, 200_000, 1000):
        tid = 100 + now // 1000 % 7
        rows = [row(now, 1, 1, "rename", comm=f"main-{now}"), row(now, tid, now, comm=f"job-{now}", cgroup="/a")]
        rows += [row(now + 400, tid, now, "rename", comm=f"work-{now}")]
        rows += [row(now + 900, tid, now, "exit")] if now % 3000 else []  # some exits are lost
        for each in rows:
            table.add(each)
            whole.add(each)
        table.forget(now - 3000)
        sizes.append(len(table))
        for t in (1, *range(100, 107)):
            for start, told in whole.lives(t, now):
                if told > now - 3000:
                    assert table.look_up(t, start, now) == whole.look_up(t, start, now)
        assert table.look_up(1, 1, now) == whole.look_up(1, 1, now)
        assert table.lives(1, now) == whole.lives(1, now)
    assert max(sizes) <= 40


def test_state_stays_bounded_over_many_retentions():
    frames, _ = node_frames("node-a", 11)
    logic = ShardLogic("s", FlowSettings(retention_s=1e-4, provisional_s=0), FlowMetrics(), None)
    logic._config = replace(logic._config, lookback_ns=10_000)
    event_frames = [f for f in frames if f.kind == "events/1"]
    span = event_frames[-1].watermark.node_mono_ns
    held = []
    for lap in range(12):
        for number, frame in enumerate(event_frames):
            columns = dict(frame.events())
            columns["time_mono_ns"] = columns["time_mono_ns"] + lap * span
            columns["seq"] = columns["seq"] + lap * 1_000_000
            shifted = _again(frame, columns, lap * len(event_frames) + number, lap * span)
            logic.on_batch([FrameMessage(Message("raw", 0, number, b"node-a", shifted.encode(), 0))])
        log = next(iter(logic._boots.values())).engine._log
        held.append(sum(map(len, log.segments)) + log._tail_rows + log.pending_rows)
    assert max(held[4:]) <= 1.5 * max(held[:4])


def _again(frame, columns, number, shift):
    from events.frames import Clocks, Watermark, events_frame

    now = frame.watermark.node_mono_ns + shift
    head = {"node": frame.node, "boot_id": frame.boot_id, "recording": frame.recording, "number": number}
    return events_frame(columns, **head, clocks=Clocks(now, now, now), watermark=Watermark(now))
