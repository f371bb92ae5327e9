"""Faults of the CPU: hogs of all classes, quota, softirq load, and an operation's own work."""

import os
import random
import subprocess
from pathlib import Path

from benchmarks.accuracy.lab import Actor, Lab
from benchmarks.accuracy.truth import Judged, Play, blame, scenario

__all__ = ["decoy", "one_of"]

_GUILTY = ("batch-recon", "cpu-hog", "backup", "report-gen")


def one_of(rng: random.Random) -> str:
    """A name that sounds guilty."""
    return rng.choice(_GUILTY)


def decoy(lab: Lab, rng: random.Random, cpu: int) -> Actor:
    """A process that burns `cpu`, sounds guilty and is innocent."""
    return lab.hog(one_of(rng), cpu)


def ran_ns(pid: int) -> int:
    """CPU time of a single-threaded process, by the kernel."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def _victim(lab: Lab, rng: random.Random, cpu: int) -> Actor:
    return lab.actor("payments", python=rng.random() < 0.3).pin(cpu)


@scenario()
def cpu_hog(lab: Lab, rng: random.Random) -> Play:
    """A batch job pinned to the victim's CPU."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    decoy(lab, rng, 1 - cpu)
    hogs = [lab.actor("nightly").pin(cpu) for _ in range(2)]
    yield [victim.pid]
    for hog in hogs:
        hog.main.send("forever")
    victim.main.run(f"op cpu-hog payment 60000000; cpu {rng.randint(40000, 60000)}; end")
    op = victim.main.operations[-1]
    pids = [h.pid for h in hogs]
    return [Judged(op, blame("cpu_preempted", *pids), op.run_delay_ns > op.duration_ns // 2)]


@scenario()
def rt_hog(lab: Lab, rng: random.Random) -> Play:
    """A real-time task takes the victim's CPU once."""
    cpu = rng.choice((0, 1))
    victim, hog = _victim(lab, rng, cpu), lab.actor("feed-handler").pin(cpu)
    decoy(lab, rng, 1 - cpu)
    os.sched_setscheduler(hog.pid, os.SCHED_FIFO, os.sched_param(rng.randint(1, 50)))
    yield [victim.pid]
    victim.main.send("op rt-hog payment 90000000; cpu 60000; end")
    hog.main.run(f"sleep 5000; cpu {rng.randint(120000, 200000)}")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("cpu_preempted_rt", hog.pid), op.run_delay_ns > 90_000_000)]


@scenario()
def weighted_hogs(lab: Lab, rng: random.Random) -> Play:
    """Two hogs of different weight: the heavy one is the culprit, by its own CPU time."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    heavy, light = lab.hog("zz-idle", cpu, nice=-5), lab.hog("backup", cpu, nice=8)
    yield [victim.pid]
    before = ran_ns(heavy.pid), ran_ns(light.pid)
    victim.main.run("op weighted payment 60000000; cpu 40000; end")
    share = ran_ns(heavy.pid) - before[0], ran_ns(light.pid) - before[1]
    op = victim.main.operations[-1]
    return [Judged(op, blame("cpu_preempted", heavy.pid), op.run_delay_ns > op.duration_ns // 2 and share[0] > 2 * share[1])]


@scenario()
def several_occupants(lab: Lab, rng: random.Random) -> Play:
    """Four occupants of one CPU, of which one takes most."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    small = [lab.hog(one_of(rng), cpu, nice=5) for _ in range(3)]
    main = lab.hog("etl", cpu, nice=-6)
    yield [victim.pid]
    before = [ran_ns(a.pid) for a in (main, *small)]
    victim.main.run("op several payment 60000000; cpu 30000; end")
    share = [ran_ns(a.pid) - b for a, b in zip((main, *small), before, strict=True)]
    op = victim.main.operations[-1]
    return [Judged(op, blame("cpu_preempted", main.pid), op.run_delay_ns > 30_000_000 and share[0] > 2 * max(share[1:]))]


