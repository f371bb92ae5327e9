"""The agent: drains the source on a timer, makes frames of it and hands them to the outputs.

One thread does everything, in this order, every `drain_interval_ms` (every half `batch_linger_ms` while the rings stay nearly
empty, because a drain costs what it costs): drain the rings, collect a batch, and when it holds
`batch_events` or is `batch_linger_ms` old, send its frames (session, tasks, losses, events) to every output; let the outputs do
what is due; every second check the accounts and the limits. Nothing here runs per event.

Guarantees. The watermark of a frame never runs ahead of what was sent. While nothing happens an empty events frame carries the
watermark on, five times a second. Each shed family and the end by a cap are recorded: a session frame says what and why, and as
long as a family is off each batch carries a loss row that covers the batch's time. When the agent ends, for whatever reason,
the source is detached first, then drained to its last event, then everything is handed over.

The accounts of P1 (`probe.accounts`) are checked every second and at the end; a violation is printed and kept in `violations`.
"""

import contextlib
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy.typing as npt

from events.frames import Watermark
from events.records import LOSS_HIDDEN, RECORD_BYTES
from events.settings import ProbeSettings
from probe.accounts import Account, RingLedger
from probe.framing import Framer, Row, Sealed, concatenate, loss_row
from probe.limits import Limits, Step, Usage, prefer_this_thread, read_usage
from probe.outputs import Output
from probe.tasks import with_container

__all__ = ["Agent", "Drained", "Source", "Summary"]

_FOR_EVER_NS: Final = 1 << 62  # far enough, and sums with it do not overflow
_SECOND_NS: Final = 1_000_000_000
_HEARTBEAT_NS: Final = 200_000_000
_STUCK_NS: Final = 10_000_000_000
_RING_RECORD_BYTES: Final = RECORD_BYTES + 8  # with the ring's own header
_SPARE: Final = 16
_FINISH_TIMEOUT_S: Final = 10.0
# Draining after the detach ends with the first empty drain; a source that never comes to an end must not hold up SIGTERM.
_LAST_DRAINS_MAX: Final = 1000


class Drained(Protocol):
    """What one drain gives (see `probe.source`)."""

    @property
    def columns(self) -> Mapping[str, npt.NDArray[Any]]: ...
    @property
    def tasks(self) -> Sequence[Row]: ...
    @property
    def losses(self) -> Sequence[Row]: ...
    @property
    def watermark(self) -> Watermark: ...


class Source(Protocol):
    """The kernel side as the agent sees it: `probe.source.KernelSource`, already open."""

    def session(self) -> Mapping[str, Any]: ...
    def drain(self) -> Drained: ...
    def shed(self, family: str) -> None: ...
    def detach(self) -> None: ...
    def stats(self) -> Mapping[str, Any]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Summary:
    """What a run amounted to; `incomplete` says why its evidence is not whole, empty if it is."""

    events: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    steps: list[Step] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def incomplete(self) -> list[str]:
        """One sentence a reason."""
        # The steps tell of what was shed; what a kernel hides is a limit of that kernel, like a tracepoint that it lacks.
        counted = {r: n for r, n in self.lost.items() if r not in ("shed", "detached", LOSS_HIDDEN)}
        lost = [f"{n or 'an unknown number of'} events lost ({reason})" for reason, n in sorted(counted.items())]
        return [*lost, *(f"{'shed ' + s.family if s.family else 'detached'}: {s.reason}" for s in self.steps)]

    @property
    def notes(self) -> list[str]:
        """What this kernel does not show to anybody; verdicts that it could touch say so."""
        hidden = self.lost[LOSS_HIDDEN]
        if not hidden:
            return []
        return [f"this kernel hides tasks from BPF: when they ran is recorded; what they did, and {hidden} switches, are not"]


class _Batch:
    """What was drained since the last frames were sent."""

    def __init__(self) -> None:
        self.parts: list[Mapping[str, npt.NDArray[Any]]] = []
        self.tasks: list[Row] = []
        self.losses: list[Row] = []
        self.payload: list[Any] = []
        self.rows = 0
        self.since_mono_ns = 0

    def add(self, drained: Drained, now_mono_ns: int) -> None:
        if not self:
            self.since_mono_ns = now_mono_ns
        rows = len(drained.columns["time_mono_ns"])
        if rows:
            self.parts.append(drained.columns)
        self.rows += rows
        self.tasks.extend(drained.tasks)
        self.losses.extend(drained.losses)
        payload = getattr(drained, "payload", None)
        if payload is not None:
            self.payload.append(payload)

    def __bool__(self) -> bool:
        return bool(self.rows or self.tasks or self.losses or self.payload)


