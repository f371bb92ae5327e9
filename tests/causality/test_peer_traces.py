"""Other tools' published traces come out as published: from the oracle, and from the engine through the commands."""

import json

import pytest
from oracle import Oracle
from peer_traces import END, TRACES

from events.kinds import BY_NUMBER
from probe.importers import import_trace


@pytest.fixture
def imported(tmp_path):
    def run(trace):
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(json.dumps(e) + "\n" for e in trace.events))
        return import_trace(str(path), "jsonl")[0]

    return run


def records_of(frames):
    for frame in frames:
        if frame.kind == "events/1":
            for row in frame.batch.to_pylist():
                kind = BY_NUMBER[row["kind"]]
                head = {"event": kind.name, "current": row["tid"]}
                head |= {name: row[name] for name in ("time_mono_ns", "cpu", "seq", "flags")}
                yield head | kind.decode(tuple(row[f"a{i}"] for i in range(5)))


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t.name)
def test_the_oracle_gives_the_published_states(trace, imported):
    last = max(e["time_ns"] for e in trace.events)
    oracle = Oracle(list(records_of(imported(trace))), last)

    for tid, expected in trace.states.items():
        got = []
        for piece in oracle.pieces.get((tid, 0), []):
            waker = piece.waker[0] if isinstance(piece.waker, tuple) else None
            got.append((piece.start, piece.end, piece.state, piece.cpu, waker))
        assert got == [(a, last if b is END else b, *rest) for a, b, *rest in expected], f"tid {tid}"
