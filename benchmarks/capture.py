"""What recording costs the recorded: time added to a system call, against `perf record`; and a storm that must lose nothing.

    python -m benchmarks.capture [--rounds 7] [--batches 300] [--storm-seconds 10] [--json FILE]

A loop of getppid calls runs pinned on one CPU, then on two. In each round, one after the other: nothing attached; kprobe with
the loop watched (its enter and exit of every call are recorded, and drained by this process); kprobe with another process
watched; `perf record` of the same two tracepoints, of the loop only, into a file in memory; and programs that do nothing, at
one of the two tracepoints and at both: what any program there costs every process. Time a call is the 10th percentile
of batches of 1000 calls (batches in which the loop was preempted do not count), the slower CPU; the table has medians over
rounds. Figures vary with what else the machine does: compare within one run only.

The storm is the same loop on every CPU for some seconds with the default ring; reported: events a second and core, and losses
(which must be 0). Needs root, linux-perf and a C compiler.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from events.kinds import FAMILIES
from events.records import LOSS_HIDDEN
from events.settings import ProbeSettings
from probe import bpfsys
from probe.limits import prefer_this_thread
from probe.source import KernelSource
from probe.watch import Selector

HERE = Path(__file__).parent
OFF = [f for f in FAMILIES if f not in ("syscalls", "sched")]
BARS = {"recorded / perf": 0.35, "unwatched_ns": 45.0, "storm_events_per_s_core": 1e6}


class Loop:
    """The load: answers with time a call."""

    def __init__(self, binary: Path, cpus: int) -> None:
        self.process = subprocess.Popen(
            [str(binary), str(cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.cpus, self.pid = cpus, self.process.pid

    def run(self, batches: int, pace_ns: int = 0) -> tuple[float, int, int]:
        """(nanoseconds a call on the slower CPU, calls made, nanoseconds in all)."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{batches} {pace_ns}\n")
        words = [int(w) for w in self.process.stdout.readline().split()]
        return max(words[: self.cpus]) / 1000, words[-2], words[-1]

    def end(self) -> None:
        """End the load."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def recording(watch: str, **settings: Any) -> Iterator[dict[str, int]]:
    """kprobe records and drains; yields counters that are complete once the block has ended."""
    source = KernelSource(ProbeSettings(families_off=OFF, **settings), [Selector.parse(watch)])
    source.open()
    seen = {"events": 0, "lost": 0}
    stop = threading.Event()

    def take() -> None:
        drained = source.drain()
        seen["events"] += len(drained.columns["seq"])
        seen["lost"] += sum(row["count"] or 0 for row in drained.losses if row["reason"] != LOSS_HIDDEN)

    def reader() -> None:
        prefer_this_thread()
        while not stop.wait(0.01):
            take()

    thread = threading.Thread(target=reader)
    thread.start()
    try:
        yield seen
        source.detach()
    finally:
        stop.set()
        thread.join()
        deadline = time.monotonic() + 10
        while any(c["unsettled"] for c in source.stats()["cpus"].values()) and time.monotonic() < deadline:
            take()
        seen["produced"] = sum(c["produced"] for c in source.stats()["cpus"].values())
        source.close()


@contextlib.contextmanager
def empty(*tracepoints: str) -> Iterator[None]:
    """A program that returns at once, at each of some tracepoints: the floor under anything that can be attached there."""
    program = bpfsys.load_program(struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0))  # r0 = 0; exit
    links = [bpfsys.attach_raw_tracepoint(program, name) for name in tracepoints]
    try:
        yield
    finally:
        for fd in (*links, program):
            os.close(fd)


@contextlib.contextmanager
def perf(pid: int) -> Iterator[None]:
    """`perf record` of raw_syscalls of one process, into a file in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        command = ["perf", "record", "-q", "-m", "4096", "-p", str(pid), "-o", f"{folder}/perf.data"]
        command += ["-e", "raw_syscalls:sys_enter", "-e", "raw_syscalls:sys_exit"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            _wait_for_perf(process, pid)
            try:
                yield
            finally:
                process.send_signal(2)
                process.wait()


def _wait_for_perf(process: "subprocess.Popen[bytes]", pid: int) -> None:
    """perf has attached once it holds perf events of both tracepoints."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            links = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
            if sum("perf_event" in link for link in links) >= 2 and any("perf.data" in link for link in links):
                time.sleep(0.2)  # it switches them on a moment later
                return
        time.sleep(0.01)
    raise SystemExit(f"perf record did not attach to process {pid} (status {process.poll()})")


def measure(binary: Path, cpus: int, rounds: int, batches: int) -> dict[str, Any]:
    """Medians over interleaved rounds, for `cpus` busy CPUs."""
    loop = Loop(binary, cpus)
    other = subprocess.Popen(["sleep", "3600"])
    cases: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "none": contextlib.nullcontext,
        "recorded": lambda: recording(f"pid:{loop.pid}"),
        "unwatched": lambda: recording(f"pid:{other.pid}"),
        "perf": lambda: perf(loop.pid),
        "empty enter": lambda: empty("sys_enter"),
        "empty exit": lambda: empty("sys_exit"),
        "empty both": lambda: empty("sys_enter", "sys_exit"),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    loop.run(batches)
    for _ in range(rounds):
        for name, case in cases.items():
            with case():
                times[name].append(loop.run(batches)[0])
    loop.end()
    other.kill()
    other.wait()
    median = {name: statistics.median(values) for name, values in times.items()}
    added = {name: median[name] - median["none"] for name in cases if name != "none"}
    return {"cpus": cpus, "ns_per_call": median, "added_ns": added, "ratio": added["recorded"] / added["perf"], "rounds": times}


def storm(binary: Path, seconds: float) -> dict[str, Any]:
    """The loop on every CPU for `seconds` with default rings, at the pace of the bar and a tenth more."""
    cpus = len(os.sched_getaffinity(0))
    loop = Loop(binary, cpus)
    pace_ns = int(2000 * 1e9 / (1.1 * BARS["storm_events_per_s_core"]))  # a batch is 1000 calls, 2000 events
    with recording(f"pid:{loop.pid}") as seen:
        _, calls, spent = loop.run(int(seconds * 1e9 / pace_ns), pace_ns)
    loop.end()
    return {
        "cpus": cpus,
        "seconds": spent / 1e9,
        "events_per_s_core": 2 * calls / (spent / 1e9) / cpus,
        "produced": seen["produced"],
        "delivered": seen["events"],
        "lost": seen["lost"],
    }


def _print(busy: list[dict[str, Any]], s: dict[str, Any]) -> None:
    print("CPUs busy  bare ns/call  recorded  not watched  perf record  recorded/perf")
    for row in busy:
        added = row["added_ns"]
        print(
            f"{row['cpus']:9d}  {row['ns_per_call']['none']:12.0f}  {added['recorded']:+8.0f}  {added['unwatched']:+11.0f}"
            f"  {added['perf']:+11.0f}  {row['ratio']:13.2f}"
        )
    for row in busy:
        floors = ", ".join(f"{name[6:]} {row['added_ns'][name]:+.0f}" for name in row["added_ns"] if name.startswith("empty"))
        print(f"programs that do nothing, {row['cpus']} CPUs busy: {floors} ns")
    rate = s["events_per_s_core"] / 1e6
    print(f"storm: {rate:.2f} M events/s a core on {s['cpus']} CPUs for {s['seconds']:.1f} s: lost {s['lost']}")
    holds = s["produced"] == s["delivered"] + s["lost"]
    print(f"produced {s['produced']} == delivered {s['delivered']} + lost {s['lost']}: {holds}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--storm-seconds", type=float, default=10)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    if shutil.which("perf") is None:
        raise SystemExit("perf is not installed: apt-get install linux-perf")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "capture_loop"
        subprocess.run(["cc", "-O2", "-pthread", "-o", str(binary), str(HERE / "capture_loop.c")], check=True)
        busy = [measure(binary, n, options.rounds, options.batches) for n in (1, 2) if n <= len(os.sched_getaffinity(0))]
        report = {"kernel": os.uname().release, "busy": busy, "storm": storm(binary, options.storm_seconds), "bars": BARS}
    _print(busy, report["storm"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
