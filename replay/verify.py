"""`kprobe replay verify`: does a patched program cure the recorded failure?

What: first the control: the unpatched program on its recording, N times; each must be identical and show the failure. Then the
answer about the patched program, as `fixed`, `not_fixed` or `cannot_tell` with reasons.
Guarantees: never `fixed` without proof. The recorded program itself is `not_fixed`; any other is `cannot_tell`, because the
player follows only a program that makes the recorded calls.
The failure is an exit status other than 0, or an expression over `exit_status`, `stdout`, `stderr`
(comparison, `in`, `and`, `or`,
`not`, literals; nothing can be called).
"""

import ast
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from events.errors import InputError
from replay.log import LogReader, load_meta
from replay.player import Player, Result
from replay.report import document

__all__ = ["Predicate", "verify"]

_COMPARE: Final[dict[type[ast.cmpop], Callable[[Any, Any], bool]]] = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.Lt: lambda a, b: a < b, ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_NAMES: Final = ("exit_status", "stdout", "stderr")


class Predicate:
    """A failure expression, parsed once and evaluated without `eval`."""

    def __init__(self, text: str) -> None:
        try:
            self._tree = ast.parse(text, mode="eval").body
            self._value(self._tree, dict.fromkeys(_NAMES, ""), dry=True)
        except SyntaxError as error:
            raise InputError(f"--failure {text!r} is not an expression: {error.msg}; for example 'exit_status == 3'") from error

    def __call__(self, result: Result) -> bool:
        values = {
            "exit_status": result.exit_status,
            "stdout": result.stdout.decode(errors="replace"),
            "stderr": result.stderr.decode(errors="replace"),
        }
        try:
            return bool(self._value(self._tree, values, dry=False))
        except TypeError as error:
            raise InputError(f"--failure cannot be evaluated: {error}") from error

    def _value(self, node: ast.expr, names: dict[str, Any], dry: bool) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self._value(node.operand, names, dry)
        if isinstance(node, ast.BoolOp):
            parts = [bool(self._value(part, names, dry)) for part in node.values]
            return all(parts) if isinstance(node.op, ast.And) else any(parts)
        if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
            sides = [self._value(side, names, dry) for side in (node.left, *node.comparators)]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            return True if dry else all(_COMPARE[type(op)](a, b) for a, op, b in pairs)
        allowed = f"{', '.join(_NAMES)}, literals, comparisons, and/or/not/in"
        raise InputError(f"--failure: {ast.unparse(node)!r} is not allowed; use {allowed}")


def verify(recording: Path, program: Path, *, replays: int, failure: str) -> dict[str, Any]:
    """The `kprobe.replay/1` document with the verdict."""
    predicate = Predicate(failure)
    meta = load_meta(recording)
    if not (program.is_file() and os.access(program, os.X_OK)):
        raise InputError(f"--program {program} is not an executable file; name a binary or a script with a #! line, mode +x")
    result = Result()
    if meta.get("recorder") == "passive":
        passive = "the recording is passive: its control run cannot be compared call by call"
        return document(result, meta, "cannot_tell", [passive])
    for number in range(1, replays + 1):
        result = Player(recording).run()
        reason = _control_reason(result, predicate, number, failure)
        if reason:
            return document(result, meta, "cannot_tell", [reason])
    control = f"control: the unpatched program failed in each of {replays} replays ({failure})"
    return document(result, meta, *_judge(recording, meta, program, control))


def _control_reason(result: Result, predicate: Predicate, number: int, failure: str) -> str | None:
    if not result.identical:
        return f"control replay {number} left the recording: {json.dumps(result.divergence)}"
    if not predicate(result):
        return f"control replay {number} did not show the failure ({failure}): exit status {result.exit_status}"
    return None


def _judge(recording: Path, meta: dict[str, Any], program: Path, control: str) -> tuple[str, list[str]]:
    digest = hashlib.blake2b(program.read_bytes(), digest_size=20).hexdigest()
    start = next(iter(LogReader(recording)))
    if json.loads(start.pieces[0])["images"][0][1] == digest:
        return "not_fixed", [control, f"{program} is byte for byte the recorded program"]
    reason = f"{program} is not the recorded {meta['program']}, and a program that makes other calls cannot be followed"
    return "cannot_tell", [control, reason]
