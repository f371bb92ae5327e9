"""Faults of memory: reclaim under an own limit, swap-in, OOM kills."""

import random
import subprocess
from pathlib import Path

from benchmarks.accuracy.lab import Actor, Lab, Operation, SlowDisk, mono_ns
from benchmarks.accuracy.scenarios_cpu import decoy
from benchmarks.accuracy.truth import Judged, Play, Truth, blame, scenario

__all__ = ["died"]


def _limit(lab: Lab, limit_mb: int, parent: Path | None = None) -> Path:
    group = lab.cgroup("memory", parent)
    (group / "memory.limit_in_bytes").write_text(str(limit_mb << 20))
    return group


def _swap(lab: Lab) -> SlowDisk:
    """A swap device of the lab's own; only pages that a limit or an advice pushes out ever reach it."""
    disk = lab.slow_disk(256)
    subprocess.run(["mkswap", disk.device], check=True, timeout=10, capture_output=True)
    subprocess.run(["swapon", disk.device], check=True, timeout=10)
    lab.undo(lambda: subprocess.run(["swapoff", disk.device], check=True, timeout=120))
    return disk


def died(victim: Actor, name: str, started_ns: int, truth: Truth, tid: int | None = None) -> Judged:
    """The operation of a victim that was killed: its end is the death, as its parent sees it."""
    status = victim.process.wait(timeout=30)
    op = Operation(name, "payment", tid or victim.pid, started_ns, mono_ns(), 10_000_000_000, "failed", None)
    return Judged(op, truth, status < 0)


@scenario()
def memory_limit(lab: Lab, rng: random.Random) -> Play:
    """The victim's own memory limit forces it to reclaim; a decoy uses much memory outside."""
    group = _limit(lab, 48)
    disk = lab.slow_disk(512)
    where = lab.filesystem(disk.device)
    victim, hog = lab.actor("payments"), lab.actor("memory-hog")
    hog.main.run("map 1 300")
    (group / "cgroup.procs").write_text(str(victim.pid))
    victim.main.run(f"open 1 {where}/data rwc; map 1 30; touch 1")
    disk.set_service_us(6000)
    yield [victim.pid]
    hog.main.send("touch 1")
    writes = "".join(f"write 1 1048576 {i << 20};" for i in range(rng.randint(40, 50)))
    victim.main.run(f"op limit payment 60000000; {writes} end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    failures = int((group / "memory.failcnt").read_text())
    return [Judged(op, blame("memcg_reclaim"), op.duration_ns > 120_000_000 and failures > 10, f"failcnt {failures}")]


@scenario()
def swap_in(lab: Lab, rng: random.Random) -> Play:
    """The victim's pages were swapped out before; touching them reads them back."""
    disk = _swap(lab)
    group = _limit(lab, 200)
    victim = lab.actor("payments")
    (group / "cgroup.procs").write_text(str(victim.pid))
    decoy(lab, rng, 1)
    victim.pin(0)
    victim.main.run(f"map 1 {rng.randint(15, 25)}; touch 1; pageout 1")
    (group / "memory.force_empty").write_text("0")  # the swap cache, too
    disk.set_service_us(500)
    yield [victim.pid]
    victim.main.run("op swap payment 20000000; peek 1; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("swap_in"), op.duration_ns > 40_000_000)]


@scenario()
def oom_own_limit(lab: Lab, rng: random.Random) -> Play:
    """The victim grows over its own limit and is killed; a decoy sends it a harmless signal before."""
    group = _limit(lab, rng.randint(40, 60))
    victim, other = lab.actor("payments"), lab.actor("oom-agent")
    (group / "cgroup.procs").write_text(str(victim.pid))
    yield [victim.pid]
    other.main.run(f"kill {victim.pid} 23")  # SIGURG: ignored
    started = mono_ns()
    victim.main.send("cpu 2000; map 1 200; touch 1")
    return [died(victim, "oom-own", started, blame("killed_oom"))]


@scenario()
def oom_neighbour(lab: Lab, rng: random.Random) -> Play:
    """A neighbour exhausts the limit of the common parent; the kernel picks the victim."""
    parent = _limit(lab, 120)
    victim, neighbour = lab.actor("payments"), lab.actor("importer")
    for actor in (victim, neighbour):
        group = lab.cgroup("memory", parent)
        (group / "cgroup.procs").write_text(str(actor.pid))
    Path(f"/proc/{victim.pid}/oom_score_adj").write_text("1000")
    victim.main.run("map 1 40; touch 1")
    yield [victim.pid]
    started = mono_ns()
    victim.main.send(f"cpu {rng.randint(1000, 5000)}; sleep 5000000")
    neighbour.main.send("map 1 100; touch 1")
    return [died(victim, "oom-neighbour", started, blame("killed_oom", neighbour.pid))]


@scenario(healthy=True)
def healthy_memory_noise(lab: Lab, rng: random.Random) -> Play:
    """A neighbour in its own limited cgroup reclaims all the time; the victim is in time."""
    group = _limit(lab, 40)
    where, _ = lab.disk(256)
    victim, noisy = lab.actor("payments").pin(0), lab.actor("memory-hog").pin(1)
    (group / "cgroup.procs").write_text(str(noisy.pid))
    noisy.main.run(f"open 1 {where}/data rwc")
    yield [victim.pid]
    noisy.main.send("repeat 30; " + "".join(f"write 1 1048576 {i << 20};" for i in range(80)))
    victim.main.run(f"op healthy-memory payment 0; map 1 20; touch 1; cpu {rng.randint(20000, 40000)}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame(set()), op.run_delay_ns < op.duration_ns // 8)]
