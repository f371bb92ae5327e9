"""Record equals replay, with inputs changed or gone; the native run is the truth.

On failure the recording stays in pytest's folder for the test; `kprobe replay run DIR` repeats it.
"""

import json
import subprocess
import sys

import pytest

KPROBE = [sys.executable, "-m", "cli.main", "replay"]


def _kprobe(*args, cwd):
    return subprocess.run([*KPROBE, *map(str, args)], cwd=cwd, capture_output=True, check=False, timeout=100)


def _root(request):
    return request.config.rootpath


PROGRAMS = {
    "echo": ["echo", "hello"],
    "exit-status": ["bash", "-c", "echo out; echo err >&2; exit 3"],
    "pipeline": ["bash", "-c", "seq 2000 | sort -R | head -3 | cat"],
    "background": ["bash", "-c", "(sleep 0.05; kill -USR1 $$) & trap 'echo got' USR1; wait; wait; echo end"],
    "killed": ["bash", "-c", "echo before; kill -TERM $$"],
    "time-and-random": ["perl", "-e", "print time, ' ', rand(), qq(\\n)"],
    "threads": [
        sys.executable, "-c",
        "import threading,random,time\nout=[]\n"
        "def w(i):\n for _ in range(5): out.append((i,random.random())); time.sleep(0.001)\n"
        "ts=[threading.Thread(target=w,args=(i,)) for i in range(3)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]; print(out, time.time())",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", PROGRAMS.values(), ids=PROGRAMS)
def test_replay_shows_what_the_recording_showed(command, tmp_path, request):
    recorded = _kprobe("record", "-o", tmp_path / "rec", "--", *command, cwd=_root(request))
    replayed = _kprobe("run", tmp_path / "rec", cwd=_root(request))

    assert (replayed.stdout, replayed.stderr, replayed.returncode) == (recorded.stdout, recorded.stderr, recorded.returncode)
    assert recorded.stdout


@pytest.mark.slow
def test_replay_needs_no_input_files(tmp_path, request):
    source = tmp_path / "in.txt"
    source.write_text("17 items\n")
    recorded = _kprobe("record", "-o", tmp_path / "rec", "--", "cat", source, cwd=_root(request))
    source.unlink()

    document = json.loads(_kprobe("run", tmp_path / "rec", "--json", cwd=_root(request)).stdout)

    assert recorded.stdout == b"17 items\n"
    assert (document["identical"], document["divergence"], document["exit_status"]) == (True, None, 0)


@pytest.mark.slow
def test_a_cut_recording_is_never_identical(tmp_path, request):
    _kprobe("record", "-o", tmp_path / "rec", "--", "echo", "hello", cwd=_root(request))
    log = tmp_path / "rec" / "events.zst"
    log.write_bytes(log.read_bytes()[:-40])

    document = json.loads(_kprobe("run", tmp_path / "rec", "--json", cwd=_root(request)).stdout)

    assert (document["identical"], document["divergence"]["class"]) == (False, "truncated_log")


@pytest.mark.slow
def test_verify_refuses_what_it_cannot_prove(tmp_path, request):
    program = tmp_path / "fails.sh"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    patched = tmp_path / "patched.sh"
    patched.write_text("#!/bin/sh\nexit 0\n")
    patched.chmod(0o755)
    _kprobe("record", "-o", tmp_path / "rec", "--", program, cwd=_root(request))

    same = json.loads(_kprobe("verify", tmp_path / "rec", "--program", program, "--json", cwd=_root(request)).stdout)
    other = json.loads(_kprobe("verify", tmp_path / "rec", "--program", patched, "--json", cwd=_root(request)).stdout)

    assert same["verdict"] == "not_fixed"
    assert other["verdict"] == "cannot_tell"
    assert other["reasons"]


COPIED_OUTPUT = """
import ctypes, os
libc = ctypes.CDLL(None)
copy = libc.syscall(438, os.pidfd_open(os.getpid()), 1, 0)  # pidfd_getfd
os.write(copy, b"through a copy\\n")
"""


@pytest.mark.slow
def test_output_through_a_copied_descriptor_is_shown(tmp_path, request):
    """Standard output copied by pidfd_getfd: left out, the replay would be silent and yet `identical`."""
    recorded = _kprobe("record", "-o", tmp_path / "rec", "--", sys.executable, "-c", COPIED_OUTPUT, cwd=_root(request))
    replayed = _kprobe("run", tmp_path / "rec", cwd=_root(request))

    assert recorded.stdout == replayed.stdout == b"through a copy\n"
    assert replayed.returncode == 0
