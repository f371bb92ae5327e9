"""Scores of verdicts against truths, per scenario and in total.

A cause counts as right if the first cause's kind and culprit are those of the truth (top-1). Operations whose fault did
not reach the victim (by the victim's own clock) are left out and counted as `void`. The path is compared as the set of
its undirected edges between threads. Run-queue time is compared with the kernel's own schedstat.
"""

import itertools
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.accuracy.baselines import busiest_process, events_nearby
from benchmarks.accuracy.judge import Run
from benchmarks.accuracy.truth import Judged

__all__ = ["Bar", "Score", "bars", "score_run", "total"]


@dataclass
class Score:
    """Sums over operations; the properties are the figures."""

    name: str
    runs: int = 0
    void: int = 0
    blamed: int = 0  # operations with a cause to find
    kind_ok: int = 0
    culprit_ok: int = 0
    both_ok: int = 0
    base_cpu_ok: int = 0
    base_near_ok: int = 0
    path_hit: int = 0
    path_said: int = 0
    path_true: int = 0
    healthy: int = 0
    false_blame: int = 0
    sum_violations: int = 0
    runq_off: int = 0
    runq_checked: int = 0
    quota_off: int = 0
    unknown_shares: list[float] = field(default_factory=list)
    analyze_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)

    @property
    def path_f1(self) -> float:
        """Harmonic mean of the path's precision and recall; 1 where no path is known."""
        if not self.path_true:
            return 1.0
        return 2 * self.path_hit / max(self.path_said + self.path_true, 1)

    @property
    def top1(self) -> float:
        """Share of operations with right kind and culprit."""
        return self.both_ok / self.blamed if self.blamed else 1.0

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "top1": self.top1, "path_f1": self.path_f1}


def score_run(run: Run) -> Score:
    """The score of one run."""
    score = Score(run.scenario, runs=1, analyze_s=[run.analyze_s])
    if run.error:
        score.errors.append(run.error)
    for judged in run.judged:
        if not judged.valid:
            score.void += 1
            continue
        verdict = run.verdicts.get(judged.operation.operation_id)
        _ledger(score, judged, verdict)
        if judged.truth.kinds:
            _blame(score, run, judged, verdict)
        else:
            score.healthy += 1
            if verdict is None or _blames_somebody(verdict):
                score.false_blame += 1
                score.misses.append(f"{run.scenario} seed {run.seed} {judged.operation.operation_id}: blamed {_said(verdict)}")
    return score


def _ids(task: dict[str, Any] | None) -> set[int]:
    return {0} if task is None else {task["tid"], task["tgid"]}


def _blame(score: Score, run: Run, judged: Judged, verdict: dict[str, Any] | None) -> None:
    score.blamed += 1
    truth = judged.truth
    first = verdict["causes"][0] if verdict and verdict["causes"] else None
    kind = first is not None and first["kind"] in truth.kinds
    culprit = first is not None and _culprit_ok(first["culprit"], judged)
    score.kind_ok += kind
    score.culprit_ok += culprit
    score.both_ok += kind and culprit
    if not (kind and culprit):
        want = f"{'/'.join(sorted(truth.kinds))} by {sorted(truth.culprits)}"
        score.misses.append(f"{judged.operation.operation_id} seed {run.seed}: want {want}, said {_said(verdict)}")
    if truth.path:
        _path(score, judged, first)
    victims = {judged.operation.tid, verdict["thread"]["tgid"] if verdict else judged.operation.tid}
    base_kind, base_pid = busiest_process(run, victims)
    score.base_cpu_ok += base_kind in truth.kinds and base_pid in truth.culprits
    base_kind, base_pid = events_nearby(run, judged.operation)
    score.base_near_ok += base_kind in truth.kinds and base_pid in truth.culprits


def _culprit_ok(task: dict[str, Any] | None, judged: Judged) -> bool:
    wanted = judged.truth.culprits
    if not wanted:
        return task is None
    if -1 in wanted:  # a child or a new thread, whose id only the kernel knows
        return task is not None and judged.operation.tid != task["tid"] and task["class"] in {"same_cgroup", "own_process"}
    return bool(_ids(task) & wanted)


