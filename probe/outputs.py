"""Where the agent's frames go. An output never raises for what a disk or a broker does: it counts, and says so.

`Output` is what the agent needs of one; `CaptureOutput` writes a `.kcap`, `probe.producer.KafkaOutput` sends to Kafka. What an
output could not keep comes back through `take_losses` as loss rows: the stream itself tells of the hole as soon as it can.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from events.errors import ProbeError
from probe.accounts import Account
from probe.capture import CaptureWriter
from probe.framing import Sealed, loss_row

__all__ = ["CaptureOutput", "LossTally", "Output"]

_RETRY_NS: Final = 1_000_000_000


class Output(Protocol):
    """A destination of frames."""

    account: Account

    def send(self, sealed: Sealed) -> None:
        """Take one frame, or count it as dropped."""

    def poll(self) -> None:
        """Do what is due without waiting; called every drain interval."""

    def take_losses(self) -> list[dict[str, Any]]:
        """Loss rows since the last call."""

    def finish(self, timeout_s: float) -> None:
        """Deliver, or keep safe, what is pending, within `timeout_s`; then let go of everything."""

    def health(self) -> str | None:
        """What is wrong with it right now, or None."""


class LossTally:
    """Merges what is lost at one hop into one row a reason until it can be told."""

    def __init__(self, hop: str) -> None:
        self._hop = hop
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}

    def frame(self, sealed: Sealed, reason: str) -> None:
        """A frame was dropped. The rows of a losses frame are kept: they must not get lost themselves."""
        if sealed.kind == "losses/1":
            self.rows(sealed.losses)
        else:
            self.span(reason, sealed.first_mono_ns, sealed.last_mono_ns, sealed.events)

    def span(self, reason: str, first_mono_ns: int, last_mono_ns: int, events: int) -> None:
        """`events` events within [first_mono_ns, last_mono_ns] were dropped."""
        self.rows([loss_row(reason, self._hop, from_mono_ns=first_mono_ns, to_mono_ns=last_mono_ns, count=events)])

    def rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Loss rows that could not be told."""
        for row in rows:
            key = (row["cpu"], row["reason"], row["hop"], row["family"])
            known = self._rows.get(key)
            if known is None:
                self._rows[key] = dict(row)
                continue
            known["from_mono_ns"] = min(known["from_mono_ns"], row["from_mono_ns"])
            open_ended = known["to_mono_ns"] is None or row["to_mono_ns"] is None
            known["to_mono_ns"] = None if open_ended else max(known["to_mono_ns"], row["to_mono_ns"])
            known["count"] = (known["count"] or 0) + (row["count"] or 0)
            known["first_seq"] = known["last_seq"] = None  # no longer one run of numbers

    def take(self) -> list[dict[str, Any]]:
        """The rows so far; the tally starts anew."""
        rows, self._rows = list(self._rows.values()), {}
        return rows


class CaptureOutput:
    """Frames to a capture file. When the disk is full the newest frames are dropped, and tried again every second."""

    def __init__(self, writer: CaptureWriter) -> None:
        self.account = Account("capture")
        self._writer = writer
        self._tally = LossTally("capture")
        self._trouble: str | None = None
        self._retry_at_mono_ns = 0

    def send(self, sealed: Sealed) -> None:
        """Append the frame, or drop it (reason `disk_full`)."""
        self.account.accepted += sealed.events
        if self._trouble and sealed.last_mono_ns < self._retry_at_mono_ns:
            self._drop(sealed)
            return
        try:
            self._writer.write_sealed(sealed)
        except ProbeError as error:
            if self._trouble is None:
                print(f"kprobe: {error}; what follows is dropped until there is room", file=sys.stderr)
            self._trouble = str(error)
            self._retry_at_mono_ns = sealed.last_mono_ns + _RETRY_NS
            self._drop(sealed)
            return
        self._trouble = None
        self.account.delivered += sealed.events

    def poll(self) -> None:
        """Nothing is ever due: writes are done when `send` returns."""

    def take_losses(self) -> list[dict[str, Any]]:
        """What did not fit on the disk."""
        return self._tally.take()

    def finish(self, timeout_s: float) -> None:  # noqa: ARG002  a local write needs no time limit
        """Write the index; without room for it the file is whole all the same."""
        try:
            self._writer.close()
        except ProbeError as error:
            self._trouble = str(error)
            print(f"kprobe: {error}", file=sys.stderr)

    def health(self) -> str | None:
        """The last error of writing, while it lasts."""
        return self._trouble

    def _drop(self, sealed: Sealed) -> None:
        self.account.dropped["disk_full"] += sealed.events
        self._tally.frame(sealed, "disk_full")
