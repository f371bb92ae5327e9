"""`kprobe replay run INCIDENT.kcap`: the recorded events folded again, and questions to them."""

import json
import sys
from pathlib import Path
from typing import Any

from events.errors import InputError

__all__ = ["run_capture"]


def run_capture(
    capture: Path, *, operations: Path | None, tids: list[int], rules: list[str], workers: int, keep: Path | None, as_json: bool
) -> int:
    """Fold again and show; returns 0, or 3 if a verdict differs or its evidence is incomplete."""
    from probe.capture import CaptureReader
    from replay import f0
    from replay.rules import parse_rule

    asked = [parse_rule(text) for text in rules]
    with CaptureReader(capture) as reader:
        frames = list(reader.frames())
        damage = [str(d) for d in reader.damage]
    for line in damage:
        print(f"kprobe: {capture}: {line}", file=sys.stderr)
    wanted, expected = _wanted(capture, frames, operations, tids)
    folded, divergence = f0.replay(frames, wanted, workers=workers, expected=expected or None)
    told = f0.document(folded, divergence, f0.what_if_all(folded, wanted, asked) if asked else [])
    if keep is not None:
        _keep(keep, frames, wanted, folded)
    if as_json:
        print(json.dumps(told))
    else:
        _show(told, workers)
    return 3 if divergence is not None or told["reasons"] or damage else 0


def _wanted(capture: Path, frames: list[Any], file: Path | None, tids: list[int]) -> tuple[list[Any], dict[str, str]]:
    """What is judged, and the hashes that were kept with it: the file given, else what the capture keeps, else beside it."""
    from cli.analyze import operations_of, whole_time
    from replay.f0 import kept_in

    beside = capture.with_suffix(".operations.csv")
    whole = [whole_time(tids, frames)] if tids else []
    if file is not None:
        return [*operations_of(file), *(o for part in whole for o in part)], {}
    if whole:
        return whole[0], {}
    kept, hashes = kept_in(frames)
    if not kept and beside.exists():
        return operations_of(beside), {}
    return kept, hashes


def _keep(path: Path, frames: list[Any], operations: list[Any], folded: Any) -> None:
    from probe.capture import CaptureWriter
    from replay.f0 import keep_frame, kept_in

    if path.exists():
        raise InputError(f"--keep {path} exists; name a new file")
    own = [f for f in frames if not kept_in([f])[0]]
    with CaptureWriter(path) as writer:
        for frame in [*own, keep_frame(own, operations, folded.hashes)]:
            writer.write(frame)


def _show(told: dict[str, Any], workers: int) -> None:
    from cli.render import verdict_text, wants_colour

    for verdict in told["verdicts"]:
        print(verdict_text(verdict, colour=wants_colour(sys.stdout)))
        print(f"  {verdict['hash']}\n")
    for question in told["what_if"]:
        low, high = (f"{ns / 1e6:.3f} ms" for ns in question["duration_ns"])
        recorded, removed = question["recorded_ns"] / 1e6, question["removed_ns"] / 1e6
        print(f"{question['operation_id']}: {recorded:.3f} ms recorded, {removed:.3f} ms taken away: {low} to {high}, ", end="")
        print(question["status"])
        for warning in question["warnings"]:
            print(f"  {warning}")
    if told["identical"]:
        print(f"kprobe: {told['events']} events folded again, by {workers} engines, too: the same verdicts", file=sys.stderr)
    for reason in told["reasons"]:
        print(f"kprobe: {reason}", file=sys.stderr)
