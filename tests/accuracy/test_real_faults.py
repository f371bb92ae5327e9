"""A few real faults end to end: injected, recorded with `kprobe record`, judged with `kprobe analyze`.

The faults are strong, so that kind and culprit are facts of the machine and no matter of timing; a run whose fault did not
reach its victim (by the victim's own clock) is played again with the next seed.
"""

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", ["rt_hog", "cpu_quota", "lock_holder_asleep", "priority_inversion", "sigkill", "oom_own_limit"]
)
def test_an_injected_fault_is_named_with_its_culprit(name, tmp_path):
    """Kind and culprit of the first cause are those of the injection, and every ledger sums exactly."""
    score = play(name, tmp_path)
    assert score["both_ok"] == score["blamed"] == 1, score["misses"]
    assert score["sum_violations"] == 0


@pytest.mark.parametrize("name", ["healthy_busy", "healthy_lock"])
def test_nobody_is_blamed_for_an_operation_in_time_on_a_busy_machine(name, tmp_path):
    """A hog next to a punctual operation is no culprit."""
    score = play(name, tmp_path)
    assert score["healthy"] >= 1
    assert score["false_blame"] == 0, score["misses"]


def play(name, tmp_path):
    """The score of one valid run of a scenario."""
    for seed in range(11, 14):
        out = tmp_path / f"{seed}.json"
        command = [sys.executable, "-m", "benchmarks.accuracy", "--scenario", name, "--seeds", "1", "--seed", str(seed)]
        done = subprocess.run(
            [*command, "--json", str(out)], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode in {0, 1}, done.stdout + done.stderr
        score = orjson.loads(out.read_bytes())["total"]
        assert score["errors"] == [], done.stdout
        if score["void"] == 0:
            return score
    raise AssertionError(f"{name}: the fault reached its victim in none of three runs: {done.stdout}")
