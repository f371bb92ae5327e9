"""The passive recorder: from the payload stream of the probe to a recording that can run again.

What: `capture_plan` says which calls and bytes the probe has to take; `import_frames` turns the frames of such a capture into a
recording folder (the same log as the traced recorder's, see `log`), and states its level and why it is not higher.
The program was not touched: its clock readings (vDSO), the memory it mapped, and what threads said to each other in memory
never came by. So a passive recording is F2 at most: clocks are derived at replay, memory calls are made for real.
`passive.bin` beside the log holds, per event, when the call began and what of its bytes is missing (`TIMES`).

Guarantees: what was lost, cut or unreadable is never made up: it comes from the unchanged file if there is one, else the
recording is refused, by name of the call. A file counts as unchanged if its inode was not touched since the recording began.
Fails: InputError for a capture without payloads, or one that does not begin with the program's exec.
"""

import json
import os
import platform
import resource
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from events.errors import InputError
from events.frames import Frame
from events.identity import read_boot_id
from events.kinds import BY_NAME
from events.records import PAYLOAD_CALL, PAYLOAD_ENTRY, PAYLOAD_IMAGE, PAYLOAD_TRUNCATED, PAYLOAD_UNREADABLE
from events.syscalls import NUMBERS
from replay import log, syscalls
from replay.fds import FdTable, follow
from replay.log import Kind
from replay.recorder import image_successor
from replay.tracee import AT_RANDOM, auxiliary_vector

__all__ = ["TIMES", "capture_plan", "import_frames", "initial_stack", "start_of"]

# Never compared with the log and made for real at replay: their results are the replaying process's own.
MEMORY_CALLS: Final = frozenset(
    NUMBERS[n]
    for n in (
        "brk", "mremap", "futex", "set_tid_address", "futex_waitv", "sched_yield",
        "rt_sigprocmask", "rt_sigreturn",  # of the process alone, and too many to record
    )
)  # fmt: skip
_MMAP, _EXECVE, _EXECVEAT = NUMBERS["mmap"], NUMBERS["execve"], NUMBERS["execveat"]
_LEAVES: Final = {NUMBERS["exit"], NUMBERS["exit_group"]}
_CLONES: Final = {NUMBERS[n] for n in ("fork", "vfork", "clone", "clone3")}
_OPENS: Final = {NUMBERS[n] for n in ("open", "openat", "openat2", "creat")}
_READS: Final = {NUMBERS["read"]: False, NUMBERS["pread64"]: True}
_ABSENT_BUT_TOLD: Final = ("io_uring_setup", "io_setup", "userfaultfd", "perf_event_open", "memfd_secret")
# What the kernel writes and the table of models leaves to recorder and player, and the arguments of clone3.
_MORE_OUTPUTS: Final[Mapping[str, tuple[str, ...]]] = {"sched_getaffinity": ("2:ret",), "prctl": ("1:16",)}
_MORE_INPUTS: Final[Mapping[str, tuple[str, ...]]] = {"clone3": ("0:88",)}
_PRCTL_WRITES: Final = {2: 4, 16: 16, 5: 4, 9: 4, 11: 4, 25: 4, 19: 4, 37: 4, 40: 8}
_RESTARTS: Final = range(-516, -511)
_SA_RESTART: Final = 0x10000000
_MAP_SHARED, _MAP_ANONYMOUS, _PROT_WRITE = 1, 0x20, 2
_THREAD_FLAG: Final = 0x10000

INPUT_MISSING: Final = 1  # flags of TIMES: what the call read is known in part only, or not at all
TIMES: Final = np.dtype([("entry_ns", "<i8"), ("flags", "<i8")])

Plan = tuple[int, tuple[str, ...], tuple[str, ...], bool]


