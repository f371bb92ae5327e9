"""Network waits: who sent what ended the wait, what was lost, who never answered."""

from causality.network import resolve_network
from causality.window import Follow, Wake, Who
from tests.causality.mechanism_trace import blocked, trace, woken

PAY, PEER = Who(10, 10), Who(20, 20)
RECV = 45
ASK = {"saddr": 1, "daddr": 2, "sport": 40000, "dport": 80, "protocol": 6, "tcp_flags": 24}
ANSWER = {"saddr": 2, "daddr": 1, "sport": 80, "dport": 40000, "protocol": 6, "tcp_flags": 24}


def sent(time, who, skb, seq, tuple_, cpu=0):
    return (time, "net_dev_queue", who, {"skb": skb, "seq": seq, **tuple_}, cpu)


def received(time, who, skb, seq, tuple_, cpu=0):
    return (time, "netif_receive_skb", who, {"skb": skb, "seq": seq, **tuple_}, cpu)


def call(time, nr=RECV, object_type=1, sk=77):
    return (time, "sys_enter", PAY, {"nr": nr, "object_type": object_type, "object": sk})


def wait(end, wake_cpu=1, *, start=1000):
    return blocked(PAY, start, end, woken(end, PEER, cpu=wake_cpu), syscall=RECV)


def said(pieces):
    return [
        (p.start_mono_ns, p.end_mono_ns, ("follow", p.task) if isinstance(p, Follow) else (p.kind, p.culprit)) for p in pieces
    ]


def test_the_wait_is_for_the_task_that_sent_what_ended_it():
    window = trace(call(900), sent(8000, PEER, 5, 300, ANSWER, 1), received(8100, PEER, 5, 300, ANSWER, 1))
    assert said(resolve_network(window, wait(8200))) == [
        (1000, 8000, ("follow", PEER)),
        (8000, 8200, ("net_peer", PEER)),
    ]


def test_a_packet_from_outside_is_an_unrecorded_peer():
    window = trace(call(900), received(8100, PEER, 5, 300, ANSWER, 1))
    assert said(resolve_network(window, wait(8200))) == [(1000, 8200, ("net_peer", None))]


def test_another_buffer_at_the_same_address_is_not_the_same_packet():
    window = trace(call(900), sent(7000, Who(30, 30), 5, 111, ANSWER, 1), received(8100, PEER, 5, 300, ANSWER, 1))
    assert said(resolve_network(window, wait(8200))) == [(1000, 8200, ("net_peer", None))]


def test_a_retransmission_is_loss_from_the_first_transmission_to_the_resend():
    window = trace(
        call(950), sent(900, PAY, 4, 100, ASK), (6000, "tcp_retransmit_skb", PAY, {**_tuple(ASK), "seq": 100}),
        sent(8000, PEER, 5, 300, ANSWER, 1), received(8100, PEER, 5, 300, ANSWER, 1),
    )  # fmt: skip
    assert said(resolve_network(window, wait(8200))) == [
        (1000, 6000, ("net_loss", None)),
        (6000, 8000, ("follow", PEER)),
        (8000, 8200, ("net_peer", PEER)),
    ]


def test_the_loss_of_another_connection_is_not_ours():
    other = {**_tuple(ASK), "sport": 50000, "seq": 100}
    window = trace(call(900), (6000, "tcp_retransmit_skb", PAY, other), received(8100, PEER, 5, 300, ANSWER, 1))
    assert said(resolve_network(window, wait(8200))) == [(1000, 8200, ("net_peer", None))]


def _tuple(flow):
    return {k: flow[k] for k in ("saddr", "daddr", "sport", "dport")}


def test_a_timeout_was_for_whoever_the_question_woke():
    ack = {**ANSWER, "tcp_flags": 16}
    window = trace(
        sent(800, PAY, 4, 100, ASK), received(810, PAY, 4, 100, ASK),
        (820, "sched_waking", PAY, {"tid": PEER.tid, "tgid": PEER.tgid}),
        sent(830, PAY, 6, 300, ack), call(900),
    )  # fmt: skip
    got = resolve_network(window, wait(9_000_000, wake_cpu=0))
    assert said(got) == [(1000, 9_000_000, ("follow", PEER))]
    assert got[0].confidence == "inferred"


