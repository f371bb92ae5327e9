"""Payloads of real programs: every byte as strace saw it in the same run, every record accounted for, nothing unasked.

Marked `kernel`. strace and the program itself are the truth.
"""

import contextlib
import re
import shutil
import struct
import sys

import pytest

from events.frames import Frame
from events.records import PAYLOAD_CALL, PAYLOAD_ENTRY, PAYLOAD_IMAGE, PAYLOAD_TRUNCATED
from events.settings import ProbeSettings
from events.syscalls import NAMES, NUMBERS
from probe.child import PausedChild
from probe.framing import Framer
from probe.payload import PlannedCall, compile_plan
from probe.source import KernelSource
from probe.watch import Selector

pytestmark = pytest.mark.kernel

PLAN = {
    "read": ((), ("1:ret",)), "write": (("1:a2",), ()), "readv": ((), ("iov",)), "writev": (("iov",), ()),
    "sendmsg": (("msg",), ()), "recvmsg": ((), ("msg",)), "openat": (("1:str",), ()), "getrandom": ((), ("0:ret",)),
    "execve": (("0:str",), ()), "exit_group": ((), ()), "newfstatat": (("1:str",), ("2:144",)), "pipe2": ((), ("0:8",)),
}  # fmt: skip


def plan(*names):
    return [
        PlannedCall(NUMBERS[n], *PLAN[n], at_entry=n in ("execve", "exit_group")) for n in names or PLAN
    ]


class Taken:
    """The payload records of one command, run to its end."""

    def __init__(self, command, calls=(), mask=None, **settings):
        child = PausedChild([str(c) for c in command])
        source = KernelSource(
            ProbeSettings(**{"ring_bytes_per_cpu": 8 << 20} | settings), [Selector.parse(f"pid:{child.pid}")],
            payload=plan(*calls), mask=mask,
        )  # fmt: skip
        with contextlib.closing(source):
            source.open()
            child.release()
            self.status = child.wait()
            self.pid = child.pid
            source.detach()
            self.losses, self.batches = [], []
            for _ in range(3):
                drained = source.drain()
                self.losses += [row for row in drained.losses if row["hop"] == "payload"]
                self.batches += [drained.payload] if drained.payload is not None else []
            self.stats = source.stats()["payload"]
        self.rows = [row for batch in self.batches for row in batch.to_pylist()]

    def of(self, name, kind=PAYLOAD_CALL):
        return [r for r in self.rows if r["nr"] == NUMBERS[name] and r["kind"] == kind]


def regions(row):
    """[(address, bytes)] of a record."""
    out, at, data = [], 0, row["data"]
    while at < len(data):
        address, have, _ = struct.unpack_from("<QII", data, at)
        out.append((address, data[at + 16 : at + 16 + have]))
        at += 16 + (have + 7 & ~7)
    return out


def content(row):
    return b"".join(piece for _, piece in regions(row))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is the truth here: apt-get install strace")
def test_bytes_of_reads_and_writes_are_those_that_strace_saw(tmp_path):
    source = tmp_path / "in"
    source.write_text("".join(f"line {i}\n" for i in range(5000))[:40_000])
    log = tmp_path / "strace.log"
    command = ["dd", "bs=40000", f"if={source}", f"of={tmp_path}/out"]
    strace = ["strace", "-f", "-xx", "-s", "100000", "-e", "trace=read,write", "-o", log]
    taken = Taken([*strace, *command], ["read", "write"])

    line = re.compile(r'^(\d+) +(read|write)\(\d+, "((?:\\x[0-9a-f]{2})*)", \d+\) += (-?\d+)', re.MULTILINE)
    seen = [(int(p), n, bytes.fromhex(t.replace("\\x", "")), int(r)) for p, n, t, r in line.findall(log.read_text())]
    pids = {p for p, *_ in seen}
    # read is recorded by what it gave, write by what it was given
    mine = [(r["tid"], NAMES[r["nr"]], content(r), r["ret"]) for r in taken.rows if r["tid"] in pids and r["ret"] >= 0]
    assert any(len(data) == 40_000 and name == "write" for _, name, data, _ in seen)
    assert [(p, n, len(d), r) for p, n, d, r in mine] == [(p, n, len(d), r) for p, n, d, r in seen]
    assert mine == seen
    assert taken.losses == [] and taken.stats["lost"] == 0


VECTORS = """
import os, socket
a, b = socket.socketpair()
r, w = os.pipe()
os.writev(w, [b"one", b"", b"two-two", b"x" * 5000])
x, y, z = bytearray(2), bytearray(5), bytearray(6000)
assert os.readv(r, [x, y, z]) == 5010
a.sendmsg([b"head|", b"body" * 100], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes([0, 0, 0, 0]))])
data, control, _, _ = b.recvmsg(4096, 64)
assert data == b"head|" + b"body" * 100 and control
"""


