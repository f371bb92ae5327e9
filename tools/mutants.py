"""Mutation testing of `causality/`: are the tests able to notice a wrong engine?

    python tools/mutants.py [--modules states,timeline,...] [--count 120] [--seed 1] [--json FILE]

One change at a time (a comparison, an operator, a constant, a condition, a boolean) is made in a copy of the project; the
tests of `tests/causality` run against it, the quick and telling ones first, and stop at the first failure. A mutant that
fails a test, or does not end, is killed; the survivors are printed with file, line and change, to be looked at. Mutants are
drawn by the seed from all places that code of the named modules has; docstrings, annotations and error texts are not code.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
MODULES = "states,log,timeline,walk,causes,verdict,engine,locks,block,window,graph,edges"
TIMEOUT_S = 240
# The first stage kills most mutants in seconds; the second is everything.
STAGES = (
    ["tests/causality/test_peer_traces.py", "tests/causality/test_simulated_truth.py", "-k", "commands or [0] or [300]"],
    ["tests/causality"],
)
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARISONS |= {ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Mult: ast.FloorDiv}


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """The variants of one node."""
    if isinstance(node, ast.Compare):
        for at, op in enumerate(node.ops):
            if type(op) in COMPARISONS:
                variant = copy.deepcopy(node)
                variant.ops[at] = COMPARISONS[type(op)]()
                yield variant
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        variant = copy.deepcopy(node)
        variant.op = OPERATORS[type(node.op)]()
        yield variant
    elif isinstance(node, ast.BoolOp):
        variant = copy.deepcopy(node)
        variant.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield variant
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.IfExp):
        yield copy.deepcopy(node.body)


def places(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes of code: not of annotations, module constants' tables, decorators or raised errors."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Raise | ast.Assert | ast.AnnAssign) or (isinstance(node, ast.expr) and _is_annotation(node)):
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                yield from walk(node.value)
            return
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child)

    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                yield from walk(statement)


def _is_annotation(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("Sequence", "Mapping")


def mutants(modules: list[str]) -> list[tuple[Path, int, str, str]]:
    """(file, line, what changed, mutated source) of every possible mutant."""
    out = []
    for module in modules:
        path = Path("causality") / f"{module}.py"
        source = (ROOT / path).read_text()
        lines = source.splitlines(keepends=True)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line.encode()))
        raw = source.encode()
        seen = set()
        for node in places(ast.parse(source)):
            if not isinstance(node, ast.expr) or node.end_lineno is None or node.end_col_offset is None:
                continue
            a, b = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            for variant in changed(node):
                text = ast.unparse(variant)
                if (a, b, text) in seen:
                    continue
                seen.add((a, b, text))
                mutated = raw[:a] + b"(" + text.encode() + b")" + raw[b:]
                out.append((path, node.lineno, f"{raw[a:b].decode()}  ->  {text}", mutated.decode()))
    return out


def make_copy(folder: Path) -> None:
    """What the tests need of the project."""
    for name in ("causality", "events", "probe", "cli", "tests", "sinks", "flows"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def verdict(folder: Path, mutant: tuple[Path, int, str, str]) -> str:
    """killed, timeout or survived."""
    path, _, _, source = mutant
    original = (ROOT / path).read_text()
    (folder / path).write_text(source)
    # Import from the copy, not from where the project is installed.
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "100"}
    base = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:randomly", "-p", "no:cacheprovider", "--timeout", "60"]
    try:
        for stage in STAGES:
            done = subprocess.run([*base, *stage], cwd=folder, env=env, capture_output=True, check=False, timeout=TIMEOUT_S)
            if done.returncode == 1:
                return "killed"
            if done.returncode != 0:
                return "killed" if b"rror" in done.stdout else f"broken: {done.stdout[-300:]!r}"
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        (folder / path).write_text(original)
    return "survived"


def main() -> None:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(description="mutation testing of causality/")
    parser.add_argument("--modules", default=MODULES)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every = mutants(options.modules.split(","))
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(every)} possible mutants, {len(chosen)} drawn with seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folders: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.workers):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            make_copy(folder)
            folders.put(folder)

        def run(mutant: tuple[Path, int, str, str]) -> str:
            folder = folders.get()
            try:
                outcome = verdict(folder, mutant)
            finally:
                folders.put(folder)
            if outcome not in ("killed", "timeout"):
                print(f"{outcome}: {mutant[0]}:{mutant[1]}: {mutant[2]}", flush=True)
            return outcome

        with ThreadPoolExecutor(options.workers) as pool:
            outcomes = list(pool.map(run, chosen))
    by_file: dict[str, Counter[str]] = {}
    for outcome, mutant in zip(outcomes, chosen, strict=True):
        by_file.setdefault(str(mutant[0]), Counter())[outcome] += 1
    for path, counts in sorted(by_file.items()):
        dead = counts["killed"] + counts["timeout"]
        print(f"{path:<28}{dead:>5} of {counts.total():>4}  {dead / counts.total():>7.1%}")
    dead = sum(o in ("killed", "timeout") for o in outcomes)
    print(f"score {dead} of {len(outcomes)}: {dead / len(outcomes):.1%}")
    if options.json:
        rows = [{"file": str(m[0]), "line": m[1], "change": m[2], "outcome": o} for m, o in zip(chosen, outcomes, strict=True)]
        options.json.write_text(json.dumps({"schema": "kprobe.mutants/1", "seed": options.seed, "mutants": rows}, indent=1))


if __name__ == "__main__":
    main()
