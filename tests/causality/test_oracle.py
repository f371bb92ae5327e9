"""The brute-force oracle, which reads only records, finds what the simulator, which writes them, knows to be true."""

import itertools
import random

import pytest
from oracle import Oracle, decode
from simulator import BASE_NS, Simulator
from tape import Tape

from events.frames import Frame

SCHEDULES = 1200


def coarse(ledger):
    """A ledger with the labels that a replay of scheduler events alone can give."""
    out = []
    for start, end, label, who in ledger:
        label = label.split(".")[0] if label.startswith(("wait", "run.")) else label
        if out and out[-1][2:] == (label, who) and out[-1][1] == start:
            out[-1] = (out[-1][0], end, label, who)
        else:
            out.append((start, end, label, who))
    return out


@pytest.mark.parametrize("first", range(0, SCHEDULES, 100))
def test_the_oracle_agrees_with_the_simulator(first):
    for seed in range(first, first + 100):
        simulator = Simulator(seed)
        truth = simulator.run()
        oracle = Oracle(decode(Tape.of(simulator, truth).records), truth.end_ns)
        assert oracle.incoherent == 0, f"seed {seed}"
        for task in truth.tasks:
            # A task's first sleep began before the recording: nothing proves it.
            states = [s[:4] for s in truth.states(task) if s[0] > BASE_NS or s[2] != "blocked"]
            assert [s for s in oracle.states(task.key) if s[1] > s[0]] == states, f"seed {seed}, tid {task.tid}"
            if states:
                window = states[0][0], states[-1][1]
                expected = coarse(truth.ledger(task, *window))
                assert oracle.ledger(task.key, *window) == expected, f"seed {seed}, tid {task.tid}"


def test_the_simulator_does_everything_that_it_is_for():
    """Across seeds every mechanism occurs; a simulator that stopped doing one would make the other tests weaker unseen."""
    seen = set()
    for seed in range(120):
        simulator = Simulator(seed)
        truth = simulator.run()
        records = decode(Tape.of(simulator, truth).records)
        seen |= {r["event"] for r in records}
        by_cpu_ns = [(r["cpu"], r["time_mono_ns"]) for r in records]
        if len(set(by_cpu_ns)) < len(by_cpu_ns):
            seen.add("two events of one nanosecond on a CPU")
        if any(len({c for c, t in by_cpu_ns if t == ns}) > 1 for ns in {t for _, t in by_cpu_ns}):
            seen.add("two events of one nanosecond on two CPUs")
        if len({t.tid for t in truth.tasks}) < len(truth.tasks):
            seen.add("reused tid")
        for cpu in truth.cpus:
            if any(a == "irq.soft" and b == "irq.hard" for a, b in itertools.pairwise(cpu.irq.values)):
                seen.add("hard interrupt within a soft one")
        for task in truth.tasks:
            states = truth.states(task)
            seen |= {x[2] for x in truth.ledger(task, states[0][0], states[-1][1])} if states else set()
        late = [r for r in records if r["event"] == "sched_waking"]
        running = {(t.tid, t.start_boot_ns): t for t in truth.tasks}
        if any(running[r["tid"], r["start_boot_ns"]].state.at(r["time_mono_ns"]) == "running" for r in late):
            seen.add("wake-up of a running task")
        if any(len(s) > 2 and s["prev_throttled"] for s in records if s["event"] == "sched_switch"):
            seen.add("throttled")

    assert seen >= {
        "two events of one nanosecond on a CPU", "two events of one nanosecond on two CPUs", "reused tid", "throttled",
        "hard interrupt within a soft one", "wake-up of a running task", "sched_migrate_task", "sched_process_fork",
        "irq.hard", "irq.soft", "run.user", "run.kernel", "runq", "runq.idle", "runq.quota", "wait.timer", "wait.futex",
        "wait.pipe", "wait.disk.queue", "wait.disk.device", "wait.child",
    }  # fmt: skip


def test_a_tape_survives_being_cut_shuffled_and_sent_twice():
    simulator = Simulator(23)
    truth = simulator.run()
    tape = Tape.of(simulator, truth)

    frames = tape.frames(rng=random.Random(5), duplicates=True)

    back = {}
    for frame in frames:
        frame = Frame.decode(frame.encode())
        if frame.kind == "events/1":
            for row in frame.batch.to_pylist():
                back[row["cpu"], row["seq"]] = row["time_mono_ns"]
    assert back == {(r[1], r[2]): r[0] for r in tape.records}


def test_removed_evidence_leaves_a_loss_row_for_every_missing_number():
    simulator = Simulator(29)
    truth = simulator.run()
    whole = Tape.of(simulator, truth)
    time_ns, cpu = whole.records[len(whole.records) // 2][:2]

    tape = whole.without(cpu, time_ns, time_ns + 3000)

    gone = {(r[1], r[2]) for r in whole.records} - {(r[1], r[2]) for r in tape.records}
    told = {(row["cpu"], seq) for row in tape.losses for seq in range(row["first_seq"], row["last_seq"] + 1)}
    assert gone
    assert told == gone
