"""Programs recorded with BPF alone run again with their inputs deleted and their peers gone; the native run is the truth.

Marked `kernel`. On failure the recording stays in pytest's folder for the test; `kprobe replay run DIR` repeats it.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from events.syscalls import NUMBERS
from probe.capture import CaptureReader
from replay import log, passive
from replay.log import Kind

pytestmark = pytest.mark.kernel

KPROBE = [sys.executable, "-m", "cli.main"]
PYTHON = os.path.realpath(sys.executable)


@pytest.fixture
def kprobe(request, tmp_path):
    """Runs kprobe, its output in pipes; `kprobe.record(command)` gives what the program itself printed, and its status."""

    def run(*args):
        words = [*KPROBE, *map(str, args)]
        return subprocess.run(words, cwd=request.config.rootpath, capture_output=True, check=False, timeout=300)

    def record(*command):
        return run("replay", "record", "--passive", "-o", tmp_path / "rec", "--", *command)

    def replay():
        told = run("replay", "run", "--json", tmp_path / "rec")
        shown = run("replay", "run", tmp_path / "rec")
        return json.loads(told.stdout), shown

    run.record, run.replay = record, replay
    return run


C_PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <fcntl.h>
#include <time.h>
#include <sys/stat.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <netinet/in.h>
int main(int argc, char **argv) {
  char buf[4096], other[16]; struct stat st; unsigned r; int fd = open(argv[1], O_RDONLY);
  struct iovec v[2] = {{other, 5}, {buf, 4000}};
  int n = readv(fd, v, 2); fstat(fd, &st);
  char *m = mmap(0, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  getrandom(&r, sizeof r, 0);
  printf("read %d size %ld mapped %.5s random %u mtime %ld\n", n, (long)st.st_size, m, r, (long)st.st_mtime);
  struct timespec a, b;
  clock_gettime(CLOCK_MONOTONIC, &a); usleep(20000); clock_gettime(CLOCK_MONOTONIC, &b);
  long us = (b.tv_sec - a.tv_sec) * 1000000 + (b.tv_nsec - a.tv_nsec) / 1000;
  printf("slept %s\n", us >= 20000 && us < 2000000 ? "as asked" : "wrong");
  int s = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (connect(s, (void *)&in, sizeof in)) { perror("connect"); return 2; }
  send(s, "hello", 5, 0); n = recv(s, buf, sizeof buf, 0);
  printf("peer said %.*s, I am %d\n", n, buf, getpid());
  return 3;
}
"""


def test_a_c_program_runs_again_without_its_input_and_its_peer(kprobe, tmp_path):
    program, source = tmp_path / "program", tmp_path / "input"
    subprocess.run(["cc", "-O2", "-x", "c", "-o", program, "-"], input=C_PROGRAM.encode(), check=True)
    source.write_text("some text that is mapped, too\n")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"answer to " + peer.recv(100))

        threading.Thread(target=answer, daemon=True).start()
        native = kprobe.record(program, source, server.getsockname()[1])
    source.unlink()
    program.unlink()

    document, shown = kprobe.replay()

    assert native.returncode == 3 and b"peer said answer to hello" in native.stdout and b"slept as asked" in native.stdout
    assert (shown.stdout, shown.returncode) == (native.stdout, 3), shown.stderr
    assert document["identical"] and document["divergence"] is None
    assert (document["schema"], document["fidelity"]) == ("kprobe.replay/1", "F2")
    assert document["clock_bound_ns"] > 0 and document["derived_clock_reads"] > 0


