"""Disk waits: whose request was in service, slow device or busy device, throttled or queued."""

from causality.block import requests, resolve_block
from causality.window import Who
from tests.causality.mechanism_trace import IDLE, blocked, trace, woken

PAY, STORM, WORKER = Who(10, 10), Who(20, 20), Who(5, 5)
DEV = 7 << 20


def io(rq, who, queued, issued, done, *, cgroup=1, issuer=None, dev=DEV):
    """One request from queue to completion."""
    bio = rq + 1
    same = {"rq": rq, "dev": dev, "bytes": 4096, "sector": rq}
    return [
        (queued, "block_bio_queue", who, {"bio": bio, "dev": dev, "bytes": 4096, "sector": rq, "cgroup_id": cgroup}),
        (issued, "block_rq_issue", issuer or who, {**same, "bio": bio}),
        (done, "block_rq_complete", IDLE, same),
    ]


def leaves(pieces):
    return [(p.start_mono_ns, p.end_mono_ns, p.label, p.kind, p.culprit) for p in pieces]


def test_a_lone_request_is_split_at_its_issue_and_nobody_is_blamed():
    window = trace(*io(100, PAY, 1000, 1200, 5000))
    assert leaves(resolve_block(window, blocked(PAY, 1000, 5010, woken(5010)))) == [
        (1000, 1200, "wait.disk.queue", "disk_slow", None),
        (1200, 5010, "wait.disk.device", "disk_slow", None),
    ]


def test_time_in_which_another_process_was_served_is_contention_by_it():
    window = trace(*io(200, STORM, 500, 600, 3000), *io(100, PAY, 1000, 1000, 5000))
    assert leaves(resolve_block(window, blocked(PAY, 1000, 5000, woken(5000)))) == [
        (1000, 3000, "wait.disk.device", "disk_contention", STORM),
        (3000, 5000, "wait.disk.device", "disk_slow", None),
    ]


def test_another_request_that_came_later_is_charged_only_from_its_issue():
    window = trace(*io(100, PAY, 1000, 1000, 9000), *io(200, STORM, 7000, 7100, 8000))
    assert leaves(resolve_block(window, blocked(PAY, 1000, 9000, woken(9000)))) == [
        (1000, 7100, "wait.disk.device", "disk_slow", None),
        (7100, 8000, "wait.disk.device", "disk_contention", STORM),
        (8000, 9000, "wait.disk.device", "disk_slow", None),
    ]


def test_requests_of_another_device_and_of_the_own_process_are_no_contention():
    other, sibling = io(200, STORM, 500, 600, 3000, dev=8 << 20), io(300, Who(11, 10), 500, 600, 2500)
    window = trace(*other, *sibling, *io(100, PAY, 1000, 1000, 5000))
    assert leaves(resolve_block(window, blocked(PAY, 1000, 5000, woken(5000)))) == [
        (1000, 5000, "wait.disk.device", "disk_slow", None)
    ]


def test_a_bio_of_a_cgroup_that_a_worker_let_through_was_throttled():
    window = trace(*io(100, WORKER, 9000, 9000, 9400, cgroup=55))
    assert leaves(resolve_block(window, blocked(PAY, 1000, 9400, woken(9400)))) == [
        (1000, 9000, "wait.disk.queue", "disk_throttle", None),
        (9000, 9400, "wait.disk.device", "disk_slow", None),
    ]


def test_a_wait_that_somebody_else_ended_is_not_the_disks():
    window = trace(*io(100, PAY, 1000, 1200, 5000))
    assert resolve_block(window, blocked(PAY, 1000, 9000, woken(9_000_000, STORM, cpu=1, in_irq=False))) == []


def test_a_reused_request_pointer_is_two_requests():
    window = trace(*io(100, PAY, 1000, 1200, 2000), *io(100, STORM, 3000, 3200, 4000))
    table = requests(window)
    assert [(int(t), int(i), int(c)) for t, i, c in zip(table.tid, table.issued, table.completed, strict=True)] == [
        (10, 1200, 2000),
        (20, 3200, 4000),
    ]