def capture_plan() -> list[Plan]:
    """(number, inputs, outputs, at entry) of every call that a passive recording needs, in the words of the models."""
    plan: list[Plan] = []
    for model in syscalls.MODELS.values():
        if model.kind == "allow" or (model.kind == "absent" and model.name not in _ABSENT_BUT_TOLD):
            continue
        if model.nr in MEMORY_CALLS:
            continue
        inputs = (*model.inputs, *_MORE_INPUTS.get(model.name, ()))
        outputs = (*model.outputs, *_MORE_OUTPUTS.get(model.name, ()))
        plan.append((model.nr, inputs, outputs, model.nr in _LEAVES or model.nr in (_EXECVE, _EXECVEAT)))
    return plan


def start_of(command: Sequence[str], pid: int) -> dict[str, Any]:
    """What the process `pid` starts with that no system call tells: for the session document of the capture."""
    fds = {}
    for entry in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
        try:
            fds[entry] = os.readlink(f"/proc/{pid}/fd/{entry}")
        except OSError:
            continue
    return {
        "command": list(command), "pid": pid, "cwd": os.readlink(f"/proc/{pid}/cwd"), "fds": fds,
        "stack_limit": list(resource.prlimit(pid, resource.RLIMIT_STACK)), "machine": platform.machine(),
        "kernel": platform.release(), "cpu_model": _cpu_model(),
    }  # fmt: skip


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


class Snapshot:
    """The memory that one payload record tells of; what it does not tell reads short, and is remembered as missing."""

    def __init__(self, data: bytes) -> None:
        self.regions: list[tuple[int, bytes]] = []
        self.missing = False
        at = 0
        while at + 16 <= len(data):
            address, have, _ = struct.unpack_from("<QII", data, at)
            self.regions.append((address, data[at + 16 : at + 16 + have]))
            at += 16 + (have + 7 & ~7)

    def read(self, address: int, length: int, /) -> bytes:
        """Bytes at an address; the longest region that holds it answers."""
        best = b""
        for start, piece in self.regions:
            if start <= address < start + len(piece):
                found = piece[address - start : address - start + length]
                best = found if len(found) > len(best) else best
        if len(best) < length:
            self.missing = True
        return best


def initial_stack(row: Mapping[str, Any]) -> tuple[int, bytes]:
    """(address, bytes) of the stack with which a program began; pages that nobody had touched are zero."""
    regions = [r for r in Snapshot(row["data"]).regions if r[1]]
    if not regions:
        raise InputError("the program's initial stack was not captured: record again")
    top = regions[0][0]
    stack = bytearray(regions[-1][0] + len(regions[-1][1]) - top)
    for address, piece in regions:
        stack[address - top : address - top + len(piece)] = piece
    return top, bytes(stack)


@dataclass(slots=True)
class Image:
    """A program start, read from its initial stack."""

    argv: list[bytes]
    environment: dict[bytes, bytes]
    random: bytes

    @classmethod
    def read(cls, top: int, stack: bytes) -> "Image":
        """Arguments, environment and the 16 random bytes. Raises InputError if the stack was not captured whole."""

        def text(address: int) -> bytes:
            end = stack.find(b"\0", address - top)
            if not 0 <= address - top < len(stack) or end < 0:
                raise InputError("the program's initial stack was not captured whole: record again")
            return stack[address - top : end]

        padded = stack + bytes(-len(stack) % 8)
        words = struct.unpack(f"<{len(padded) // 8}Q", padded)
        count = words[0]
        argv = [text(a) for a in words[1 : 1 + count]]
        strings = []
        for address in words[2 + count :]:
            if not address:
                break
            strings.append(text(address))
        random = next((v for _, kind, v in auxiliary_vector(padded) if kind == AT_RANDOM), 0)
        return cls(argv, dict(s.partition(b"=")[::2] for s in strings), stack[random - top : random - top + 16])


@dataclass(slots=True)
class _Open:
    """An open file: shared by duplicates of its descriptor."""

    path: str
    offset: int = 0


@dataclass(slots=True)
class _Thread:
    index: int
    table: FdTable
    tgid: int
    held: dict[str, Any] | None = None  # an interrupted call whose end is not settled yet
    entered: dict[str, Any] | None = None  # an execve on its way
    dead: bool = False


