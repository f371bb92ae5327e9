"""A verdict against the simulator's truth: its ledger to the nanosecond, its hash however the events arrive, and what loss may
do to it."""

import itertools
import random

import pytest
from simulator import BASE_NS, Simulator
from tape import BOOT_ID, NODE, Tape

from causality.engine import EngineConfig, NodeEngine
from causality.operations import Operation
from causality.verdict import verdict_hash

BATCH = 40
SCHEDULES = 400


def judge(frames, operations, config=None):
    engine = NodeEngine(NODE, BOOT_ID, config)
    engine.submit(operations)
    verdicts = []
    for frame in frames:
        engine.fold([frame])
        verdicts += engine.ready()
    engine.finish()
    return {v["operation_id"]: v for v in verdicts + engine.ready()}


def operations_of(simulator, truth, rng):
    """One operation a task, within its life."""
    out = []
    for number, task in enumerate(truth.tasks):
        states = truth.states(task)
        born = max(states[0][0], BASE_NS) if states else truth.end_ns
        ended = states[-1][1] if states else truth.end_ns
        if states and states[0][2] == "blocked" and states[0][0] <= BASE_NS:
            born = states[0][1]
        if ended - born < 2:
            continue
        start = rng.randrange(born, ended - 1)
        end = rng.randrange(start + 1, min(ended, truth.end_ns))
        out.append((task, Operation(f"op-{number}", "simulated", task.key[0], start, end, 1)))
    return out


def coarse(label):
    return "wait" if label.startswith("wait") else "run" if label.startswith("run.") else label


def said(verdict):
    """The ledger as (start, end, label, occupant), neighbours merged."""
    out = []
    for piece in verdict["ledger"]:
        label = coarse(piece["label"])
        who = piece["culprit"]
        who = (who["tid"], who["start_boot_ns"]) if label == "runq" and who else None
        if out and out[-1][2:] == (label, who):
            out[-1] = (out[-1][0], piece["end_mono_ns"], label, who)
        else:
            out.append((piece["start_mono_ns"], piece["end_mono_ns"], label, who))
    return out


def true(truth, task, start, end):
    out = []
    for a, b, label, who in truth.ledger(task, start, end):
        label = coarse(label)
        if out and out[-1][2:] == (label, who):
            out[-1] = (out[-1][0], b, label, who)
        else:
            out.append((a, b, label, who))
    return out


def at(ledger, time_ns):
    return next((p[2:] for p in ledger if p[0] <= time_ns < p[1]), None)


@pytest.mark.parametrize("first", range(0, SCHEDULES, BATCH))
def test_the_ledger_of_every_task_equals_the_truth(first):
    for seed in range(first, first + BATCH):
        simulator = Simulator(seed)
        truth = simulator.run()
        chosen = operations_of(simulator, truth, random.Random(seed))
        verdicts = judge(Tape.of(simulator, truth).frames(), [o for _, o in chosen])
        for task, operation in chosen:
            verdict = verdicts[operation.operation_id]
            start, end = operation.start_mono_ns, operation.end_mono_ns
            assert said(verdict) == true(truth, task, start, end), f"seed {seed}, {operation}"
            assert verdict["completeness"]["lost_events"] == 0
            assert sum(verdict["totals"].values()) == end - start
            assert verdict_hash(verdict) == verdict["hash"]


def test_the_hash_does_not_depend_on_how_the_events_arrive():
    """P5: cuts, order, duplicates and retention change nothing."""
    for seed in range(1000, 1040):
        simulator = Simulator(seed)
        truth = simulator.run()
        tape = Tape.of(simulator, truth)
        operations = [o for _, o in operations_of(simulator, truth, random.Random(seed))]
        hashes = [
            {k: v["hash"] for k, v in judge(frames, operations, config).items()}
            for frames, config in (
                (tape.frames(), None),
                (tape.frames(rng=random.Random(seed)), None),
                (tape.frames(rng=random.Random(seed + 1), duplicates=True), None),
                (tape.frames(batch=7), EngineConfig(retention_ns=0)),
            )
        ]
        assert all(h == hashes[0] for h in hashes), f"seed {seed}"
        assert set(hashes[0]) == {o.operation_id for o in operations}