def _path(score: Score, judged: Judged, first: dict[str, Any] | None) -> None:
    path = judged.truth.path
    true = {frozenset(pair) for pair in itertools.pairwise(path)}
    said: set[frozenset[int]] = set()
    for edge in first["chain"] if first else []:
        if edge["from"] and edge["to"] and edge["from"]["tid"] != edge["to"]["tid"]:
            said.add(frozenset((edge["from"]["tid"], edge["to"]["tid"])))
    score.path_true += len(true)
    score.path_said += len(said)
    score.path_hit += len(true & said)
    if true != said:
        score.misses.append(f"{judged.operation.operation_id}: path {[sorted(s) for s in said]} instead of {path}")


def _ledger(score: Score, judged: Judged, verdict: dict[str, Any] | None) -> None:
    if verdict is None:
        score.sum_violations += 1
        return
    at, ok = verdict["start_mono_ns"], True
    for part in verdict["ledger"]:
        ok &= part["start_mono_ns"] == at and part["ns"] == part["end_mono_ns"] - part["start_mono_ns"] and part["ns"] >= 0
        at = part["end_mono_ns"]
    ok &= at == verdict["end_mono_ns"] and sum(verdict["totals"].values()) == verdict["duration_ns"]
    score.sum_violations += not ok
    totals = verdict["totals"]
    if not judged.operation.in_time:
        score.unknown_shares.append((totals.get("unknown", 0) + totals.get("lost", 0)) / max(verdict["duration_ns"], 1))
    counted = judged.operation.run_delay_ns
    quota = totals.get("runq.quota", 0)
    if counted is not None and judged.truth.throttled_ns is None:
        said = sum(ns for label, ns in totals.items() if label.startswith("runq"))
        irq = sum(ns for label, ns in totals.items() if label.startswith("irq"))  # while runnable it delays, too
        dispatch = totals.get("runq.idle", 0)  # a remote wake-up counts here from the waking, there from the enqueueing
        tolerance = max(100_000, counted // 50)
        score.runq_checked += 1
        if not said - dispatch - tolerance <= counted <= said + irq + tolerance:
            score.runq_off += 1
            score.misses.append(f"{judged.operation.operation_id}: run queue {said} ns, schedstat {counted} ns")
    if (
        judged.truth.throttled_ns is not None
        and abs(quota - judged.truth.throttled_ns) > judged.truth.throttled_ns // 50 + 100_000
    ):
        score.quota_off += 1
        score.misses.append(f"{judged.operation.operation_id}: quota {quota} ns, cpu.stat {judged.truth.throttled_ns} ns")


def _blames_somebody(verdict: dict[str, Any]) -> bool:
    return bool(verdict["causes"]) and (verdict["status"] == "ok" or verdict["causes"][0]["culprit"] is not None)


def _said(verdict: dict[str, Any] | None) -> str:
    if verdict is None:
        return "no verdict"
    causes = [
        f"{c['kind']} by {c['culprit'] and (c['culprit']['comm'], c['culprit']['tid'])} {c['ns'] / 1e6:.1f} ms"
        for c in verdict["causes"][:2]
    ]
    return f"[{verdict['status']}] {'; '.join(causes) or 'nothing'}"


def total(scores: list[Score]) -> Score:
    """All scores added."""
    out = Score("total")
    for score in scores:
        for name, value in asdict(score).items():
            if name != "name":
                setattr(out, name, getattr(out, name) + value)
    return out


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of the table of bars."""

    figure: str
    bar: str
    got: str
    passed: bool


def bars(all_of: Score) -> list[Bar]:
    """The bars of the suite."""
    false = all_of.false_blame / all_of.healthy if all_of.healthy else 0.0
    unknown = statistics.median(all_of.unknown_shares) if all_of.unknown_shares else 0.0
    return [
        Bar("top-1 kind and culprit", ">= 95 %", f"{all_of.top1:.1%}", all_of.top1 >= 0.95),
        Bar("path F1", ">= 0.95", f"{all_of.path_f1:.3f}", all_of.path_f1 >= 0.95),
        Bar("false blame on healthy", "<= 2 %", f"{false:.1%}", false <= 0.02),
        Bar("exact-sum violations", "0", str(all_of.sum_violations), all_of.sum_violations == 0),
        Bar(
            "run queue against schedstat",
            "2 % or 100 us",
            f"{all_of.runq_off} of {all_of.runq_checked} off",
            all_of.runq_off == 0,
        ),
        Bar("throttled time against cpu.stat", "2 % or 100 us", f"{all_of.quota_off} off", all_of.quota_off == 0),
        Bar("unknown share of late operations", "median < 2 %", f"{unknown:.2%}", unknown < 0.02),
    ]
