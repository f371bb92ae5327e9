"""Why an operation failed: signal, OOM kill, reset, the peer's exit, an error return; and who stopped a stopped thread.

Called for operations whose outcome is `failed`, and for threads that exited inside their window. The order is that of
finality: a death explains everything, else the last failed system call of the thread does. Who sent a signal is
current at `signal_generate`; who reset a connection is current when a segment with the RST flag was queued; whose
exit closed a connection is the sender of the FIN, if it exited then.

Can be fooled by: errors that the program expects and ignores (only the last one before the end is taken, and only if
it stands for a failure), and by a failure that the program decides on without the kernel (an answer that says
"declined"): then there is no `Failure`.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from causality.window import EventRef, Rows, Who, Window

__all__ = ["Failure", "failure_of", "stopper_of"]

_EXIT_SIGNAL: Final = 0x7F
_STOPPING: Final = (19, 20, 21, 22)  # SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU
_ENDING: Final = (1, 2, 3, 15)  # SIGHUP, SIGINT, SIGQUIT, SIGTERM
_FLAG_FIN, _FLAG_RST = 1, 4
_RESETS: Final = {104, 103, 32}  # ECONNRESET, ECONNABORTED, EPIPE
_IO_ERRORS: Final = {5, 6, 19, 27, 28, 30, 74, 75, 117, 121, 122}  # EIO, ENXIO, ENODEV, EFBIG, ENOSPC, EROFS, EBADMSG, ...
_SOCKET: Final = 1
_AF_UNIX: Final = 1
_READS: Final = {0, 19, 45, 47, 299}  # read, readv, recvfrom, recvmsg, recvmmsg
_END_TO_EXIT_NS: Final = 50_000_000  # an exit's FIN may leave before or after the exit is told
_FAMILY_UNREACHED: Final = {111, 113, 101}  # ECONNREFUSED, EHOSTUNREACH, ENETUNREACH


@dataclass(frozen=True, slots=True)
class Failure:
    """The mechanism that made it fail, when it struck, and who did it."""

    time_mono_ns: int
    kind: str
    culprit: Who | None
    evidence: tuple[EventRef, ...]
    confidence: str = "exact"


def failure_of(window: Window, who: Who, start_mono_ns: int, end_mono_ns: int) -> Failure | None:
    """Why a thread's operation in [start, end] failed, or None if the kernel does not tell (timeouts: see the waits)."""
    return _death(window, who, start_mono_ns, end_mono_ns) or _last_error(window, who, start_mono_ns, end_mono_ns)


def _death(window: Window, who: Who, start: int, end: int) -> Failure | None:
    exits = window.rows("sched_process_exit").between(start, end)
    mine = np.flatnonzero((exits.columns["tid"] == who.tid) | (exits.columns["tgid"] == who.tgid))
    if not len(mine):
        return None
    own = [int(i) for i in mine if int(exits.columns["tid"][int(i)]) == who.tid]
    i = own[0] if own else int(mine[0])
    died, signal = int(exits.time[i]), int(exits.get("exit_code")[i]) & _EXIT_SIGNAL
    oom = _oom(window, who, died)
    if oom is not None:
        return oom
    if signal == 0:
        return _told_to_end(window, who, exits, i, start)
    sent = _signal(window, who, (signal,), died)
    if sent is None:
        return Failure(died, "killed_signal", None, (exits.ref(i),), "strong")
    rows, k = sent
    return Failure(int(rows.time[k]), "killed_signal", rows.who(k), (rows.ref(k), exits.ref(i)))


def _told_to_end(window: Window, who: Who, exits: Rows, i: int, start: int) -> Failure | None:
    """The process ended itself with a status that is no success, after somebody had told it to by a signal that it caught."""
    died = int(exits.time[i])
    sent = _signal(window, who, _ENDING, died)
    if sent is None or not int(exits.get("exit_code")[i]):
        return None
    rows, k = sent
    if int(rows.time[k]) < start or rows.who(k).tgid == who.tgid:
        return None
    return Failure(int(rows.time[k]), "killed_signal", rows.who(k), (rows.ref(k), exits.ref(i)), "strong")


def _oom(window: Window, who: Who, before: int) -> Failure | None:
    rows = window.rows("mark_victim").between(window.from_mono_ns, before)
    mine = np.flatnonzero((rows.get("tgid") == who.tgid) | (rows.get("tid") == who.tgid))
    if not len(mine):
        return None
    i = int(mine[-1])
    invoker = rows.who(i)
    return Failure(int(rows.time[i]), "killed_oom", None if invoker.tgid == who.tgid else invoker, (rows.ref(i),))


def _signal(window: Window, who: Who, signals: tuple[int, ...], before: int) -> tuple[Rows, int] | None:
    """The last delivery of one of these signals to the thread's process."""
    rows = window.rows("signal_generate")
    hit = np.isin(rows.get("sig"), signals) & (rows.time <= before)
    hit &= (rows.get("tgid") == who.tgid) & ((rows.get("group") == 1) | (rows.get("tid") == who.tid))
    found = np.flatnonzero(hit)
    effective = [int(i) for i in found if int(rows.get("result")[int(i)]) == 0] or [int(i) for i in found]
    return (rows, effective[-1]) if effective else None


def stopper_of(window: Window, who: Who, stopped_mono_ns: int) -> tuple[Who, EventRef] | None:
    """Who sent the signal that stopped a thread (SIGSTOP and its kin): (sender, the event's name), or None."""
    sent = _signal(window, who, _STOPPING, stopped_mono_ns)
    if sent is None:
        return None
    rows, i = sent
    return rows.who(i), rows.ref(i)


