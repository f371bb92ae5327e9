"""Clock bounds: the truth is always inside, they are as narrow as an exhaustive search finds, and lies are rejected.

Truth: two clocks with an offset, a drift and random, asymmetric delays, made here; the search is `brute`, which knows only
the rule that no packet arrives before it was sent.
"""

import random
from fractions import Fraction

import numpy as np
import pytest

from causality.clocks import MAX_DRIFT, STEP_AFTER, ClockGraph, PairClock


class Hosts:
    """A and B: what B's clock says at A's time, exactly; packets with delays of their own direction."""

    def __init__(self, rng):
        self.rng = rng
        self.offset = rng.choice([-1, 1]) * rng.randrange(10**15)
        self.ppb = rng.randrange(-300_000, 300_001)
        self.origin = rng.randrange(10**15)
        self.floors = rng.randrange(100, 500_000), rng.randrange(100, 500_000)

    def b_at(self, a_ns):
        return a_ns + self.offset + (a_ns - self.origin) * self.ppb // 10**9

    def packet(self, a_ns, forward):
        """(sent, received), each by its own host's clock."""
        delay = self.floors[not forward] + int(self.rng.expovariate(1 / 200_000))
        if forward:
            return a_ns, self.b_at(a_ns + delay)
        return self.b_at(a_ns), a_ns + delay

    def packets(self, count, span_ns):
        times = sorted(self.origin + self.rng.randrange(span_ns) for _ in range(count))
        return [(forward := self.rng.random() < 0.5, *self.packet(t, forward)) for t in times]


def brute(points, a_ns):
    """[min, max] offset at `a_ns` over all lines that no point contradicts: all corners, by exact arithmetic."""
    lines = [(Fraction(x), Fraction(o), up) for x, o, up in points]
    limit = Fraction(MAX_DRIFT)
    candidates = []
    for i, (x, o, _) in enumerate(lines):
        candidates += [(drift, o - drift * x) for drift in (-limit, limit)]
        for y, p, _ in lines[:i]:
            if x != y:
                drift = (o - p) / (x - y)
                candidates.append((drift, o - drift * x))
    fits = [
        drift * a_ns + rest
        for drift, rest in candidates
        if abs(drift) <= limit and all((drift * x + rest <= o) if up else (drift * x + rest >= o) for x, o, up in lines)
    ]
    return min(fits), max(fits)


@pytest.mark.parametrize("seed", range(60))
def test_the_true_time_is_always_within_the_bounds(seed):
    rng = random.Random(seed)
    hosts, clock = Hosts(rng), PairClock()
    for forward, sent, received in hosts.packets(rng.randrange(2, 400), rng.choice([10**6, 10**9, 10**12])):
        assert clock.add(forward=forward, sent_ns=sent, received_ns=received), f"seed {seed}"
        if clock.known:
            moment = hosts.origin + rng.randrange(10**12)
            low, high = (int(x[0]) for x in clock.to_b(moment))
            assert low <= hosts.b_at(moment) <= high, f"seed {seed}"
            low, high = (int(x[0]) for x in clock.to_a(hosts.b_at(moment)))
            assert low <= moment <= high, f"seed {seed}"
    assert clock.rejected == 0


@pytest.mark.parametrize("seed", range(100, 130))
def test_the_bounds_are_those_of_an_exhaustive_search(seed):
    rng = random.Random(seed)
    hosts, clock, points = Hosts(rng), PairClock(), []
    for forward, sent, received in hosts.packets(rng.randrange(4, 14), rng.choice([10**7, 10**10])):
        clock.add(forward=forward, sent_ns=sent, received_ns=received)
        a_ns, b_ns = (sent, received) if forward else (received, sent)
        points.append((a_ns - hosts.origin, b_ns - a_ns, forward))
    if not clock.known:
        return
    for moment in (0, 10**6, 10**9):
        low, high = (int(x[0]) for x in clock.to_b(hosts.origin + moment))
        least, most = brute(points, moment)
        # 1 ns of slack at every bound turns a line about its nearest points: allow what that does at this distance.
        spread = max(x for x, _, _ in points) - min(x for x, _, _ in points) + 1
        room = 4 + 8 * (abs(moment) + 2 * spread) / spread
        assert low - hosts.origin - moment == pytest.approx(float(least), abs=room), f"seed {seed}"
        assert high - hosts.origin - moment == pytest.approx(float(most), abs=room), f"seed {seed}"