class Agent:
    """Runs one recording from `source` (open) to `outputs`, and closes both."""

    def __init__(
        self,
        source: Source,
        framer: Framer,
        outputs: Sequence[Output],
        settings: ProbeSettings,
        *,
        usage: Callable[[], Usage] = read_usage,
    ) -> None:
        self.account = Account("agent")
        self.ring = RingLedger()
        self.outputs = outputs
        self.summary = Summary()
        self._source = source
        self._framer = framer
        self._settings = settings
        self._usage = usage
        self._session: dict[str, Any] = dict(source.session())
        self._shed: list[str] = []
        self._detached = False
        self._batch = _Batch()
        self._watermark = Watermark(0)
        self._sent_watermark_ns = 0
        self._sent_mono_ns = 0
        self._checked_mono_ns = 0
        self._drained_rows = 0
        # A pipe, not an Event: setting an Event in a signal handler can deadlock with the wait that it interrupts.
        self.ticked_mono_ns = 0
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.limits = Limits(
            cpu_share_max=settings.cpu_share_max,
            memory_max_bytes=settings.memory_max_bytes,
            window_s=settings.limit_window_s,
            families=[f for f, state in self._session.get("families", {}).items() if state.get("attached")],
        )

    def run(self, stop: Callable[[], bool]) -> Summary:
        """Record until `stop()` is true or a cap ends the recording; `stop` is asked after every drain."""
        try:
            prefer_this_thread()
            self._send_session()
            while not (self._detached or stop()):
                began = time.monotonic()
                self.tick()
                self._wait(self._interval_s() - (time.monotonic() - began))
        except BaseException as error:
            self.summary.error = str(error)
            raise
        finally:
            self._end()
        return self.summary

    def wake(self) -> None:
        """Cut the wait for the next drain short; may be called from a signal handler or another thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    def tick(self) -> None:
        """One turn of the loop."""
        self.ticked_mono_ns = time.monotonic_ns()
        self._drain()
        now = time.monotonic_ns()
        if self._due(now):
            self._flush(now)
        for output in self.outputs:
            output.poll()
        if now - self._checked_mono_ns >= _SECOND_NS:
            self._checked_mono_ns = now
            self._check(final=False)
            step = self.limits.check(self._usage())
            if step is not None:
                self._step_down(step)

    def troubles(self) -> list[str]:
        """What outputs complain of right now, and what was shed: the recording goes on all the same."""
        told = [f"{o.account.hop}: {trouble}" for o in self.outputs if (trouble := o.health())]
        return [*told, *(f"family {family} was shed" for family in self._shed)]

    def failures(self) -> list[str]:
        """Why this is no recording to rely on, empty if it is."""
        failed = list(self.summary.violations)
        if self._detached:
            failed.append("detached: not recording")
        if self.ticked_mono_ns and time.monotonic_ns() - self.ticked_mono_ns > _STUCK_NS:
            failed.append("the rings have not been drained for more than 10 s")
        return failed

    def source_stats(self) -> Mapping[str, Any]:
        """The source's own counters."""
        return self._source.stats()

    @property
    def shed(self) -> Sequence[str]:
        """Families given up so far."""
        return tuple(self._shed)

    def _interval_s(self) -> float:
        """Seconds from one drain to the next: a ring that fills at the pace of the last drain stays below a sixteenth."""
        shortest_ms, linger_ms = self._settings.drain_interval_ms, self._settings.batch_linger_ms
        capacity = int(self._session.get("ring_bytes_per_cpu") or self._settings.ring_bytes_per_cpu) // _RING_RECORD_BYTES
        relaxed = self._drained_rows * _SPARE * max(linger_ms // 2 // shortest_ms, 1) < capacity
        return (max(shortest_ms, linger_ms // 2) if relaxed else shortest_ms) / 1000

    def _wait(self, seconds: float) -> None:
        ready, _, _ = select.select([self._wake_read], [], [], max(0.0, seconds))
        if ready:
            os.read(self._wake_read, 4096)

    def _drain(self) -> int:
        drained = self._source.drain()
        self.ring.add(drained.columns, drained.losses)
        self._batch.add(drained, time.monotonic_ns())
        for row in drained.losses:
            self.summary.lost[row["reason"]] += row["count"] or 0
        self._watermark = drained.watermark
        rows = self._drained_rows = len(drained.columns["time_mono_ns"])
        self.account.accepted += rows
        self.account.pending += rows
        self.summary.events += rows
        return rows

    def _due(self, now_mono_ns: int) -> bool:
        if self._batch.rows >= self._settings.batch_events:
            return True
        if self._batch:
            return now_mono_ns - self._batch.since_mono_ns >= self._settings.batch_linger_ms * 1_000_000
        moved = self._watermark.node_mono_ns > self._sent_watermark_ns
        return moved and now_mono_ns - self._sent_mono_ns >= _HEARTBEAT_NS

    def _flush(self, now_mono_ns: int) -> None:
        batch, self._batch = self._batch, _Batch()
        losses = [*batch.losses, *self._shed_rows(), *(row for o in self.outputs for row in o.take_losses())]
        for sealed in self._framer.tasks([with_container(row) for row in batch.tasks]):
            self._send(sealed)
        for sealed in self._framer.losses(losses):
            self._send(sealed)
        for sealed in (s for part in batch.payload for s in self._framer.payload(part)):
            self._send(sealed)
        columns = concatenate(batch.parts)
        for sealed in self._framer.events(columns, self._watermark, self._settings.batch_events):
            self._send(sealed)
            self.account.delivered += sealed.events
            self.account.pending -= sealed.events
        self._sent_watermark_ns = self._watermark.node_mono_ns
        self._sent_mono_ns = now_mono_ns

    def _send(self, sealed: Sealed) -> None:
        for output in self.outputs:
            output.send(sealed)

    def _send_session(self) -> None:
        body = {**self._session, "shed": self._shed, "detached": self._detached}
        body["steps"] = [{"family": s.family, "reason": s.reason} for s in self.summary.steps]
        self._send(self._framer.session(body))

    def _shed_rows(self) -> list[dict[str, Any]]:
        """While a family is off, every batch says that its time was not watched by it."""
        start, end = self._sent_watermark_ns, self._watermark.node_mono_ns
        return [loss_row("shed", "probe", from_mono_ns=start, to_mono_ns=end, family=f) for f in self._shed]

    def _step_down(self, step: Step) -> None:
        self.summary.steps.append(step)
        what = f"shedding family {step.family}" if step.family else "detaching: the recording ends here"
        print(f"kprobe: {step.reason}; {what}", file=sys.stderr)
        self._flush(time.monotonic_ns())  # up to here the family was watched
        if step.family is None:
            self._detach("the probe was above its limits")
        else:
            self._source.shed(step.family)
            self._shed.append(step.family)
        self._session = dict(self._source.session())
        self._send_session()

    def _detach(self, why: str) -> None:
        self._source.detach()
        self._detached = True
        now = time.monotonic_ns()
        self._batch.losses.append(loss_row("detached", "probe", from_mono_ns=now, to_mono_ns=_FOR_EVER_NS))
        self._session["detached_reason"] = why

    def _end(self) -> None:
        """Detach, drain to the last event, hand everything over, close."""
        try:
            if self.summary.error is None:
                self._source.detach()
                for _ in range(_LAST_DRAINS_MAX):
                    if self._drain() == 0:
                        break
            self._flush(time.monotonic_ns())
        finally:
            self._source.close()
            for output in self.outputs:
                output.finish(_FINISH_TIMEOUT_S)
                self.summary.lost.update(+output.account.dropped)
            self._check(final=self.summary.error is None)
            for end in (self._wake_read, self._wake_write):
                os.close(end)

    def _check(self, *, final: bool) -> None:
        accounts = (self.account, *(o.account for o in self.outputs))
        wrong = [v for a in accounts if (v := a.violation())] + self.ring.violations(final=final)
        for violation in wrong:
            if violation not in self.summary.violations:
                print(f"kprobe: accounts do not add up (a bug, please report it): {violation}", file=sys.stderr)
                self.summary.violations.append(violation)
