"""The command: `python -m benchmarks.accuracy [--scenario NAME]... [--seeds N] [--seed S] [--json FILE] [--keep DIR]`.

Exit status 0 if all bars are met, 1 if one is missed, 2 for wrong usage.
"""

import argparse
import os
import secrets
import signal
import sys
import time
from pathlib import Path

import orjson

from benchmarks.accuracy import (  # noqa: F401  the scenarios register themselves
    scenarios_cpu,
    scenarios_disk,
    scenarios_healthy,
    scenarios_locks,
    scenarios_memory,
    scenarios_network,
    scenarios_pairs,
    scenarios_postgres,
    scenarios_waits,
)
from benchmarks.accuracy.judge import play
from benchmarks.accuracy.lab import Lab, outweigh_neighbours
from benchmarks.accuracy.score import Score, bars, score_run, total
from benchmarks.accuracy.truth import SCENARIOS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description="Real faults with known truth.")
    parser.add_argument("--scenario", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each scenario (default 10)")
    parser.add_argument("--seed", type=int, help="first seed (default: random, printed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all scores as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep captures, operations and verdicts here")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    return parser.parse_args()


def main() -> int:
    """Runs the suite."""
    args = _arguments()
    if args.list:
        for s in SCENARIOS.values():
            print(f"{s.name:26s} {'healthy ' if s.healthy else ''}{s.summary}")
        return 0
    unknown = set(args.scenario or []) - set(SCENARIOS)
    if unknown:
        print(f"no such scenario: {', '.join(sorted(unknown))}; see --list", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("needs root: it makes cgroups, devices and network namespaces, and records", file=sys.stderr)
        return 2
    # Told to end, it ends as after an error: what it started, mounted and made is taken away again.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    outweigh_neighbours()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the lab is cleared
    return _suite(args)


def _suite(args: argparse.Namespace) -> int:
    first = args.seed if args.seed is not None else secrets.randbelow(10**6)
    names = args.scenario or list(SCENARIOS)
    print(f"seed {first}: repeat with --seed {first} --seeds {args.seeds}", flush=True)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    scores = []
    began = time.monotonic()
    with Lab() as lab:
        for name in names:
            score = total([_one(lab, name, first + i, args.keep) for i in range(args.seeds)])
            score.name = name
            scores.append(score)
            _print_line(score)
    _print_total(scores)
    print(f"took {time.monotonic() - began:.0f} s")
    if args.json:
        document = {
            "seed": first,
            "seeds": args.seeds,
            "scenarios": [s.document() for s in scores],
            "total": total(scores).document(),
        }
        args.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    return 0 if all(b.passed for b in bars(total(scores))) else 1


def _one(lab: Lab, name: str, seed: int, keep: Path | None) -> Score:
    try:
        run = play(lab, SCENARIOS[name], seed, keep)
    except Exception as error:  # one broken run must not hide the other results; it is counted and printed
        return Score(name, runs=1, errors=[f"{name} seed {seed}: {type(error).__name__}: {error}"])
    if keep is not None:
        (keep / f"{name}-{seed}.json").write_bytes(orjson.dumps(run.verdicts, option=orjson.OPT_INDENT_2))
    else:
        score = score_run(run)
        run.capture.unlink(missing_ok=True)
        return score
    return score_run(run)


def _print_line(score: Score) -> None:
    if score.blamed or not score.healthy:
        text = (
            f"kind {score.kind_ok}/{score.blamed} culprit {score.culprit_ok}/{score.blamed} both {score.both_ok}/{score.blamed}"
        )
        text += f" path {score.path_f1:.2f} | most CPU {score.base_cpu_ok}, nearby {score.base_near_ok}"
    else:
        text = f"healthy {score.healthy} false blame {score.false_blame}"
    print(f"{score.name:26s} {text}{f' void {score.void}' if score.void else ''}", flush=True)
    for miss in [*score.errors, *score.misses][:12]:
        print(f"    {miss}", flush=True)


def _print_total(scores: list[Score]) -> None:
    everything = total(scores)
    print(f"\n{'figure':36s} {'bar':16s} {'got':20s}")
    for bar in bars(everything):
        print(f"{bar.figure:36s} {bar.bar:16s} {bar.got:20s} {'pass' if bar.passed else 'MISS'}")
    of = max(everything.blamed, 1)
    cpu, near = everything.base_cpu_ok / of, everything.base_near_ok / of
    print(f"baseline, most CPU near the time: {cpu:.1%}; most events within 50 ms: {near:.1%}")
    each = everything.analyze_s
    print(f"analyze: {sum(each) / max(len(each), 1):.2f} s a run; void {everything.void}, errors {len(everything.errors)}")


if __name__ == "__main__":
    sys.exit(main())