@dataclass(slots=True)
class _Capture:
    """What is needed of a capture, in the order of time."""

    start: dict[str, Any]
    rows: list[dict[str, Any]]
    exits: dict[int, tuple[int, int]]  # tid -> time, exit code
    signals: list[tuple[int, int, int, int, int, int]]  # time, tid, number, code, handler, flags
    lost: int
    clocks: dict[str, int]  # real and boot time less monotonic time
    began_real_ns: int
    boot_id: str


def read_capture(frames: Iterable[Frame]) -> _Capture:
    """Collect payload rows, exits and signals. Raises InputError for a capture that has no payloads."""
    start: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    exits: dict[int, tuple[int, int]] = {}
    signals: list[tuple[int, int, int, int, int, int]] = []
    lost, began, boot_id, clocks = 0, 0, "", dict[str, int]()
    for frame in frames:
        if frame.kind == "session/1" and "start" in frame.body and not start:
            start = dict(frame.body["start"])
            clocks["real_less_mono_ns"] = frame.clocks.real_ns - frame.clocks.mono_ns
            clocks["boot_less_mono_ns"] = frame.clocks.boot_ns - frame.clocks.mono_ns
            began, boot_id = frame.clocks.real_ns, frame.boot_id
        elif frame.kind == "payload/1":
            rows += frame.batch.to_pylist()
        elif frame.kind == "losses/1":
            lost += sum(r["count"] or 1 for r in frame.batch.to_pylist() if r["hop"] in ("payload", "capture"))
        elif frame.kind == "events/1":
            _collect_events(frame, exits, signals)
    if not start or not rows:
        raise InputError("this capture has no payloads from a program's start: record it with kprobe record --payload -- CMD")
    first: dict[int, int] = {}
    for row in rows:
        first[row["tid"]] = min(row["time_mono_ns"], first.get(row["tid"], row["time_mono_ns"]))
    # A new thread may have made calls before the clone that made it returned: the clone comes first all the same.
    for row in rows:
        if row["nr"] in _CLONES and row["ret"] in first and row["ret"] > 0:
            row["time_mono_ns"] = min(row["time_mono_ns"], first[row["ret"]] - 1)
    rows.sort(key=lambda r: (r["time_mono_ns"], r["cpu"], r["seq"]))
    return _Capture(start, rows, exits, sorted(signals), lost, clocks, began, boot_id)


def _collect_events(
    frame: Frame, exits: dict[int, tuple[int, int]], signals: list[tuple[int, int, int, int, int, int]]
) -> None:
    columns = frame.events()
    for name in ("sched_process_exit", "signal_deliver"):
        kind = BY_NAME[name]
        for i in np.flatnonzero(columns["kind"] == kind.number).tolist():
            a0, a1, a2, a3, a4 = (int(columns[f"a{n}"][i]) for n in range(5))
            values = kind.decode((a0, a1, a2, a3, a4))
            tid, time = int(columns["tid"][i]), int(columns["time_mono_ns"][i])
            if name == "sched_process_exit":
                exits[tid] = time, values["exit_code"]
            else:
                signals.append((time, tid, values["sig"], values["code"], values["sa_handler"], values["sa_flags"]))


def import_frames(frames: Iterable[Frame], folder: Path) -> dict[str, Any]:
    """Write the recording that the capture amounts to; returns its meta document."""
    capture = read_capture(frames)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the recording folder {folder}: {error.strerror}") from error
    if (folder / "recording.json").exists() or (folder / "events.zst").exists():
        raise InputError(f"{folder} holds a recording already: name a new folder, so that no recording is overwritten")
    return _Importer(capture, folder).run()


