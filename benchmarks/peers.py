"""Side by side with peers: the same tasks, the same seconds, the same kernel; delays and wakers as each tool sees them.

    python -m benchmarks.peers [--seconds 4] [--rounds 3] [--json FILE]

One process with threads that compete for two CPUs (bursts of hashing without the interpreter lock, short sleeps, a lock) is
watched by `kprobe record` together with `perf sched record`, then with BCC's `runqslower`. Compared, thread by thread over its
whole life:

- run-queue delay: `kprobe states` (runnable) against `perf sched timehist` (delay after a wake-up, plus waits that began with a
  preemption), against the same recording's events with the waits that timehist leaves out, and against `runqslower 0` (which
  prints whole microseconds)
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


def record(folder: Path, seconds: float, peer: str) -> int:
    """Run the load under kprobe and one peer; returns its pid.

    One peer at a time: tools on the same tracepoint run one after the other, and what the first one does (runqslower hands
    a line to user space) is in the times of those behind it.
    """
    load = subprocess.Popen([sys.executable, "-c", LOAD, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert load.stdin is not None and load.stdout is not None
    pid = int(load.stdout.readline())
    capture = folder / "run.kcap"
    kprobe = [sys.executable, "-m", "cli.main", "record", "-o", str(capture), "--watch", f"pid:{pid}"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(recorder("kprobe", kprobe, folder / "kprobe.log"))
        wait_until(lambda: capture.exists() and capture.stat().st_size > 500, "kprobe's first frame")
        if peer == "timehist":
            _start_perf(stack, folder)
        else:
            _start_runqslower(stack, folder, pid)
        load.stdin.write(b"go\n")
        load.stdin.flush()
        load.wait()
        if peer == "runqslower":
            time.sleep(0.2)  # its poll prints the last lines; nothing is measured any more
    return pid


def _start_perf(stack: contextlib.ExitStack, folder: Path) -> None:
    for name in ("control", "ack"):
        os.mkfifo(folder / name)
    argv = ["perf", "sched", "record", "-k", "CLOCK_MONOTONIC", "-m", "4M", "-o", str(folder / "perf.data"), "-D", "-1"]
    argv.append(f"--control=fifo:{folder}/control,{folder}/ack")
    stack.enter_context(recorder("perf", argv, folder / "perf.log"))
    (folder / "control").write_text("enable\n")  # returns once perf has opened its end
    with (folder / "ack").open() as ack:
        ack.readline()  # now its events are on: the file alone does not tell


def _start_runqslower(stack: contextlib.ExitStack, folder: Path, pid: int) -> None:
    tool = shutil.which("runqslower-bpfcc") or sys.exit("peers: runqslower-bpfcc is missing: apt-get install bpfcc-tools")
    log = folder / "runqslower.log"
    argv = ["/usr/bin/python3", "-u", tool, "-p", str(pid), "0"]
    stack.enter_context(recorder("runqslower", argv, log, env=bcc_headers(folder / "headers")))
    wait_until(lambda: b"Tracing" in log.read_bytes(), "runqslower's start")


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


def perf_events(folder: Path) -> Iterator[tuple[int, int, str, str]]:
    """(ns, tid, event, text) of perf's own recording."""
    argv = ["perf", "script", "-i", str(folder / "perf.data"), "--ns", "-F", "tid,time,event,trace"]
    head = re.compile(r"^\s*(-?\d+)\s+([\d.]+):\s+sched:(\w+):\s+(.*)$")
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for found in filter(None, map(head.match, text.splitlines())):
        seconds, _, nanos = found[2].partition(".")
        yield int(seconds) * 1_000_000_000 + int(nanos.ljust(9, "0")), int(found[1]), found[3], found[4]


_SWITCH = re.compile(r"prev_pid=(\d+).* prev_state=(\S+) ==> .* next_pid=(\d+)")


def event_delays(folder: Path, tids: set[int]) -> dict[int, int]:
    """Run-queue delay from perf's own events, with what timehist leaves out: waits that began with a wake-up *before* the
    switch-out (it calls them sleep), and those of a thread that is exiting (its samples carry no tid, but their text does).
    """
    out: dict[int, int] = defaultdict(int)
    queued: dict[int, int] = {}
    running: set[int] = set()
    early: set[int] = set()
    for now, _, event, text in perf_events(folder):
        if event in ("sched_waking", "sched_wakeup_new") and (target := re.search(r" pid=(\d+)", text)):
            tid = int(target[1])
            if tid in running:
                early.add(tid)
            elif tid in early:  # woken again: the early wake-up had found it awake, and it slept after all
                early.discard(tid)
                queued[tid] = now
            else:
                queued.setdefault(tid, now)
        elif event == "sched_switch" and (found := _SWITCH.search(text)):
            prev, following = int(found[1]), int(found[3])
            running.discard(prev)
            queued.pop(prev, None)  # still queued: its switch-in was not reported, and nobody knows when it was
            if found[2].startswith("R") or prev in early:
                queued[prev] = now
            if following in tids:
                out[following] += now - queued.get(following, now)
            queued.pop(following, None)
            running.add(following)
            early.discard(following)
    return out


