"""Where a replay left its recording, in words and as JSON.

`Divergence` is raised by the player and carries the report: event number, thread, class, expected and actual call
with decoded arguments, the first differing bytes, and the calls that matched before. Classes: `control_flow` (another call),
`arguments`, `payload`, `layout` (addresses), `extra_call`, `missing_call`, `signal`, `exit`, `unmodelled`, `missing_input`,
`truncated_log`, `order`.
"""

from typing import Any

from replay.log import Event, Kind
from replay.syscalls import decode_call

__all__ = ["Divergence", "describe", "payload_difference"]


class Divergence(Exception):  # noqa: N818 - an outcome, not an error
    """The replay left the recording."""

    def __init__(self, kind: str, thread: int, expected: str, actual: str, **more: Any) -> None:
        super().__init__(f"{kind}: expected {expected}, got {actual}")
        self.report: dict[str, Any] = {"class": kind, "thread": thread, "expected": expected, "actual": actual} | more


def describe(event: Event | None) -> str:
    """A log entry for people."""
    if event is None:
        return "nothing more of this thread"
    if event.kind in (Kind.CALL, Kind.EXEC, Kind.LEAVE, Kind.SPAWN):
        text = decode_call(event.nr, event.args if event.kind != Kind.SPAWN else (), event.payload)
        return f"{text} = {event.result}" if event.kind == Kind.CALL else text
    if event.kind == Kind.SIGNAL:
        return f"signal {event.nr}"
    if event.kind == Kind.DEATH:
        return f"death with wait status {event.result:#x}"
    return Kind(event.kind).name.lower()


def payload_difference(expected: bytes, actual: bytes) -> dict[str, Any]:
    """The first differing byte and its neighbourhood."""
    limit = min(len(expected), len(actual))
    at = next((i for i in range(limit) if expected[i] != actual[i]), limit)
    start = max(0, at - 16)
    return {"offset": at, "expected": repr(expected[start : at + 32]), "actual": repr(actual[start : at + 32]),
            "expected_bytes": len(expected), "actual_bytes": len(actual)}  # fmt: skip
