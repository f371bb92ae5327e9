"""Switches that the kernel did not show are counted exactly, and each lies in a window that is told."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from events.kinds import BY_NAME
from events.records import EVENT_DTYPE
from probe.switches import UnseenSwitches

SWITCH, CALL = BY_NAME["sched_switch"], BY_NAME["sys_enter"]
HIDDEN = {7, 8}  # of the threads 1 to 8; 3 and 4 are of one process


def process_of(tid):
    return 3 if tid == 4 else tid


def schedule(moves):
    """(events that a kernel shows which hides the threads HIDDEN, their numbers, times of the switches that it did not show).

    `moves` are the threads in the order in which they have the CPU, each with the calls it makes.
    """
    rows, missing, unseen = [], [], 0
    time, current = 1_000, moves[0][0]
    for tid, calls in moves[1:]:
        if tid == current:
            continue
        time += 10
        if current in HIDDEN:
            missing.append(time)
            unseen += 1
        else:
            args = SWITCH.encode(next_tid=tid, next_tgid=process_of(tid), not_run=unseen)
            rows.append((time, len(rows), 0, SWITCH.number, 0, process_of(current), current, *args))
            unseen = 0
        current = tid
        for _ in range(calls if tid not in HIDDEN else 0):
            time += 1
            rows.append((time, len(rows), 0, CALL.number, 0, process_of(tid), tid, 0, 0, 0, 0, 0))
    if not rows or rows[-1][3] != SWITCH.number:
        missing = [t for t in missing if rows and t < rows[-1][0]]
    elif unseen:
        missing = missing[:-unseen]
    events = np.array(rows, EVENT_DTYPE)
    return events, np.arange(len(rows), dtype=np.uint64), missing


MOVES = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), min_size=2, max_size=60)


@given(MOVES, st.lists(st.integers(0, 200), max_size=6))
def test_every_switch_not_shown_is_counted_once_and_located_however_the_events_are_cut(moves, cuts):
    events, seq, missing = schedule([*moves, (1, 0), (2, 0), (1, 0)])  # it ends with a switch that is shown, or two
    finder = UnseenSwitches(0)
    bounds = [0, *sorted(min(c, len(events)) for c in cuts), len(events)]

    found = [u for a, b in itertools.pairwise(bounds) for u in finder.find(events[a:b], seq[a:b])]

    after_first = [t for t in missing if t > events["time_mono_ns"][0]]
    told = [u for u in found if u.from_mono_ns >= events["time_mono_ns"][0] and u.to_mono_ns > u.from_mono_ns]
    assert finder.told == sum(u.count for u in found)
    assert len(after_first) <= sum(u.count for u in found) <= len(missing)
    for time in after_first:
        assert any(u.from_mono_ns < time < u.to_mono_ns for u in told), f"nobody tells of the switch at {time}"


@given(MOVES)
def test_a_record_without_a_missing_switch_has_none(moves):
    events, seq, missing = schedule([(1 + tid % 6, calls) for tid, calls in moves])

    assert missing == []
    assert UnseenSwitches(0).find(events, seq) == []


def test_the_window_is_between_the_last_event_before_and_the_first_after():
    events, seq, _ = schedule([(1, 0), (2, 1), (7, 0), (5, 2), (6, 0)])

    (found,) = UnseenSwitches(0).find(events, seq)

    shown = events["time_mono_ns"].tolist()
    assert (found.count, found.tid) == (1, 7)
    assert (found.from_mono_ns, found.to_mono_ns) == (shown[2], shown[3]), "from the switch to thread 7 to the call of thread 5"


def test_a_switch_lost_in_the_ring_is_not_counted_twice():
    """Its number is missing: the ring's account has it."""
    events, seq, _ = schedule([(1, 0), (2, 1), (5, 1), (6, 1), (1, 0)])
    lost = 2  # the switch from thread 2 to 5

    assert UnseenSwitches(0).find(np.delete(events, lost), np.delete(seq, lost)) == []
