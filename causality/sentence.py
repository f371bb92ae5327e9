"""The sentence: what happened, in words that an on-call engineer reads at 3am without a manual."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["sentence"]

Json = Mapping[str, Any]
_MIN_SHARE: Final = 100  # parts below a hundredth of the duration are left to the ledger

_PHRASES: Final[Mapping[str, str]] = {
    "cpu_preempted": "runnable{cpu} behind {who}",
    "cpu_preempted_rt": "runnable{cpu} behind real-time {who}",
    "cpu_quota": "throttled by the CPU quota of its cgroup",
    "irq_storm": "interrupted{cpu} by {who}",
    "lock_holder": "waiting for a lock held by {who}",
    "lock_convoy": "queued for a lock that {who} held in turn",
    "priority_inversion": "waiting for a lock whose holder {via} stood behind {who} on its CPU",
    "disk_contention": "waiting for the disk while it served {who}",
    "disk_throttle": "throttled by the I/O limit of its cgroup",
    "disk_slow": "waiting for the disk itself",
    "journal_commit": "waiting for the file system's journal, filled by {who}",
    "dirty_throttle": "made to wait for dirty pages, most of them of {who}",
    "memcg_reclaim": "reclaiming memory under the limit of its own cgroup",
    "global_reclaim": "reclaiming memory for the whole machine, which {who} used up",
    "swap_in": "reading its memory back from swap",
    "net_loss": "waiting for lost packets to be sent again",
    "net_peer": "waiting for an answer from the network",
    "net_reset": "connection reset by {who}",
    "killed_oom": "killed because its memory limit was reached",
    "killed_signal": "killed by a signal from {who}",
    "stopped": "stopped by {who}",
    "peer_slow": "waiting for {who}",
    "peer_exited": "its peer {who} exited",
    "io_error": "an I/O error",
    "own_cpu": "own work",
    "own_sleep": "asleep by its own choice",
    "unknown": "for reasons not recorded",
}


def _ms(ns: int) -> str:
    return f"{ns / 1e6:.1f} ms" if ns >= 50_000 or ns == 0 else f"{ns / 1e3:.1f} us"


def _name(task: Json | None) -> str:
    if task is None:
        return "somebody who was not recorded"
    if task["class"] == "irq":
        return f"interrupts ({task['comm']})"
    return f"{task['comm'] or 'an unnamed task'} (pid {task['tgid'] or task['tid']})"


def _who(cause: Json) -> str:
    several = [c["task"] for c in cause["culprits"] if c["ns"] * 10 >= cause["ns"]]
    names = list(dict.fromkeys(_name(t) for t in several[:3])) or [_name(cause["culprit"])]
    more = len(several) - 3
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] + (f" and {more} more" if more > 0 else "")


def _phrase(cause: Json, cpus: Sequence[int]) -> str:
    cpu = f" on CPU {cpus[0]}" if len(cpus) == 1 else " on CPUs " + ", ".join(map(str, cpus)) if cpus else ""
    chain = cause["chain"]
    via = _name(chain[-1]["to"]) if len(chain) > 1 else ""
    text = _PHRASES[cause["kind"]].format(who=_who(cause), cpu=cpu, via=via).replace("  ", " ")
    if cause["kind"] in ("cpu_preempted", "cpu_preempted_rt") and len(chain) > 1:
        return f"waiting for {via}, which was {text}"
    return text


def _subject(verdict: Json, attributes: Mapping[str, str]) -> str:
    trigger = attributes.get("triggered_by")
    title = attributes.get("title") or f"{verdict['type']} {verdict['operation_id']}"
    return title + (f", triggered by {trigger}," if trigger else "")


def sentence(
    verdict: Json, causes: Sequence[Json], cpus: Sequence[Sequence[int]], attributes: Mapping[str, str]
) -> str:
    """The sentence of a verdict; `causes` are all contributors (also of an operation that is ok), `cpus` those of each."""
    duration, deadline = verdict["duration_ns"], verdict["deadline_ns"]
    limit = f" (deadline {_ms(deadline)})" if deadline is not None else ""
    verb = "failed after" if verdict["status"] == "failed" else "took"
    parts = [
        f"{_ms(c['ns'])} {_phrase(c, cpus[i])}" if c["ns"] else _phrase(c, cpus[i])
        for i, c in enumerate(causes)
        if c["kind"] != "unknown" and (c["ns"] == 0 or c["ns"] * _MIN_SHARE >= duration or i < 1)
    ][:5]
    dispatch = verdict["totals"].get("runq.idle", 0)
    if dispatch * _MIN_SHARE >= duration:
        parts.append(f"{_ms(dispatch)} until an idle CPU took it up")
    done = verdict["completeness"]
    unknown = sum(c["ns"] for c in causes if c["kind"] == "unknown")
    parts += [f"unknown {_ms(unknown)}", f"lost events {done['lost_events']}"]
    text = f"{_subject(verdict, attributes)} {verb} {_ms(duration)}{limit}: {'; '.join(parts)}."
    return text + _counterfactual(verdict, causes)


def _counterfactual(verdict: Json, causes: Sequence[Json]) -> str:
    if verdict["status"] == "ok" or not causes:
        return ""
    top = causes[0]
    if top["kind"] in ("unknown", "own_cpu") or top["ns"] == 0 or verdict["status"] == "failed":
        return ""
    low, high = top["without_it_ns"]
    what = _who(top) if top["culprit"] is not None else "that"
    span = f"in {_ms(low)}" if low == high else f"in {_ms(low)} to {_ms(high)}"
    deadline = verdict["deadline_ns"]
    if deadline is None:
        return f" Without {what} it would have finished {span}."
    inside = "inside the deadline" if high <= deadline else "still late" if low > deadline else "perhaps inside the deadline"
    return f" Without {what} it would have finished {span}, {inside}."
