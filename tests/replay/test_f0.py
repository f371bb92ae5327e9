"""A capture folded again gives the same verdicts, bit for bit, in any order and with any number of engines.

Schedules are simulated (`Simulator(seed)` is the whole schedule); one test records the real kernel.
"""

import json
import os
import random
import subprocess
import sys

import pytest

from causality.operations import Operation
from events.errors import InputError
from probe.capture import CaptureReader, CaptureWriter
from replay import f0
from replay.rules import parse_rule

KPROBE = [sys.executable, "-m", "cli.main"]


@pytest.fixture(scope="module")
def simulated():
    """`simulated(seed)`: frames and operations of a schedule of the engine's own tests."""
    folder = os.path.join(os.path.dirname(__file__), "..", "causality")
    sys.path.insert(0, folder)
    from simulator import Simulator
    from tape import Tape
    from test_simulated_truth import operations_of

    sys.path.remove(folder)

    def make(seed):
        simulator = Simulator(seed)
        truth = simulator.run()
        chosen = operations_of(truth, random.Random(seed))
        operations = [Operation(name, "op", t.tid, start, end, deadline_ns=5000) for name, (t, start, end) in chosen.items()]
        return Tape.of(simulator, truth).frames(batch=40), operations

    return make


@pytest.fixture
def incident(simulated, tmp_path):
    """A capture file with several operations, and the operations file beside it."""
    frames, operations = simulated(3)
    with CaptureWriter(tmp_path / "incident.kcap") as writer:
        for frame in frames:
            writer.write(frame)
    lines = [f"{o.operation_id},op,{o.tid},{o.start_mono_ns},{o.end_mono_ns},{o.deadline_ns}," for o in operations]
    head = "operation_id,type,tid,start_mono_ns,end_mono_ns,deadline_ns,outcome"
    (tmp_path / "operations.csv").write_text("\n".join([head, *lines]) + "\n")
    return tmp_path


