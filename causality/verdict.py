"""The verdict document `kprobe.verdict/1` of one operation, and its hash.

Every verdict holds, or this module raises AssertionError instead of returning it: the ledger covers [start, end) without gap
or overlap, in integers, and the totals sum to the duration. The hash is over canonical JSON (sorted keys, no spaces) without
the hash itself: the same events give the same hash, live or offline.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from causality.causes import CAPABILITY_OF, KINDS, Cause, collect, culprit_of, ranked, settle_convoys, without
from causality.operations import Operation
from causality.sentence import sentence
from causality.tasks import Task
from causality.timeline import RECORDING_ENDED, Key, Timeline
from causality.walk import IRQ_TID, Root, Walk
from events.topics import VERDICT_SCHEMA

__all__ = ["ALGORITHM", "build", "status_of", "verdict_hash", "woken_by"]

ALGORITHM: Final = "causal/1"
_EVIDENCE_MAX: Final = 12  # ids a ledger slice carries; merged slices keep the first and the last ones
_SMALL_SHARE: Final = 100
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FailureCause:
    """A cause of failure, found beside the ledger."""

    kind: str
    culprit: Key | None
    evidence: tuple[str, ...]
    confidence: str


def verdict_hash(verdict: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of a verdict without its hash."""
    body = {k: v for k, v in verdict.items() if k != "hash"}
    return "sha256:" + hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


class _Names:
    """TASK objects, relative to the operation's thread."""

    def __init__(self, timeline: Timeline, victim: Task, realtime: set[Key]) -> None:
        self._timeline, self._victim, self._realtime = timeline, victim, realtime

    def task(self, key: Key, name: str = "") -> Json:
        if key[0] == IRQ_TID:
            return {"tid": 0, "tgid": 0, "comm": name, "start_boot_ns": 0, "cgroup": "", "container": None, "class": "irq"}
        task = self._timeline.task(*key)
        return {
            "tid": task.tid, "tgid": task.tgid, "comm": task.comm, "start_boot_ns": task.start_boot_ns, "cgroup": task.cgroup,
            "container": task.container, "class": self._class(task),
        }  # fmt: skip

    def _class(self, task: Task) -> str:
        victim = self._victim
        if task.tid == 0:
            return "idle"
        if task.tgid and task.tgid == victim.tgid:
            return "own_process"
        if task.kthread:
            return "kernel_thread"
        if task.key in self._realtime:
            return "realtime"
        same = task.cgroup == victim.cgroup if task.cgroup and victim.cgroup else task.cgroup_id == victim.cgroup_id != 0
        return "same_cgroup" if same else "other_cgroup"


def status_of(operation: Operation, duration_ns: int) -> str:
    """ok, late, failed or unjudged."""
    if operation.outcome == "failed":
        return "failed"
    if operation.deadline_ns is None:
        return "unjudged"
    return "late" if duration_ns > operation.deadline_ns else "ok"


def build(
    operation: Operation, timeline: Timeline, walk: Walk, victim: Key, *, start: int, end: int, failure: FailureCause | None,
    retained: bool = True, provisional: bool = False,
) -> Json:  # fmt: skip
    """The verdict of an operation over [start, end)."""
    roots = settle_convoys(walk.explain(victim, start, end))
    _check_cover(roots, start, end)
    realtime = {r.culprit for r in roots if r.mechanism == "runq_rt" and r.culprit is not None}
    names = _Names(timeline, timeline.task(*victim), realtime)
    ledger = _ledger(roots, names)
    totals: dict[str, int] = {}
    for piece in ledger:
        totals[piece["label"]] = totals.get(piece["label"], 0) + piece["ns"]
    duration = end - start
    assert sum(totals.values()) == duration, f"operation {operation.operation_id}: totals do not sum to the duration"
    status = status_of(operation, duration)
    woken = woken_by(timeline, victim, start, end)
    causes = ranked(collect(roots), duration, operation.deadline_ns)
    documents = [_cause(c, names, roots, duration, woken, victim) for c in causes]
    if failure is not None:
        documents.insert(0, _failure(failure, names, victim, duration))
    head: Json = {
        "schema": VERDICT_SCHEMA, "operation_id": operation.operation_id, "type": operation.type, "node": timeline.node,
        "boot_id": timeline.boot_id, "thread": _thread(timeline.task(*victim)), "start_mono_ns": start, "end_mono_ns": end,
        "duration_ns": duration, "deadline_ns": operation.deadline_ns, "status": status, "ledger": ledger, "totals": totals,
    }  # fmt: skip
    head["completeness"] = _completeness(timeline, walk, roots, start, end, retained)
    head["ruled_out"] = _ruled_out(timeline, documents, duration)
    cpus = [sorted({r.cpu for r in c.roots if r.cpu >= 0}) for c in causes]
    if failure is not None:
        cpus.insert(0, [])
    head["sentence"] = sentence(head, documents, cpus, operation.attributes)
    kept = [d for i, d in enumerate(documents) if i == 0 or d["ns"] * _SMALL_SHARE >= duration]
    head["causes"] = [] if status == "ok" else [{"rank": i + 1, **d} for i, d in enumerate(kept)]
    head["attributes"] = dict(sorted(operation.attributes.items()))
    head["provisional"] = provisional
    head["algorithm"] = ALGORITHM
    head["hash"] = verdict_hash(head)
    return head