def off_cpu_by_waker(folder: Path, tids: set[int]) -> dict[int, dict[int, int]]:
    """offwaketime's rule over perf's own events: target tid -> waker tid -> ns off the CPU."""
    out: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    left: dict[int, int] = {}
    waker: dict[int, int] = {}
    for now, tid, event, text in perf_events(folder):
        if event == "sched_waking" and (target := re.search(r" pid=(\d+)", text)):
            waker[int(target[1])] = tid
        elif event == "sched_switch" and (found := _SWITCH.search(text)):
            left[int(found[1])] = now
            following = int(found[3])
            if following in left and following in tids:
                out[following][waker.pop(following, 0)] += now - left.pop(following)
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
        elif s.get("contradicted") and tid in begun:
            begun[tid] = s["end_mono_ns"]  # it ran in between, unreported; the rule forgets what was before, too
        elif s.get("waker_tid") is not None:
            waker[tid] = s["waker_tid"]
    return out


def kprobe_delays(states: list[dict[str, Any]], pid: int) -> tuple[dict[int, int], dict[int, int], dict[int, str]]:
    """Runnable ns, number of runnable states, and name of each thread of the load that was started to work."""
    delays: dict[int, int] = defaultdict(int)
    waits: dict[int, int] = defaultdict(int)
    names = {s["tid"]: s["comm"] for s in states if s["tgid"] == pid and s["tid"] != pid}
    for s in states:
        if s["tid"] in names and s["state"] == "runnable" and not s.get("contradicted"):
            delays[s["tid"]] += s["end_mono_ns"] - s["start_mono_ns"]
            waits[s["tid"]] += 1
    return delays, waits, names


def compare(folder: Path, pid: int, peer: str) -> list[dict[str, Any]]:
    """One row a thread and figure of the load: ours, the peer's, and how far apart."""
    states = kprobe_states(folder)
    delays, waits, names = kprobe_delays(states, pid)
    more: list[dict[str, Any]] = []
    if peer == "runqslower":
        # It cuts each delay to whole microseconds: half of one is missing on average.
        theirs = {tid: ns + lines * 500 for tid, (ns, lines) in slower_delays(folder).items()}
    else:
        theirs = event_delays(folder, set(names))
        plain = perf_delays(folder, pid)
        more = [_row(names[t], "run-queue delay", "timehist", waits[t], delays[t], plain.get(t, 0)) for t in sorted(names)]
    label = "runqslower" if peer == "runqslower" else "perf's events"
    rows = [_row(names[t], "run-queue delay", label, waits[t], delays[t], theirs.get(t, 0)) for t in sorted(names)]
    if peer == "timehist":
        rows += more
        mine, rule = kprobe_off_cpu(states, set(names)), off_cpu_by_waker(folder, set(names))
        for t in sorted(names):
            ours, other = sum(mine[t].values()), sum(rule[t].values())
            rows.append(_row(names[t], "off CPU", "offwaketime's rule", waits[t], ours, other))
            by_task = {w: ns for w, ns in mine[t].items() if w}
            both = sum(min(ns, rule[t].get(w, 0)) for w, ns in by_task.items())
            rows.append(_row(names[t], "off CPU, by wakers", "offwaketime's rule", waits[t], sum(by_task.values()), both))
    return rows


def _row(comm: str, figure: str, peer: str, waits: int, ours: int, theirs: int) -> dict[str, Any]:
    return {
        "comm": comm, "figure": figure, "peer": peer, "waits": waits, "kprobe_ns": ours, "peer_ns": theirs,
        "difference": _ratio(ours, theirs),
    }  # fmt: skip


def _ratio(ours: int, theirs: int) -> float:
    return abs(ours - theirs) / theirs if theirs else float(ours != 0)


def kprobes_missing() -> str:
    """Why offwaketime cannot run here; empty if it can."""
    available = Path("/sys/bus/event_source/devices/kprobe").exists()
    return "" if available else "offwaketime: not run, this kernel has no kprobes (CONFIG_KPROBES is not set)"


def show(number: int, rows: list[dict[str, Any]]) -> None:
    """The table of one round."""
    print(f"round {number}")
    print(f"{'thread':<10}{'figure':<20}{'peer':<20}{'waits':>8}{'kprobe ms':>13}{'peer ms':>13}{'apart':>9}")
    for r in rows:
        numbers = f"{r['waits']:>8}{r['kprobe_ns'] / 1e6:>13.3f}{r['peer_ns'] / 1e6:>13.3f}{r['difference']:>9.2%}"
        print(f"{r['comm']:<10}{r['figure']:<20}{r['peer']:<20}{numbers}")


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
        rows = []
        for peer in ("timehist", "runqslower"):
            with tempfile.TemporaryDirectory() as scratch:
                folder = options.keep / f"{number}-{peer}" if options.keep else Path(scratch)
                folder.mkdir(parents=True, exist_ok=True)
                rows += compare(folder, record(folder, options.seconds, peer), peer)
        rounds.append(rows)
        show(number, rows)
    for figure, peer in dict.fromkeys((r["figure"], r["peer"]) for rows in rounds for r in rows):
        apart = [r["difference"] for rows in rounds for r in rows if (r["figure"], r["peer"]) == (figure, peer)]
        print(f"{figure} against {peer}: median {sorted(apart)[len(apart) // 2]:.2%}, farthest {max(apart):.2%} apart")
    print(kprobes_missing())
    if options.json:
        options.json.write_text(json.dumps({"schema": "kprobe.bench.peers/1", "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