SCRIPTS = {
    "files-random-hash": """
        import hashlib, os, random, sys
        for name in sorted(os.listdir(sys.argv[1])):
            data = open(os.path.join(sys.argv[1], name), "rb").read()
            print(name, len(data), hashlib.sha256(data).hexdigest()[:12])
        print(random.random(), hash("a string"), sorted({"x", "y", "z"}), list({"x", "y", "z"}), os.urandom(4).hex())
        print(os.getpid(), os.environ["MARK"], os.getcwd())
    """,
    "big-reads-and-seeks": """
        import sys
        with open(sys.argv[1] + "/big", "rb") as f:
            whole = f.read()
            f.seek(70_000)
            print(len(whole), whole[-20:], f.read(10), f.tell())
    """,
    "sqlite": """
        import sqlite3
        db = sqlite3.connect(":memory:")
        db.execute("create table t (a int, b text)")
        db.executemany("insert into t values (?, ?)", [(i, str(i) * 3) for i in range(1000)])
        print(db.execute("select sum(a), max(b) from t").fetchone())
    """,
    "select-and-timeouts": """
        import os, select, socket, time
        a, b = socket.socketpair()
        a.settimeout(0.05)
        try:
            a.recv(1)
        except TimeoutError:
            print("timed out")
        poller = select.epoll(); poller.register(b, select.EPOLLIN)
        a.send(b"x")
        print(poller.poll(1) == [(b.fileno(), select.EPOLLIN)], b.recv(10))
        began = time.monotonic(); time.sleep(0.03)
        print(0.03 <= time.monotonic() - began < 5, time.time() > 1.6e9)
    """,
    "signals": """
        import os, signal, time
        got = []
        signal.signal(signal.SIGALRM, lambda *_: got.append("alarm"))
        signal.signal(signal.SIGUSR1, lambda *_: got.append("user"))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGUSR1)
        print(got)
    """,
    "killed": """
        import os, signal, sys
        print("before"); sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGTERM)
        print("after")
    """,
    "exception": """
        import sys
        sys.stdout.write("out\\n")
        raise SystemExit("message to stderr")
    """,
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_python_script_runs_again_with_its_inputs_deleted(kprobe, tmp_path, monkeypatch, name):
    monkeypatch.setenv("MARK", "set at recording")
    inputs, script = tmp_path / "inputs", tmp_path / "script.py"
    inputs.mkdir()
    (inputs / "one").write_text("1\n")
    (inputs / "big").write_bytes(bytes(range(256)) * 500)
    script.write_text(textwrap.dedent(SCRIPTS[name]))

    native = kprobe.record(PYTHON, script, inputs)
    for path in [*inputs.iterdir(), script]:
        path.unlink()
    monkeypatch.setenv("MARK", "another")
    document, shown = kprobe.replay()

    assert native.stdout, native.stderr
    assert shown.stdout == native.stdout, (shown.stderr, document)
    assert shown.returncode == native.returncode
    assert document["identical"], document
    assert document["exit_status"] == native.returncode


def test_ten_replays_are_one(kprobe, tmp_path):
    script = tmp_path / "script.py"
    clocks = "time.time_ns(), time.monotonic_ns(), random.random(), time.perf_counter_ns()"
    script.write_text(f"import time, random\nprint({clocks})\n")
    native = kprobe.record(PYTHON, script)

    runs = [kprobe("replay", "run", "--json", tmp_path / "rec") for _ in range(10)]
    documents = [json.loads(run.stdout) for run in runs]

    assert len({run.stdout for run in runs}) == 1
    # Clocks are derived, so what it printed of them differs from the native run, and the report says so.
    assert not documents[0]["identical"] and documents[0]["divergence"]["class"] == "payload"
    shown = kprobe("replay", "run", tmp_path / "rec")
    mine, theirs = shown.stdout.split(), native.stdout.split()
    assert mine[2] == theirs[2], "the random number comes from the recording"
    for at in (0, 1, 3):
        assert abs(int(mine[at]) - int(theirs[at])) <= documents[0]["clock_bound_ns"]


REFUSED = {
    "child process": "import os\nif os.fork() == 0: os._exit(0)\nos.wait()",
    "shared and writable": "import mmap\nf = open('FILE', 'r+b'); mmap.mmap(f.fileno(), 10)",
    "changed since the recording began": "import mmap\nf = open('FILE', 'w+b'); f.write(b'x' * 10); f.flush(); "
    "mmap.mmap(f.fileno(), 10, prot=mmap.PROT_READ)",
    "bytes that it gave the program were cut": "import os\nos.read(os.open('/dev/urandom', 0), 200_000)",
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_proved_is_refused_with_its_reason(kprobe, tmp_path, reason):
    (tmp_path / "file").write_bytes(b"0123456789")

    kprobe.record(PYTHON, "-c", REFUSED[reason].replace("FILE", str(tmp_path / "file")))
    document, shown = kprobe.replay()

    assert not document["identical"] and document["fidelity"] == "F0"
    assert reason in json.dumps(document), document
    assert shown.returncode == 3 and shown.stdout == b""


def test_a_mapped_file_that_is_changed_after_the_recording_keeps_its_recorded_bytes(kprobe, tmp_path):
    source = tmp_path / "file"
    source.write_bytes(b"0123456789")
    time.sleep(0.01)
    text = "import mmap, sys\nf = open(sys.argv[1], 'rb'); print(mmap.mmap(f.fileno(), 10, prot=mmap.PROT_READ)[:])"
    native = kprobe.record(PYTHON, "-c", text, source)
    source.write_bytes(b"ABCDEFGHIJ")

    document, shown = kprobe.replay()

    assert (native.stdout, shown.stdout) == (b"b'0123456789'\n",) * 2
    assert document["identical"]


def test_on_another_machine_no_file_is_taken_for_what_was_not_captured(kprobe, tmp_path, monkeypatch):
    kprobe.record(PYTHON, "-c", "print(1)")
    with CaptureReader(tmp_path / "rec" / "capture.kcap") as reader:
        frames = list(reader.frames())
    monkeypatch.setattr(passive, "read_boot_id", lambda: "0" * 32)

    document = passive.import_frames(frames, tmp_path / "elsewhere")

    assert document["fidelity"] == "F0"
    assert "this is not the boot that it was recorded in" in json.dumps(document)


def test_a_passive_recording_cannot_tell_of_a_fix(kprobe, tmp_path):
    kprobe.record(PYTHON, "-c", "raise SystemExit(3)")

    answer = json.loads(kprobe("replay", "verify", "--json", "--program", "/bin/true", tmp_path / "rec").stdout)

    assert (answer["verdict"], answer["identical"]) == ("cannot_tell", False)
    assert "passive" in answer["reasons"][0]


def test_lost_payload_records_refuse_the_recording(kprobe, tmp_path, monkeypatch):
    monkeypatch.setenv("KPROBE_PROBE__PAYLOAD_RING_BYTES_PER_CPU", str(1 << 18))
    text = "import os\nfd = os.open('/dev/zero', 0)\nfor _ in range(5000): os.read(fd, 8000)"

    kprobe.record(PYTHON, "-c", text)
    document, _ = kprobe.replay()

    assert document["fidelity"] == "F0" and not document["identical"]
    assert "payload records were lost" in json.dumps(document)


def test_the_log_of_a_passive_recording_is_the_log_of_a_traced_one(kprobe, tmp_path):
    """Same program, both recorders: the same calls with the same bytes, but for memory calls and clocks."""
    source = tmp_path / "in"
    source.write_text("text\n" * 1000)
    kprobe.record("head", "-c", "2000", source)
    kprobe("replay", "record", "-o", tmp_path / "traced", "--", "head", "-c", "2000", source)

    def calls(folder):
        own = passive.MEMORY_CALLS | {NUMBERS[n] for n in ("mmap", "clock_gettime", "prlimit64", "getrandom")}
        events = [e for e in log.LogReader(folder) if e.kind in (Kind.CALL, Kind.LEAVE) and e.nr not in own]
        return [(e.kind, e.nr, e.result, e.payload, _bytes(e)) for e in events]

    assert calls(tmp_path / "rec") == calls(tmp_path / "traced")


def _bytes(event):
    """What the call gave, without what differs from run to run: inodes and times of the pipes that stand for the output."""
    return [p[16:72] if len(p) == 144 else p for p in event.pieces]


def test_a_recording_is_private_and_its_capture_is_kept(kprobe, tmp_path):
    kprobe.record("true")

    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "rec").iterdir() if path.is_file()}
    assert set(modes) == {"capture.kcap", "events.zst", "passive.bin", "recording.json"}
    assert set(modes.values()) == {0o600}


def test_import_says_why_a_capture_without_payloads_is_no_recording(kprobe, tmp_path):
    kprobe("record", "-o", tmp_path / "plain.kcap", "--", "true")

    told = kprobe("replay", "import", tmp_path / "plain.kcap", "-o", tmp_path / "rec")

    assert told.returncode == 2
    assert b"kprobe record --payload -- CMD" in told.stderr


def test_a_snapshot_answers_from_the_longest_region_and_remembers_what_is_missing():
    def region(address, data):
        return struct.pack("<QII", address, len(data), len(data)) + data + bytes(-len(data) % 8)

    snapshot = passive.Snapshot(region(1000, b"abc") + region(1000, b"abcdefgh") + region(5000, b"zz"))

    assert (snapshot.read(1002, 4), snapshot.missing) == (b"cdef", False)
    assert (snapshot.read(5001, 4), snapshot.missing) == (b"z", True)