def _check_cover(roots: Sequence[Root], start: int, end: int) -> None:
    at = start
    for root in roots:
        assert root.start_mono_ns == at < root.end_mono_ns, f"ledger is not contiguous at {at}: {root}"
        at = root.end_mono_ns
    assert at == end, f"ledger ends at {at}, not at {end}"


def _thread(task: Task) -> Json:
    return {"tid": task.tid, "tgid": task.tgid, "comm": task.comm, "start_boot_ns": task.start_boot_ns}


def _ledger(roots: Sequence[Root], names: _Names) -> list[Json]:
    out: list[Json] = []
    marks: list[Any] = []
    for root in roots:
        who = culprit_of(root, root.kind)
        via = tuple(h.other for h in root.hops if who is None or h.other != who[0])
        mark = (root.label, who, via, root.confidence, root.kind)
        if marks and marks[-1] == mark:
            _extend(out[-1], root)
            continue
        marks.append(mark)
        out.append(
            {
                "start_mono_ns": root.start_mono_ns, "end_mono_ns": root.end_mono_ns, "ns": root.ns, "label": root.label,
                "culprit": names.task(*who) if who is not None else None, "via": [names.task(k) for k in via],
                "evidence": list(dict.fromkeys(root.evidence))[:_EVIDENCE_MAX], "confidence": root.confidence,
            }
        )
    return out


def _extend(piece: Json, root: Root) -> None:
    piece["end_mono_ns"] = root.end_mono_ns
    piece["ns"] += root.ns
    more = [e for e in root.evidence if e not in piece["evidence"]]
    piece["evidence"] = (piece["evidence"] + more) if len(piece["evidence"]) < _EVIDENCE_MAX else piece["evidence"]
    piece["evidence"] = piece["evidence"][:_EVIDENCE_MAX]


def _cause(
    cause: Cause, names: _Names, roots: Sequence[Root], duration: int, woken: Sequence[tuple[int, Key]], victim: Key
) -> Json:
    ranked = sorted(cause.culprits.items(), key=lambda c: (-c[1], c[0]))
    by_process: dict[int, int] = {}
    for (key, name), ns in ranked:
        tgid = names.task(key, name)["tgid"]
        by_process[tgid] = by_process.get(tgid, 0) + ns
    ranked.sort(key=lambda c: (-by_process[names.task(*c[0])["tgid"]], -c[1], c[0]))
    culprits = [{"task": names.task(*who), "ns": ns} for who, ns in ranked]
    top = ranked[0][0] if ranked else None
    return {
        "kind": cause.kind, "ns": cause.ns, "culprit": culprits[0]["task"] if culprits else None, "culprits": culprits,
        "chain": _chain(cause, names, victim, top), "confidence": cause.confidence,
        "without_it_ns": list(without(roots, cause, duration, woken)),
    }  # fmt: skip


def _path(root: Root, victim: Key, who: tuple[Key, str] | None) -> tuple[Any, ...]:
    """(edge, cause, name, effect) from the operation's thread outwards."""
    path: list[Any] = [(h.edge, h.other, "", h.waiter) for h in root.hops]
    last = root.hops[-1].other if root.hops else victim
    if who is not None and who[0] != last:
        edge = {"runq": "occupies_cpu", "runq_rt": "occupies_cpu", "irq": "interrupts"}.get(root.mechanism, "delays")
        path.append((edge, who[0], who[1], last))
    return tuple(path)


