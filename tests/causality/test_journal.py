"""Journal waits and dirty throttling: who filled the commit, and who dirtied the pages."""

from causality.journal import commits, resolve_dirty, resolve_journal
from causality.window import Who
from tests.causality.mechanism_trace import IDLE, blocked, trace, woken
from tests.causality.test_block import io, leaves

PAY, FILL, JBD = Who(10, 10), Who(20, 20), Who(7, 7)
DEV = 7 << 20


def handle(time, who, transaction, dirtied):
    return (time, "jbd2_handle_stats", who, {"dev": DEV, "transaction": transaction, "dirtied_blocks": dirtied})


def commit(start, end, transaction):
    head = {"dev": DEV, "transaction": transaction}
    return [(start, "jbd2_start_commit", JBD, head), (end, "jbd2_end_commit", JBD, head)]


def wake_by_journal(time):
    return woken(time, JBD, comm="jbd2/vda-8", in_irq=False)


def test_a_commit_that_another_filled_is_blamed_on_who_dirtied_most():
    window = trace(handle(100, PAY, 4, 2), handle(200, FILL, 4, 900), handle(300, Who(30, 30), 4, 10), *commit(1000, 9000, 4))
    assert leaves(resolve_journal(window, blocked(PAY, 1000, 9010, wake_by_journal(9005)))) == [
        (1000, 9010, "wait.journal", "journal_commit", FILL)
    ]
    assert commits(window)[0].blocks == {PAY: 2, FILL: 900, Who(30, 30): 10}


def test_an_own_commit_is_as_slow_as_its_device():
    window = trace(handle(100, PAY, 4, 2), *commit(1000, 9000, 4), *io(100, JBD, 1100, 1100, 8900))
    got = resolve_journal(window, blocked(PAY, 1000, 9010, wake_by_journal(9005)))
    assert {(p.label, p.kind, p.culprit) for p in got} == {("wait.journal", "disk_slow", None)}
    assert (got[0].start_mono_ns, got[-1].end_mono_ns) == (1000, 9010)


def test_the_requests_of_others_delay_an_own_commit():
    window = trace(
        handle(100, PAY, 4, 2), *commit(1000, 9000, 4), *io(200, FILL, 900, 900, 6000), *io(100, JBD, 1100, 1100, 8900)
    )
    got = resolve_journal(window, blocked(PAY, 1000, 9000, wake_by_journal(9000)))
    blamed = [(p.start_mono_ns, p.end_mono_ns) for p in got if p.kind == "disk_contention" and p.culprit == FILL]
    assert blamed == [(1100, 6000)]


def test_two_commits_partition_the_wait():
    window = trace(
        handle(50, FILL, 3, 9), *commit(100, 3000, 3), handle(200, PAY, 4, 9), handle(300, FILL, 4, 1), *commit(3100, 9000, 4)
    )
    got = resolve_journal(window, blocked(PAY, 1000, 9000, wake_by_journal(9000)))
    assert (got[0].start_mono_ns, got[0].end_mono_ns, got[0].kind, got[0].culprit) == (1000, 3000, "journal_commit", FILL)
    assert {p.kind for p in got[1:]} == {"disk_slow"}
    assert got[-1].end_mono_ns == 9000


def test_a_wait_that_the_journal_did_not_end_is_not_its():
    assert resolve_journal(trace(*commit(1000, 9000, 4)), blocked(PAY, 1000, 9000, woken(9000))) == []


def pause(time, who, dirtied, *, jiffies=10, dev=DEV):
    return (time, "balance_dirty_pages", who, {"pause_jiffies": jiffies, "dirtied": dirtied, "bdi_dev": dev})


def test_a_dirty_pause_is_blamed_on_who_dirtied_most():
    window = trace(pause(1000, FILL, 5000), pause(2000, PAY, 30), pause(2500, Who(30, 30), 90000, dev=1))
    assert leaves(resolve_dirty(window, blocked(PAY, 2100, 9000, woken(9000)))) == [
        (2100, 9000, "wait.dirty", "dirty_throttle", FILL)
    ]


def test_an_own_flood_has_no_culprit():
    window = trace(pause(1000, FILL, 5), pause(2000, PAY, 3000))
    assert leaves(resolve_dirty(window, blocked(PAY, 2100, 9000, woken(9000)))) == [
        (2100, 9000, "wait.dirty", "dirty_throttle", None)
    ]


def test_an_announcement_without_a_pause_is_no_pause():
    assert resolve_dirty(trace(pause(2000, PAY, 3000, jiffies=0)), blocked(PAY, 2100, 9000, woken(9000, IDLE))) == []