@scenario()
def cpu_quota(lab: Lab, rng: random.Random) -> Play:
    """The victim's own cgroup quota, while a decoy burns the other CPU."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    decoy(lab, rng, 1 - cpu)
    group = lab.cgroup("cpu")
    (group / "cpu.cfs_period_us").write_text("100000")
    (group / "cpu.cfs_quota_us").write_text(str(rng.choice((20000, 30000))))
    (group / "cpu.shares").write_text("30000")  # outside the session's autogroup, which outweighs the neighbours
    (group / "cgroup.procs").write_text(str(victim.pid))
    yield [victim.pid]
    before = _throttled_ns(group)
    victim.main.run("op quota payment 100000000; cpu 85000; end")
    throttled = _throttled_ns(group) - before
    op = victim.main.operations[-1]
    return [Judged(op, blame("cpu_quota", throttled_ns=throttled), throttled > op.duration_ns // 2)]


def _throttled_ns(group: Path) -> int:
    return int((group / "cpu.stat").read_text().split("throttled_time")[1].split()[0])


@scenario()
def own_cpu(lab: Lab, rng: random.Random) -> Play:
    """The operation's own computing made it late; a hog runs on the other CPU."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    decoy(lab, rng, 1 - cpu)
    yield [victim.pid]
    victim.main.run(f"op own-cpu payment 20000000; cpu {rng.randint(80000, 150000)}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("own_cpu"), op.duration_ns > 2 * op.run_delay_ns)]


@scenario()
def own_sleep(lab: Lab, rng: random.Random) -> Play:
    """The operation slept by its own timer, a noisy hog on its very CPU."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    decoy(lab, rng, cpu)
    yield [victim.pid]
    victim.main.run(f"op own-sleep payment 20000000; sleep {rng.randint(80000, 150000)}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("own_sleep"), op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def softirq_load(lab: Lab, rng: random.Random) -> Play:
    """Packets of others are received on the victim's CPU."""
    cpu = rng.choice((0, 1))
    victim = lab.actor("payments").pin(cpu)
    a, b, _, to = lab.netns_pair()
    mask = subprocess.run(
        ["ip", "netns", "exec", b, "sh", "-c", f"echo {1 << cpu:x} > /sys/class/net/eth0/queues/rx-0/rps_cpus"],
        check=False,
        timeout=10,
    )
    rules = ["-A", "INPUT", "-p", "udp", "-m", "string", "--algo", "bm", "--string", "never-there", "-j", "DROP"]
    for _ in range(rng.randint(24, 30)):
        subprocess.run(["ip", "netns", "exec", b, "iptables", *rules], check=True, timeout=10)
    drop = ["-A", "INPUT", "-p", "udp", "-j", "DROP"]
    subprocess.run(["ip", "netns", "exec", b, "iptables", *drop], check=True, timeout=10)
    floods = [lab.actor("telemetry", netns=a).pin(1 - cpu) for _ in range(1)]
    for flood in floods:
        flood.main.run(f"udp 1 9 {to}")
    yield [victim.pid]
    for flood in floods:
        flood.main.send("repeat -1; send 1 1400")
    softirq = _softirq_ticks(cpu)
    victim.main.run("op softirq payment 60000000; cpu 60000; end")
    softirq = _softirq_ticks(cpu) - softirq
    op = victim.main.operations[-1]
    stolen = op.duration_ns - 62_000_000
    return [
        Judged(
            op,
            blame("irq_storm", 0, _pid_of(f"ksoftirqd/{cpu}"), *(f.pid for f in floods)),
            mask.returncode == 0 and stolen > 75_000_000,
            f"softirq ticks {softirq}",
        )
    ]


def _pid_of(comm: str) -> int:
    for path in Path("/proc").glob("[0-9]*/comm"):
        if path.read_text().strip() == comm:
            return int(path.parent.name)
    return 0


def _softirq_ticks(cpu: int) -> int:
    line = next(x for x in Path("/proc/stat").read_text().splitlines() if x.startswith(f"cpu{cpu} "))
    return int(line.split()[7])


@scenario(healthy=True)
def healthy_busy(lab: Lab, rng: random.Random) -> Play:
    """A busy machine, an operation in time."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    decoy(lab, rng, 1 - cpu)
    lab.hog("batch-recon", cpu, nice=10)
    yield [victim.pid]
    victim.main.run("op healthy-busy payment 400000000; cpu 10000; sleep 10000; end")
    return [Judged(victim.main.operations[-1], blame(set()), victim.main.operations[-1].in_time)]


@scenario(healthy=True)
def healthy_other_cpu(lab: Lab, rng: random.Random) -> Play:
    """A hog on the other CPU; the operation has no deadline and does its own work."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    decoy(lab, rng, 1 - cpu)
    yield [victim.pid]
    victim.main.run(f"op healthy-other payment 0; cpu {rng.randint(30000, 60000)}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame(set()), op.run_delay_ns < op.duration_ns // 8)]


@scenario(healthy=True)
def healthy_decoy_sleep(lab: Lab, rng: random.Random) -> Play:
    """A burst of a guilty-sounding neighbour on the victim's CPU while the victim sleeps on purpose; no deadline."""
    cpu = rng.choice((0, 1))
    victim, noisy = _victim(lab, rng, cpu), lab.actor("cpu-hog").pin(cpu)
    yield [victim.pid]
    victim.main.send("op healthy-decoy payment 0; cpu 5000; sleep 120000; cpu 5000; end")
    noisy.main.run("sleep 20000; cpu 60000")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame(set()), op.run_delay_ns < op.duration_ns // 8)]


@scenario(healthy=True)
def healthy_many_short(lab: Lab, rng: random.Random) -> Play:
    """Twenty short operations in time among two hogs."""
    cpu = rng.choice((0, 1))
    victim = _victim(lab, rng, cpu)
    decoy(lab, rng, cpu)
    decoy(lab, rng, 1 - cpu)
    yield [victim.pid]
    for i in range(20):
        victim.main.run(f"op healthy-short-{i} payment 150000000; cpu 1500; end")
    return [Judged(op, blame(set()), op.in_time) for op in victim.main.operations]
