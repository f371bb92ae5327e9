"""The engine's answers equal the simulator's truth, exactly, over random schedules; where evidence was removed they say so.

Frames arrive cut anywhere, shuffled, and partly twice. A failing seed is printed: `Simulator(seed)` is the whole schedule.
"""

import itertools
import random

import pytest
from simulator import BASE_NS, Simulator
from tape import BOOT_ID, NODE, Tape

from causality.engine import NodeEngine
from causality.log import EventLog
from causality.operations import Operation
from causality.tasks import TaskTable
from causality.timeline import Loss, Timeline

BATCH = 50
SCHEDULES = 800


def timeline_of(frames, end_ns, *, proven_ns=BASE_NS):
    """What the engine sees of some frames once they are sealed."""
    log, tasks, losses = EventLog(), TaskTable(), []
    for frame in frames:
        if frame.kind == "events/1":
            log.add(frame.events())
        elif frame.kind == "tasks/1":
            tasks.fold(frame.batch)
        elif frame.kind == "losses/1":
            for row in frame.batch.to_pylist():
                where = (row["from_mono_ns"], row["to_mono_ns"], row["cpu"])
                losses.append(Loss(*where, row["reason"], row["family"] or "", row["count"]))
    log.seal(end_ns + 1)
    log.settle()
    return Timeline(
        log.segments, tasks, losses, lo_mono_ns=0, hi_mono_ns=end_ns, node=NODE, boot_id=BOOT_ID, proven_mono_ns=proven_ns
    )


def engine_states(timeline, key, start_ns, end_ns):
    out = []
    for i in timeline.states(key, start_ns, end_ns):
        waker = None
        if i.state_name == "runnable" and i.wake:
            waker = "irq" if i.wake.frames else i.wake.waker
        cpu = i.cpu if i.state_name == "running" else None
        out.append((i.start_mono_ns, i.end_mono_ns, i.state_name, cpu, waker))
    return out


def true_states(truth, task):
    """A task's first sleep began before the recording: nothing proves it."""
    states = [s for s in truth.states(task) if s[0] > BASE_NS or s[2] != "blocked"]
    return [(a, b, state, cpu, getattr(waker, "key", waker)) for a, b, state, cpu, waker in states]


@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_states_and_wakers_equal_the_truth(first):
    for seed in range(first, first + BATCH):
        simulator = Simulator(seed)
        truth = simulator.run()
        frames = Tape.of(simulator, truth).frames(rng=random.Random(seed), duplicates=True)
        timeline = timeline_of(frames, truth.end_ns)
        for task in truth.tasks:
            expected = true_states(truth, task)
            if expected:
                got = engine_states(timeline, task.key, expected[0][0], expected[-1][1])
                assert got == expected, f"seed {seed}, tid {task.tid}"


@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_occupants_and_interrupt_frames_equal_the_truth(first):
    for seed in range(first, first + BATCH):
        simulator = Simulator(seed)
        truth = simulator.run()
        timeline = timeline_of(Tape.of(simulator, truth).frames(rng=random.Random(seed)), truth.end_ns)
        for cpu in truth.cpus:
            got = [(o.start_mono_ns, o.end_mono_ns, o.key[0]) for o in timeline.occupants(cpu.number, BASE_NS, truth.end_ns)]
            if any(r[1] == cpu.number for r in simulator.records):
                assert _merged(got) == _steps(cpu.occupant, truth, lambda task: task.tid if task else 0), f"seed {seed}"
            frames = timeline.frames(cpu.number, BASE_NS, truth.end_ns)
            busy = sorted({(f.start_mono_ns, f.end_mono_ns, "irq") for f in frames if f.parent == -1})
            expected = [s for s in _steps(cpu.irq, truth, lambda label: "irq" if label else None) if s[2]]
            assert _merged(busy) == expected, f"seed {seed}"


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_the_states_of_a_window_do_not_depend_on_how_far_back_one_looks(first):
    """A busy thread's states are derived from just before the window on: that must change nothing, losses or not."""
    cut = 0
    for seed in range(first, first + 50):
        rng = random.Random(seed)
        simulator = Simulator(seed, tasks=3, duration_ns=200_000)
        truth = simulator.run()
        tape = Tape.of(simulator, truth)
        if seed % 2:
            hole = tape.records[rng.randrange(len(tape.records))]
            tape = tape.without(hole[1], hole[0], hole[0] + rng.randint(500, 20_000))
        frames = tape.frames()
        for task in truth.tasks:
            start = rng.randrange(BASE_NS, truth.end_ns)
            end = rng.randrange(start + 1, truth.end_ns + 1)
            whole = timeline_of(frames, truth.end_ns)
            whole.states(task.key, 0, 1)
            near = timeline_of(frames, truth.end_ns)
            cut += near._tail_start(task.key, start) is not None
            assert near.states(task.key, start, end) == whole.states(task.key, start, end), f"seed {seed}, tid {task.tid}"
    assert cut > 20


def _merged(pieces):
    out = []
    for a, b, who in pieces:
        if out and out[-1][2] == who and out[-1][1] == a:
            out[-1] = (out[-1][0], b, who)
        else:
            out.append((a, b, who))
    return out


