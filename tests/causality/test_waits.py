"""Whole verdicts on small traces: who a wait is blamed on, and what a switch that is missing does to it."""

from causality.window import Who
from tests.causality.node_trace import END_NS, futex, switch, task, verdict, waking

PAY, PEER, HOG, HIDDEN, IDLE = Who(10, 10), Who(20, 20), Who(30, 30), Who(40, 40), Who(0, 0)
TASKS = [task(PAY, "payments"), task(PEER, "accounts"), task(HOG, "reindex")]
MS = 1_000_000


def causes(document):
    return [(c["kind"], c["culprit"] and c["culprit"]["comm"]) for c in document["causes"]]


def called(time, cpu, who, nr, **more):
    return (time, "sys_enter", who, {"nr": nr, **more}, cpu)


def asked_and_answered(*between):
    """PAY sleeps from 2 ms on in a read and is woken by PEER at 90 ms."""
    read = {"object_type": 2, "object": 5}
    return [
        called(1 * MS, 0, PAY, 0, **read), switch(2 * MS, 0, PAY, IDLE), *between,
        waking(90 * MS, 1, PEER, PAY, target=0), switch(90 * MS + 5, 0, IDLE, PAY, state=0),
        switch(95 * MS, 1, PEER, IDLE),
    ]  # fmt: skip


def test_a_thread_whose_switch_in_is_missing_stood_in_line_until_its_cpu_changed_hands():
    """PEER is preempted by HOG; HOG gives way to a task whose switches the kernel hides, which let PEER in unseen."""
    events = asked_and_answered(
        switch(3 * MS, 1, PEER, HOG, state=0, preempt=1), switch(80 * MS, 1, HOG, HIDDEN),
        called(81 * MS, 1, PEER, 1, object_type=2),
    )  # fmt: skip
    document = verdict(events, TASKS, PAY, 1 * MS, 91 * MS)
    assert causes(document)[0] == ("cpu_preempted", "reindex")
    assert 76 * MS <= document["causes"][0]["ns"] <= 78 * MS
    waited = [((s["culprit"] or {}).get("comm"), s["ns"]) for s in document["ledger"] if s["label"] == "wait.pipe"]
    # In between nobody can be named; then from the first event that shows it on its CPU, not a ns before.
    assert waited[1:] == [("reindex", 77 * MS), (None, 1 * MS), ("accounts", 9 * MS)]


def test_the_same_holds_if_the_operation_ends_before_the_thread_leaves_its_cpu():
    events = asked_and_answered(
        switch(3 * MS, 1, PEER, HOG, state=0, preempt=1), switch(80 * MS, 1, HOG, HIDDEN),
    )  # fmt: skip
    document = verdict(events, TASKS, PAY, 1 * MS, 91 * MS)
    assert [c[:2] for c in causes(document)[:2]] == [("cpu_preempted", "reindex"), ("unknown", None)]
    assert document["causes"][0]["ns"] == 77 * MS


def test_the_occupant_that_was_let_in_unseen_has_the_cpu_from_the_first_event_that_shows_it():
    """PAY is runnable on CPU 0 while HIDDEN, then HOG (whose switch-in is missing) have it."""
    events = [
        switch(2 * MS, 0, PAY, HIDDEN, state=0, preempt=1), called(3 * MS, 0, HOG, 39),
        switch(80 * MS, 0, HOG, PAY, state=0, preempt=1),
    ]  # fmt: skip
    document = verdict(events, TASKS, PAY, 1 * MS, 90 * MS)
    assert causes(document) == [("cpu_preempted", "reindex"), ("own_cpu", None), ("unknown", None)]
    assert [c["ns"] for c in document["causes"]] == [77 * MS, 11 * MS, 1 * MS]


def test_who_lets_a_file_lock_go_held_it():
    for number in (73, 72):  # flock, fcntl
        events = [
            called(1 * MS, 0, PAY, number), called(1 * MS, 1, PEER, 230), switch(2 * MS, 0, PAY, IDLE),
            switch(3 * MS, 1, PEER, IDLE),
            waking(85 * MS, 1, IDLE, PEER), switch(86 * MS, 1, IDLE, PEER, state=0),
            waking(90 * MS, 1, PEER, PAY, target=0), switch(91 * MS, 0, IDLE, PAY, state=0),
        ]  # fmt: skip
        document = verdict(events, TASKS, PAY, 1 * MS, 92 * MS)
        assert causes(document)[0] == ("lock_holder", "accounts")
        assert document["causes"][0]["chain"][0]["edge"] == "holds_lock"


def test_a_signal_that_ends_the_wait_for_a_file_lock_makes_its_sender_no_holder():
    events = [
        called(1 * MS, 0, PAY, 73), switch(2 * MS, 0, PAY, IDLE),
        (90 * MS - 10, "signal_generate", PEER, {"sig": 14, "tid": PAY.tid, "tgid": PAY.tgid}, 1),
        waking(90 * MS, 1, PEER, PAY, target=0), switch(91 * MS, 0, IDLE, PAY, state=0),
    ]  # fmt: skip
    assert causes(verdict(events, TASKS, PAY, 1 * MS, 92 * MS))[0] == ("peer_slow", "accounts")


