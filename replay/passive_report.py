"""A passive replay, shown: `kprobe replay run` on a passive recording, and the verdict on a patched program.

What: `run` prints the program's output or the document `kprobe.replay/1`, which for a passive replay also says how far clocks
may be off and how many outputs differ.
Exit status of `run`: that of the program when the replay is identical; 3 when it left the recording, with the report on stderr.
"""

import json
import sys
from pathlib import Path
from typing import Any

from replay import report
from replay.passive_player import PassivePlayer, PassiveResult, show_limits
from replay.rules import RuleSet

__all__ = ["document", "run"]


def document(
    result: PassiveResult, meta: dict[str, Any], verdict: str | None = None, reasons: list[str] | None = None
) -> dict[str, Any]:
    """The JSON of one passive replay."""
    told = report.document(result, meta, verdict, reasons)
    told["notes"] = [*told["notes"], *show_limits(result)]
    more = ("derived_clock_reads", "clock_bound_ns", "skipped", "extra", "differing_outputs")
    return told | {name: getattr(result, name) for name in more}


def run(recording: Path, *, as_json: bool, program: Path | None, rules: RuleSet | None) -> int:
    """Replay and show; returns the exit status."""
    player = PassivePlayer(recording, None if as_json else report._pass_through, program=program, rules=rules)
    result = player.run()
    if as_json:
        print(json.dumps(document(result, player.meta)))
    if result.identical:
        return result.exit_status or 0
    if not as_json:
        report._show(result)
        for line in show_limits(result):
            print(f"  {line}", file=sys.stderr)
    return report.DIVERGED