class _Importer:
    """One pass over the rows of one program."""

    def __init__(self, capture: _Capture, folder: Path) -> None:
        self.capture, self.folder = capture, folder
        self.writer = log.LogWriter(folder)
        self.blobs = log.BlobStore(folder)
        self.threads: dict[int, _Thread] = {}
        self.times: list[tuple[int, int]] = []
        self.refused: list[str] = []
        self.notes: set[str] = set()
        self.files: dict[str, str] = {}
        self.opens: dict[int, _Open] = {}
        self.calls = 0
        self.t0_ns = 0
        self.meta: dict[str, Any] = {}
        self.signals = list(capture.signals)
        self.cwd = str(capture.start["cwd"])

    def run(self) -> dict[str, Any]:
        """Import everything."""
        root = int(self.capture.start["pid"])
        pending: dict[str, Any] | None = None
        if self.capture.lost:
            self._refuse(f"{self.capture.lost} payload records were lost: a larger probe.payload_ring_bytes_per_cpu may help")
        for row in self.capture.rows:
            if not self.threads:  # before the program's exec there is only the recorder's own child
                if row["tid"] == root and row["nr"] == _EXECVE:
                    pending = row if row["kind"] == PAYLOAD_ENTRY else pending
                    if row["kind"] == PAYLOAD_IMAGE and pending is not None:
                        self._begin(root, pending, row)
                continue
            if self._known(row):
                self._row(self.threads[row["tid"]], row)
        if not self.threads:
            raise InputError("the capture does not hold the program's exec: record it with kprobe record --payload -- CMD")
        self._end()
        self.writer.close()
        np.array(self.times, TIMES).tofile(self.folder / "passive.bin")
        (self.folder / "passive.bin").chmod(0o600)
        self._finish_meta(root)
        return self.meta

    def _known(self, row: dict[str, Any]) -> bool:
        if row["tid"] in self.threads:
            return True
        known = row["tgid"] in {t.tgid for t in self.threads.values()}
        child = "a child process: a passive recording is of one process"
        self._refuse("a thread whose birth was not recorded" if known else child)
        return False

    def _refuse(self, reason: str) -> None:
        if reason not in self.refused:
            self.refused.append(reason)

    # ---- events

    def _add(self, kind: int, thread: _Thread, time: int, entry: int, flags: int = 0, **more: Any) -> None:
        self.writer.add(kind, thread.index, time_ns=max(0, time - self.t0_ns), **more)
        self.times.append((max(0, entry - self.t0_ns), flags))

    def _begin(self, root: int, entry: dict[str, Any], row: dict[str, Any]) -> None:
        self.t0_ns = int(entry["time_mono_ns"])
        table = FdTable()
        for fd, target in self.capture.start["fds"].items():
            if int(fd) > 2:
                table.labels[int(fd)] = f"inherited:{target}"
        self.threads[root] = thread = _Thread(0, table, int(row["tgid"]))
        path, image = self._exec(thread, entry, row)
        self.meta = {
            "schema": log.SCHEMA, "recorder": "passive", "command": [os.fsdecode(a) for a in image.argv],
            "exec_path": path, "program": os.path.abspath(os.path.join(self.cwd, path)), "cwd": self.cwd,
            "environment": {os.fsdecode(k): os.fsdecode(v) for k, v in image.environment.items()},
            "stack_limit": self.capture.start["stack_limit"], "machine": self.capture.start["machine"],
            "kernel": self.capture.start["kernel"], "cpu_model": self.capture.start["cpu_model"],
            "started_real_ns": self.t0_ns + self.capture.clocks["real_less_mono_ns"],
        }  # fmt: skip

    def _exec(self, thread: _Thread, entry: dict[str, Any], row: dict[str, Any]) -> tuple[str, Image]:
        path = os.fsdecode(syscalls.c_string(Snapshot(entry["data"]), entry["arg0"]))
        top, stack = initial_stack(row)
        image = Image.read(top, stack)
        layout = {
            "images": self._images(path), "stack_top": top, "entry": 0, "cwd": self.cwd, "random": image.random.hex(),
            "argv": [os.fsdecode(a) for a in image.argv], "stack_limit": self.capture.start["stack_limit"],
            "environment": {os.fsdecode(k): os.fsdecode(v) for k, v in image.environment.items()},
        }  # fmt: skip
        args = tuple(int(entry[f"arg{i}"]) for i in range(6))
        self._add(
            Kind.EXEC, thread, row["time_mono_ns"], entry["entry_mono_ns"], nr=_EXECVE, args=args,
            payload=os.fsencode(path), pieces=[json.dumps(layout).encode(), stack],
        )  # fmt: skip
        thread.table.after_exec()
        return path, image

    def _images(self, path: str) -> list[list[str]]:
        """[path, hash] of program, interpreter, loader: as they lie on the disk, if nobody touched them since."""
        found: dict[str, str] = {}
        for _ in range(5):
            absolute = path if path.startswith("/") else os.path.join(self.cwd, path)
            fd = self._unchanged(absolute, "program")
            if fd < 0:
                break
            try:
                found[absolute] = self.blobs.add_fd(fd)
                following = image_successor(fd)
            finally:
                os.close(fd)
            if following is None:
                break
            path = following
        return [list(item) for item in found.items()]

    def _unchanged(self, path: str, what: str) -> int:
        """A descriptor of a file whose inode was not touched since the recording began; else -1, and a refusal.

        On another machine a file of that name may be another file with an old inode: there nothing is taken.
        """
        if self.capture.boot_id != read_boot_id():
            self._refuse(f"{what} {path}: its bytes were not captured, and this is not the boot that it was recorded in")
            return -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._refuse(f"{what} {path}: its bytes were not captured, and it cannot be read now ({error.strerror})")
            return -1
        info = os.fstat(fd)
        if max(info.st_ctime_ns, info.st_mtime_ns) >= self.capture.began_real_ns:
            self._refuse(f"{what} {path}: its bytes were not captured, and the file was changed since the recording began")
            os.close(fd)
            return -1
        return fd

    def _row(self, thread: _Thread, row: dict[str, Any]) -> None:
        self._signals_before(row["time_mono_ns"])
        nr, kind = int(row["nr"]), row["kind"]
        self._settle(thread, row)
        if kind == PAYLOAD_ENTRY:
            if nr in _LEAVES:
                self._add(Kind.LEAVE, thread, row["time_mono_ns"], row["time_mono_ns"], nr=nr, args=_args(row))
            else:
                thread.entered = row
        elif kind == PAYLOAD_IMAGE and thread.entered is not None:
            if len([t for t in self.threads.values() if not t.dead]) > 1:
                self._refuse("execve of a process with several threads")
            thread.table = thread.table.copy()
            self._exec(thread, thread.entered, row)
            self.calls += 1
        elif kind == PAYLOAD_CALL and row["ret"] in _RESTARTS:
            thread.held = row
        elif kind == PAYLOAD_CALL:
            self._call(thread, row, int(row["ret"]))

    def _settle(self, thread: _Thread, row: dict[str, Any]) -> None:
        """An interrupted call is followed by itself, made again by the kernel, unless a handler made it end with EINTR."""
        held, thread.held = thread.held, None
        if held is not None and (row["nr"] in (held["nr"], syscalls.RESTART_SYSCALL)):
            again = row["nr"] == syscalls.RESTART_SYSCALL or all(row[f"arg{i}"] == held[f"arg{i}"] for i in range(3))
            if again:
                row |= {"nr": held["nr"], "entry_mono_ns": held["entry_mono_ns"]}
                row |= {f"arg{i}": held[f"arg{i}"] for i in range(6)}

    def _signals_before(self, time: int) -> None:
        while self.signals and self.signals[0][0] < time:
            when, tid, number, code, handler, flags = self.signals.pop(0)
            thread = self.threads.get(tid)
            if thread is None or handler in (0, 1):
                continue
            held = thread.held
            if held is not None and not (held["ret"] in (-512, -513) and flags & _SA_RESTART):
                thread.held = None
                self._call(thread, held, -4)
            info = struct.pack("<iii", number, 0, code - (1 << 32) if code >= 1 << 31 else code)
            self._add(Kind.SIGNAL, thread, when, when, nr=number, args=(0,) * 6, payload=info.ljust(128, b"\0"))

    def _call(self, thread: _Thread, row: dict[str, Any], result: int) -> None:
        nr, args = int(row["nr"]), _args(row)
        shape = syscalls.MODELS.get(nr)
        if shape is None or shape.kind == "refuse":
            self._refuse(f"{syscalls.name_of(nr)} is not modelled")
            return
        if shape.kind == "absent":
            if result >= 0:
                self._refuse(f"{shape.name}: what it brings in by shared memory is not seen")
            return
        if nr == _MMAP:
            pieces = self._mapped(thread, args, result)
            entry = row["entry_mono_ns"] or row["time_mono_ns"]
            self._add(Kind.CALL, thread, row["time_mono_ns"], entry, nr=nr, result=result, args=args, pieces=pieces)
            return
        if nr == _EXECVE and thread.entered is not None:  # failed: its path came with the entry
            row = row | {"data": thread.entered["data"]}
        memory = Snapshot(row["data"])
        payload = syscalls.input_of(shape, memory, args)
        flags = INPUT_MISSING if memory.missing else 0
        memory.missing = False
        pieces = [memory.read(*region) for region in syscalls.output_regions(shape, memory, args, result)]
        pieces += _more_pieces(shape.name, memory, args, result)
        if memory.missing:
            pieces = self._from_file(thread, nr, args, result, pieces, row["flags"])
        if nr in _CLONES and result > 0:
            self._spawn(thread, row, args, result)
        if shape.name == "ioctl" and result >= 0 and not syscalls.ioctl_known(args[1]):
            self._refuse(f"ioctl {args[1] & 0xFFFFFFFF:#x} is not modelled")
        entry = row["entry_mono_ns"] or row["time_mono_ns"]
        told = {"nr": nr, "result": result, "args": args, "payload": payload, "pieces": pieces}
        self._add(Kind.CALL, thread, row["time_mono_ns"], entry, flags, **told)
        self.calls += 1
        follow(thread.table, shape.name, args, result, payload, pieces)
        self._follow_files(thread, shape.name, args, result)

    def _from_file(
        self, thread: _Thread, nr: int, args: tuple[int, ...], result: int, pieces: list[bytes], flags: int
    ) -> list[bytes]:
        """Bytes that did not fit, or were not in memory, of a read from a file that is still the same."""
        label = thread.table.label(args[0])
        file = self.opens.get(args[0] & 0xFFFFFFFF)
        why = "cut" if flags & PAYLOAD_TRUNCATED else "not in memory" if flags & PAYLOAD_UNREADABLE else "not captured"
        if nr in _READS and file is not None and result > 0:
            fd = self._unchanged(file.path, "file")
            if fd >= 0:
                with os.fdopen(fd, "rb") as source:
                    whole = os.pread(source.fileno(), result, args[3] if _READS[nr] else file.offset)
                if len(whole) == result and whole.startswith(pieces[0] if pieces else b""):
                    self.notes.add(f"bytes of {file.path} beyond the payload limit were read from the unchanged file")
                    return [whole]
        self._refuse(f"{syscalls.name_of(nr)} of {label or 'a descriptor'}: bytes that it gave the program were {why}")
        return pieces

    def _follow_files(self, thread: _Thread, name: str, args: tuple[int, ...], result: int) -> None:
        """Where each regular file's position is, so that bytes can be found in it."""
        fd = args[0] & 0xFFFFFFFF
        if name in ("open", "openat", "openat2", "creat") and result >= 0:
            path = thread.table.label(result)
            self.opens[result] = _Open(path if path.startswith("/") else os.path.join(self.cwd, path))
        elif (
            (name in ("dup", "dup2", "dup3") or (name == "fcntl" and args[1] & 0xFFFFFFFF in (0, 1030)))
            and result >= 0 and fd in self.opens
        ):  # fmt: skip
            self.opens[result] = self.opens[fd]
        elif name == "close":
            self.opens.pop(fd, None)
        elif name in ("read", "readv", "getdents64", "write", "writev") and result > 0 and fd in self.opens:
            self.opens[fd].offset += result
        elif name == "lseek" and result >= 0 and fd in self.opens:
            self.opens[fd].offset = result
        elif name == "chdir" and result == 0:
            self.notes.add("the working directory was changed: files opened by relative names are found from the first one")

    def _mapped(self, thread: _Thread, args: tuple[int, ...], result: int) -> list[bytes]:
        """The content behind a file mapping, by hash: the probe cannot see what is read through it."""
        if 0 > result > -4096 or args[3] & _MAP_ANONYMOUS or args[4] & 1 << 31:
            return []
        fd = args[4] & 0xFFFFFFFF
        label = thread.table.label(fd)
        if label == "/dev/zero":
            return [b"zero"]
        if args[3] & 0xF in (1, 3) and args[2] & _PROT_WRITE:
            self._refuse(f"mmap of {label or fd}, shared and writable: memory that others may change is not seen")
            return []
        file = self.opens.get(fd)
        if file is None:
            self._refuse(f"mmap of {label or fd}: its bytes are not captured, and it is no file that can be read now")
            return []
        if label not in self.files:
            own = self._unchanged(file.path, "mmap of")
            if own < 0:
                return []
            with os.fdopen(own, "rb") as source:
                self.files[label] = self.blobs.add_fd(source.fileno())
        return [self.files[label].encode()]

    def _spawn(self, thread: _Thread, row: dict[str, Any], args: tuple[int, ...], tid: int) -> None:
        nr = int(row["nr"])
        flags = args[0] if nr == NUMBERS["clone"] else int.from_bytes(Snapshot(row["data"]).read(args[0], 8), "little")
        if nr not in (NUMBERS["clone"], NUMBERS["clone3"]) or not flags & _THREAD_FLAG:
            self._refuse("a child process: a passive recording is of one process")
            return
        if tid not in self.threads:
            self.threads[tid] = _Thread(len(self.threads), thread.table, thread.tgid)
        child = self.threads[tid]
        entry = row["entry_mono_ns"] or row["time_mono_ns"]
        self._add(
            Kind.SPAWN, thread, row["time_mono_ns"], entry, nr=nr, result=child.index, args=(1, 1, flags, tid, 0, 0)
        )

    def _end(self) -> None:
        """Deaths, in the order of time."""
        self._signals_before(1 << 62)
        known = [(self.capture.exits.get(tid, (1 << 62, 0)), tid, t) for tid, t in self.threads.items()]
        for (time, code), _, thread in sorted(known, key=lambda k: (k[0][0], k[1])):
            if thread.held is not None:
                self._call(thread, thread.held, -4)
            last = max((t for t, _ in self.times), default=0) + self.t0_ns
            time = min(time, last + 1) if time == 1 << 62 else time
            self._add(Kind.DEATH, thread, time, time, nr=-1, result=code, args=(0,) * 6)

    def _finish_meta(self, root: int) -> None:
        status = self.capture.exits.get(root, (0, 0))[1]
        self.times.append((0, 0))
        if root not in self.capture.exits:
            self._refuse("the end of the program was not recorded")
        threads = len(self.threads)
        why = [
            "F4 needs exact clocks and addresses, which a passive recording does not see: clocks are derived between calls",
            "F3 needs the order of threads within memory, which a passive recording does not see"
            if threads > 1
            else "F3 is for several threads; this program has one",
        ]
        self.meta |= {
            "exit_status": 128 + (status & 0x7F) if status & 0x7F else status >> 8 & 0xFF, "calls": self.calls,
            "threads": threads, "fidelity": "F0" if self.refused else "F2", "refused": self.refused,
            "why_not_higher": [f"F1 and above: {r}" for r in self.refused] + why, "notes": sorted(self.notes),
            "files": self.files, "root_tid": root,
            "clock": {"t0_mono_ns": self.t0_ns} | self.capture.clocks,
            "tids": {str(t.index): tid for tid, t in self.threads.items()},
        }  # fmt: skip
        log.save_meta(self.folder, self.meta)


def _args(row: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(row[f"arg{i}"]) for i in range(6))


def _more_pieces(name: str, memory: Snapshot, args: Sequence[int], result: int) -> Iterator[bytes]:
    """What the table of models leaves to recorder and player."""
    if name == "sched_getaffinity" and result > 0:
        yield memory.read(args[2], result)
    elif name == "prctl" and result >= 0 and args[0] & 0xFFFFFFFF in _PRCTL_WRITES:
        yield memory.read(args[1], _PRCTL_WRITES[args[0] & 0xFFFFFFFF])
