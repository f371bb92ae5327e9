"""Which bytes that one host received another had sent, and how long they were on the wire (D10).

A fold over the packets of many nodes: `CrossNode.fold(node, packets, watermark)` takes one node's packets in any order, and
`edges()` gives what has been matched since. Pure: columns in, columns out; Python runs per connection and batch only.

    packets_of(columns)        the TCP packets of one node's events (`net_dev_queue`, `netif_receive_skb`)
    CrossNode().fold(...)      match; the packets of both directions also bound the two hosts' clocks (`causality.clocks`)
    EdgeBatch                  one connection's matched packets: who sent when, who received when, wire time with its error

How bytes are matched. A connection's direction is (saddr, daddr, sport, dport); an epoch of it begins with a SYN, whose
sequence number tells it from an earlier use of the same ports. Sequence numbers are unwrapped to 64 bits from there. The
sender's packets are byte ranges, and so are the receiver's; offload cuts and joins packets on the way, so a received range
belongs to the sent ranges that cover it, whatever their sizes. The first transmission of a byte counts as its sending; later
ones are retransmissions: their number and the time of the last are told (`resent_mono_ns`: the gap between the two is loss,
not wire). On each node the first time that a byte passes counts: what bridges and veth pairs show again is the same packet.

A node that sends a direction's bytes before it receives them is their sender, otherwise a receiver. Two senders of one epoch
are two connections that look alike (address translation, overlapping networks): no edge is made of either, and `ambiguous`
counts them. An edge whose bytes arrive before they can have been sent, by the clock bounds, is rejected and counted, never
clamped.

Can be fooled by: address translation between the hosts (no match: counted as `unmatched`), and two connections without a
recorded SYN on the same four numbers whose sequence numbers overlap (the clock bounds reject all but the plausible).
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from causality.clocks import ClockGraph
from events.kinds import BY_NAME

__all__ = ["CrossNode", "EdgeBatch", "FlowKey", "Packets", "packets_of"]

Ints = npt.NDArray[np.int64]
FlowKey = tuple[int, int, int, int]  # saddr, daddr, sport, dport of the direction
_SYN: Final = 2
_FIN: Final = 1
_TCP: Final = 6
_HEADERS: Final = 52  # IPv4 and TCP with timestamps; a byte too few at a range's end matters to nobody
_EPOCHS_MAX: Final = 8
_RANGES_MAX: Final = 8192  # byte ranges kept per epoch and side
_BOUNDS_PER_BATCH: Final = 64
_WRAP: Final = 1 << 32


@dataclass(frozen=True, slots=True)
class Packets:
    """TCP packets of one node, one row each. `sent`: queued for transmission, else received. `cpu`, `number`: the event."""

    time_mono_ns: Ints
    sent: npt.NDArray[np.bool_]
    saddr: Ints
    daddr: Ints
    sport: Ints
    dport: Ints
    seq: Ints
    length: Ints  # bytes of sequence space: payload, SYN, FIN
    tcp_flags: Ints
    tid: Ints
    tgid: Ints
    cpu: Ints
    number: Ints

    def __len__(self) -> int:
        return len(self.time_mono_ns)

    def take(self, chosen: npt.NDArray[Any]) -> "Packets":
        """The rows of a mask or of indexes."""
        return Packets(**{name: getattr(self, name)[chosen] for name in _PACKET_COLUMNS})


_PACKET_COLUMNS: Final = tuple(Packets.__dataclass_fields__)


def _joined(parts: list[Packets]) -> Packets:
    if len(parts) == 1:
        return parts[0]
    return Packets(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in _PACKET_COLUMNS})


def packets_of(columns: Mapping[str, npt.NDArray[Any]]) -> Packets:
    """The TCP packets that take sequence numbers, of one node's event columns (`events.records.EVENTS`)."""
    sent, received = BY_NAME["net_dev_queue"], BY_NAME["netif_receive_skb"]
    kind = columns["kind"]
    rows = np.flatnonzero((kind == sent.number) | (kind == received.number))
    part = {name: columns[name][rows] for name in ("time_mono_ns", "cpu", "seq", "tid", "tgid", "a0", "a1", "a2", "a3", "a4")}
    flags = sent.get(part, "tcp_flags")
    length = np.maximum(sent.get(part, "ip_len") - _HEADERS, 0)
    length = np.where(flags & _SYN != 0, 1, length + (flags & _FIN != 0))
    found = Packets(
        time_mono_ns=part["time_mono_ns"].astype(np.int64), sent=columns["kind"][rows] == sent.number,
        saddr=sent.get(part, "saddr"), daddr=sent.get(part, "daddr"), sport=sent.get(part, "sport"),
        dport=sent.get(part, "dport"), seq=sent.get(part, "seq"), length=length, tcp_flags=flags,
        tid=part["tid"].astype(np.int64), tgid=part["tgid"].astype(np.int64), cpu=part["cpu"].astype(np.int64),
        number=part["seq"].astype(np.int64),
    )  # fmt: skip
    return found.take((sent.get(part, "protocol") == _TCP) & (length > 0))