def test_a_wait_that_is_not_on_a_socket_is_not_the_networks():
    for other in (call(900, nr=202, object_type=0), call(900, nr=0, object_type=2), call(900, nr=35, object_type=0)):
        nr = other[3]["nr"]
        window = trace(sent(700, PAY, 4, 100, ASK), other, received(8100, PEER, 5, 300, ANSWER, 1))
        assert resolve_network(window, blocked(PAY, 1000, 8200, woken(8200, PEER, cpu=1), syscall=nr)) == []


def test_a_task_that_wakes_outside_softirq_is_followed_by_the_engine():
    window = trace(call(900), received(8100, PEER, 5, 300, ANSWER, 1))
    wake = woken(8200, PEER, cpu=1, in_irq=False)
    assert resolve_network(window, blocked(PAY, 1000, 8200, wake, syscall=RECV)) == []


def test_a_unix_socket_is_not_the_networks():
    ready = (950, "sk_data_ready", PEER, {"sk": 77, "family": 1})
    window = trace(sent(700, PAY, 4, 100, ASK), call(900), ready)
    assert resolve_network(window, wait(8200)) == []


def test_what_the_cpu_wakes_after_the_receive_softirq_is_not_the_peer():
    window = trace(
        sent(800, PAY, 4, 100, ASK), received(810, PAY, 4, 100, ASK), (815, "softirq_exit", PAY, {"vec": 3}),
        (900, "sys_enter", PAY, {"nr": RECV, "object_type": 1, "object": 77}),
        (950, "sched_waking", PAY, {"tid": 30, "tgid": 30}),
    )  # fmt: skip
    assert said(resolve_network(window, wait(9_000_000, wake_cpu=0))) == [(1000, 9_000_000, ("net_peer", None))]


def test_a_wait_that_a_timer_ended_owes_nothing_to_a_packet_that_came_by_just_before():
    """A server sleeps with a timeout (epoll) in the middle of a request; the packet is somebody else's."""
    other = {**ANSWER, "sport": 9092, "dport": 50000}
    window = trace(
        received(500, PEER, 9, 40, ANSWER), sent(400, PAY, 8, 10, ASK), call(900, nr=232, object_type=0),
        sent(7000, Who(30, 30), 5, 300, other, 1), received(7100, Who(30, 30), 5, 300, other, 1),
    )  # fmt: skip
    by_timer = Wake(8200, 1, 999, PEER, "", in_irq=True, by_timer=True)
    assert resolve_network(window, blocked(PAY, 1000, 8200, by_timer, syscall=232)) == []


def test_a_timed_wait_on_many_sockets_with_an_open_question_is_for_whoever_was_asked():
    window = trace(
        sent(800, PAY, 4, 100, ASK), received(810, PAY, 4, 100, ASK),
        (820, "sched_waking", PAY, {"tid": PEER.tid, "tgid": PEER.tgid}), call(900, nr=7, object_type=0),
    )  # fmt: skip
    by_timer = Wake(9_000_000, 0, 999, PEER, "", in_irq=True, by_timer=True)
    got = resolve_network(window, blocked(PAY, 1000, 9_000_000, by_timer, syscall=7))
    assert said(got) == [(1000, 9_000_000, ("follow", PEER))]


def test_of_several_packets_in_one_softirq_the_one_for_the_socket_that_became_readable_counts():
    late = {**ANSWER, "sport": 81}
    window = trace(
        call(900), sent(7000, PEER, 5, 300, ANSWER, 1), sent(7500, Who(30, 30), 6, 900, late, 1),
        received(8100, PEER, 5, 300, ANSWER, 1), received(8110, Who(30, 30), 6, 900, late, 1),
        (8150, "sk_data_ready", PEER, {"sk": 77, "sport": 40000, "dport": 80}, 1),
    )  # fmt: skip
    assert said(resolve_network(window, wait(8200)))[0] == (1000, 7000, ("follow", PEER))
