"""Network waits on one node (D10): which packet ended the wait, who sent it, and what was lost on the way.

The packet that ended a wait is the last one received on the waking CPU just before the wake-up. On loopback and veth
it is the same buffer (skb pointer) on both sides, so its sender is whoever was current when that buffer was queued
for transmission: the wait was for that task (`Follow`, edge `net`) until it sent. Without such a buffer the sender is
on another machine or was not recorded: `net_peer`. A retransmission on the connection during the wait is `net_loss`
from the first transmission of that byte range to the resend.

A wait that no packet ended (a timeout) was for whoever the waiter's own last packet woke: the peer that did not answer.

Can be fooled by: packets that softirq sends on behalf of nobody (then the acknowledged task is named with confidence
`strong`), and tuple reuse within one window (the skb pointer and the time decide first).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from causality.window import EventRef, Follow, Leaf, Piece, Rows, Wait, Who, Window, cover

__all__ = ["Flow", "Packet", "peer_of", "received_before", "resolve_network", "sender_of", "sent_by"]

_RX_TO_WAKE_NS: Final = 2_000_000  # receive softirq to wake-up, on one CPU, other packets of the batch in between
_TX_TO_RX_NS: Final = 1_000_000_000  # a buffer may wait in a backlog or a queue discipline
_FLAG_PUSH: Final = 8
_FLAGS_ASKING: Final = 8 | 2  # PSH, SYN: not the acknowledgements that softirq sends while somebody else is current
_SOCKET: Final = 1
_AF_UNIX: Final = 1
_NETWORK_CALLS: Final = frozenset({42, 43, 44, 45, 46, 47, 288, 299, 307})  # connect, accept, send and receive family
_MULTIPLEXERS: Final = frozenset({7, 23, 232, 270, 271, 281, 441})  # poll, select, epoll_wait and their kin
_UDP: Final = 17
_NET_RX: Final = 3  # the softirq that receives
_TX_KINDS: Final = ("net_dev_queue", "net_dev_start_xmit")


@dataclass(frozen=True, slots=True, order=True)
class Flow:
    """A connection seen from one side: addresses as the kernel holds them, ports as numbers."""

    saddr: int
    daddr: int
    sport: int
    dport: int

    def back(self) -> "Flow":
        """The same connection seen from the other side."""
        return Flow(self.daddr, self.saddr, self.dport, self.sport)


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet event."""

    time_mono_ns: int
    skb: int
    flow: Flow
    seq: int
    tcp_flags: int
    who: Who
    ref: EventRef


def _packet(rows: Rows, i: int) -> Packet:
    fields = rows.kind.decode(tuple(int(rows.columns[f"a{k}"][i]) for k in range(5)))
    flow = Flow(fields["saddr"], fields["daddr"], fields["sport"], fields["dport"])
    return Packet(int(rows.time[i]), fields["skb"], flow, fields["seq"], fields["tcp_flags"], rows.who(i), rows.ref(i))


def received_before(window: Window, cpu: int, time_mono_ns: int) -> Packet | None:
    """The TCP or UDP packet whose reception on `cpu` was going on at a time; of several the one for the socket that was made
    readable last."""
    rows = window.rows("netif_receive_skb")
    near = rows.between(time_mono_ns - _RX_TO_WAKE_NS, time_mono_ns)
    found = np.flatnonzero((near.columns["cpu"] == cpu) & (near.get("sport") != 0))
    found = found[[_receive_end(window, cpu, int(near.time[i])) >= time_mono_ns for i in found]] if len(found) else found
    if not len(found):
        return None
    ready = window.rows("sk_data_ready").between(int(near.time[found[0]]), time_mono_ns)
    here = np.flatnonzero((ready.columns["cpu"] == cpu) & (ready.get("sport") != 0))
    if len(here):
        ports = int(ready.get("dport")[here[-1]]), int(ready.get("sport")[here[-1]])
        mine = found[(near.get("sport")[found] == ports[0]) & (near.get("dport")[found] == ports[1])]
        found = mine if len(mine) else found
    return _packet(near, int(found[-1]))


def sender_of(window: Window, packet: Packet) -> Packet | None:
    """The queueing of the same buffer on this node, or None."""
    for kind in _TX_KINDS:
        rows = window.rows(kind).between(packet.time_mono_ns - _TX_TO_RX_NS, packet.time_mono_ns)
        same = (rows.get("skb") == np.uint64(packet.skb)) & (rows.get("seq") == packet.seq)
        same &= (rows.get("sport") == packet.flow.sport) & (rows.get("dport") == packet.flow.dport)
        found = np.flatnonzero(same)
        if len(found):
            return _packet(rows, int(found[-1]))
    return None