def _chain(cause: Cause, names: _Names, victim: Key, top: tuple[Key, str] | None) -> list[Json]:
    """The path that carries most of the cause's time, to its first culprit if any; edges point from cause to effect."""
    weight: dict[tuple[Any, ...], int] = {}
    proof: dict[tuple[Any, ...], Root] = {}
    for root in cause.roots:
        who = culprit_of(root, cause.kind)
        path = _path(root, victim, who)
        if path and (top is None or who == top):
            weight[path] = weight.get(path, 0) + root.ns
            if path not in proof or root.ns > proof[path].ns:
                proof[path] = root
    if not weight:
        return []
    best = min(weight, key=lambda p: (-weight[p], str(p)))
    root = proof[best]
    own = [h.evidence for h in root.hops] + [root.evidence]
    return [
        {
            "edge": edge, "from": names.task(who, name), "to": names.task(effect), "ns": weight[best],
            "evidence": list(own[min(i, len(own) - 1)])[:_EVIDENCE_MAX],
        }
        for i, (edge, who, name, effect) in enumerate(best)
    ]  # fmt: skip


def _failure(failure: FailureCause, names: _Names, victim: Key, duration: int) -> Json:
    culprit = names.task(failure.culprit) if failure.culprit is not None else None
    edge = {"edge": failure.kind, "from": culprit, "to": names.task(victim), "ns": 0, "evidence": list(failure.evidence)}
    return {
        "kind": failure.kind, "ns": 0, "culprit": culprit, "culprits": [{"task": culprit, "ns": 0}] if culprit else [],
        "chain": [edge] if culprit else [], "confidence": failure.confidence, "without_it_ns": [duration, duration],
    }  # fmt: skip


def woken_by(timeline: Timeline, victim: Key, start: int, end: int) -> list[tuple[int, Key]]:
    """(time, thread) of the wake-ups that the operation's thread did."""
    rows = timeline.of_task_kinds(victim[0], ("sched_waking",), start, end)
    tids, starts = rows.get("tid", "sched_waking"), rows.get("start_boot_ns", "sched_waking")
    return [(int(rows.time[i]), (int(tids[i]), int(starts[i]))) for i in range(len(rows))]


def _completeness(timeline: Timeline, walk: Walk, roots: Sequence[Root], start: int, end: int, retained: bool) -> Json:
    # What a kernel hides from everybody counts where something hangs on it.
    doubtful = [(r.start_mono_ns, r.end_mono_ns) for r in roots if r.label in ("unknown", "lost")]
    hidden = (x for x in timeline.hidden(start, end) if any(x.start_mono_ns < b and a < x.end_mono_ns for a, b in doubtful))
    lost = sum(x.count for x in (*timeline.losses(start, end), *hidden))
    unknown_ns = sum(r.ns for r in roots if r.label == "unknown")
    unresolved = sum(r.ns for r in roots if r.kind == "unknown" and r.label != "lost")
    lost_ns = sum(r.ns for r in roots if r.label == "lost")
    duration = end - start
    missing = [f"walk limit: {name} ({n})" for name, n in sorted(walk.limits.items())]
    if any(x.reason == RECORDING_ENDED for x in timeline.losses(start, end)):
        missing.append("events after the end of the recording")
    if not retained:
        missing.append("events older than the retention")
    if unresolved * _SMALL_SHARE > duration:
        families = timeline.session.get("families", {})
        missing += [f"events: {name}" for name, state in sorted(families.items()) if not state.get("attached", True)]
    complete = not (lost or lost_ns or missing) and unknown_ns * _SMALL_SHARE <= duration
    return {"lost_events": lost, "unknown_ns": unknown_ns, "lost_ns": lost_ns, "missing": missing, "complete": complete}


def _ruled_out(timeline: Timeline, documents: Sequence[Json], duration: int) -> list[Json]:
    families = timeline.session.get("families", {})
    ns_of: dict[str, int] = {}
    for document in documents:
        ns_of[document["kind"]] = ns_of.get(document["kind"], 0) + document["ns"]
    named = {d["kind"] for i, d in enumerate(documents) if i == 0 or d["ns"] * _SMALL_SHARE >= duration}
    out = []
    for kind in KINDS:
        if kind in named or kind == "unknown":
            continue
        gone = [f for f in CAPABILITY_OF.get(kind, ()) if f in families and not families[f].get("attached", True)]
        why = f"capability missing: {', '.join(gone)}" if gone else "below 1 %" if ns_of.get(kind) else "no such event"
        out.append({"kind": kind, "ns": ns_of.get(kind, 0), "why": why})
    return out
