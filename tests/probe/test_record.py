"""`kprobe record` on the real kernel: the command notices nothing, its whole tree is there, and limits and kills are honest."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from events.kinds import BY_NAME
from probe.capture import CaptureReader

pytestmark = pytest.mark.kernel
KPROBE = [sys.executable, "-m", "cli.main"]
DEADLINE_S = 60.0


def kprobe(*args, **more):
    return subprocess.run([*KPROBE, *map(str, args)], capture_output=True, text=True, timeout=DEADLINE_S, check=False, **more)


def record(path, *command, options=(), **more):
    return kprobe("record", "-o", path, *options, "--", *command, **more)


def info(path):
    return json.loads(kprobe("info", path, "--json").stdout)


def events(path, *options):
    return [json.loads(line) for line in kprobe("events", path, "--jsonl", *options).stdout.splitlines()]


def wait_until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.02)


def test_the_command_keeps_its_streams_and_its_status(tmp_path):
    done = record(tmp_path / "x.kcap", "/bin/sh", "-c", "cat; echo to-stderr >&2; exit 37", input="from stdin\n")

    assert (done.returncode, done.stdout) == (37, "from stdin\n")
    lines = done.stderr.splitlines()
    assert lines[0] == "to-stderr"
    assert re.fullmatch(r"kprobe: .*x\.kcap: \d+ events in [\d.]+ s, [\d.]+ MB", lines[1])
    assert info(tmp_path / "x.kcap")["complete"]


def test_a_command_that_dies_of_a_signal(tmp_path):
    assert record(tmp_path / "x.kcap", "/bin/sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_signal_dispositions_are_those_of_a_shell(tmp_path):
    """Python ignores SIGPIPE; a program started by it must not."""
    done = record(tmp_path / "x.kcap", "/bin/sh", "-c", "grep -E 'Sig(Ign|Blk)' /proc/self/status")
    assert [int(line.split()[1], 16) for line in done.stdout.splitlines()] == [0, 0]


def test_a_command_that_is_not_there_runs_nothing_and_replaces_nothing(tmp_path):
    path = tmp_path / "x.kcap"
    path.write_bytes(b"")
    done = record(path, "no-such-program-23")

    assert done.returncode == 2
    assert done.stderr == "kprobe: cannot run 'no-such-program-23': no such program; give a path, or a name that is in PATH\n"
    assert path.read_bytes() == b""


_SCRIPT = "for i in 1 2 3 4 5 6 7; do /bin/echo $i > /dev/null; done; /bin/sh -c '/bin/true; /bin/true'; :"


def test_the_tree_is_watched_from_before_its_first_instruction(tmp_path):
    """strace says which execve and write calls the tree makes; the recording has each of them, none missing, none more."""
    log = tmp_path / "strace.log"
    subprocess.run(["strace", "-f", "-qq", "-e", "trace=execve,write", "-o", log, "/bin/sh", "-c", _SCRIPT], check=True)
    truth = [m[1] for line in log.read_text().splitlines() if (m := re.match(r"\d+ +(execve|write)\(", line))]

    done = record(tmp_path / "x.kcap", "/bin/sh", "-c", _SCRIPT)

    assert done.returncode == 0
    numbers = {59: "execve", 1: "write"}
    tree = {t["tid"] for t in info(tmp_path / "x.kcap")["tasks"] if t["watched"]}
    seen = [
        numbers[e["fields"]["nr"]]
        for e in events(tmp_path / "x.kcap", "--kind", "sys_enter")
        if e["fields"]["nr"] in numbers and e["tid"] in tree
    ]
    # The go-ahead to the waiting child comes by a pipe that it reads: it writes nothing before its exec.
    assert seen.count("execve") == truth.count("execve") == 11
    assert seen.count("write") == truth.count("write")


def test_every_life_of_the_tree_is_named(tmp_path):
    done = record(tmp_path / "x.kcap", "/bin/sh", "-c", "/bin/sleep 0.01 & echo $!; wait $!")

    pid = int(done.stdout)
    task = next(t for t in info(tmp_path / "x.kcap")["tasks"] if t["tid"] == pid)
    assert (task["comm"], task["watched"]) == ("sleep", True)
    own = events(tmp_path / "x.kcap", "--tid", pid)
    kinds = {e["kind"] for e in own}
    assert {"sched_process_fork", "sched_process_exec", "sched_switch", "sched_process_exit"} <= kinds
    assert [e["time_mono_ns"] for e in own] == sorted(e["time_mono_ns"] for e in own)


def test_events_can_be_cut_off_by_head(tmp_path):
    record(tmp_path / "x.kcap", "/bin/sleep", "0.1")
    shown = subprocess.run(
        f"{' '.join(KPROBE)} events {tmp_path / 'x.kcap'} | head -3; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert len(shown.stdout.splitlines()) == 4
    assert shown.stderr == ""


def test_sigterm_reaches_the_command(tmp_path):
    path = tmp_path / "x.kcap"
    script = "trap 'echo got TERM; exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    child = subprocess.Popen([*KPROBE, "record", "-o", path, "--", "/bin/sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=DEADLINE_S)

    assert (child.returncode, out) == (5, "got TERM\n")
    assert info(path)["complete"]


def test_without_a_command_it_records_until_it_is_told_to_stop(tmp_path):
    path = tmp_path / "x.kcap"
    child = subprocess.Popen([*KPROBE, "record", "-o", path], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: path.exists() and path.stat().st_size > 100_000, "events are written")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=DEADLINE_S)

    found = info(path)
    assert child.returncode == 0, err
    assert (found["closed"], found["damage"]) == (True, [])


def test_kill_9_leaves_a_readable_file_and_a_living_command(tmp_path):
    path, flag, out = tmp_path / "x.kcap", tmp_path / "go", tmp_path / "out"
    script = f"while [ ! -e {flag} ]; do sleep 0.01; done; echo finished > {out}"
    child = subprocess.Popen([*KPROBE, "record", "-o", path, "--", "/bin/sh", "-c", script])
    wait_until(lambda: path.exists() and path.stat().st_size > 100_000, "events are written")
    child.kill()
    child.wait()
    flag.touch()
    wait_until(out.exists, "the command goes on without its recorder")

    done = kprobe("info", path)
    assert done.returncode == 3
    assert "NOT CLOSED" in done.stdout
    with CaptureReader(path) as reader:
        assert reader.verify() == list(reader.damage)
        frames = list(reader.frames())
        assert [f.number for f in frames] == list(range(len(frames)))
        assert sum(f.batch.num_rows for f in frames if f.kind == "events/1") > 0


FEW = '["' + '","'.join(sorted({k.family for k in BY_NAME.values()} - {"sched", "syscalls"})) + '"]'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cap", "value", "words"),
    [("CPU_SHARE_MAX", "0.00001", "CPU share"), ("MEMORY_MAX_BYTES", str(64 << 20), "resident memory")],
    ids=["cpu", "memory"],
)
def test_above_a_cap_the_probe_sheds_then_detaches_and_says_so(tmp_path, cap, value, words):
    path = tmp_path / "x.kcap"
    limits = {f"KPROBE_PROBE__{cap}": value, "KPROBE_PROBE__LIMIT_WINDOW_S": "0.5", "KPROBE_PROBE__FAMILIES_OFF": FEW}
    done = record(path, "/bin/sleep", "8", env={**os.environ, **limits})

    assert done.returncode == 0  # the command's own status; it never noticed
    assert f"kprobe: {words}" in done.stderr
    told = [line for line in done.stderr.splitlines() if "evidence is incomplete" in line]
    assert [re.sub(r":.*", "", line.split("incomplete: ")[1]) for line in told] == ["shed syscalls", "shed sched", "detached"]
    found = info(path)
    assert found["closed"]
    assert not found["complete"]
    session = found["recording"]["session"]
    assert (session["shed"], session["detached"]) == (["syscalls", "sched"], True)
    assert {(r["reason"], r["family"]) for r in found["losses"]} >= {
        ("shed", "syscalls"),
        ("shed", "sched"),
        ("detached", None),
    }


def test_what_was_drained_is_what_the_kernel_numbered(tmp_path):
    """P1 from the file alone: on every CPU the numbers have no hole that is not a loss row."""
    record(tmp_path / "x.kcap", "/bin/sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); : > /dev/null; done")

    found = info(tmp_path / "x.kcap")

    assert found["events"] > 40_000
    assert [r for r in found["losses"] if r["reason"] == "unexplained"] == []
    assert found["lost_events"] == 0
