"""Level F0: the event stream again. `kprobe replay run INCIDENT.kcap` folds the recorded events and gives the same verdicts.

What: `replay(frames, operations)` judges the operations of a capture several times: once with the frames as they were recorded,
then with operations spread over `workers` engines that get the frames in other orders, some twice. The verdict hash is over its
content, so equal hashes mean bit for bit equal verdicts, on any machine. `what_if` asks the same events a question, with
the rule object of `rules`: `task=batch-recon -> remove`, `call=lock task=X -> remove`, `call=disk -> remove`, and
`call=cpu -> remove` (one more CPU: it never waits for one).
What is judged comes from an operations file, or from the capture itself if it was kept with them (`keep`): a session frame at
the end of the capture that holds the operations and the hashes of their verdicts. `identical` then also means: as at that time.
Guarantees: no clock, no chance but the printed seed, no state from outside. Fails: InputError if there is nothing to judge.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pyarrow as pa

from causality.engine import EngineConfig, NodeEngine
from causality.operations import Operation, from_row
from causality.whatif import Answer, what_if
from events.errors import InputError
from events.frames import SCHEMAS, Frame
from replay.rules import Rule, RuleSet, Subject

__all__ = ["Folded", "document", "fold", "keep_frame", "kept_in", "replay", "what_if_all"]

SEED: Final = 20261125
_KEY: Final = "incident"  # of the session document that keeps operations and hashes
_SWAP: Final = 24  # frames are shuffled within so many places: an engine waits for ten times as many


@dataclass(slots=True)
class Folded:
    """Verdicts by (node, operation id), and the engines that gave them."""

    verdicts: list[dict[str, Any]] = field(default_factory=list)
    engines: dict[tuple[str, str], NodeEngine] = field(default_factory=dict)
    events: int = 0

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of each verdict, by operation."""
        return {f"{v['node']}/{v['operation_id']}": v["hash"] for v in self.verdicts}


def fold(frames: Iterable[Frame], operations: Sequence[Operation]) -> Folded:
    """One fold of frames, in the order given."""
    out = Folded()
    config = EngineConfig(retention_ns=2**62, edges=False)
    for frame in frames:
        if frame.kind == "session/1" and _KEY in frame.body:
            continue
        key = frame.node, frame.boot_id
        if key not in out.engines:
            out.engines[key] = NodeEngine(*key, config)
            out.engines[key].submit(o for o in operations if o.node in ("", frame.node))
        out.engines[key].fold([frame])
        out.events += frame.batch.num_rows if frame.kind == "events/1" else 0
    for key in sorted(out.engines):
        out.engines[key].finish()
        out.verdicts += out.engines[key].ready()
    out.verdicts.sort(key=lambda v: (v["node"], v["end_mono_ns"], v["operation_id"]))
    return out


def replay(
    frames: Sequence[Frame], operations: Sequence[Operation], *, workers: int = 2, seed: int = SEED,
    expected: Mapping[str, str] | None = None,
) -> tuple[Folded, dict[str, Any] | None]:  # fmt: skip
    """(the fold as recorded, where another fold or the kept hashes differ from it: None if nowhere)."""
    if not operations:
        raise InputError("nothing to judge: give --operations FILE.csv, --tid N, or a capture kept with its operations")
    plain = fold(frames, operations)
    if expected is not None and (wrong := _difference(expected, plain.hashes)):
        return plain, {"class": "verdict", "where": "kept with the capture"} | wrong
    hashes: dict[str, str] = {}
    for worker in range(workers):
        rng = random.Random(seed + worker)
        share = [o for o in operations if _worker_of(o, workers) == worker]
        if share:
            hashes |= fold(_in_other_order(frames, rng), share).hashes
    wrong = _difference(plain.hashes, hashes)
    where = f"{workers} engines, frames in another order, seed {seed}"
    return plain, {"class": "verdict", "where": where} | wrong if wrong else None


def _worker_of(operation: Operation, workers: int) -> int:
    return hashlib.sha256(operation.operation_id.encode()).digest()[0] % workers


