"""What a simulated schedule looks like on its way from the probe: frames, cut anywhere, in any order, twice, with holes.

`Tape` holds the records of one simulation with their sequence numbers. `frames` cuts them; `without` removes evidence the
way a full ring does, leaving the loss row that the probe would write.
"""

import itertools
import random
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from events.frames import SCHEMAS, Clocks, Frame, Watermark, events_frame
from events.kinds import BY_NAME, FAMILIES
from events.records import EVENTS, FLAG_WATCHED, LOSSES, TASKS

NODE = "sim"
BOOT_ID = "5" * 32


@dataclass(frozen=True)
class Tape:
    """Numbered records (time, cpu, seq, kind, tgid, tid, args), sorted by time, task rows and loss rows."""

    records: tuple
    task_rows: tuple
    losses: tuple
    end_ns: int
    cpus: int

    @classmethod
    def of(cls, simulator, truth, *, nested=True):
        """The tape of a finished simulation. With `nested`, some neighbours took their numbers in the other order, as programs
        that interrupt each other between reserving a record and reading the clock do."""
        rng = random.Random(simulator.seed * 7 + 1)
        counters = {}
        numbered = []
        for time_ns, cpu, kind, tgid, tid, args in simulator.records:
            seq = counters.get(cpu, 0)
            counters[cpu] = seq + 1
            numbered.append([time_ns, cpu, seq, kind, tgid, tid, args])
        if nested:
            last = {}
            for record in numbered:
                before = last.get(record[1])
                if before is not None and before[0] < record[0] and rng.random() < 0.05:
                    before[2], record[2] = record[2], before[2]
                last[record[1]] = record
        return cls(tuple(map(tuple, numbered)), tuple(simulator.task_rows), (), truth.end_ns, len(simulator.cpus))

    def without(self, cpu, from_ns, to_ns):
        """The tape after a full ring dropped every record of `cpu` in [from, to)."""
        gone = [r for r in self.records if r[1] == cpu and from_ns <= r[0] < to_ns]
        if not gone:
            return self
        kept = tuple(r for r in self.records if not (r[1] == cpu and from_ns <= r[0] < to_ns))
        numbers = sorted(r[2] for r in gone)
        rows = []
        # One row a run of numbers, bounded by the records around it, as the reader of the ring writes it.
        for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
            seqs = [seq for _, seq in run]
            before = [r[0] for r in kept if r[1] == cpu and r[2] < seqs[0]]
            after = [r[0] for r in kept if r[1] == cpu and r[2] > seqs[-1]]
            row = dict.fromkeys(LOSSES.names)
            row |= {"cpu": cpu, "reason": "ring_full", "hop": "ring", "from_mono_ns": max(before, default=0)}
            row |= {"to_mono_ns": min(after, default=self.end_ns), "count": len(seqs)}
            rows.append(row | {"first_seq": seqs[0], "last_seq": seqs[-1]})
        return replace(self, records=kept, losses=(*self.losses, *rows))

    def hiding(self, tid):
        """The tape of a kernel that runs no program while thread `tid` is current, with the rows that the probe then writes."""
        kept = [r for r in self.records if r[5] != tid]
        rows = []
        for gone in (r for r in self.records if r[5] == tid and r[3] == BY_NAME["sched_switch"].number):
            before = [r[0] for r in kept if r[1] == gone[1] and r[0] <= gone[0]]
            after = [r[0] for r in kept if r[1] == gone[1] and r[0] > gone[0]]
            if before and after:
                row = dict.fromkeys(LOSSES.names) | {"cpu": gone[1], "reason": "hidden_task", "hop": "kernel", "count": 1}
                rows.append(row | {"from_mono_ns": max(before), "to_mono_ns": min(after)})
        place = {}
        for cpu in range(self.cpus):
            numbers = sorted(r[2] for r in kept if r[1] == cpu)
            place |= {(cpu, number): i for i, number in enumerate(numbers)}
        numbered = tuple((r[0], r[1], place[r[1], r[2]], *r[3:]) for r in kept)
        tasks = tuple(r for r in self.task_rows if r["tid"] != tid)
        return replace(self, records=numbered, task_rows=tasks, losses=(*self.losses, *rows))

    def between(self, from_ns, to_ns, *, snapshot=False):
        """The tape of a recorder that was started at `from_ns` and stopped at `to_ns`."""
        kept = tuple(r for r in self.records if from_ns <= r[0] < to_ns)
        rows = self.task_rows if snapshot else ()
        return replace(self, records=kept, task_rows=rows, end_ns=to_ns)

    def columns(self, records):
        """Event columns of some records."""
        rows = [(r[0], r[2], r[1], r[3], FLAG_WATCHED, r[4], r[5], *r[6]) for r in records]
        return {
            f.name: np.array([row[at] for row in rows], dtype=f.type.to_pandas_dtype()) for at, f in enumerate(EVENTS)
        }

    def frames(self, *, batch=1_000_000, rng=None, duplicates=False):
        """The tape as frames of at most `batch` events. With `rng` the cuts are random, and the frames arrive in random order
        (the session first); with `duplicates` some arrive twice."""
        parts = self._cut(batch, rng)
        head = {"node": NODE, "boot_id": BOOT_ID, "recording": "r", "clocks": Clocks(self.end_ns, self.end_ns, self.end_ns)}
        start = min((r[0] for r in self.records), default=0)
        out = [Frame(kind="session/1", batch=_empty(), body=session(start, self.cpus), **self._mark(head, 0, start))]
        for kind, schema, rows in (("tasks/1", TASKS, self.task_rows), ("losses/1", LOSSES, self.losses)):
            if rows:
                batch_of_rows = pa.RecordBatch.from_pylist([{n: r.get(n) for n in schema.names} for r in rows], schema=schema)
                out.append(Frame(kind=kind, batch=batch_of_rows, **self._mark(head, len(out), start)))
        for at, part in enumerate(parts):
            watermark = self.end_ns if at == len(parts) - 1 else parts[at + 1][0][0]
            out.append(events_frame(self.columns(part), **self._mark(head, len(out), watermark)))
        if rng is not None:
            rest = out[1:]
            if duplicates:
                rest += [f for f in rest if rng.random() < 0.3]
            rng.shuffle(rest)
            out = out[:1] + rest
        return out

    def _cut(self, batch, rng):
        parts = []
        at = 0
        while at < len(self.records):
            size = batch if rng is None else rng.randint(1, max(1, min(batch, len(self.records) // 3 + 1)))
            parts.append(self.records[at : at + size])
            at += size
        return parts

    def _mark(self, head, number, watermark_ns):
        marks = Watermark(watermark_ns, dict.fromkeys(range(self.cpus), watermark_ns))
        return {**head, "number": number, "watermark": marks}


def _empty():
    return pa.RecordBatch.from_arrays([], schema=SCHEMAS["session/1"])


def session(start_ns, cpus):
    """The session document of a probe that records everything."""
    families = {name: {"attached": True, "missing": [], "reason": ""} for name in FAMILIES}
    body = {"kernel": "sim", "cpus": cpus, "families": families, "capabilities": {}, "watch": ["all"]}
    return body | {"started_mono_ns": start_ns}