def _last_error(window: Window, who: Who, start: int, end: int) -> Failure | None:
    rows = window.rows("sys_exit").between(start, end)
    rows = rows.take(rows.columns["tid"] == who.tid)
    ret, nr, calls, entry = rows.get("ret"), rows.get("nr"), *_entries(window, who, rows)
    socket = (calls.get("object_type") == _SOCKET)[entry] & (entry >= 0) if len(calls) else np.zeros(len(rows), np.bool_)
    known = sorted(_RESETS | _IO_ERRORS | _FAMILY_UNREACHED)
    closed = socket & (ret == 0) & np.isin(nr, sorted(_READS)) & (rows.get("arg1") != 0)
    found = np.flatnonzero(np.isin(-ret, known) | closed)
    if not len(found):
        return None
    i = int(found[-1])
    code, at = -int(ret[i]), int(rows.time[i])
    if code in _IO_ERRORS:
        return Failure(at, "io_error", None, _io_evidence(window, rows, i, start))
    if code == 0 or code in _RESETS:
        return _broken_connection(window, who, rows, i, start)
    return Failure(at, "net_reset", None, (rows.ref(i),), "strong")


def _entries(window: Window, who: Who, exits: Rows) -> tuple[Rows, npt.NDArray[Any]]:
    """The thread's entries to calls, and for each exit which of them it ends (-1: none was recorded)."""
    enters = window.rows("sys_enter")
    enters = enters.take(enters.columns["tid"] == who.tid)
    return enters, np.searchsorted(enters.time, exits.time, "right") - 1


def _io_evidence(window: Window, rows: Rows, i: int, start: int) -> tuple[EventRef, ...]:
    """The failed call, and the failed request under it if there is one."""
    done = window.rows("block_rq_complete").between(start, int(rows.time[i]))
    bad = np.flatnonzero(done.get("error") != 0)
    return (rows.ref(i), done.ref(int(bad[-1]))) if len(bad) else (rows.ref(i),)


def _broken_connection(window: Window, who: Who, rows: Rows, i: int, start: int) -> Failure | None:
    """A reset, or the peer's exit, by the segment that broke the connection."""
    at = int(rows.time[i])
    local = _local_closer(window, who, rows, i, start)
    if local is not None:
        return local
    broke = _breaking_segment(window, who, start, at)
    if broke is None:
        if -int(rows.get("ret")[i]) == 0:
            return Failure(at, "peer_exited", None, (rows.ref(i),), "strong")
        return Failure(at, "net_reset", None, (rows.ref(i),), "strong")
    sent, k, reset = broke
    sender = sent.who(k)
    evidence = (sent.ref(k), rows.ref(i))
    if _exited(window, sender, int(sent.time[k])):
        return Failure(at, "peer_exited", sender, evidence)
    if reset:
        return Failure(at, "net_reset", sender if sender.tid else None, evidence)
    return Failure(at, "peer_exited", sender, evidence, "strong")


def _local_closer(window: Window, who: Who, rows: Rows, i: int, start: int) -> Failure | None:
    """The peer of a UNIX socket or pipe, by its exit: whoever woke the thread for the end of the stream, or sent on it last."""
    at = int(rows.time[i])
    wakes = window.rows("sched_waking").between(start, at)
    found = np.flatnonzero((wakes.get("tid") == who.tid) & (wakes.columns["tgid"] != who.tgid))
    candidates = [(wakes.who(int(k)), wakes.ref(int(k))) for k in found[-1:]]
    ready = window.rows("sk_data_ready").between(window.from_mono_ns, at)
    calls, entry = _entries(window, who, rows)
    if entry[i] < 0:
        return None
    kind, stream = int(calls.get("object_type")[entry[i]]), int(calls.get("object")[entry[i]])
    on_it = (ready.get("sk") == np.uint64(stream)) & (ready.get("family") == _AF_UNIX) & (ready.columns["tgid"] != who.tgid)
    candidates += [(ready.who(int(k)), ready.ref(int(k))) for k in np.flatnonzero(on_it)[-1:]]
    if kind == _SOCKET and not on_it.any():
        return None  # of another family: segments tell
    for peer, proof in candidates:
        if _exited(window, peer, at):
            return Failure(at, "peer_exited", peer, (proof, rows.ref(i)))
    return None


def _breaking_segment(window: Window, who: Who, start: int, end: int) -> tuple[Rows, int, bool] | None:
    """The last segment with RST (or else FIN) that somebody else sent to a connection of this thread."""
    sent = window.rows("net_dev_queue")
    mine = _flows(sent, who, end)
    flags = sent.get("tcp_flags")
    inside = (sent.time >= start) & (sent.time <= end) & (sent.get("protocol") == 6)
    for bit in (_FLAG_RST, _FLAG_FIN):
        for k in np.flatnonzero(inside & ((flags & bit) != 0) & (sent.columns["tid"] != who.tid))[::-1]:
            k = int(k)
            ports = (int(sent.get("dport")[k]), int(sent.get("sport")[k]))
            if not mine or ports in mine:
                return sent, k, bit == _FLAG_RST
    return None


def _flows(sent: Rows, who: Who, before: int) -> set[tuple[int, int]]:
    """(own port, peer's port) of the connections on which the thread's process has sent."""
    own = np.flatnonzero((sent.columns["tgid"] == who.tgid) & (sent.time <= before) & (sent.get("protocol") == 6))
    sport, dport = sent.get("sport"), sent.get("dport")
    return {(int(sport[int(k)]), int(dport[int(k)])) for k in own}


def _exited(window: Window, who: Who, near: int) -> bool:
    rows = window.rows("sched_process_exit").between(near - _END_TO_EXIT_NS, near + _END_TO_EXIT_NS)
    return bool((rows.columns["tgid"] == who.tgid).any())