def test_vectors_and_messages_are_taken_whole_with_their_control_data():
    taken = Taken([sys.executable, "-c", VECTORS], ["writev", "readv", "sendmsg", "recvmsg"])

    whole = b"onetwo-two" + b"x" * 5000
    assert taken.status == 0
    assert b"".join(p for _, p in regions(taken.of("writev")[-1])[1:]) == whole
    assert b"".join(p for _, p in regions(taken.of("readv")[-1])[1:]) == whole
    for name in ("sendmsg", "recvmsg"):
        record = taken.of(name)[-1]
        assert content(record).endswith(b"head|" + b"body" * 100), name
        assert struct.pack("<QiI", 20, 1, 1)[:16] in content(record), f"{name}: the control message's head"


def test_a_new_program_comes_with_its_arguments_environment_and_random_bytes(monkeypatch):
    monkeypatch.setenv("KPROBE_TEST_MARK", "in the environment")
    taken = Taken(["cat", "/dev/null", "an argument"], ["execve", "exit_group"])

    path = content(taken.of("execve", PAYLOAD_ENTRY)[-1])
    (image,) = taken.of("execve", PAYLOAD_IMAGE)
    stack = content(image)
    assert path.endswith(b"/cat\0")
    assert b"cat\0/dev/null\0an argument\0" in stack and b"KPROBE_TEST_MARK=in the environment\0" in stack
    assert struct.unpack_from("<Q", stack)[0] == 3, "the stack begins with the number of arguments"
    assert [r["arg0"] & 0xFF for r in taken.of("exit_group", PAYLOAD_ENTRY)] == [taken.status]


def test_what_does_not_fit_is_cut_and_says_so():
    taken = Taken([sys.executable, "-c", "import os; os.read(os.open('/dev/zero', 0), 1 << 20)"], ["read"])

    record = next(r for r in taken.of("read") if r["ret"] == 1 << 20)
    assert record["flags"] & PAYLOAD_TRUNCATED
    assert 60_000 < len(record["data"]) <= 65536
    assert taken.stats["truncated"] == sum(r["flags"] & PAYLOAD_TRUNCATED for r in taken.rows)


def test_a_full_ring_drops_and_every_dropped_record_is_accounted_for():
    text = "import os\nfd = os.open('/dev/zero', 0)\nfor _ in range(4000): os.read(fd, 4000)"
    taken = Taken([sys.executable, "-c", text], ["read"], payload_ring_bytes_per_cpu=1 << 18)

    lost = sum(row["count"] for row in taken.losses)
    assert lost > 1000, "the test did not fill the ring"
    assert len(taken.rows) + lost == taken.stats["produced"]
    for cpu in {row["cpu"] for row in taken.rows}:
        seen = {r["seq"] for r in taken.rows if r["cpu"] == cpu}
        gone = {s for x in taken.losses if x["cpu"] == cpu for s in range(x["first_seq"], x["last_seq"] + 1)}
        assert seen | gone == set(range(len(seen) + len(gone))) and not seen & gone


def test_a_mask_sees_the_bytes_before_anything_is_framed():
    def mask(pieces):
        return [piece.replace(b"4111111111111111", b"411111******1111") for piece in pieces]

    taken = Taken(["echo", "card 4111111111111111"], ["write", "execve"], mask=mask)

    framer = Framer(node="n", boot_id="b" * 32, recording="r")
    frames = [Frame.decode(s.data) for batch in taken.batches for s in framer.payload(batch)]
    rows = [row for frame in frames for row in frame.batch.to_pylist()]
    assert [row["seq"] for row in rows] == [row["seq"] for row in taken.rows]
    everything = b"".join(row["data"] for row in rows)
    assert b"card 411111******1111\n" in everything and b"4111111111111111" not in everything


def test_the_frames_of_a_large_batch_hold_every_record_once():
    taken = Taken(["dd", "if=/dev/urandom", "of=/dev/null", "bs=20000", "count=100"], ["read"])

    framer = Framer(node="n", boot_id="b" * 32, recording="r")
    sealed = [s for batch in taken.batches for s in framer.payload(batch)]
    rows = [row for s in sealed for row in Frame.decode(s.data).batch.to_pylist()]
    assert rows == taken.rows and len(rows) >= 100
    assert max(len(s.data) for s in sealed) <= 900_000 and len(sealed) > 2


def test_words_that_the_kernel_side_cannot_take_are_named():
    _, unknown = compile_plan([PlannedCall(NUMBERS["recvmmsg"], (), ("mmsg",)), PlannedCall(NUMBERS["read"], (), ("1:ret",))])

    assert unknown == {NUMBERS["recvmmsg"]: ["mmsg"]}