def sent_by(window: Window, who: Who, before_mono_ns: int) -> Packet | None:
    """The last packet with data (or that opens a connection) that was sent while a thread was current, before a time."""
    for kind in _TX_KINDS:
        rows = window.rows(kind)
        high = int(np.searchsorted(rows.time, before_mono_ns, "right"))
        data = (rows.get("tcp_flags")[:high] & _FLAGS_ASKING != 0) | (rows.get("protocol")[:high] == _UDP)
        found = np.flatnonzero((rows.columns["tid"][:high] == who.tid) & (rows.get("sport")[:high] != 0) & data)
        if len(found):
            return _packet(rows, int(found[-1]))
    return None


def peer_of(window: Window, sent: Packet) -> tuple[Who, EventRef] | None:
    """The task that the arrival of a sent packet woke: (task, the waking's name), or None."""
    rows = window.rows("netif_receive_skb").between(sent.time_mono_ns, sent.time_mono_ns + _TX_TO_RX_NS)
    found = np.flatnonzero((rows.get("skb") == np.uint64(sent.skb)) & (rows.get("seq") == sent.seq))
    if not len(found):
        return None
    arrived, cpu = int(rows.time[int(found[0])]), int(rows.columns["cpu"][int(found[0])])
    woken = window.rows("sched_waking").between(arrived, min(arrived + _RX_TO_WAKE_NS, _receive_end(window, cpu, arrived)))
    hits = np.flatnonzero((woken.columns["cpu"] == cpu) & (woken.get("kthread") == 0) & (woken.get("tid") != sent.who.tid))
    if not len(hits):
        return _reader_of(window, sent, arrived, cpu)
    i = int(hits[0])
    return Who(int(woken.get("tid")[i]), int(woken.get("tgid")[i])), woken.ref(i)


def _receive_end(window: Window, cpu: int, arrived_mono_ns: int) -> int:
    """When the softirq that received a packet was over: what the CPU wakes after that has nothing to do with the packet."""
    ends = []
    for kind in ("softirq_exit", "sched_switch"):
        rows = window.rows(kind).between(arrived_mono_ns, arrived_mono_ns + _RX_TO_WAKE_NS)
        here = rows.columns["cpu"] == cpu
        if kind == "softirq_exit":
            here &= rows.get("vec") == _NET_RX
        ends += rows.time[here][:1].tolist()
    return min(ends, default=arrived_mono_ns + _RX_TO_WAKE_NS)


def _reader_of(window: Window, sent: Packet, arrived_mono_ns: int, cpu: int) -> tuple[Who, EventRef] | None:
    """Who called on the socket that a packet made readable, where nobody slept on it yet."""
    ready = window.rows("sk_data_ready").between(arrived_mono_ns, arrived_mono_ns + _RX_TO_WAKE_NS)
    same = (ready.columns["cpu"] == cpu) & (ready.get("sport") == sent.flow.dport) & (ready.get("dport") == sent.flow.sport)
    found = np.flatnonzero(same)
    if not len(found):
        return None
    calls = window.rows("sys_enter")
    on_it = (calls.get("object") == ready.get("sk")[int(found[0])]) & (calls.get("object_type") == _SOCKET)
    users = np.flatnonzero(on_it & (calls.columns["tid"] != sent.who.tid))
    if not len(users):
        return None
    i = int(users[-1])
    return calls.who(i), calls.ref(i)


def _losses(window: Window, flow: Flow, lo: int, hi: int) -> list[Piece]:
    """`net_loss` leaves for the retransmissions of a connection, both directions, within [lo, hi)."""
    rows = window.rows("tcp_retransmit_skb").between(lo, hi)
    leaves: list[Piece] = []
    for i in range(len(rows)):
        f = rows.kind.decode(tuple(int(rows.columns[f"a{k}"][i]) for k in range(5)))
        ports = (f["sport"], f["dport"])
        if ports not in ((flow.sport, flow.dport), (flow.dport, flow.sport)):
            continue
        first = _first_sent(window, Flow(f["saddr"], f["daddr"], *ports), f["seq"], int(rows.time[i]))
        begin = max(lo, first) if first is not None else lo
        if int(rows.time[i]) > begin:
            leaves.append(Leaf(begin, int(rows.time[i]), "wait.net", "net_loss", None, (rows.ref(i),)))
    return leaves


def _first_sent(window: Window, flow: Flow, seq: int, before_mono_ns: int) -> int | None:
    for kind in _TX_KINDS:
        rows = window.rows(kind)
        same = (rows.get("sport") == flow.sport) & (rows.get("dport") == flow.dport) & (rows.get("seq") == seq)
        found = np.flatnonzero(same & (rows.time < before_mono_ns))
        if len(found):
            return int(rows.time[int(found[0])])
    return None


