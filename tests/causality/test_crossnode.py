"""Bytes that cross hosts: every received packet is matched to the first sending of its bytes, or to nothing.

Truth: `Net`, which moves bytes one by one in plain Python between hosts with clocks of their own: segmentation offload cuts
and joins packets, some are lost and sent again, sequence numbers wrap, ports are used again, bridges show packets twice.
"""

import itertools
import random

import numpy as np
import pytest

from causality.crossnode import CrossNode, Packets, packets_of
from events.kinds import BY_NAME

SYN, FIN, PSH = 2, 1, 8
CONNECTIONS = 4


class Net:
    """Hosts, connections between them, and what a probe on each host records."""

    def __init__(self, seed, *, hosts=3, late_start=False, loss=0.05):
        self.rng = random.Random(seed)
        self.late_start, self.loss = late_start, loss
        self.clock = {}
        for name in "abcdef"[:hosts]:
            self.clock[name] = (self.rng.randrange(10**15), self.rng.randrange(-200_000, 200_001))
        self.packets = {name: [] for name in self.clock}
        self.numbers = {name: itertools.count() for name in self.clock}
        self.expected = set()  # (sender, receiver, flow, sent event, received event)
        self.wires = {}  # the same -> ns on the wire, by the receiver's clock

    def at(self, host, true_ns):
        offset, ppb = self.clock[host]
        return offset + true_ns + true_ns * ppb // 10**9

    def record(self, host, true_ns, sent, flow, seq, length, flags):
        number = next(self.numbers[host])
        row = (self.at(host, true_ns), sent, *flow, seq % 2**32, length, flags, 100 + number % 7, 100, 0, number)
        self.packets[host].append(row)
        return number

    def connection(self, flow, sender, receiver, begun_ns):
        """One direction: returns the true time of its end."""
        rng = self.rng
        isn = rng.choice([rng.randrange(2**32), 2**32 - rng.randrange(1, 20_000)])
        whole = rng.random() < (0.3 if self.late_start else 1)
        bridged = rng.random() < 0.3
        now = begun_ns
        sent_first = {}  # byte -> (event, true time)
        got = set()
        if whole:
            now = self._send(flow, sender, receiver, [(isn, 1, SYN)], now, sent_first, got, bridged)
        position = isn + 1
        for _ in range(rng.randrange(3, 25)):
            length = rng.choice([1, 40, 1448, 8000])
            cuts = sorted({0, length, *(rng.randrange(length + 1) for _ in range(rng.randrange(3)))})
            parts = [(position + a, b - a, PSH) for a, b in itertools.pairwise(cuts)]
            now = self._send(flow, sender, receiver, parts, now, sent_first, got, bridged)
            position += length
        return now

    def _send(self, flow, sender, receiver, parts, now, sent_first, got, bridged):
        """Send a run of bytes, given as the packets that the sender queues; the receiver sees other cuts of them."""
        rng = self.rng
        for seq, length, flags in parts:
            event = self.record(sender, now, True, flow, seq, length, flags)
            if bridged:
                self.record(sender, now + 300, False, flow, seq, length, flags)
                self.record(sender, now + 600, True, flow, seq, length, flags)
            for byte in range(seq, seq + length):
                sent_first.setdefault(byte, (event, now))
            now += rng.randrange(2_000, 20_000)
        if rng.random() < self.loss:  # everything lost: sent again, after a while
            return self._send(flow, sender, receiver, parts, now + 200_000_000, sent_first, got, bridged)
        first, end = parts[0][0], parts[-1][0] + parts[-1][1]
        if parts[0][2] & SYN:
            arrive = [(first, 1, SYN)]
        else:
            cuts = sorted({first, end, *(rng.randrange(first, end) for _ in range(rng.randrange(3)))})
            arrive = [(a, b - a, PSH) for a, b in itertools.pairwise(cuts)]
        when = now + rng.randrange(20_000, 400_000)
        for seq, length, flags in arrive:
            number = self.record(receiver, when, False, flow, seq, length, flags)
            if bridged:
                self.record(receiver, when + 200, True, flow, seq, length, flags)
                self.record(receiver, when + 400, False, flow, seq, length, flags)
            event, sent_at = sent_first[seq + length - 1]
            edge = (sender, receiver, flow, event, number)
            self.expected.add(edge)
            self.wires[edge] = self.at(receiver, when) - self.at(receiver, sent_at)
            when += rng.randrange(500, 5_000)
        if rng.random() < self.loss:  # an acknowledgement lost: the bytes are sent and received once more
            event = self.record(sender, when, True, flow, parts[0][0], parts[0][1], parts[0][2])
            self.record(receiver, when + 100_000, False, flow, parts[0][0], parts[0][1], parts[0][2])
        return max(when, now) + rng.randrange(1_000_000)

    def run(self):
        hosts = list(self.clock)
        for number in range(CONNECTIONS):
            one, other = self.rng.sample(hosts, 2)
            now = 1_000_000 * number
            for _ in range(self.rng.randrange(1, 3)):  # the same ports twice, one life after the other
                there, back = (1, 2, 40_000 + number, 80), (2, 1, 80, 40_000 + number)
                ended = self.connection(there, one, other, now)
                now = max(ended, self.connection(back, other, one, now + 50_000)) + 1_000_000
                if self.late_start:
                    break  # without SYNs two lives of the same ports cannot be told apart
        return self

    def batches(self, rng):
        """(host, packets, watermark), each host's in order, the hosts mixed, some packets twice."""
        out = {}
        for host, rows in self.packets.items():
            rows = sorted(rows)
            size = rng.randrange(1, len(rows) + 1) if rows else 1
            parts = [rows[at : at + size] for at in range(0, len(rows), size)]
            out[host] = []
            for k, part in enumerate(parts):
                again = part + rng.sample(part, len(part) // 10)
                rng.shuffle(again)
                out[host].append((host, packets(again), parts[k + 1][0][0] if k + 1 < len(parts) else part[-1][0] + 1))
        mixed = []
        while any(out.values()):
            mixed.append(out[rng.choice([h for h in out if out[h]])].pop(0))
        return mixed


def packets(rows):
    names = tuple(Packets.__dataclass_fields__)
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    return Packets(**{n: np.array(c, np.bool_ if n == "sent" else np.int64) for n, c in zip(names, columns, strict=True)})


def matched(net, rng):
    cross = CrossNode()
    found = []
    for host, batch, watermark in net.batches(rng):
        cross.fold(host, batch, watermark)
    cross.finish()
    found += cross.edges()
    return cross, found


def rows_of(batches):
    for batch in batches:
        for i in range(len(batch)):
            yield batch, i, (
                batch.sender, batch.receiver, batch.flow, int(batch.sent_event[i, 1]), int(batch.received_event[i, 1])
            )  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_every_received_packet_is_matched_to_the_first_sending_of_its_bytes(seed):
    net = Net(seed).run()
    cross, found = matched(net, random.Random(seed))
    assert {edge for _, _, edge in rows_of(found)} == net.expected, f"seed {seed}"
    assert cross.counters["rejected"] == cross.counters["ambiguous"] == 0


@pytest.mark.parametrize("seed", range(200, 230))
def test_the_true_wire_time_lies_within_the_error(seed):
    net = Net(seed, hosts=2).run()
    _, found = matched(net, random.Random(seed))
    known = 0
    for batch, i, edge in rows_of(found):
        if batch.error_ns[i] >= 0:
            known += 1
            assert abs(int(batch.wire_ns[i]) - net.wires[edge]) <= int(batch.error_ns[i]) + 2, f"seed {seed}, {edge}"
    assert known


@pytest.mark.parametrize("seed", range(300, 320))
def test_a_capture_that_begins_in_the_middle_matches_all_the_same(seed):
    """Some connections have no SYN; what cannot be told is left out, nothing is matched wrongly."""
    net = Net(seed, late_start=True).run()
    _, found = matched(net, random.Random(seed))
    assert {edge for _, _, edge in rows_of(found)} <= net.expected, f"seed {seed}"
    assert len(list(rows_of(found))) >= len(net.expected) * 9 // 10, f"seed {seed}"


@pytest.mark.parametrize("seed", range(400, 415))
def test_missing_packets_leave_edges_out_and_make_none_up(seed):
    rng = random.Random(seed)
    net = Net(seed).run()
    for host, rows in net.packets.items():
        net.packets[host] = [r for r in rows if rng.random() > 0.1 or r[8] & SYN]
    _, found = matched(net, rng)
    sent = {(batch.sender, e[3]): e for batch, _, e in rows_of(found)}
    assert sent
    for batch, i, edge in rows_of(found):
        # Where the first sending is missing its repetition stands in; never another connection, never other bytes.
        assert batch.sent_mono_ns[i] >= 0
        assert edge[:3] in {e[:3] for e in net.expected}, f"seed {seed}"
        if batch.error_ns[i] >= 0:
            assert batch.wire_ns[i] + batch.error_ns[i] >= 0


def test_the_same_packets_give_the_same_edges_in_any_order_of_arrival():
    net = Net(5).run()
    seen = set()
    for k in range(6):
        _, found = matched(net, random.Random(k))
        rows = [(e, int(b.wire_ns[i]) // 50, int(b.transmissions[i])) for b, i, e in rows_of(found)]
        seen.add(tuple(sorted(rows)))
    assert len({tuple(r[0] for r in rows) for rows in seen}) == 1
    for rows in itertools.combinations(seen, 2):
        assert all(abs(a[1] - b[1]) <= 1 for a, b in zip(*rows, strict=True))


def test_two_senders_of_the_same_bytes_are_ambiguous_and_matched_to_nobody():
    flow = (1, 2, 40_000, 80)
    cross = CrossNode()
    row = (1000, True, *flow, 500, 100, PSH, 7, 7, 0, 1)
    for host in ("a", "b"):
        cross.fold(host, packets([row]), 2000)
    cross.fold("c", packets([(1500, False, *flow, 500, 100, PSH, 7, 7, 0, 1)]), 2000)
    cross.finish()
    assert cross.edges() == []
    assert cross.counters["ambiguous"] == 1


def test_a_retransmission_is_told_apart_from_a_slow_wire():
    flow = (1, 2, 40_000, 80)
    cross = CrossNode()
    sent = [(t, True, *flow, 500, 100, PSH, 7, 7, 0, n) for n, t in enumerate((1_000, 201_000_000))]
    cross.fold("a", packets(sent), 10**9)
    cross.fold("b", packets([(201_050_000, False, *flow, 500, 100, PSH, 8, 8, 0, 1)]), 10**9)
    (batch,) = cross.edges()
    assert (int(batch.sent_mono_ns[0]), int(batch.resent_mono_ns[0]), int(batch.transmissions[0])) == (1_000, 201_000_000, 2)


def test_forgotten_connections_are_counted():
    cross = CrossNode(connections_max=10)
    rows = [(t, True, 1, 2, 1000 + t, 80, 5, 10, PSH, 7, 7, 0, t) for t in range(30)]
    cross.fold("a", packets(rows), 100)
    assert cross.counters["evicted"] == 20


def test_packets_are_read_from_event_columns():
    kind = BY_NAME["net_dev_queue"]
    args = kind.encode(saddr=1, daddr=2, sport=3, dport=4, ip_len=152, tcp_flags=PSH, protocol=6, seq=77)
    other = kind.encode(saddr=1, daddr=2, sport=3, dport=4, ip_len=152, protocol=17)
    empty = kind.encode(saddr=1, daddr=2, sport=3, dport=4, ip_len=52, tcp_flags=16, protocol=6, seq=77)
    columns = {f"a{k}": np.array([args[k], other[k], empty[k]], np.uint64) for k in range(5)}
    columns |= {name: np.array([5, 6, 7], np.int64) for name in ("time_mono_ns", "cpu", "seq", "tid", "tgid")}
    columns["kind"] = np.full(3, kind.number, np.uint8)
    found = packets_of(columns)
    assert len(found) == 1
    assert (int(found.seq[0]), int(found.length[0]), bool(found.sent[0]), int(found.dport[0])) == (77, 100, True, 4)

