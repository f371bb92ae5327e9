"""Records one run of a scenario with `kprobe record` and judges it with `kprobe analyze`, both as subprocesses."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.accuracy.lab import Lab, Operation, wait_until
from benchmarks.accuracy.truth import Judged, Scenario

__all__ = ["Run", "play"]

_KPROBE = (sys.executable, "-m", "cli.main")
_HEADER = "operation_id,type,tid,start_mono_ns,end_mono_ns,deadline_ns,outcome"


@dataclass(slots=True)
class Run:
    """One run: what happened, what kprobe said (verdicts by operation id), and what the rest of the machine did."""

    scenario: str
    seed: int
    judged: list[Judged]
    verdicts: dict[str, dict[str, Any]]
    analyze_s: float
    capture: Path
    busiest: list[tuple[int, int]]  # (pid, CPU ticks while the fault ran), most first
    error: str = ""


def play(lab: Lab, scenario: Scenario, seed: int, keep: Path | None = None) -> Run:
    """One run from setting the stage to the verdicts; the stage is cleared before the judging."""
    folder = keep if keep is not None else lab.path
    capture = folder / f"{scenario.name}-{seed}.kcap"
    run = Run(scenario.name, seed, [], {}, 0.0, capture, [])
    rng = random.Random(f"{scenario.name}/{seed}")
    with lab.scope():
        acting = scenario.play(lab, rng)
        watch = next(acting)
        with _recording(capture, watch):
            before = _ticks()
            try:
                acting.send(None)
            except StopIteration as end:
                run.judged = end.value
            after = _ticks()
    run.busiest = sorted(((p, t - before.get(p, 0)) for p, t in after.items()), key=lambda x: -x[1])[:8]
    _analyze(run)
    return run


@contextlib.contextmanager
def _recording(capture: Path, watch: list[int]) -> Iterator[None]:
    command = [*_KPROBE, "record", "-q", "-o", str(capture)]
    for pid in watch:
        command += ["--watch", f"pid:{pid}"]
    capture.unlink(missing_ok=True)
    recorder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0)
    try:
        wait_until(
            lambda: any(capture.parent.glob(capture.name + "*")) or recorder.poll() is not None, "kprobe record to start"
        )
        if recorder.poll() is not None:
            assert recorder.stderr is not None
            raise RuntimeError(f"kprobe record ended with {recorder.returncode}: {recorder.stderr.read().decode()[-600:]}")
        time.sleep(0.05)
        yield
        time.sleep(0.05)
    finally:
        if recorder.poll() is None:
            recorder.send_signal(signal.SIGINT)
        try:
            _, err = recorder.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            recorder.kill()
            _, err = recorder.communicate()
    if recorder.returncode not in {0, 3}:
        raise RuntimeError(f"kprobe record ended with {recorder.returncode}: {err.decode()[-600:]}")


def _row(op: Operation) -> str:
    deadline = str(op.deadline_ns) if op.deadline_ns else ""
    return f"{op.operation_id},{op.type},{op.tid},{op.start_mono_ns},{op.end_mono_ns},{deadline},{op.outcome}"


def _analyze(run: Run) -> None:
    operations = run.capture.with_suffix(".csv")
    operations.write_text("\n".join([_HEADER, *(_row(j.operation) for j in run.judged)]) + "\n")
    command = [*_KPROBE, "analyze", str(run.capture), "--operations", str(operations), "--json"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    run.analyze_s = time.monotonic() - began
    if done.returncode not in {0, 3}:
        run.error = f"kprobe analyze ended with {done.returncode}: {done.stderr.decode()[-600:]}"
        return
    document = orjson.loads(done.stdout)
    verdicts = document["verdicts"] if isinstance(document, dict) and "verdicts" in document else document
    verdicts = [verdicts] if isinstance(verdicts, dict) else verdicts
    run.verdicts = {v["operation_id"]: v for v in verdicts}


def _ticks() -> dict[int, int]:
    out = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            out[int(entry)] = int(fields[11]) + int(fields[12])
    return out
