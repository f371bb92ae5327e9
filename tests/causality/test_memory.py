"""Memory: reclaim under an own limit and under global pressure, and swap-in."""

from causality.memory import reclaim_brackets, resolve_reclaim, resolve_swap
from causality.window import Who
from tests.causality.mechanism_trace import blocked, trace, woken
from tests.causality.test_block import io, leaves

PAY, GROW = Who(10, 10), Who(20, 20)
MEMCG, DIRECT = "mm_vmscan_memcg_reclaim", "mm_vmscan_direct_reclaim"


def reclaim(stem, start, end, who=PAY):
    return [(start, f"{stem}_begin", who, {"order": 0}), (end, f"{stem}_end", who, {"nr_reclaimed": 32})]


def rss(time, who, size, member=1):
    return (time, "rss_stat", who, {"mm_id": who.tgid, "curr": 1, "member": member, "size_bytes": size})


def test_a_wait_inside_own_limit_reclaim_has_no_culprit():
    window = trace(*reclaim(MEMCG, 1000, 9000))
    assert leaves(resolve_reclaim(window, blocked(PAY, 2000, 5000, woken(5000)))) == [
        (2000, 5000, "wait.reclaim", "memcg_reclaim", None)
    ]


def test_global_reclaim_names_whose_memory_grew_most():
    window = trace(rss(100, GROW, 0), rss(200, Who(30, 30), 0), rss(900, GROW, 1 << 30), rss(950, Who(30, 30), 1 << 20),
                   *reclaim(DIRECT, 1000, 9000))  # fmt: skip
    got = resolve_reclaim(window, blocked(PAY, 2000, 5000, woken(5000)))
    assert leaves(got) == [(2000, 5000, "wait.reclaim", "global_reclaim", GROW)]
    assert got[0].confidence == "statistical"


def test_a_wait_after_reclaim_or_in_another_threads_reclaim_is_not_reclaim():
    window = trace(*reclaim(MEMCG, 1000, 1500), *reclaim(MEMCG, 1000, 9000, GROW))
    assert resolve_reclaim(window, blocked(PAY, 2000, 5000, woken(5000))) == []
    assert [(b.start_mono_ns, b.end_mono_ns) for b in reclaim_brackets(window, PAY)] == [(1000, 1500)]


def test_a_reclaim_without_an_end_lasts_to_the_end_of_the_view():
    window = trace((1000, f"{MEMCG}_begin", PAY, {}), until=7000)
    assert [(b.start_mono_ns, b.end_mono_ns) for b in reclaim_brackets(window, PAY)] == [(1000, 7000)]


FAULT = (900, "page_fault_user", PAY, {"address": 4096})


def test_a_fault_that_reads_for_itself_is_swap_in():
    window = trace(FAULT, *io(100, PAY, 1000, 1100, 5000))
    assert leaves(resolve_swap(window, blocked(PAY, 1200, 5000, woken(5000)))) == [(1200, 5000, "wait.swap", "swap_in", None)]


def test_a_file_fault_and_a_read_call_are_not_swap_in():
    file_fault = (950, "filemap_fault", PAY, {"dev": 1, "ino": 2})
    call = (950, "sys_enter", PAY, {"nr": 0})
    for between in (file_fault, call):
        window = trace(FAULT, between, *io(100, PAY, 1000, 1100, 5000))
        assert resolve_swap(window, blocked(PAY, 1200, 5000, woken(5000))) == []