def test_loss_moves_time_into_lost_and_unknown_only():
    """A gap can hide a cause, but never invent one."""
    for seed in range(2000, 2120):
        rng = random.Random(seed)
        simulator = Simulator(seed)
        truth = simulator.run()
        chosen = operations_of(simulator, truth, rng)
        tape = Tape.of(simulator, truth)
        length = truth.end_ns - BASE_NS
        start = BASE_NS + rng.randrange(length)
        holed = tape.without(rng.randrange(tape.cpus), start, start + rng.randrange(1, length // 4 + 2))
        verdicts = judge(holed.frames(), [o for _, o in chosen])
        for task, operation in chosen:
            verdict = verdicts[operation.operation_id]
            heard = said(verdict)
            expected = true(truth, task, operation.start_mono_ns, operation.end_mono_ns)
            cuts = sorted({t for p in (*heard, *expected) for t in p[:2]})
            for a, _ in itertools.pairwise(cuts):
                label, who = at(heard, a)
                if label in ("lost", "unknown") or (label, who) == ("runq", None):
                    continue
                assert (label, who) == at(expected, a), f"seed {seed}, {operation}, at {a}"
            lost = verdict["completeness"]
            assert lost["complete"] is False or lost["lost_ns"] == 0


def test_what_a_kernel_hides_costs_no_more_than_what_hung_on_it():
    """The windows of hidden switches never invent a cause, and leave alone what the thread's own events prove."""
    lost = kept = 0
    for seed in range(4000, 4080):
        rng = random.Random(seed)
        simulator = Simulator(seed)
        truth = simulator.run()
        hidden = rng.choice(truth.tasks)
        chosen = [(t, o) for t, o in operations_of(simulator, truth, rng) if t.tid != hidden.tid]
        tape = Tape.of(simulator, truth).hiding(hidden.tid)
        verdicts = judge(tape.frames(), [o for _, o in chosen])
        again = judge(tape.frames(batch=7), [o for _, o in chosen])
        assert {k: v["hash"] for k, v in verdicts.items()} == {k: v["hash"] for k, v in again.items()}, f"seed {seed}"
        for task, operation in chosen:
            verdict = verdicts[operation.operation_id]
            heard = said(verdict)
            expected = true(truth, task, operation.start_mono_ns, operation.end_mono_ns)
            if expected[-1][2] != "run":
                continue  # a program says that its operation ends: it runs then
            cuts = sorted({t for p in (*heard, *expected) for t in p[:2]})
            for a, b in itertools.pairwise(cuts):
                label, who = at(heard, a)
                if label in ("lost", "unknown") or (label, who) == ("runq", None):
                    lost += b - a
                    continue
                if (label, who) == ("runq", hidden.key) and at(expected, a)[0].startswith("irq."):
                    continue  # interrupts of a hidden task are as hidden as it is: they pass for its own time
                assert (label, who) == at(expected, a), f"seed {seed}, {operation}, hidden {hidden.tid}, at {a}"
                kept += b - a
            told = verdict["completeness"]
            assert told["lost_events"] == 0 or told["lost_ns"] + told["unknown_ns"] > 0
    assert 0 < lost < 0.1 * kept


def test_a_restored_engine_goes_on_where_it_was():
    for seed in range(3000, 3020):
        simulator = Simulator(seed)
        truth = simulator.run()
        operations = [o for _, o in operations_of(simulator, truth, random.Random(seed))]
        frames = Tape.of(simulator, truth).frames(batch=50)
        expected = judge(frames, operations)
        engine = NodeEngine(NODE, BOOT_ID)
        engine.submit(operations)
        found = []
        for frame in frames:
            engine = NodeEngine.restore(engine.snapshot())
            engine.fold([frame])
            found += engine.ready()
        engine.finish()
        found += engine.ready()
        assert {v["operation_id"]: v["hash"] for v in found} == {k: v["hash"] for k, v in expected.items()}, f"seed {seed}"