def kprobe(request, *args):
    words = [*KPROBE, *map(str, args)]
    return subprocess.run(words, cwd=request.config.rootpath, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_and_any_number_of_engines_give_the_same_verdicts(simulated, seed):
    frames, operations = simulated(seed)
    if not operations:
        pytest.skip("a schedule without operations")
    plain, divergence = f0.replay(frames, operations, workers=1, seed=seed)

    assert divergence is None
    assert len(plain.verdicts) == len(operations)
    for workers in (2, 3, 7):
        again, divergence = f0.replay(frames, operations, workers=workers, seed=seed * 100 + workers)
        assert divergence is None
        assert again.hashes == plain.hashes


def test_a_verdict_that_changed_is_a_divergence_with_both_hashes(simulated):
    frames, operations = simulated(3)
    plain, _ = f0.replay(frames, operations)
    name = min(plain.hashes)

    _, divergence = f0.replay(frames, operations, expected=plain.hashes | {name: "sha256:0"})

    assert divergence["class"] == "verdict" and divergence["operation"] == name
    assert (divergence["expected"], divergence["actual"]) == ("sha256:0", plain.hashes[name])


def test_run_on_a_capture_gives_the_verdicts_of_analyze(incident, request):
    analyzed = kprobe(request, "analyze", incident / "incident.kcap", "--operations", incident / "operations.csv", "--json")
    operations = ("--operations", incident / "operations.csv")
    told = kprobe(request, "replay", "run", incident / "incident.kcap", *operations, "--json", "--workers", 3)
    document = json.loads(told.stdout)

    assert document["schema"] == "kprobe.replay/1"
    assert (document["fidelity"], document["identical"], document["divergence"]) == ("F0", True, None)
    by_id = {v["operation_id"]: v["hash"] for v in json.loads(analyzed.stdout)}
    assert {v["operation_id"]: v["hash"] for v in document["verdicts"]} == by_id and by_id


def test_a_kept_incident_needs_no_file_and_says_when_a_verdict_is_another(incident, request):
    kept = incident / "kept.kcap"
    operations = ("--operations", incident / "operations.csv")
    first = kprobe(request, "replay", "run", incident / "incident.kcap", *operations, "--keep", kept, "--json")
    again = kprobe(request, "replay", "run", kept, "--json")

    assert json.loads(again.stdout)["hash"] == json.loads(first.stdout)["hash"]
    assert json.loads(again.stdout)["identical"]
    # A capture with an event less is another incident: the kept hashes say so.
    with CaptureReader(kept) as reader:
        frames = list(reader.frames())
    at = next(i for i, f in enumerate(frames) if f.kind == "events/1" and f.batch.num_rows > 20)
    with CaptureWriter(incident / "other.kcap") as writer:
        for i, frame in enumerate(frames):
            if i != at:
                writer.write(frame)
    other = kprobe(request, "replay", "run", incident / "other.kcap", "--json")
    document = json.loads(other.stdout)
    assert other.returncode == 3
    assert not document["identical"] and document["divergence"]["where"] == "kept with the capture"


def test_operations_may_lie_beside_the_capture(incident, request):
    (incident / "operations.csv").rename(incident / "incident.operations.csv")

    told = kprobe(request, "replay", "run", incident / "incident.kcap", "--json")

    assert json.loads(told.stdout)["identical"]


def test_nothing_to_judge_is_an_error_with_the_remedy(incident, request):
    told = kprobe(request, "replay", "run", incident / "incident.kcap")

    assert told.returncode == 2 and "--operations FILE.csv" in told.stderr


def test_a_rule_that_names_nobody_takes_nothing_away(simulated):
    frames, operations = simulated(3)
    folded, _ = f0.replay(frames, operations)

    for answer in f0.what_if_all(folded, operations, [parse_rule("task=nobody -> remove")]):
        assert answer["removed_ns"] == 0
        assert answer["duration_ns"][0] <= answer["recorded_ns"]


def test_one_more_cpu_takes_away_all_time_behind_others(simulated):
    frames, operations = simulated(3)
    folded, _ = f0.replay(frames, operations)

    answers = f0.what_if_all(folded, operations, [parse_rule("call=cpu -> remove")])

    verdicts = {v["operation_id"]: v for v in folded.verdicts}
    assert any(a["removed_ns"] for a in answers)
    for answer in answers:
        assert answer["removed_ns"] >= verdicts[answer["operation_id"]]["totals"].get("runq", 0)
        assert answer["duration_ns"][1] - answer["duration_ns"][0] >= 0


def test_a_rule_that_adds_something_is_refused_on_an_event_stream(simulated):
    frames, operations = simulated(3)
    folded, _ = f0.replay(frames, operations)

    with pytest.raises(InputError, match="task=batch-recon -> remove"):
        f0.what_if_all(folded, operations, [parse_rule("call=fsync -> delay=5ms")])


VICTIM = """
import os, subprocess, sys, time
os.sched_setaffinity(0, {0})
text = '''import os, ctypes
ctypes.CDLL(None).prctl(15, b"the-hog", 0, 0, 0)
os.sched_setaffinity(0, {0})
print("go", flush=True)
while True: pass'''
hog = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
hog.stdout.readline()
start = time.monotonic_ns()
while time.process_time() < 0.2: pass
print(os.getpid(), start, time.monotonic_ns())
hog.kill()
"""


@pytest.mark.kernel
def test_a_real_operation_without_its_culprit_is_as_long_as_its_own_work(tmp_path, request):
    """Two busy loops on one CPU: without the other, the operation takes what it computes itself."""
    capture = tmp_path / "run.kcap"
    told = kprobe(request, "record", "-o", capture, "-q", "--", sys.executable, "-c", VICTIM)
    tid, start, end = map(int, told.stdout.split())
    (tmp_path / "run.operations.csv").write_text(
        "operation_id,type,tid,start_mono_ns,end_mono_ns,deadline_ns,outcome\n"
        f"spin,spin,{tid},{start},{end},{(end - start) * 9 // 10},\n"
    )

    told = kprobe(request, "replay", "run", capture, "--json", "--rule", "task=the-hog -> remove")
    document = json.loads(told.stdout)

    assert document["identical"] and document["fidelity"] == "F0"
    (answer,) = document["what_if"]
    totals = document["verdicts"][0]["totals"]
    own = sum(ns for label, ns in totals.items() if label.startswith("run."))
    assert answer["removed_ns"] > (end - start) // 10
    assert answer["duration_ns"][0] <= answer["duration_ns"][1] <= (end - start) * 21 // 20
    assert answer["duration_ns"][0] <= own + totals.get("irq.hard", 0) + totals.get("irq.soft", 0) + totals.get("runq.idle", 0)