def _steps(steps, truth, name):
    times = sorted({truth.start_ns, truth.end_ns} | {t for t in steps.times if truth.start_ns < t < truth.end_ns})
    return _merged([(a, b, name(steps.at(a))) for a, b in itertools.pairwise(times)])


def operations_of(truth, rng):
    """Two random operations a task, each from a moment in which it ran to another, with the windows."""
    chosen = {}
    for number, task in enumerate(truth.tasks):
        runs = [s for s in true_states(truth, task) if s[2] == "running" and s[1] - s[0] > 1]
        for part in range(2 if len(runs) > 1 else 0):
            first = rng.randrange(len(runs) - 1)
            last = rng.randrange(first + 1, len(runs))
            start, end = rng.randint(runs[first][0], runs[first][1] - 1), rng.randint(runs[last][0] + 1, runs[last][1])
            chosen[f"{number}-{part}"] = (task, start, end)
    return chosen


def judge(frames, chosen, folds=1):
    """The verdicts of the engine, which gets its frames in so many folds."""
    engine = NodeEngine(NODE, BOOT_ID)
    engine.submit([Operation(name, "op", task.tid, start, end, deadline_ns=1) for name, (task, start, end) in chosen.items()])
    size = -(-len(frames) // folds)
    for at in range(0, len(frames), size):
        engine.fold(frames[at : at + size])
    engine.finish()
    return {v["operation_id"]: v for v in engine.ready()}


def ledger_of(verdict):
    out = []
    for s in verdict["ledger"]:
        who = (s["culprit"]["tid"], s["culprit"]["start_boot_ns"]) if s["culprit"] and s["label"] == "runq" else None
        piece = (s["start_mono_ns"], s["end_mono_ns"], s["label"], who)
        if out and out[-1][1] == piece[0] and out[-1][2:] == piece[2:]:
            out[-1] = (out[-1][0], *piece[1:])
        else:
            out.append(piece)
    return out


@pytest.mark.parametrize("first", range(0, 160, 20))
def test_ledgers_equal_the_truth(first):
    """Label and occupant of every nanosecond of every operation."""
    for seed in range(first, first + 20):
        simulator = Simulator(seed)
        truth = simulator.run()
        rng = random.Random(seed)
        chosen = operations_of(truth, rng)
        verdicts = judge(Tape.of(simulator, truth).frames(rng=rng, duplicates=True), chosen, folds=3)
        for name, (task, start, end) in chosen.items():
            verdict = verdicts[name]
            assert sum(verdict["totals"].values()) == verdict["duration_ns"] == end - start
            assert ledger_of(verdict) == truth.ledger(task, start, end), f"seed {seed}, operation {name}"
            assert verdict["completeness"]["complete"], f"seed {seed}, operation {name}"


@pytest.mark.parametrize("seed", range(300, 340))
def test_the_hash_is_that_of_the_events_and_of_nothing_else(seed):
    """Order of arrival, cuts, duplicates and the number of folds leave no trace in a verdict."""
    simulator = Simulator(seed)
    truth = simulator.run()
    tape = Tape.of(simulator, truth)
    chosen = operations_of(truth, random.Random(seed))
    plain = {name: v["hash"] for name, v in judge(tape.frames(), chosen).items()}

    for variant in range(3):
        rng = random.Random(1000 * seed + variant)
        frames = tape.frames(batch=rng.choice([7, 100, 1_000_000]), rng=rng, duplicates=variant != 0)
        again = {name: v["hash"] for name, v in judge(frames, chosen, folds=1 + 4 * variant).items()}
        assert again == plain, f"variant {variant}"


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_lost_events_never_become_a_wrong_answer(first):
    """With a hole in one CPU's records every nanosecond is labelled as in truth, or `lost` or `unknown`; occupants too."""
    moved = 0
    for seed in range(first, first + 25):
        simulator = Simulator(seed)
        truth = simulator.run()
        rng = random.Random(seed)
        whole = Tape.of(simulator, truth)
        hole = whole.records[rng.randrange(len(whole.records))]
        tape = whole.without(hole[1], hole[0], hole[0] + rng.randint(500, 20_000))
        chosen = operations_of(truth, rng)
        for name, verdict in judge(tape.frames(rng=rng), chosen).items():
            task, start, end = chosen[name]
            assert sum(verdict["totals"].values()) == end - start
            moved += sum(verdict["totals"].get(label, 0) for label in ("lost", "unknown"))
            for piece in ledger_of(verdict):
                _must_agree(truth, task, piece, f"seed {seed}, operation {name}, hole on CPU {hole[1]} from {hole[0]}")
    assert moved > 0


def _must_agree(truth, task, piece, where):
    start, end, label, who = piece
    if label in ("lost", "unknown"):
        return
    for a, b, true_label, true_who in truth.ledger(task, start, end):
        assert _same(label, true_label), f"{where}: [{a}, {b}) is {true_label}, not {label}"
        assert who is None or who == true_who, f"{where}: [{a}, {b}) was {true_who}'s, not {who}'s"


def _same(label, true_label):
    """`wait.other` and `runq` without an occupant claim less than the truth, not something else."""
    vague = label == "wait.other" and true_label.startswith("wait.")
    return label == true_label or vague or (label == "runq" and true_label.startswith(("runq", "irq")))
