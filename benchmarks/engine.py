"""What the engine costs: fold (decoded frames to sealed, ordered events and closed edges) and one verdict on a large capture.

    python -m benchmarks.engine [--events 10000000] [--rounds 3] [--json FILE]

The workload is synthetic and fixed by its seed: CPUs that switch among tasks, wake-ups, system calls and ticks, cut
into frames as the probe cuts them. Prints a table and JSON. Bars: fold within 250 ns an event, a verdict on 10 M
decoded events within 50 ms.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from causality.engine import EngineConfig, NodeEngine
from causality.operations import Operation
from events.frames import Clocks, Frame, Watermark, events_frame
from events.kinds import BY_NAME

_MEAN_GAP_NS = 2_000
_CPUS = 4
_TASKS = 200
_FRAME_EVENTS = 16_384


def columns(count: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Events of `_CPUS` CPUs in the order of time: a switch chain per CPU that is consistent, with other events between."""
    rng = np.random.default_rng(seed)
    kinds = {n: BY_NAME[n].number for n in ("sched_switch", "sched_waking", "sys_enter", "sys_exit", "local_timer_entry")}
    choice = rng.choice(np.array(list(kinds.values()), np.uint8), count, p=[0.06, 0.04, 0.43, 0.43, 0.04])
    time_ns = np.cumsum(rng.integers(1, 2 * _MEAN_GAP_NS // _CPUS, count)).astype(np.int64) + 1_000_000_000
    cpu = rng.integers(0, _CPUS, count).astype(np.uint16)
    tid = np.zeros(count, np.uint32)
    args = {f"a{i}": np.zeros(count, np.uint64) for i in range(5)}
    seq = np.zeros(count, np.uint64)
    for c in range(_CPUS):
        mine = np.flatnonzero(cpu == c)
        seq[mine] = np.arange(len(mine), dtype=np.uint64)
        switches = choice[mine] == kinds["sched_switch"]
        entered = rng.integers(0, _TASKS // _CPUS, int(switches.sum())) * _CPUS + c + 1000
        epoch = np.cumsum(switches) - switches
        tid[mine] = np.concatenate(([1000 + c], entered))[epoch].astype(np.uint32)
        args["a0"][mine[switches]] = entered.astype(np.uint64) | (entered.astype(np.uint64) << np.uint64(32))
        args["a1"][mine[switches]] = entered
        args["a2"][mine[switches]] = rng.integers(0, 2, len(entered))
        args["a4"][mine[switches]] = tid[mine[switches]]
    wakes = choice == kinds["sched_waking"]
    woken = rng.integers(1000, 1000 + _TASKS, int(wakes.sum())).astype(np.uint64)
    args["a0"][wakes], args["a1"][wakes] = woken | (woken << np.uint64(32)), woken
    head = {"time_mono_ns": time_ns, "seq": seq, "cpu": cpu, "kind": choice, "flags": np.ones(count, np.uint8)}
    return {**head, "tgid": tid.copy(), "tid": tid, **args}


def frames_of(data: dict[str, npt.NDArray[Any]]) -> list[Frame]:
    """The events as frames, with watermarks."""
    count = len(data["time_mono_ns"])
    out = []
    for number, at in enumerate(range(0, count, _FRAME_EVENTS)):
        part = {n: c[at : at + _FRAME_EVENTS] for n, c in data.items()}
        mark = int(part["time_mono_ns"][-1]) + 1
        head = {"node": "bench", "boot_id": "0" * 32, "recording": "r", "number": number, "clocks": Clocks(mark, mark, mark)}
        out.append(events_frame(part, **head, watermark=Watermark(mark)))
    return out


def measure(count: int, rounds: int, seed: int) -> dict[str, Any]:
    """The figures of all rounds."""
    data = columns(count, seed)
    frames = frames_of(data)
    first, last = int(data["time_mono_ns"][0]), int(data["time_mono_ns"][-1])
    folds, verdicts = [], []
    for _ in range(rounds):
        engine = NodeEngine("bench", "0" * 32, EngineConfig(retention_ns=2**62))
        begun = time.perf_counter_ns()
        for at in range(0, len(frames), 8):
            engine.fold(frames[at : at + 8])
        folds.append((time.perf_counter_ns() - begun) / count)
        engine.finish()
        for k, share in enumerate((0.3, 0.5, 0.8)):
            start = first + int((last - first) * share)
            operation = Operation(f"op-{k}", "bench", 1000 + k, start, start + 20_000_000, 1_000_000)
            begun = time.perf_counter_ns()
            engine.judge(operation)
            verdicts.append((time.perf_counter_ns() - begun) / 1e6)
    return {
        "schema": "kprobe.benchmark/1", "benchmark": "engine", "events": count, "seed": seed,
        "fold_ns_per_event": {"rounds": folds, "best": min(folds), "bar": 250},
        "verdict_ms": {"all": verdicts, "first": verdicts[0], "median": float(np.median(verdicts)), "bar": 50},
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.events, options.rounds, options.seed)
    fold, verdict = result["fold_ns_per_event"], result["verdict_ms"]
    print(f"{options.events} events, seed {options.seed}, {options.rounds} rounds")
    print(f"fold      {fold['best']:8.1f} ns/event  (bar {fold['bar']})")
    print(f"verdict   {verdict['first']:8.1f} ms first, {verdict['median']:.1f} ms median  (bar {verdict['bar']})")
    text = orjson.dumps(result, option=orjson.OPT_INDENT_2).decode()
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
