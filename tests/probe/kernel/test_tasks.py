"""Tasks are who procfs says they are; descendants are followed without a gap; a reused number is two tasks."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from events.records import FLAG_OBSERVER, FLAG_WATCHED
from events.syscalls import NUMBERS

from .conftest import wait_until

pytestmark = pytest.mark.kernel

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def stat_fields(pid, tid=None):
    """Fields of /proc/PID/stat from the third on: [0] is the state."""
    path = Path(f"/proc/{pid}/task/{tid or pid}/stat")
    return path.read_text().rsplit(")", 1)[1].split()


def test_the_snapshot_agrees_with_procfs(record, helper):
    sleeper = helper("/bin/cat")
    wait_until(lambda: stat_fields(sleeper.pid)[0] == "S", "cat waits for its input")
    recording = record("all")

    recording.drain()

    rows = {r["tid"]: r for r in recording.tasks if r["reason"] == "snapshot"}
    row = rows[sleeper.pid]
    stat = stat_fields(sleeper.pid)
    assert row["start_boot_ns"] // TICK_NS == int(stat[19])  # field 22
    assert (row["tgid"], row["parent_tid"], row["state"]) == (sleeper.pid, os.getpid(), "S")
    assert row["parent_start_boot_ns"] == rows[os.getpid()]["start_boot_ns"]
    assert row["comm"] == "cat" and row["cmdline"] == "/bin/cat" and not row["kthread"]
    assert (row["syscall_nr"], row["syscall_arg0"]) == (NUMBERS["read"], 0)
    assert rows[2]["comm"] == "kthreadd" and rows[2]["kthread"]
    assert rows[os.getpid()]["observer"] and not row["observer"] and row["watched"]


def test_the_snapshot_has_every_thread(record):
    """procfs, read before and after, knows no thread that lived all the while and is not in the snapshot.

    Process 1 is left out: sandboxes hide theirs from BPF.
    """

    def threads():
        found = set()
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and folder.name != "1":
                with contextlib.suppress(OSError):
                    found |= {(int(folder.name), int(t)) for t in os.listdir(folder / "task")}
        return found

    before = threads()
    recording = record("all")
    recording.drain()

    have = {(r["tgid"], r["tid"]) for r in recording.tasks if r["reason"] == "snapshot"}
    assert (before & threads()) - have == set()


def test_a_stopped_child_is_in_the_snapshot_as_stopped(record, helper):
    child = helper("/bin/cat")
    os.kill(child.pid, signal.SIGSTOP)
    wait_until(lambda: stat_fields(child.pid)[0] == "T", "the child stops")
    recording = record("all")

    recording.drain()
    os.kill(child.pid, signal.SIGCONT)

    assert [r["state"] for r in recording.tasks if r["tid"] == child.pid] == ["T"]


def test_descendants_are_followed_from_their_first_call(record, helper):
    """Three generations, forked while recording: each process's first system call is there."""
    shell = helper(
        "/bin/sh", "-c", "read x; for i in 1 2 3 4 5 6 7; do (/bin/true; /bin/sh -c '/bin/true; :'); done; echo done; read y"
    )
    recording = record(f"pid:{shell.pid}")

    assert shell.tell() == "done"
    recording.catch_up()

    forked = {r["tid"] for r in recording.tasks if r["reason"] == "fork" and r["watched"]}
    calls = recording.of("sys_enter") + recording.of("sys_exit")
    assert len(forked) >= 7 * 3
    for tid in forked:
        first = min((c for c in calls if c["by_tid"] == tid), key=lambda c: c["time_mono_ns"], default=None)
        assert first is not None, f"no call of {tid} was recorded"
        assert first["nr"] in (NUMBERS["clone"], NUMBERS["vfork"], NUMBERS["fork"], 435), "the return from its own birth"
    assert {c["by_tgid"] for c in calls} <= forked | {shell.pid}, "only the tree is recorded in detail"


def test_exec_has_the_whole_command_line(record, helper):
    shell = helper("/bin/sh", "-c", "read x; /bin/echo one 'two three' >/dev/null; echo done; read y")
    recording = record(f"pid:{shell.pid}")

    shell.tell()
    recording.catch_up()

    rows = [r for r in recording.tasks if r["reason"] == "exec" and r["comm"] == "echo" and r["watched"]]
    assert [r["cmdline"] for r in rows] == ["/bin/echo one two three"]
    ended = [r for r in recording.tasks if r["reason"] == "exit" and r["tid"] == rows[0]["tid"]]
    assert [(r["exit_code"], r["start_boot_ns"]) for r in ended] == [(0, rows[0]["start_boot_ns"])]


def test_exit_status_and_killing_signal_are_told(record, helper):
    shell = helper("/bin/sh", "-c", "read x; /bin/sh -c 'exit 7'; /bin/sh -c 'kill -9 $$'; echo done; read y")
    recording = record(f"pid:{shell.pid}")

    shell.tell()
    recording.catch_up()

    codes = [r["exit_code"] for r in recording.tasks if r["reason"] == "exit" and r["watched"]]
    assert 7 << 8 in codes and 9 in codes