def resolve_network(window: Window, wait: Wait) -> list[Piece]:
    """The pieces of a wait on a socket, or nothing if no packet is known to have to do with it."""
    wake = wait.wake
    lo, hi = wait.start_mono_ns, wait.end_mono_ns
    on_socket = _on_socket(window, wait)
    if on_socket is False or (wake is not None and not wake.in_irq):
        return []  # packets wake their readers from the receive softirq, tasks' wake-ups are followed by the engine
    by_packet = wake is not None and not wake.by_timer
    packet = received_before(window, wake.cpu, wake.time_mono_ns) if wake is not None and by_packet else None
    if packet is None or wake is None:
        return _unanswered(window, wait) if on_socket else []
    sender = sender_of(window, packet)
    losses = _losses(window, packet.flow, lo, hi)
    if sender is None:
        leaf = Leaf(lo, hi, "wait.net", "net_peer", None, (packet.ref, wake.ref), "strong")
        return cover([*losses, leaf], lo, hi, "wait.net", "net_peer")
    evidence = (sender.ref, packet.ref, wake.ref)
    if sender.who.tid == wait.who.tid or sender.who.tid == 0:
        return _by_softirq(window, wait, packet, losses, evidence)
    sent = min(max(sender.time_mono_ns, lo), hi)
    follow = Follow(lo, sent, sender.who, "wait.net", "net", evidence)
    wire = Leaf(sent, hi, "wait.net", "net_peer", sender.who, evidence)
    return _with_losses(losses, [follow, wire], lo, hi)


def _on_socket(window: Window, wait: Wait) -> bool | None:
    """Is the thread in a call on an internet socket, or one that waits for several? None: its calls are not recorded."""
    call = window.last_of("sys_enter", wait.who.tid, wait.blocked_mono_ns)
    if call is None:
        return None if wait.syscall is None else wait.syscall in _NETWORK_CALLS | _MULTIPLEXERS
    rows, i = call
    number, fd_type, sk = (int(rows.get(name)[i]) for name in ("nr", "object_type", "object"))
    if wait.syscall is not None and number != wait.syscall:
        return wait.syscall in _NETWORK_CALLS | _MULTIPLEXERS
    if number in _MULTIPLEXERS:
        return True
    if fd_type != _SOCKET and number not in _NETWORK_CALLS:
        return False
    ready = window.rows("sk_data_ready")
    local = (ready.get("sk") == np.uint64(sk)) & (ready.get("family") == _AF_UNIX)
    return not bool(local.any())


def _with_losses(losses: list[Piece], others: list[Piece], lo: int, hi: int) -> list[Piece]:
    """`others` with the spans of `losses` cut out and given to the losses."""
    spans = cover(losses, lo, hi, "", "")
    out: list[Piece] = []
    for span in spans:
        if isinstance(span, Leaf) and span.kind == "net_loss":
            out.append(span)
            continue
        inside = [p for p in others if p.end_mono_ns > span.start_mono_ns and p.start_mono_ns < span.end_mono_ns]
        out += cover(inside, span.start_mono_ns, span.end_mono_ns, "wait.net", "net_peer")
    return out


def _by_softirq(window: Window, wait: Wait, packet: Packet, losses: list[Piece], evidence: tuple[EventRef, ...]) -> list[Piece]:
    """The packet was sent in interrupt context: its task is unknown, unless the waiter's own question names who was asked."""
    lo, hi = wait.start_mono_ns, wait.end_mono_ns
    rows = window.rows("net_dev_queue").between(window.from_mono_ns, packet.time_mono_ns)
    same = (rows.get("sport") == packet.flow.sport) & (rows.get("dport") == packet.flow.dport)
    tasks = np.flatnonzero(same & (rows.columns["tid"] != 0) & (rows.columns["tid"] != wait.who.tid))
    if len(tasks):
        others: list[Piece] = [Follow(lo, hi, rows.who(int(tasks[-1])), "wait.net", "net", evidence, "strong")]
    else:
        others = [Leaf(lo, hi, "wait.net", "net_peer", None, evidence, "strong")]
    return _with_losses(losses, others, lo, hi)


def _answered(window: Window, sent: Packet, before_mono_ns: int) -> bool:
    """Did data come back on the connection since? Then the waiter does not stand there with an open question."""
    for kind in (*_TX_KINDS, "netif_receive_skb"):
        rows = window.rows(kind).between(sent.time_mono_ns, before_mono_ns)
        back = (rows.get("sport") == sent.flow.dport) & (rows.get("dport") == sent.flow.sport)
        if bool((back & ((rows.get("tcp_flags") & _FLAG_PUSH != 0) | (rows.get("protocol") == _UDP))).any()):
            return True
    return False


def _unanswered(window: Window, wait: Wait) -> list[Piece]:
    """No packet ended the wait: whoever the waiter's last packet woke did not answer."""
    sent = sent_by(window, wait.who, wait.blocked_mono_ns)
    if sent is None or (wait.syscall in _MULTIPLEXERS and _answered(window, sent, wait.blocked_mono_ns)):
        return []
    lo, hi = wait.start_mono_ns, wait.end_mono_ns
    losses = _losses(window, sent.flow, lo, hi)
    peer = peer_of(window, sent)
    if peer is None:
        return _with_losses(losses, [Leaf(lo, hi, "wait.net", "net_peer", None, (sent.ref,), "inferred")], lo, hi)
    who, waking = peer
    return _with_losses(losses, [Follow(lo, hi, who, "wait.net", "net", (sent.ref, waking), "inferred")], lo, hi)
