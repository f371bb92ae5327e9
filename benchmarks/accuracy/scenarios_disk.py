"""Faults of storage: busy, slow and throttled devices, the journal, dirty throttling, I/O errors."""

import os
import random
from pathlib import Path

from benchmarks.accuracy.lab import Lab
from benchmarks.accuracy.scenarios_cpu import decoy
from benchmarks.accuracy.truth import Judged, Play, blame, scenario

__all__: list[str] = []


def _number(device: str) -> str:
    st = os.stat(device)
    return f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"


@scenario()
def disk_contention(lab: Lab, rng: random.Random) -> Play:
    """Another process keeps the victim's device busy; a decoy writes elsewhere and sounds guilty."""
    disk = lab.slow_disk(256)
    victim = lab.actor("payments")
    storm = [lab.actor("archiver", 3)]
    noise = lab.actor("disk-hog")
    noise.main.run(f"open 1 {lab.path / lab.unique('noise')} rwc")
    victim.main.run(f"open 1 {disk.device} rd")
    for actor in storm:
        for thread in actor.threads:
            thread.run(f"open {10 + thread.tid % 40} {disk.device} rd")
    disk.set_service_us(rng.randint(3000, 5000))
    yield [victim.pid]
    noise.main.send("repeat -1; write 1 65536 0; fsync 1")
    for actor in storm:
        for i, thread in enumerate(actor.threads):
            thread.send(f"repeat -1; read {10 + thread.tid % 40} 262144 {(i + 1) << 25}")
    victim.main.run("sleep 20000")
    victim.main.run(f"op contention payment 30000000; {' '.join(f'read 1 4096 {i << 20};' for i in range(10))} end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("disk_contention", *(a.pid for a in storm)), op.duration_ns > 90_000_000)]


@scenario()
def fsync_storm(lab: Lab, rng: random.Random) -> Play:
    """Others write and fsync on the same file system as the victim."""
    disk = lab.slow_disk(256)
    where = lab.filesystem(disk.device)
    victim, storm = lab.actor("payments"), lab.actor("audit-log", 4)
    decoy(lab, rng, 1)
    victim.main.run(f"open 1 {where}/ledger rwc; write 1 65536 0; fsync 1")
    for i, thread in enumerate(storm.threads):
        thread.run(f"open {10 + i} {where}/storm{i} rwc")
    disk.set_service_us(rng.randint(3000, 5000))
    yield [victim.pid]
    for i, thread in enumerate(storm.threads):
        thread.send(f"repeat 60; write {10 + i} 524288; fsync {10 + i}")
    victim.main.run("sleep 60000")
    victim.main.run("op fsync-storm payment 40000000; write 1 4096 65536; fsync 1; write 1 4096 69632; fsync 1; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame({"disk_contention", "journal_commit"}, storm.pid), op.duration_ns > 60_000_000)]


@scenario()
def disk_slow(lab: Lab, rng: random.Random) -> Play:
    """The device itself is slow and nobody else uses it; a decoy storms another device."""
    disk = lab.slow_disk(64)
    victim, noise = lab.actor("payments"), lab.actor("disk-hog")
    noise.main.run(f"open 1 {lab.path / lab.unique('noise')} rwc")
    victim.main.run(f"open 1 {disk.device} rwd")
    yield [victim.pid]
    noise.main.send("repeat -1; write 1 262144 0; fsync 1")
    disk.set_service_us(rng.randint(40000, 80000))
    verb = rng.choice(("read", "write"))
    victim.main.run(f"op slow payment 30000000; {verb} 1 4096 4096; {verb} 1 4096 81920; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("disk_slow"), op.duration_ns > 70_000_000)]


@scenario()
def disk_slow_fsync(lab: Lab, rng: random.Random) -> Play:
    """The device is slow under an fsync through the journal, with nobody else in it."""
    disk = lab.slow_disk(64)
    where = lab.filesystem(disk.device)
    victim = lab.actor("payments")
    decoy(lab, rng, 1)
    victim.main.run(f"open 1 {where}/ledger rwc; write 1 65536 0; fsync 1")
    yield [victim.pid]
    disk.set_service_us(rng.randint(25000, 40000))
    victim.main.run("op slow-fsync payment 30000000; write 1 4096 0; fsync 1; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("disk_slow"), op.duration_ns > 60_000_000)]


@scenario()
def disk_throttle(lab: Lab, rng: random.Random) -> Play:
    """The victim's own cgroup limits its writes."""
    device = lab.loop(lab.path / (lab.unique("disk") + ".img"), 64)
    victim, noise = lab.actor("payments"), lab.actor("disk-hog")
    noise.main.run(f"open 1 {lab.path / lab.unique('noise')} rwc")
    group = lab.cgroup("blkio")
    (group / "blkio.throttle.write_bps_device").write_text(f"{_number(device)} {1 << 20}")
    (group / "cgroup.procs").write_text(str(victim.pid))
    victim.main.run(f"open 1 {device} rwd")
    yield [victim.pid]
    noise.main.send("repeat -1; write 1 262144 0; fsync 1")
    victim.main.run(f"op throttle payment 40000000; write 1 {rng.randint(40, 60) * 4096} 0; write 1 131072 1048576; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("disk_throttle"), op.duration_ns > 100_000_000)]


@scenario()
def journal_filled(lab: Lab, rng: random.Random) -> Play:
    """Another process filled the journal transaction that the victim's fsync must commit."""
    disk = lab.slow_disk(256)
    where = lab.filesystem(disk.device, "-O", "^metadata_csum")
    (where / "d").mkdir()
    victim, filler = lab.actor("payments"), lab.actor("unpacker")
    decoy(lab, rng, 1)
    victim.main.run(f"open 1 {where}/ledger rwc; write 1 65536 0; fsync 1")
    yield [victim.pid]
    filler.main.run(f"creates {where}/d {rng.randint(9000, 12000)}")
    disk.set_service_us(8000)
    victim.main.run("op journal payment 60000000; write 1 4096 65536; fsync 1; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("journal_commit", filler.pid), op.duration_ns > 100_000_000)]


@scenario()
def dirty_throttle(lab: Lab, rng: random.Random) -> Play:
    """Another process filled the device's dirty quota; the victim's small buffered writes are paused."""
    disk = lab.slow_disk(512)
    where = lab.filesystem(disk.device)
    bdi = Path(f"/sys/class/bdi/{_number(disk.device)}")
    (bdi / "max_bytes").write_text(str(24 << 20))
    (bdi / "strict_limit").write_text("1")
    victim, writer = lab.actor("payments"), lab.actor("exporter")
    victim.main.run(f"open 1 {where}/ledger rwc")
    writer.main.run(f"open 1 {where}/export rwc")
    disk.set_service_us(40000)
    yield [victim.pid]
    writer.main.send("repeat 12; write 1 4194304")
    victim.main.run("sleep 400000")
    victim.main.run(f"op dirty payment 30000000; {'write 1 131072;' * rng.randint(32, 40)} end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("dirty_throttle", writer.pid), op.duration_ns > 60_000_000)]


@scenario()
def io_error(lab: Lab, rng: random.Random) -> Play:
    """The device under the victim loses its end: reads fail with an I/O error."""
    backing = lab.path / (lab.unique("disk") + ".img")
    device = lab.loop(backing, 32)
    victim = lab.actor("payments")
    decoy(lab, rng, 1)
    victim.main.run(f"open 1 {device} rd")
    os.truncate(backing, 1 << 20)
    yield [victim.pid]
    victim.main.run(f"op io-error payment 100000000; read 1 4096 0; cpu {rng.randint(500, 3000)}; read 1 4096 {16 << 20}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("io_error"), op.outcome == "failed")]


@scenario(healthy=True)
def healthy_disk_busy(lab: Lab, rng: random.Random) -> Play:
    """A disk storm while the victim does no I/O; no deadline."""
    victim, noise = lab.actor("payments").pin(0), lab.actor("disk-hog").pin(1)
    noise.main.run(f"open 1 {lab.path / lab.unique('noise')} rwc")
    yield [victim.pid]
    noise.main.send("repeat -1; write 1 262144 0; fsync 1")
    victim.main.run(f"op healthy-disk payment 0; cpu {rng.randint(20000, 40000)}; sleep 20000; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame(set()), op.run_delay_ns < op.duration_ns // 8)]


@scenario(healthy=True)
def healthy_fsync(lab: Lab, rng: random.Random) -> Play:
    """An fsync in time beside a hog."""
    where, _ = lab.disk(64)
    victim = lab.actor("payments")
    decoy(lab, rng, 1)
    victim.main.run(f"open 1 {where}/ledger rwc; write 1 65536 0; fsync 1")
    yield [victim.pid]
    for i in range(3):
        victim.main.run(f"op healthy-fsync-{i} payment 2000000000; write 1 4096 0; fsync 1; end")
    return [Judged(op, blame(set()), op.in_time) for op in victim.main.operations]
