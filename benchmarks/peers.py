"""Side by side with peers: the same tasks, the same seconds, the same kernel; delays and wakers as each tool sees them.

    python -m benchmarks.peers [--seconds 4] [--rounds 3] [--json FILE]

One process with threads that compete for two CPUs (bursts of hashing without the interpreter lock, short sleeps, a lock) is
watched at once by `kprobe record`, `perf sched record` and BCC's `runqslower`. Compared, thread by thread over its whole life:

- run-queue delay: `kprobe states` (runnable) against `perf sched timehist` (delay after a wake-up, plus waits that began with a
  preemption) and against `runqslower 0` (which prints whole microseconds)
- time off the CPU by waker: `kprobe states` against the rule of `offwaketime` (from switch-out to switch-in, charged to the
  task whose wake-up came last). offwaketime itself needs kprobes on finish_task_switch and try_to_wake_up; where the kernel has
  none, its rule is applied to `perf script` of the same seconds, and the reason is printed.

runqslower is unmodified. It wants kernel headers for three fields of `task_struct`; it gets them from the kernel's own BTF.
Needs root, linux-perf and bpfcc-tools. What differs, and why, stands in docs/peers.md.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LOAD = """
import hashlib, os, sys, threading, time
lock = threading.Lock()
data = bytes(1 << 20)
def work(name, cpu, burst, nap, until):
    with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm: comm.write(name)
    os.sched_setaffinity(0, {cpu})
    while time.monotonic() < until:
        hashlib.sha256(data[:burst]).digest()
        if nap: time.sleep(nap)
        if name.endswith("lock"):
            with lock: hashlib.sha256(data[:burst // 2]).digest()
print(os.getpid(), flush=True)
sys.stdin.readline()
until = time.monotonic() + float(sys.argv[1])
cpus = sorted(os.sched_getaffinity(0))
plan = [("hog", 0, 1 << 20, 0), ("nap", 0, 1 << 19, 0.002), ("short", 0, 1 << 16, 0.001), ("a-lock", 1, 1 << 18, 0.001),
        ("b-lock", 1, 1 << 18, 0), ("wide", 1, 1 << 19, 0.003)]
threads = [threading.Thread(target=work, args=(n, cpus[c % len(cpus)], b, s, until)) for n, c, b, s in plan]
for t in threads: t.start()
for t in threads: t.join()
"""
READY_S = 30.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll `condition`; exits with `what` if it does not come true in time."""
    deadline = time.monotonic() + READY_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"peers: {what} did not happen within {READY_S:.0f} s")
        time.sleep(0.02)


@contextlib.contextmanager
def recorder(name: str, argv: list[str], log: Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A tool that records until it gets SIGINT; its words go to `log`."""
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, **more)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(READY_S)
            except subprocess.TimeoutExpired:
                process.kill()
                print(f"peers: {name} had to be killed: {log.read_text(errors='replace')[-500:]}", file=sys.stderr)


def bcc_headers(root: Path) -> dict[str, str]:
    """An environment in which BCC's tools compile without kernel headers: task_struct as BTF describes it."""
    from probe.btf import KernelTypes
    from probe.compiler import _STUBS  # the stub headers that the probe itself compiles with

    for name, content in _STUBS.items():
        path = root / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    types = KernelTypes()
    found = {name: types.place(f"task_struct.{name}", ()) for name in ("__state", "pid", "tgid", "comm")}
    places = {name: place.byte for name, place in found.items() if place is not None}
    size = {"__state": "unsigned int", "pid": "int", "tgid": "int", "comm": "char"}
    lines, at = [], 0
    for name, offset in sorted(places.items(), key=lambda item: item[1]):
        width = 16 if name == "comm" else 4
        lines += [f"char pad_{name}[{offset - at}];"] if offset > at else []
        lines.append(f"{size[name]} {name}{'[16]' if name == 'comm' else ''};")
        at = offset + width
    text = "#pragma once\n#define TASK_COMM_LEN 16\n#define TASK_RUNNING 0\nstruct task_struct { " + " ".join(lines) + " };\n"
    for name, content in (("sched", text), ("nsproxy", ""), ("pid_namespace", "")):
        (root / "include" / "linux" / f"{name}.h").write_text(content)
    return os.environ | {"BCC_KERNEL_SOURCE": str(root)}


def record_all(folder: Path, seconds: float) -> int:
    """Run the load under all three recorders; returns its pid."""
    load = subprocess.Popen([sys.executable, "-c", LOAD, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert load.stdin is not None and load.stdout is not None
    pid = int(load.stdout.readline())
    capture, data = folder / "run.kcap", folder / "perf.data"
    kprobe = [sys.executable, "-m", "cli.main", "record", "-o", str(capture), "--watch", f"pid:{pid}"]
    perf = ["perf", "sched", "record", "-k", "CLOCK_MONOTONIC", "-m", "4M", "-o", str(data), "-D", "-1"]
    perf.append(f"--control=fifo:{folder}/control,{folder}/ack")
    slower = [sys.executable, "-u", shutil.which("runqslower-bpfcc") or "runqslower-bpfcc", "-p", str(pid), "0"]
    with contextlib.ExitStack() as stack:
        logs = {n: folder / f"{n}.log" for n in ("kprobe", "perf", "runqslower")}
        stack.enter_context(recorder("kprobe", kprobe, logs["kprobe"]))
        wait_until(lambda: capture.exists() and capture.stat().st_size > 500, "kprobe's first frame")
        slower[0] = "/usr/bin/python3"
        stack.enter_context(recorder("runqslower", slower, logs["runqslower"], env=bcc_headers(folder / "headers")))
        wait_until(lambda: b"Tracing" in logs["runqslower"].read_bytes(), "runqslower's start")
        for name in ("control", "ack"):
            os.mkfifo(folder / name)
        stack.enter_context(recorder("perf", perf, logs["perf"]))
        (folder / "control").write_text("enable\n")  # returns once perf has opened its end
        with (folder / "ack").open() as ack:
            ack.readline()  # now its events are on: the file alone does not tell
        load.stdin.write(b"go\n")
        load.stdin.flush()
        load.wait()
        time.sleep(0.2)  # let runqslower's poll print its last lines; nothing is measured any more
    return pid


def kprobe_states(folder: Path) -> list[dict[str, Any]]:
    """The states of all threads, as `kprobe states` lists them."""
    argv = [sys.executable, "-m", "cli.main", "states", str(folder / "run.kcap"), "--jsonl"]
    done = subprocess.run(argv, capture_output=True, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"peers: kprobe states failed: {done.stderr.decode()}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def perf_delays(folder: Path, pid: int) -> dict[int, int]:
    """Run-queue delay per tid from `perf sched timehist`: after wake-ups, and after preemptions."""
    argv = ["perf", "sched", "timehist", "-i", str(folder / "perf.data"), "--state"]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    line = re.compile(r"^\s*([\d.]+) \[(\d+)\]\s+(.*)\[(\d+)(?:/(\d+))?\]\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(\w+)")
    total: dict[int, int] = defaultdict(int)
    last: dict[int, str] = {}
    for found in filter(None, map(line.match, text.splitlines())):
        tid, tgid = int(found[4]), int(found[5] or found[4])
        if tgid != pid:
            continue
        wait, delay = (round(float(found[n]) * 1_000_000) for n in (6, 7))
        total[tid] += delay + (wait if last.get(tid) == "R" else 0)
        last[tid] = found[9][0]
    return total


def slower_delays(folder: Path) -> dict[int, tuple[int, int]]:
    """(run-queue delay in ns, lines) per tid from runqslower."""
    out: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for line in (folder / "runqslower.log").read_text(errors="replace").splitlines():
        found = re.match(r"^\S+\s+.*?\s+(\d+)\s+(\d+)(?:\s|$)", line)
        if found and line[:2].isdigit():
            ns, count = out[int(found[1])]
            out[int(found[1])] = ns + int(found[2]) * 1000, count + 1
    return out


def off_cpu_by_waker(folder: Path, tids: set[int]) -> dict[int, dict[int, int]]:
    """offwaketime's rule over perf's own events: target tid -> waker tid -> ns off the CPU."""
    argv = ["perf", "script", "-i", str(folder / "perf.data"), "--ns", "-F", "tid,time,event,trace"]
    head = re.compile(r"^\s*(\d+)\s+([\d.]+):\s+sched:(\w+):\s+(.*)$")
    short = re.compile(r":(\d+) \[\d+\] .* ==> .*:(\d+) \[")
    out: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    left: dict[int, int] = {}
    waker: dict[int, int] = {}
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for found in filter(None, map(head.match, text.splitlines())):
        seconds, _, nanos = found[2].partition(".")
        now = int(seconds) * 1_000_000_000 + int(nanos.ljust(9, "0"))
        if found[3] in ("sched_waking", "sched_wakeup") and (target := re.search(r" pid=(\d+)", found[4])):
            waker[int(target[1])] = int(found[1])
        elif found[3] == "sched_switch":
            pids = re.search(r"prev_pid=(\d+).* next_pid=(\d+)", found[4]) or short.search(found[4])
            if pids is None:
                continue
            left[int(pids[1])] = now
            if int(pids[2]) in left and int(pids[2]) in tids:
                out[int(pids[2])][waker.pop(int(pids[2]), 0)] += now - left.pop(int(pids[2]))
    return out


def kprobe_off_cpu(states: list[dict[str, Any]], tids: set[int]) -> dict[int, dict[int, int]]:
    """The same sums from kprobe's states: each stretch off the CPU is charged to its last waker (0: none, or an interrupt)."""
    out: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    begun: dict[int, int] = {}
    waker: dict[int, int] = {}
    for s in states:
        tid = s["tid"]
        if tid not in tids:
            continue
        if s["state"] == "running":
            if tid in begun:
                out[tid][waker.pop(tid, 0)] += s["start_mono_ns"] - begun.pop(tid)
            begun[tid] = s["end_mono_ns"]
        elif s.get("waker_tid") is not None:
            waker[tid] = s["waker_tid"]
    return out


def compare(folder: Path, pid: int) -> list[dict[str, Any]]:
    """One row a thread of the load."""
    states = kprobe_states(folder)
    perf, slower = perf_delays(folder, pid), slower_delays(folder)
    mine = {t for t in perf if t != pid}
    ours: dict[int, int] = defaultdict(int)
    waits: dict[int, int] = defaultdict(int)
    names: dict[int, str] = {}
    for s in states:
        if s["tid"] in mine and s["state"] == "runnable":
            ours[s["tid"]] += s["end_mono_ns"] - s["start_mono_ns"]
            waits[s["tid"]] += 1
        names[s["tid"]] = s["comm"] or names.get(s["tid"], "")
    off, peer_off = kprobe_off_cpu(states, mine), off_cpu_by_waker(folder, mine)
    rows = []
    for tid in sorted(mine):
        slower_ns, lines = slower[tid]
        total, peer_total = sum(off[tid].values()), sum(peer_off[tid].values())
        row = {"tid": tid, "comm": names.get(tid, ""), "waits": waits[tid], "kprobe_ns": ours[tid], "perf_ns": perf[tid]}
        row |= {"perf_difference": _ratio(ours[tid], perf[tid]), "runqslower_ns": slower_ns, "runqslower_lines": lines}
        # It cuts each delay to whole microseconds: half of one is missing on average.
        row["runqslower_difference"] = _ratio(ours[tid], slower_ns + lines * 500)
        rows.append(row | {"off_cpu_ns": total, "peer_off_cpu_ns": peer_total, "off_cpu_difference": _ratio(total, peer_total)})
    return rows


def _ratio(ours: int, theirs: int) -> float:
    return abs(ours - theirs) / theirs if theirs else float(ours != 0)


def kprobes_missing() -> str:
    """Why offwaketime cannot run here; empty if it can."""
    available = Path("/sys/bus/event_source/devices/kprobe").exists()
    return "" if available else "offwaketime: not run, this kernel has no kprobes (CONFIG_KPROBES is not set)"


def show(number: int, rows: list[dict[str, Any]]) -> None:
    """The table of one round."""
    print(f"round {number}: run-queue delay in ms, and time off the CPU by waker")
    heads = ("waits", "kprobe", "timehist", "diff", "runqslower", "diff", "off CPU", "peer rule", "diff")
    print(f"{'thread':<10}" + "".join(f"{h:>11}" for h in heads))
    for r in rows:
        cells = [f"{r['waits']}", f"{r['kprobe_ns'] / 1e6:.3f}", f"{r['perf_ns'] / 1e6:.3f}", f"{r['perf_difference']:.2%}"]
        cells += [f"{r['runqslower_ns'] / 1e6:.3f}", f"{r['runqslower_difference']:.2%}", f"{r['off_cpu_ns'] / 1e6:.3f}"]
        cells += [f"{r['peer_off_cpu_ns'] / 1e6:.3f}", f"{r['off_cpu_difference']:.2%}"]
        print(f"{r['comm']:<10}" + "".join(f"{c:>11}" for c in cells))


def main() -> None:
    """Run the rounds, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description="kprobe beside perf sched timehist, runqslower and offwaketime")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="leave the recordings in this folder")
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.keep / str(number) if options.keep else Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            rounds.append(compare(folder, record_all(folder, options.seconds)))
        show(number, rounds[-1])
    print(kprobes_missing())
    if options.json:
        options.json.write_text(json.dumps({"schema": "kprobe.bench.peers/1", "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
