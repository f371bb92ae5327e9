"""`kprobe replay run`: one replay, shown as the program's output or as `kprobe.replay/1` JSON.

Exit status: that of the program when the replay is identical; 3 when it left the recording, with the report on stderr.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

from replay.log import load_meta
from replay.player import Player, Result

__all__ = ["document", "run"]

SCHEMA: Final = "kprobe.replay/1"
DIVERGED: Final = 3


def document(
    result: Result, meta: dict[str, Any], verdict: str | None = None, reasons: list[str] | None = None
) -> dict[str, Any]:
    """The JSON of one replay."""
    if reasons is None:
        reasons = [] if result.identical else [_sentence(result)]
    return {
        "schema": SCHEMA, "fidelity": meta["fidelity"], "why_not_higher": meta["why_not_higher"], "notes": meta["notes"],
        "identical": result.identical, "divergence": result.divergence, "syscalls_replayed": result.calls,
        "stdout_sha256": result.stdout_sha256, "exit_status": result.exit_status, "verdict": verdict, "reasons": reasons,
    }  # fmt: skip


def _sentence(result: Result) -> str:
    report = result.divergence or {}
    return f"{report.get('class')}: expected {report.get('expected')}, got {report.get('actual')}"


def run(recording: Path, *, scale: float, as_json: bool) -> int:
    """Replay and show; returns the exit status."""
    if load_meta(recording).get("recorder") == "passive":
        from replay.passive_report import run as run_passive

        return run_passive(recording, as_json=as_json, program=None, rules=None)
    player = Player(recording, None if as_json else _pass_through, scale)
    result = player.run()
    if as_json:
        print(json.dumps(document(result, player.meta)))
    if result.identical:
        return result.exit_status or 0
    if not as_json:
        _show(result)
    return DIVERGED


def _pass_through(name: str, data: bytes) -> None:
    stream = sys.stdout if name == "stdout" else sys.stderr
    stream.buffer.write(data)
    stream.buffer.flush()


def _show(result: Result) -> None:
    report = result.divergence or {}
    where = f"event {report.get('event')}, thread {report.get('thread')}"
    print(f"kprobe: the replay left the recording at {where}:", file=sys.stderr)
    for key in ("class", "expected", "actual", "difference", "call_site"):
        if key in report:
            print(f"  {key}: {report[key]}", file=sys.stderr)
    for line in report.get("last_matched", []):
        print(f"  matched before: {line}", file=sys.stderr)