def _in_other_order(frames: Sequence[Frame], rng: random.Random) -> list[Frame]:
    """The frames in another order, some twice: the sessions first, the rest moved by a few places."""
    first = [f for f in frames if f.kind == "session/1"]
    rest = [f for f in frames if f.kind != "session/1"]
    rest += [f for f in rest if rng.random() < 0.1]
    places = sorted(range(len(rest)), key=lambda i: (rest[i].number + rng.randrange(_SWAP), i))
    return first + [rest[i] for i in places]


def _difference(expected: Mapping[str, str], got: Mapping[str, str]) -> dict[str, Any]:
    for name in sorted({*expected, *got}):
        if expected.get(name) != got.get(name):
            return {"operation": name, "expected": expected.get(name), "actual": got.get(name)}
    return {}


# ---- what an incident keeps of itself ---------------------------------------------------------------------------------


def keep_frame(frames: Sequence[Frame], operations: Sequence[Operation], hashes: Mapping[str, str]) -> Frame:
    """The frame that keeps operations and hashes: to be appended to a copy of the capture."""
    last = max(frames, key=lambda f: f.number)
    body = {_KEY: {"operations": [o.row() for o in operations], "hashes": dict(hashes)}}
    batch = pa.RecordBatch.from_arrays([], schema=SCHEMAS["session/1"])
    return replace(last, kind="session/1", number=last.number + 1, batch=batch, body=body)


def kept_in(frames: Iterable[Frame]) -> tuple[list[Operation], dict[str, str]]:
    """Operations and hashes that a capture keeps; none if it was not kept with any."""
    for frame in frames:
        kept = frame.body.get(_KEY) if frame.kind == "session/1" else None
        if kept:
            return [from_row(row, "the capture's operation") for row in kept["operations"]], dict(kept["hashes"])
    return [], {}


# ---- questions ---------------------------------------------------------------------------------------------------------


def what_if_all(folded: Folded, operations: Sequence[Operation], rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """For each operation, what it would have taken with the rules applied."""
    out = []
    for rule in rules:
        if not rule.effects.remove and rule.effects.duration_ns != 0:
            raise InputError("on an event stream a rule can take away: write for example 'task=batch-recon -> remove'")
    for key in sorted(folded.engines):
        engine = folded.engines[key]
        for operation in sorted(operations, key=lambda o: (o.end_mono_ns or 0, o.operation_id)):
            if operation.node not in ("", key[0]):
                continue
            path = engine.path(operation)
            answer = what_if(path, _chosen_by(RuleSet(rules)))
            out.append(_told(operation, key[0], answer, path.comm((operation.tid, 0))))
    return out


def _chosen_by(rules: RuleSet) -> Callable[[str, str], bool]:
    return lambda what, task: rules.effects(Subject(what, "", -1, task)) is not None


def _told(operation: Operation, node: str, answer: Answer, comm: str) -> dict[str, Any]:
    return {
        "operation_id": operation.operation_id, "node": node, "comm": comm, "recorded_ns": answer.recorded_ns,
        "removed_ns": answer.removed_ns, "duration_ns": [answer.low_ns, answer.high_ns],
        "status": answer.status(operation.deadline_ns), "order_may_change": bool(answer.reorders), "warnings": answer.reorders,
    }  # fmt: skip


def document(folded: Folded, divergence: dict[str, Any] | None, questions: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The JSON document `kprobe.replay/1` of an event stream."""
    incomplete = [v["operation_id"] for v in folded.verdicts if not v["completeness"]["complete"]]
    digest = hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(folded.hashes.items())).encode()).hexdigest()
    reasons = [f"evidence is incomplete for {', '.join(incomplete[:5])}"] if incomplete else []
    if divergence is not None:
        reasons.append(f"verdict of {divergence['operation']} differs ({divergence['where']})")
    return {
        "schema": "kprobe.replay/1", "fidelity": "F0", "why_not_higher": ["F1 and above need a recording of the program"],
        "notes": [], "identical": divergence is None, "divergence": divergence, "syscalls_replayed": 0, "stdout_sha256": None,
        "exit_status": None, "verdict": None, "reasons": reasons, "events": folded.events, "hash": f"sha256:{digest}",
        "verdicts": folded.verdicts, "what_if": list(questions),
    }  # fmt: skip
