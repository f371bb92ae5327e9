"""What travels between the steps of a flow: whole Kafka messages, never single events.

All types are small, immutable and can be pickled: between the workers of one process they move by reference, between
processes as bytes. A decoded frame is not pickled; the receiver decodes it again, which costs less than pickling its
columns.
"""

from dataclasses import dataclass, field
from typing import Any

from causality.operations import Operation
from events.frames import Frame

__all__ = ["DeadLetter", "FrameMessage", "Judgement", "Message", "NodeSeen", "Submission"]


@dataclass(frozen=True, slots=True)
class Message:
    """One Kafka message. `replayed`: its effects are stored already; it is read again only to rebuild state."""

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes = field(repr=False)
    timestamp_real_ms: int
    replayed: bool = False

    @property
    def token(self) -> str:
        """The message's name, the same at every reading: what makes its effects idempotent."""
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that cannot be used, and why."""

    message: Message
    reason: str


class FrameMessage:
    """A raw message and the frame that it holds. Raises FrameError if it holds none."""

    __slots__ = ("frame", "message")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.frame = Frame.decode(message.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameMessage, (self.message,)


@dataclass(frozen=True, slots=True)
class Submission:
    """An operation to be judged, and the message that announced it."""

    operation: Operation
    message: Message


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """A node is recorded. Told to all shards: whoever leaves a node out must know that there is only one."""

    node: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, in the bytes in which every store gets it, and its causal edges. `key` is the operation's id."""

    verdict: dict[str, Any]
    edges: tuple[dict[str, Any], ...]

    @property
    def key(self) -> str:
        """The operation's id."""
        return str(self.verdict["operation_id"])
