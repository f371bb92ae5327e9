"""The account of one CPU: whatever is lost or late, every number is delivered, lost, or not yet settled."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from probe.ring import GRACE_NS, CpuLedger, fitting_ring_bytes, round_ring_bytes
from probe.source import _out_of_order


def account(ledger, seq, now=0):
    """Deliver `seq`, each at time 10 * seq."""
    numbers = np.array(seq, np.uint64)
    ledger.account(numbers, (numbers * 10).astype(np.int64), now)


def test_contiguous_numbers_leave_nothing_open():
    ledger = CpuLedger(0)

    account(ledger, [0, 1, 2])
    account(ledger, [4, 3])

    assert (ledger.next_seq, ledger.delivered, ledger.pending) == (5, 5, [])


def test_a_hole_is_lost_once_a_later_switch_proves_that_nothing_runs_in_it():
    ledger = CpuLedger(0)
    account(ledger, [0, 1, 5], now=7)

    assert ledger.settle(switch_seq=3, now_mono_ns=8) == []
    (hole,) = ledger.settle(switch_seq=5, now_mono_ns=8)

    assert (hole.first_seq, hole.last_seq, hole.from_mono_ns, hole.to_mono_ns) == (2, 4, 10, 50)
    assert ledger.lost == 3


def test_a_late_event_fills_its_hole_and_the_watermark_waits_for_it():
    ledger = CpuLedger(0)
    account(ledger, [0, 1, 3])
    assert ledger.watermark(100) == 10

    account(ledger, [2])

    assert ledger.watermark(100) == 100
    assert ledger.settle(switch_seq=3, now_mono_ns=GRACE_NS * 2) == []


def test_numbers_missing_at_the_end_are_seen_by_the_counter():
    ledger = CpuLedger(0)
    account(ledger, [0, 1])

    ledger.note_produced(4, now_mono_ns=50)

    assert ledger.watermark(60) == 10
    (hole,) = ledger.settle(switch_seq=-1, now_mono_ns=51 + GRACE_NS)
    assert (hole.first_seq, hole.last_seq, hole.to_mono_ns) == (2, 3, 50)


def test_numbers_pass_the_end_of_32_bits():
    start = (1 << 32) - 2
    ledger = CpuLedger(0, next_seq=start)

    full = ledger.extend(np.array([start, start + 1, 0, 2, 1], np.uint64).astype(np.uint32))

    assert full.tolist() == [start, start + 1, 1 << 32, (1 << 32) + 2, (1 << 32) + 1]


@given(st.data())
def test_every_number_is_delivered_or_lost_or_open(data):
    """Random losses, nesting within a window of 4, random blocks; at the end nothing is unsettled."""
    produced = data.draw(st.integers(1, 80))
    lost = data.draw(st.sets(st.integers(0, produced - 1)))
    late = {n: n + data.draw(st.integers(0, 3)) for n in range(produced) if n not in lost}
    order = sorted(late, key=lambda n: (late[n], n))
    ledger, holes = CpuLedger(0), []
    while order:
        size = data.draw(st.integers(1, len(order)))
        block, order = order[:size], order[size:]
        account(ledger, block)
        unsettled = sum(h.count for h in ledger.pending)
        assert ledger.delivered + unsettled == ledger.next_seq

    ledger.note_produced(produced, 0)
    holes += ledger.settle(-1, 0, final=True)

    said = {n for h in holes for n in range(h.first_seq, h.last_seq + 1)}
    assert said == lost
    assert ledger.delivered + ledger.lost == produced and not ledger.pending


def test_ring_sizes_are_what_the_kernel_takes():
    assert [round_ring_bytes(n) for n in (1, 4096, 4097, 64 << 20, 3 << 30)] == [4096, 4096, 8192, 64 << 20, 1 << 31]


def test_rings_that_nobody_sized_follow_the_cpus_and_the_memory_cap():
    """Mapped twice, all rings fill half of the cap at most."""
    sizes = {(cpus, cap): fitting_ring_bytes(cpus, cap) for cpus in (1, 2, 8, 64, 1024) for cap in (64 << 20, 1 << 30, 1 << 36)}

    assert sizes[2, 1 << 30] == sizes[1, 1 << 36] == 64 << 20
    assert sizes[8, 1 << 30] == 32 << 20 and sizes[64, 1 << 30] == 4 << 20
    for (cpus, cap), size in sizes.items():
        assert size == round_ring_bytes(size), "the kernel takes it as it is"
        assert size == 256 << 10 or 2 * cpus * size <= cap // 2


@given(st.lists(st.integers(0, 40), max_size=30))
def test_sorting_only_what_is_out_of_place_sorts_all(values):
    times, seq = np.array(values, np.int64), np.arange(len(values))[::-1]

    places = _out_of_order(times)
    order = np.arange(len(times))
    order[places] = places[np.lexsort((seq[places], times[places]))]

    assert order.tolist() == np.lexsort((seq, times)).tolist()