@dataclass(frozen=True, slots=True)
class EdgeBatch:
    """Received packets of one direction with the sendings of their bytes, one row each.

    `begun`: when the first of its bytes was sent first, `sent`: when the last of them was. Times by the clock of the node they
    happened on. The true time on the wire, by the receiver's clock, lies within `wire_ns` +/- `error_ns`; `error_ns` -1: the
    clocks are not known. `resent_mono_ns` -1: sent once.
    """

    sender: str
    receiver: str
    flow: FlowKey
    first_byte: Ints  # sequence number, unwrapped within the epoch
    end_byte: Ints
    begun_mono_ns: Ints
    sent_mono_ns: Ints
    received_mono_ns: Ints
    transmissions: Ints
    resent_mono_ns: Ints
    wire_ns: Ints
    error_ns: Ints
    sent_tid: Ints
    sent_tgid: Ints
    sent_event: Ints  # (n, 2): cpu, number on `sender`
    received_event: Ints  # on `receiver`

    def __len__(self) -> int:
        return len(self.first_byte)

    def sort_key(self) -> tuple[Any, ...]:
        """A total order of batches that does not depend on arrival."""
        return self.sender, self.receiver, self.flow, int(self.received_mono_ns[0]), tuple(self.received_event[0].tolist())


@dataclass(slots=True)
class _Side:
    """One node's view of one epoch. As a sender: first transmissions, by byte; as a receiver: arrivals that wait for theirs."""

    sends: bool
    last_seq: int
    last_position: int
    start: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    end: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    rows: Packets | None = None  # of `start`
    again_start: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # retransmissions
    again_end: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    again_time: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    seen: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # first bytes of arrivals


@dataclass(slots=True)
class _Epoch:
    """One life of a connection's direction. `isn`: its SYN's sequence number, None if none was seen."""

    isn: int | None
    anchor: int
    sides: dict[str, _Side] = field(default_factory=dict)

    @property
    def senders(self) -> list[str]:
        return [node for node, side in self.sides.items() if side.sends]


@dataclass(slots=True)
class _Connection:
    """The lives of one direction, and in which of them each node is."""

    epochs: list[_Epoch] = field(default_factory=list)
    current: dict[str, _Epoch] = field(default_factory=dict)


