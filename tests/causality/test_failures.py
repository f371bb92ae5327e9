"""Failures: who killed, reset, left or stopped; which error ended the operation."""

from causality.failures import failure_of, stopper_of
from causality.window import Who
from tests.causality.mechanism_trace import IDLE, trace

PAY, OTHER, PEER = Who(10, 10), Who(30, 30), Who(20, 20)
READ, RECV = 0, 45


def signal(time, sender, sig, target=PAY, result=0):
    return (time, "signal_generate", sender, {"tid": target.tid, "tgid": target.tgid, "sig": sig, "group": 1, "result": result})


def exits(time, who, code):
    return (time, "sched_process_exit", who, {"exit_code": code, "group_dead": 1})


def call(time, nr, ret, *, object_type=0, who=PAY):
    enter = (time, "sys_enter", who, {"nr": nr, "object_type": object_type, "arg1": 4096})
    return [enter, (time + 10, "sys_exit", who, {"nr": nr, "ret": ret, "arg1": 4096})]


def said(failure):
    return failure and (failure.time_mono_ns, failure.kind, failure.culprit)


def test_the_sender_of_the_deadly_signal_is_the_culprit():
    window = trace(signal(100, Who(99, 99), 23), signal(500, OTHER, 9), exits(600, PAY, 9))
    assert said(failure_of(window, PAY, 0, 1000)) == (500, "killed_signal", OTHER)


def test_a_signal_to_somebody_else_and_a_normal_exit_are_no_kill():
    window = trace(signal(500, OTHER, 9, target=PEER), exits(600, PEER, 9), exits(700, PAY, 0))
    assert failure_of(window, PAY, 0, 1000) is None


def oom(time, invoker, victim=PAY):
    return (time, "mark_victim", invoker, {"tid": victim.tgid, "tgid": victim.tgid})


def test_an_oom_kill_by_the_own_allocation_has_no_culprit():
    window = trace(oom(400, PAY), signal(410, PAY, 9), exits(600, PAY, 9))
    assert said(failure_of(window, PAY, 0, 1000)) == (400, "killed_oom", None)


def test_an_oom_kill_by_a_neighbours_allocation_names_it():
    window = trace(oom(400, OTHER), signal(410, OTHER, 9), exits(600, PAY, 9))
    assert said(failure_of(window, PAY, 0, 1000)) == (400, "killed_oom", OTHER)


def segment(time, who, flags, *, sport=80, dport=40000):
    return (time, "net_dev_queue", who, {"sport": sport, "dport": dport, "protocol": 6, "tcp_flags": flags})


OWN = segment(50, PAY, 24, sport=40000, dport=80)


def test_a_reset_names_who_sent_it():
    window = trace(OWN, segment(500, PEER, 4), *call(100, RECV, -104, object_type=1))
    assert said(failure_of(window, PAY, 0, 1000)) == (110, "net_reset", None)
    window = trace(OWN, segment(90, PEER, 4), *call(100, RECV, -104, object_type=1))
    assert said(failure_of(window, PAY, 0, 1000)) == (110, "net_reset", PEER)


def test_the_reset_of_another_connection_is_not_ours():
    window = trace(OWN, segment(90, OTHER, 4, sport=81, dport=50000), *call(100, RECV, -104, object_type=1))
    assert said(failure_of(window, PAY, 0, 1000)) == (110, "net_reset", None)


def test_a_read_of_nothing_after_the_peers_exit_is_the_peers_exit():
    window = trace(OWN, exits(80, PEER, 0), segment(90, PEER, 17), *call(100, READ, 0, object_type=1))
    assert said(failure_of(window, PAY, 0, 1000)) == (110, "peer_exited", PEER)


def test_the_end_of_a_file_is_no_failure():
    assert failure_of(trace(*call(100, READ, 0, object_type=3)), PAY, 0, 1000) is None


def test_an_error_of_the_device_is_an_io_error_with_its_request():
    bad = (105, "block_rq_complete", IDLE, {"rq": 5, "error": -5})
    failure = failure_of(trace(bad, *call(100, READ, -5, object_type=3)), PAY, 0, 1000)
    assert said(failure) == (110, "io_error", None)
    assert len(failure.evidence) == 2


def test_the_last_error_counts_and_expected_ones_do_not():
    window = trace(*call(100, READ, -5, object_type=3), *call(200, READ, -2), *call(300, READ, -11, object_type=1))
    assert said(failure_of(window, PAY, 0, 1000)) == (110, "io_error", None)


def test_errors_of_other_threads_and_other_times_are_not_ours():
    window = trace(*call(100, READ, -5, who=OTHER), *call(2000, READ, -5))
    assert failure_of(window, PAY, 0, 1000) is None


def test_who_stopped_it_is_who_sent_the_stop():
    window = trace(signal(100, OTHER, 18), signal(200, PEER, 19), signal(900, OTHER, 19))
    assert stopper_of(window, PAY, 300)[0] == PEER
    assert stopper_of(window, PAY, 150) is None


def test_a_process_that_ends_itself_for_a_signal_it_caught_was_ended_by_the_sender():
    window = trace(
        (500, "signal_generate", OTHER, {"sig": 15, "tid": PAY.tid, "tgid": PAY.tgid, "group": 1}),
        (900, "sched_process_exit", PAY, {"exit_code": 256, "group_dead": 1}),
    )
    failure = failure_of(window, PAY, 100, 1000)
    assert (failure.kind, failure.culprit, failure.confidence) == ("killed_signal", OTHER, "strong")


def test_a_process_that_ends_itself_long_after_a_signal_or_with_success_was_not():
    told = (500, "signal_generate", OTHER, {"sig": 15, "tid": PAY.tid, "tgid": PAY.tgid, "group": 1})
    for exit_code, start in ((0, 100), (256, 600)):
        window = trace(told, (900, "sched_process_exit", PAY, {"exit_code": exit_code, "group_dead": 1}))
        assert failure_of(window, PAY, start, 1000) is None


def test_the_end_of_a_unix_stream_is_the_exit_of_whoever_closed_it():
    ready = {"sk": 77, "family": 1}
    window = trace(
        (200, "sys_enter", PAY, {"nr": 45, "object_type": 1, "object": 77}), (300, "sk_data_ready", OTHER, ready),
        (700, "sched_process_exit", OTHER, {"exit_code": 256, "group_dead": 1}),
        (800, "sys_exit", PAY, {"nr": 45, "ret": 0, "arg1": 100}),
    )  # fmt: skip
    failure = failure_of(window, PAY, 100, 1000)
    assert (failure.kind, failure.culprit) == ("peer_exited", OTHER)