def test_more_packets_never_widen_the_bounds():
    rng = random.Random(7)
    hosts, clock = Hosts(rng), PairClock()
    moment, widths = hosts.origin + 5 * 10**8, []
    for forward, sent, received in hosts.packets(500, 10**9):
        clock.add(forward=forward, sent_ns=sent, received_ns=received)
        if clock.known:
            low, high = clock.to_b(moment)
            widths.append(int(high[0] - low[0]))
    assert widths == sorted(widths, reverse=True)
    assert sum(hosts.floors) <= widths[-1] <= sum(hosts.floors) + 200_000


def test_the_order_of_arrival_does_not_matter():
    rng = random.Random(11)
    hosts = Hosts(rng)
    packets = hosts.packets(200, 10**9)
    seen = set()
    for _ in range(5):
        clock = PairClock()
        for forward, sent, received in packets:
            assert clock.add(forward=forward, sent_ns=sent, received_ns=received)
        low, high = clock.to_b(np.array([hosts.origin, hosts.origin + 10**9]))
        seen.add((tuple(low // 10), tuple(high // 10)))
        rng.shuffle(packets)
    spread = [max(abs(x - y) for a in seen for b in seen for x, y in zip(a[k], b[k], strict=True)) for k in (0, 1)]
    assert max(spread) <= 1


def test_a_packet_that_would_arrive_before_it_was_sent_is_rejected_and_counted():
    rng = random.Random(13)
    hosts, clock = Hosts(rng), PairClock()
    for forward, sent, received in hosts.packets(200, 10**9):
        clock.add(forward=forward, sent_ns=sent, received_ns=received)
    before = [tuple(x) for x in clock.to_b(hosts.origin)]
    moment = hosts.origin + 10**9
    assert not clock.add(forward=True, sent_ns=moment, received_ns=hosts.b_at(moment) - 2_000_000)
    assert clock.rejected == 1
    assert [tuple(x) for x in clock.to_b(hosts.origin)] == before


@pytest.mark.parametrize("step_ns", [50_000_000, -50_000_000])
def test_a_clock_that_is_set_begins_a_new_window_and_keeps_the_old_one_for_the_time_before(step_ns):
    rng = random.Random(17)
    hosts, clock = Hosts(rng), PairClock()
    for forward, sent, received in hosts.packets(200, 10**9):
        clock.add(forward=forward, sent_ns=sent, received_ns=received)
    early, true_early = hosts.origin + 10**8, hosts.b_at(hosts.origin + 10**8)
    set_at = hosts.origin + 2 * 10**9
    hosts.offset += step_ns
    for k in range(400):
        forward = rng.random() < 0.5
        sent, received = hosts.packet(set_at + k * 10**6, forward)
        clock.add(forward=forward, sent_ns=sent, received_ns=received)

    assert clock.steps == 1
    assert STEP_AFTER <= clock.rejected < 3 * STEP_AFTER
    late = set_at + 350 * 10**6
    for moment, true in ((early, true_early), (late, hosts.b_at(late))):
        low, high = (int(x[0]) for x in clock.to_b(moment))
        assert low <= true <= high
        assert high - low < sum(hosts.floors) + 1_000_000


def test_hosts_that_do_not_talk_are_mapped_through_those_that_do():
    rng = random.Random(19)
    graph = ClockGraph()
    first, second = Hosts(rng), Hosts(rng)  # a to b, b to c
    second.origin = first.b_at(first.origin)
    for hosts, one, other in ((first, "a", "b"), (second, "b", "c")):
        for forward, sent, received in hosts.packets(100, 10**9):
            assert graph.add(one if forward else other, other if forward else one, sent, received)
    moment = first.origin + 10**8
    true = second.b_at(first.b_at(moment))
    low, high = graph.map("a", "c", moment)
    assert low <= true <= high
    assert high - low < sum(first.floors) + sum(second.floors) + 2_000_000
    back = graph.map("c", "a", true)
    assert back[0] <= moment <= back[1]
    assert graph.map("a", "elsewhere", moment) is None
