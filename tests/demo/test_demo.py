"""The demonstration, whole: real kernel events through real servers to the sentence.

The truth comes from the service's own log and from the batch job's pid.
"""

import csv
import os
import signal
import time

import pytest

from demo.run import SETTLEMENT, Demo, DemoError

pytestmark = [pytest.mark.kernel, pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(240)]


def logged(folder, settlement=SETTLEMENT):
    with (folder / "operations.csv").open(newline="") as lines:
        return next(row for row in csv.DictReader(lines) if row["operation_id"] == str(settlement))


def test_the_demo_names_the_batch_job_by_pid_with_a_ledger_that_sums_exactly(stack, tmp_path):
    demo = Demo(settings=stack.settings, folder=tmp_path / "run", say=print)

    outcome = demo.run()

    row = logged(outcome.folder)
    duration_ns = int(row["end_mono_ns"]) - int(row["start_mono_ns"])
    verdict = outcome.live
    assert verdict["duration_ns"] == duration_ns == sum(verdict["totals"].values())
    assert verdict["status"] == "late"
    first = verdict["causes"][0]
    assert (first["kind"], first["culprit"]["comm"]) == ("cpu_preempted", "batch-recon")
    assert first["culprit"]["tgid"] == outcome.batch_pid
    assert f"batch-recon (pid {outcome.batch_pid})" in verdict["sentence"]
    assert verdict["hash"] == outcome.offline["hash"]
    assert verdict == outcome.offline


def test_without_the_batch_job_the_same_demo_blames_nobody(stack, tmp_path):
    outcome = Demo(settings=stack.settings, folder=tmp_path / "run", say=print, healthy=True).run()

    assert outcome.batch_pid is None
    assert (outcome.live["status"], outcome.live["causes"]) == ("ok", [])
    assert outcome.live["hash"] == outcome.offline["hash"]


@pytest.mark.parametrize("victim", ["flow", "probe", "settlement service", "clearing house"])
def test_a_process_killed_during_the_demo_is_named_and_nothing_is_left_running(stack, tmp_path, victim):
    class Sabotaged(Demo):
        def _drive(self, port):
            child = next(c for c in self._children if c.name == victim)
            os.kill(child.process.pid, signal.SIGKILL)
            child.process.wait(timeout=10)
            return super()._drive(port)

    demo = Sabotaged(settings=stack.settings, folder=tmp_path / "run", say=print)

    with pytest.raises(DemoError, match=rf"the {victim} \(pid \d+\) was killed by SIGKILL"):
        demo.run()

    assert demo._children == []
    deadline_s = time.monotonic() + 5
    while (left := _processes_of(tmp_path)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert left == []


def _processes_of(folder):
    """Processes whose command line names the run's folder."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if os.fsencode(str(folder)) in file.read() and int(name) != os.getpid():
                    found.append(int(name))
        except OSError:
            continue
    return found
