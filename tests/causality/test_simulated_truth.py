"""The engine's answers equal the simulator's truth, exactly, over random schedules; where evidence was removed they say so.

Frames arrive cut anywhere, shuffled, and partly twice. A failing seed is printed: `Simulator(seed)` is the whole schedule.
"""

import itertools
import random

import pytest
from simulator import BASE_NS, Simulator
from tape import BOOT_ID, NODE, Tape

from causality.log import EventLog
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
