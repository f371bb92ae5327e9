"""Other tools' published traces come out as published: from the oracle, and from the engine through the commands."""

import json

import pytest
from oracle import Oracle
from peer_traces import END, TRACES

from cli.main import app
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


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t.name)
def test_the_commands_give_the_published_states(trace, tmp_path, capfd):
    source, capture = tmp_path / "trace.jsonl", tmp_path / "trace.kcap"
    source.write_text("".join(json.dumps(e) + "\n" for e in trace.events))
    app(["import", "--format", "jsonl", str(source), "-o", str(capture)], standalone_mode=False)
    capfd.readouterr()

    app(["states", str(capture), "--jsonl"], standalone_mode=False)

    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    last = max(e["time_ns"] for e in trace.events)
    for tid, expected in trace.states.items():
        got = []
        for row in (r for r in rows if r["tid"] == tid):
            cpu = row["cpu"] if row["state"] == "running" else None
            waker = row["waker_tid"] if row["state"] == "runnable" else None
            got.append((row["start_mono_ns"], row["end_mono_ns"], row["state"], cpu, waker, row.get("open", False)))
        assert got == [(a, last if b is END else b, *rest, b is END) for a, b, *rest in expected], f"tid {tid}"