def test_a_reused_number_is_two_tasks(record):
    """clone3 with set_tid hands out one pid twice."""
    recording = record("all")
    parent = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, check=True)
    tid = int(parent.stdout)

    recording.catch_up()

    births = [r for r in recording.tasks if r["reason"] == "fork" and r["tid"] == tid]
    deaths = [r for r in recording.tasks if r["reason"] == "exit" and r["tid"] == tid]
    assert len(births) >= 2
    assert len({r["start_boot_ns"] for r in births}) == len(births)
    assert {r["start_boot_ns"] for r in births} == {r["start_boot_ns"] for r in deaths}


REUSE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
class Args(ctypes.Structure):
    names = "flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid n cgroup"
    _fields_ = [(n, ctypes.c_uint64) for n in names.split()]
want = os.fork() or os._exit(0)
os.waitpid(want, 0)
for _ in range(2):
    tids = (ctypes.c_int * 1)(want)
    args = Args(exit_signal=17, set_tid=ctypes.addressof(tids), n=1)
    pid = libc.syscall(435, ctypes.byref(args), ctypes.sizeof(args))
    if pid == 0:
        os._exit(0)
    assert pid == want, (pid, want, os.strerror(ctypes.get_errno()))
    os.waitpid(pid, 0)
print(want)
"""


def test_kprobe_itself_is_never_recorded_in_detail_but_named_when_it_runs(record, helper):
    recording = record("all")
    os.stat("/")

    def switched():
        recording.drain()
        return [r for r in recording.of("sched_switch") if r["by_tgid"] == os.getpid()]

    # Waiting sleeps between two drains, so this process does leave the CPU, on a quiet machine too.
    wait_until(lambda: len(switched()) >= 3, "a switch of the observer itself")
    recording.catch_up()

    mine = [
        r for kind in ("sys_enter", "sys_exit", "page_fault_user") for r in recording.of(kind) if r["by_tgid"] == os.getpid()
    ]
    assert mine == []
    assert {r["flags"] for r in switched()} == {FLAG_OBSERVER}


def test_excluded_processes_and_their_children_are_left_out(record, helper):
    server = helper("/bin/sh", "-c", "read x; /bin/true; echo done; read y")
    recording = record("all", exclude=[server.pid])

    server.tell()
    recording.catch_up()

    born = [r for r in recording.tasks if r["reason"] == "fork" and r["parent_tid"] == server.pid]
    assert born and all(r["observer"] and not r["watched"] for r in born)
    assert not [r for r in recording.of("sys_enter") if r["by_tgid"] in {server.pid, born[0]["tgid"]}]


def test_a_name_is_watched_from_its_exec_on(record, helper):
    shell = helper("/bin/sh", "-c", "read x; /bin/true; /bin/uname; read y")
    recording = record("comm:unam?")

    shell.tell()
    recording.catch_up()

    calls = recording.of("sys_enter")
    assert {r["flags"] for r in calls} == {FLAG_WATCHED}
    execs = [r for r in recording.tasks if r["reason"] == "exec" and r["comm"] == "uname" and r["watched"]]
    assert execs and {r["by_tgid"] for r in calls} <= {r["tgid"] for r in recording.tasks if r["watched"]}
    write = NUMBERS["write"]
    assert [r for r in calls if r["nr"] == write and r["by_tgid"] == execs[0]["tgid"]]


def test_nothing_stays_attached_after_sigkill(helper):
    """The kernel forgets every program of a killed probe."""
    probe = helper.python(HOLD)
    ids = [int(i) for i in probe.tell().split()]
    assert len(ids) > 50 and all(program_exists(i) for i in ids[:1])

    os.kill(probe.pid, signal.SIGKILL)

    wait_until(lambda: not any(program_exists(i) for i in ids), "all programs are gone")


HOLD = """
import os, sys
from events.settings import ProbeSettings
from probe.source import KernelSource
source = KernelSource(ProbeSettings(ring_bytes_per_cpu=4096), [])
source.open()
sys.stdin.readline()
ids = []
for fd in os.listdir("/proc/self/fdinfo"):
    try:
        ids += [line.split()[1] for line in open(f"/proc/self/fdinfo/{fd}") if line.startswith("prog_id")]
    except OSError:
        pass
print(*sorted(set(ids)), flush=True)
sys.stdin.readline()
"""


def program_exists(number):
    """Does the kernel know a BPF program of that id (BPF_PROG_GET_FD_BY_ID)?"""
    attr = (ctypes.c_uint32 * 4)(number)
    fd = ctypes.CDLL(None, use_errno=True).syscall(321, 13, ctypes.byref(attr), 16)
    if fd >= 0:
        os.close(fd)
    return fd >= 0