def test_the_call_of_a_snapshot_says_nothing_of_a_thread_that_ran_since_unwatched():
    """PEER sat in recvfrom when the recording began, ran, and then slept by a timer: its sleep is no wait for the network."""
    snapshot = {"reason": "snapshot", "syscall_nr": 45, "watched": False, "state": "S"}
    events = asked_and_answered(
        waking(1 * MS + 5, 1, HOG, PEER), switch(1 * MS + 9, 1, HOG, PEER), switch(3 * MS, 1, PEER, IDLE),
        (85 * MS - 5, "local_timer_entry", IDLE, {"vector": 236}, 1), waking(85 * MS, 1, IDLE, PEER),
        (85 * MS + 5, "local_timer_exit", IDLE, {"vector": 236}, 1), switch(86 * MS, 1, IDLE, PEER, state=0),
    )  # fmt: skip
    document = verdict(events, [*TASKS, task(PEER, "accounts", **snapshot)], PAY, 1 * MS, 91 * MS)
    assert causes(document)[0] == ("peer_slow", "accounts")


def test_who_is_let_in_unseen_after_a_wait_in_a_call_ran_from_its_return_on():
    events = [
        called(1 * MS, 0, PAY, 0, object_type=2), switch(2 * MS, 0, PAY, IDLE), waking(10 * MS, 1, PEER, PAY, target=0),
        switch(11 * MS, 0, IDLE, HIDDEN, state=0), (14 * MS, "sys_exit", PAY, {"nr": 0, "ret": 1}, 0),
        switch(20 * MS, 0, PAY, IDLE),
    ]  # fmt: skip
    document = verdict(events, TASKS, PAY, 1 * MS, 19 * MS)
    assert document["totals"]["runq"] + document["totals"].get("runq.idle", 0) == 4 * MS
    assert "unknown" not in document["totals"]


def test_nothing_is_known_of_the_time_after_the_recording_and_the_verdict_says_so():
    events = asked_and_answered()
    for start, end in ((1 * MS, 2 * END_NS), (END_NS + 1, 2 * END_NS), (1 * MS, 2**63 - 1)):
        document = verdict(events, TASKS, PAY, start, end)
        assert document["totals"]["lost"] == end - max(start, END_NS)
        assert not document["completeness"]["complete"]
        assert document["completeness"]["missing"] == ["events after the end of the recording"]


def timed_out_then_woken(*, retry_word, gap_ns=1000):
    """PAY waits 5 ms for a word, in vain, waits again at once, and is woken by PEER at 12 ms; PEER works all the time."""
    tick = {"vector": 236}
    second = 7 * MS + 100 + gap_ns
    return [
        futex(1 * MS, 0, PAY, 0, 64), switch(2 * MS, 0, PAY, IDLE), called(1 * MS, 1, PEER, 39),
        (7 * MS - 5, "local_timer_entry", IDLE, tick, 0), waking(7 * MS, 0, IDLE, PAY),
        (7 * MS + 5, "local_timer_exit", IDLE, tick, 0), switch(7 * MS + 9, 0, IDLE, PAY, state=0),
        (7 * MS + 50, "sys_exit", PAY, {"nr": 202, "ret": -110}, 0), futex(second, 0, PAY, 0, retry_word),
        switch(second + 100, 0, PAY, IDLE), waking(12 * MS, 1, PEER, PAY, target=0), switch(12 * MS + 9, 0, IDLE, PAY, state=0),
        switch(20 * MS, 1, PEER, IDLE),
    ]  # fmt: skip


def test_a_wait_that_timed_out_and_was_taken_up_again_was_for_whoever_ended_it_at_last():
    for word in (64, 68):  # the second group of a condition variable lies beside the first
        document = verdict(timed_out_then_woken(retry_word=word), TASKS, PAY, 1 * MS, 13 * MS)
        assert causes(document)[0] == ("peer_slow", "accounts")
        assert document["causes"][0]["ns"] > 9 * MS


def test_a_timed_wait_that_was_left_for_something_else_was_a_sleep():
    """Another word, or the same one after work of its own: nobody owed the thread anything for the first 5 ms."""
    for events in (timed_out_then_woken(retry_word=256), timed_out_then_woken(retry_word=64, gap_ns=2 * MS)):
        document = verdict(events, TASKS, PAY, 1 * MS, 13 * MS)
        slept = [c["ns"] for c in document["causes"] if c["kind"] == "own_sleep"]
        assert slept == [5 * MS]


def test_who_is_frozen_asleep_was_stopped_from_when_its_timer_was_due_until_the_thaw():
    timer = {"hrtimer": 1, "function": 2, "expires_ns": 41 * MS}
    events = [
        called(1 * MS, 0, PAY, 230), (1 * MS + 10, "hrtimer_start", PAY, timer, 0), switch(2 * MS, 0, PAY, IDLE),
        waking(90 * MS, 1, PEER, PAY, target=0, state=0x8000), switch(90 * MS + 9, 0, IDLE, PAY, state=0),
    ]  # fmt: skip
    document = verdict(events, TASKS, PAY, 1 * MS, 91 * MS)
    assert causes(document)[:2] == [("stopped", "accounts"), ("own_sleep", None)]
    assert [c["ns"] for c in document["causes"][:2]] == [49 * MS, 39 * MS]