class CrossNode:
    """See the module's text. `connections_max`: directions held; the least recently used are forgotten, and counted."""

    def __init__(self, connections_max: int = 65_536) -> None:
        self.clocks = ClockGraph()
        self.counters = dict.fromkeys(("edges", "rejected", "ambiguous", "unmatched", "evicted", "duplicates"), 0)
        self._connections_max = connections_max
        self._pending: dict[str, list[Packets]] = {}
        self._flows: OrderedDict[FlowKey, _Connection] = OrderedDict()
        self._ready: list[EdgeBatch] = []

    def fold(self, node: str, packets: Packets, watermark_mono_ns: int) -> None:
        """Take packets of a node; those before its watermark are matched. `node` must name the boot too."""
        if len(packets):
            self._pending.setdefault(node, []).append(packets)
        self._advance(node, watermark_mono_ns)

    def finish(self) -> None:
        """The input has ended: match everything, count what has no other half."""
        for node in sorted(self._pending):
            self._advance(node, None)
        for flow in self._flows:
            for epoch in self._flows[flow].epochs:
                self._match(flow, epoch, partial=True)
                self.counters["unmatched"] += sum(len(s.start) for s in epoch.sides.values() if not s.sends)

    def edges(self) -> list[EdgeBatch]:
        """What has been matched since the last call, with what the clocks say now."""
        found, self._ready = self._ready, []
        timed = [t for batch in found if (t := self._timed(batch)) is not None]
        self.counters["edges"] += sum(map(len, timed))
        return sorted(timed, key=EdgeBatch.sort_key)

    # --- in order of time, a node at a time

    def _advance(self, node: str, watermark: int | None) -> None:
        parts = self._pending.pop(node, [])
        if not parts:
            return
        packets = _joined(parts)
        order = np.lexsort((packets.number, packets.cpu, packets.time_mono_ns))
        packets = packets.take(order)
        same = (np.diff(packets.time_mono_ns) == 0) & (np.diff(packets.cpu) == 0) & (np.diff(packets.number) == 0)
        if same.any():
            self.counters["duplicates"] += int(same.sum())
            packets = packets.take(np.append(True, ~same))
        ripe = len(packets) if watermark is None else int(np.searchsorted(packets.time_mono_ns, watermark))
        if ripe < len(packets):
            self._pending[node] = [packets.take(np.arange(ripe, len(packets)))]
        if ripe:
            self._by_flow(node, packets.take(np.arange(ripe)))

    def _by_flow(self, node: str, packets: Packets) -> None:
        key = np.stack([packets.saddr, packets.daddr, packets.sport, packets.dport], axis=1)
        distinct, group = np.unique(key, axis=0, return_inverse=True)
        group = group.ravel()
        order = np.argsort(group, kind="stable")
        bounds = np.concatenate(([0], np.cumsum(np.bincount(group, minlength=len(distinct)))))
        for k in range(len(distinct)):
            saddr, daddr, sport, dport = (int(v) for v in distinct[k])
            self._take(node, (saddr, daddr, sport, dport), packets.take(order[bounds[k] : bounds[k + 1]]))

    def _take(self, node: str, flow: FlowKey, packets: Packets) -> None:
        """One node's packets of one direction, cut where a new epoch begins."""
        connection = self._flows.setdefault(flow, _Connection())
        self._flows.move_to_end(flow)
        if len(self._flows) > self._connections_max:
            self._flows.popitem(last=False)
            self.counters["evicted"] += 1
        cuts = np.flatnonzero(packets.tcp_flags & _SYN)
        begins = sorted({0, *cuts.tolist()})
        for at, until in zip(begins, [*begins[1:], len(packets)], strict=True):
            part = packets.take(np.arange(at, until))
            isn = int(part.seq[0]) if int(part.tcp_flags[0]) & _SYN else None
            epoch = self._epoch(connection, node, isn, int(part.seq[0]))
            self._side(epoch, node, part)
            self._match(flow, epoch, partial=False)

    @staticmethod
    def _epoch(connection: "_Connection", node: str, isn: int | None, seq: int) -> _Epoch:
        """The epoch that a run of packets belongs to: its SYN's, else that in which the node is, else the only one."""
        epochs = connection.epochs
        if isn is not None:
            found = next((e for e in epochs if e.isn == isn), None)
        else:
            found = connection.current.get(node) or (epochs[0] if len(epochs) == 1 else None)
            found = found or next((e for e in epochs if e.isn is None), None)
        if found is None:
            found = _Epoch(isn, seq)
            epochs.append(found)
            del epochs[:-_EPOCHS_MAX]
        connection.current[node] = found
        return found

    def _side(self, epoch: _Epoch, node: str, packets: Packets) -> None:
        side = epoch.sides.get(node)
        if side is None:
            side = epoch.sides[node] = _Side(bool(packets.sent[0]), epoch.anchor, 0)
        mine = packets.take(packets.sent == side.sends)
        if not len(mine):
            return
        steps = np.diff(mine.seq, prepend=side.last_seq)
        steps = (steps + _WRAP // 2) % _WRAP - _WRAP // 2
        position = side.last_position + np.cumsum(steps)
        side.last_seq, side.last_position = int(mine.seq[-1]), int(position[-1])
        if side.sends:
            self._sent(side, position, mine)
        else:
            self._received(side, position, mine)

    def _sent(self, side: _Side, position: Ints, packets: Packets) -> None:
        end = position + packets.length
        carried = int(side.end[-1]) if len(side.end) else None
        reached = np.maximum.accumulate(end if carried is None else np.maximum(end, carried))
        least = np.iinfo(np.int64).min if carried is None else carried
        before = np.concatenate(([least], reached[:-1]))
        new = end > before
        again = position < before
        side.again_start = np.concatenate((side.again_start, position[again]))[-_RANGES_MAX:]
        side.again_end = np.concatenate((side.again_end, np.minimum(end, before)[again]))[-_RANGES_MAX:]
        side.again_time = np.concatenate((side.again_time, packets.time_mono_ns[again]))[-_RANGES_MAX:]
        fresh = packets.take(new)
        side.rows = fresh if side.rows is None else _joined([side.rows, fresh])
        side.start = np.concatenate((side.start, np.maximum(position, before)[new]))
        side.end = np.concatenate((side.end, end[new]))
        gone = len(side.start) - _RANGES_MAX
        if gone > 0:
            side.start, side.end = side.start[gone:], side.end[gone:]
            side.rows = side.rows.take(np.arange(gone, len(side.rows)))
            self.counters["evicted"] += gone

    def _received(self, side: _Side, position: Ints, packets: Packets) -> None:
        first = np.unique(position, return_index=True)[1]
        keep = np.sort(first[~np.isin(position[first], side.seen)])
        side.seen = np.concatenate((side.seen, position[keep]))[-_RANGES_MAX:]
        fresh = packets.take(keep)
        side.rows = fresh if side.rows is None or not len(side.start) else _joined([side.rows, fresh])
        side.start = np.concatenate((side.start, position[keep]))
        side.end = np.concatenate((side.end, (position + packets.length)[keep]))
        gone = len(side.start) - _RANGES_MAX
        if gone > 0:
            side.start, side.end = side.start[gone:], side.end[gone:]
            side.rows = side.rows.take(np.arange(gone, len(side.rows)))
            self.counters["unmatched"] += gone

    # --- matching

    def _match(self, flow: FlowKey, epoch: _Epoch, *, partial: bool) -> None:
        senders = epoch.senders
        if len(senders) > 1:
            for side in epoch.sides.values():
                if not side.sends:
                    self.counters["ambiguous"] += len(side.start)
                    side.start, side.end = side.start[:0], side.end[:0]
            return
        if not senders or not len(epoch.sides[senders[0]].start):
            return
        sender = epoch.sides[senders[0]]
        for node, side in epoch.sides.items():
            if not side.sends and len(side.start):
                self._pair(flow, epoch.anchor, (senders[0], sender), (node, side), partial=partial)

    def _pair(
        self, flow: FlowKey, anchor: int, sending: tuple[str, _Side], receiving: tuple[str, _Side], *, partial: bool
    ) -> None:
        sender, receiver = sending[1], receiving[1]
        assert sender.rows is not None and receiver.rows is not None
        first = np.searchsorted(sender.start, receiver.start, "right") - 1
        last = np.searchsorted(sender.start, receiver.end - 1, "right") - 1
        covered = (first >= 0) & (receiver.start < sender.end[np.maximum(first, 0)])
        whole = covered & (receiver.end - 1 < sender.end[np.maximum(last, 0)])
        hit = covered if partial else whole
        if not hit.any():
            return
        got, first, last = receiver.rows.take(hit), first[hit], last[hit]
        begun, sent = sender.rows.take(first), sender.rows.take(last)
        start, end = receiver.start[hit], receiver.end[hit]
        count, resent = _transmissions(sender, start, end)
        unknown = np.full(len(start), -1, np.int64)
        batch = EdgeBatch(
            sending[0], receiving[0], flow, start + anchor, end + anchor, begun.time_mono_ns, sent.time_mono_ns,
            got.time_mono_ns, count, resent, unknown, unknown, sent.tid, sent.tgid,
            np.stack([sent.cpu, sent.number], axis=1), np.stack([got.cpu, got.number], axis=1),
        )  # fmt: skip
        rest = np.flatnonzero(~hit)
        receiver.start, receiver.end, receiver.rows = receiver.start[rest], receiver.end[rest], receiver.rows.take(rest)
        self._bound_clocks(batch)
        self._ready.append(batch)

    def _bound_clocks(self, batch: EdgeBatch) -> None:
        """Every edge bounds the clocks; of a large batch the fastest packet of each part is told, which bounds most."""
        delay = batch.received_mono_ns - batch.sent_mono_ns
        chosen = np.arange(len(batch))
        if len(batch) > _BOUNDS_PER_BATCH:
            part = chosen * _BOUNDS_PER_BATCH // len(batch)
            order = np.lexsort((delay, part))
            chosen = order[np.flatnonzero(np.diff(part[order], prepend=-1))]
        for i in chosen.tolist():
            self.clocks.add(batch.sender, batch.receiver, int(batch.sent_mono_ns[i]), int(batch.received_mono_ns[i]))

    def _timed(self, batch: EdgeBatch) -> EdgeBatch | None:
        """The batch with wire times; without the edges that the clocks make impossible."""
        bounds = self.clocks.direct(batch.sender, batch.receiver, batch.sent_mono_ns)
        if bounds is None:
            return batch
        low, high = bounds
        possible = batch.received_mono_ns >= low
        self.counters["rejected"] += int((~possible).sum())
        if not possible.any():
            return None
        # A resend that cannot have left before the bytes arrived had no part in their way.
        earliest = self.clocks.direct(batch.sender, batch.receiver, batch.resent_mono_ns)
        late = (earliest[0] > batch.received_mono_ns) if earliest is not None else np.zeros(len(batch), np.bool_)
        longest, shortest = batch.received_mono_ns - low, np.maximum(batch.received_mono_ns - high, 0)
        values = {name: getattr(batch, name) for name in EdgeBatch.__dataclass_fields__}
        values["wire_ns"] = (longest + shortest) // 2
        values["error_ns"] = longest - values["wire_ns"]
        values["resent_mono_ns"] = np.where(late, -1, batch.resent_mono_ns)
        fixed = ("sender", "receiver", "flow")
        return EdgeBatch(**{name: value if name in fixed else value[possible] for name, value in values.items()})


def _transmissions(sender: _Side, start: Ints, end: Ints) -> tuple[Ints, Ints]:
    """How often the bytes of each range were sent, and when last (-1: once)."""
    count, resent = np.ones(len(start), np.int64), np.full(len(start), -1, np.int64)
    for a, b, time in zip(sender.again_start.tolist(), sender.again_end.tolist(), sender.again_time.tolist(), strict=True):
        hit = (start < b) & (end > a)
        count[hit] += 1
        resent[hit] = np.maximum(resent[hit], time)
    return count, resent
