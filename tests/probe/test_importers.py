"""Traces of other tools come in as what they say: fields, identities, order, losses, and nothing invented."""

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from events.errors import InputError
from events.frames import Frame
from events.kinds import BY_NAME, BY_NUMBER
from events.records import FLAG_HARDIRQ, FLAG_SOFTIRQ, UNKNOWN_CPU, UNKNOWN_TID
from events.syscalls import NUMBERS
from probe.importers import import_trace
from probe.neutral import STATE_DEAD, as_number, name_number, state_bits
from probe.trace_text import parse_arguments

TRACES = Path(__file__).parent / "traces"


def events_of(frames, node="imported"):
    """Every event as a dict of head and fields, in recorded order."""
    out = []
    for frame in frames:
        if frame.kind != "events/1" or frame.node != node:
            continue
        for row in frame.batch.to_pylist():
            kind = BY_NUMBER[row["kind"]]
            fields = kind.decode(tuple(row[f"a{i}"] for i in range(5)))
            head = {name: row[name] for name in ("time_mono_ns", "seq", "cpu", "flags")}
            out.append({"event": kind.name, "current": row["tid"], **head, **fields})
    return out


def rows_of(frames, kind):
    return [row for frame in frames if frame.kind == kind for row in frame.batch.to_pylist()]


@pytest.fixture
def import_json(tmp_path):
    def run(*lines):
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        return import_trace(str(path), "jsonl")

    return run


@pytest.fixture
def import_text(tmp_path):
    def run(text):
        path = tmp_path / "trace.txt"
        path.write_text(text)
        return import_trace(str(path), "ftrace-text")

    return run


def switch(time_ns, prev_pid, prev_state, next_pid, cpu=0, **more):
    fields = {"prev_comm": f"t{prev_pid}", "prev_pid": prev_pid, "prev_prio": 120, "prev_state": prev_state}
    fields |= {"next_comm": f"t{next_pid}", "next_pid": next_pid, "next_prio": 120}
    return {"time_ns": time_ns, "cpu": cpu, "kind": "sched_switch", **fields, **more}


def waking(time_ns, pid, cpu=0, **more):
    fields = {"comm": f"t{pid}", "pid": pid, "prio": 120, "target_cpu": 0}
    return {"time_ns": time_ns, "cpu": cpu, "kind": "sched_waking", **fields, **more}


@pytest.mark.parametrize(
    ("given", "bits", "preempted"),
    [
        ("R", 0, False),
        ("R+", 0, True),
        ("S", 1, False),
        ("D", 2, False),
        ("D|W", 0x202, False),
        ("DK", 0x102, False),
        ("T", 4, False),
        ("t", 8, False),
        ("X", STATE_DEAD, False),
        ("Z", STATE_DEAD, False),
        ("x", STATE_DEAD, False),
        ("I", 0x402, False),
        ("P", 0x40, False),
        (0, 0, False),
        (1, 1, False),
        (2, 2, False),
        (3, 3, False),
        ("1", 1, False),
        (256, 0, True),
        (2048, 0, True),
        (16, STATE_DEAD, False),
        (32, STATE_DEAD, False),
        (0x80, 0x402, False),
    ],
)
def test_prev_state_means_the_same_as_a_number_and_as_letters(given, bits, preempted):
    assert state_bits(given) == (bits, preempted)


@pytest.mark.parametrize("given", ["", "+", "Q", "S?", None, [1], 1.5])
def test_a_prev_state_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="prev_state"):
        state_bits(given)


@pytest.mark.parametrize(
    ("given", "number"),
    [
        (7, 7),
        (True, 1),
        ("0x10", 16),
        ("-12", -12),
        ("12", 12),
        ("ffff888100", 0xFFFF888100),
        ("000000001234567a", 0x1234567A),
        ("0000000012345678", 0x12345678),
        ("8,0", 8 << 20),
        ("254,3", 254 << 20 | 3),
        ("true", 1),
        (3.0, 3),
        (3.5, None),
        (None, None),
        ("", None),
        ([], None),
        ("tick_nohz_handler", name_number("tick_nohz_handler")),
    ],
)
def test_numbers_in_all_their_spellings(given, number):
    assert as_number(given) == number


def test_a_thread_that_ran_before_the_first_switch_is_the_one_it_takes_away(import_json):
    frames, _ = import_json(waking(5, 23), switch(10, 7, "S", 23), waking(15, 7))

    assert [(e["event"], e["current"]) for e in events_of(frames)] == [
        ("sched_waking", 7),
        ("sched_switch", 7),
        ("sched_waking", 23),
    ]


def test_on_a_cpu_without_switches_the_waker_is_unknown_and_not_idle(import_json):
    frames, _ = import_json(waking(5, 23, cpu=3))

    assert [e["current"] for e in events_of(frames)] == [UNKNOWN_TID]


def test_a_wake_up_without_target_cpu_has_none(import_json):
    line = waking(5, 23, common_pid=9)
    del line["target_cpu"]

    frames, _ = import_json(line)

    assert [(e["current"], e["target_cpu"]) for e in events_of(frames)] == [(9, UNKNOWN_CPU)]


def test_times_that_step_back_are_sorted_and_equal_ones_keep_the_order_of_the_file(import_json):
    frames, report = import_json(switch(30, 1, "S", 2), waking(10, 5), waking(10, 4), switch(30, 2, "S", 3))

    assert [(e["time_mono_ns"], e["seq"], e.get("next_tid", e.get("tid"))) for e in events_of(frames)] == [
        (10, 0, 5),
        (10, 1, 4),
        (30, 2, 2),
        (30, 3, 3),
    ]
    assert report.notes == Counter({"times that step back: sorted": 2})


def test_a_reused_tid_is_two_tasks(import_json):
    frames, _ = import_json(
        switch(10, 1, "S", 23),
        {"time_ns": 15, "cpu": 0, "kind": "sched_process_exit", "comm": "t23", "pid": 23, "prio": 120},
        switch(20, 23, "X", 1),
        {"time_ns": 30, "cpu": 0, "kind": "sched_process_fork", "comm": "t1", "pid": 1, "child_comm": "new", "child_pid": 23},
        switch(40, 1, "S", 23),
    )

    events = events_of(frames)
    assert [e["next_start_boot_ns"] for e in events if e["event"] == "sched_switch"] == [1, 0, 30]
    rows = [(r["reason"], r["start_boot_ns"], r["comm"]) for r in rows_of(frames, "tasks/1") if r["tid"] == 23]
    assert rows == [("snapshot", 1, "t23"), ("fork", 30, "new"), ("rename", 30, "t23")]


def test_the_same_last_switch_twice_is_one_life(import_json):
    frames, _ = import_json(switch(10, 1, "S", 23), switch(20, 23, "X", 1), switch(20, 23, "X", 1))

    assert {r["start_boot_ns"] for r in rows_of(frames, "tasks/1") if r["tid"] == 23} == {0}


def test_sixty_four_is_dead_for_a_task_that_exits_and_parked_for_others(import_json):
    exiting = {"time_ns": 15, "cpu": 0, "kind": "sched_process_exit", "comm": "t7", "pid": 7}

    frames, _ = import_json(switch(10, 1, "S", 7), exiting, switch(20, 7, 64, 8), switch(30, 8, 64, 9))

    states = [e["prev_state"] for e in events_of(frames) if e["event"] == "sched_switch"]
    assert states == [1, STATE_DEAD, 0x40]


def test_priorities_of_lttng_are_told_by_the_idle_tasks(import_json):
    lttng = switch(10, 0, 0, 7) | {"prev_prio": 20, "next_prio": -50}

    frames, _ = import_json(lttng)

    assert [(e["prev_prio"], e["next_prio"], e["next_policy"]) for e in events_of(frames)] == [(120, 50, 1)]


def test_lttng_names_threads_tid_and_processes_pid(import_json):
    fork = {"time_ns": 25, "cpu": 1, "kind": "sched_process_fork", "parent_tid": 20, "parent_pid": 20, "child_tid": 21}

    frames, _ = import_json(fork | {"child_pid": 20, "child_comm": "proc20"})

    assert [(r["tid"], r["tgid"], r["parent_tid"]) for r in rows_of(frames, "tasks/1")] == [(20, 20, None), (21, 20, 20)]


def test_a_trace_without_waking_has_its_wakeups_as_evidence(import_json):
    frames, report = import_json(switch(10, 1, "S", 2), waking(20, 1) | {"kind": "sched_wakeup", "success": 1})

    assert [e["event"] for e in events_of(frames)] == ["sched_switch", "sched_waking", "sched_wakeup"]
    assert "sched_wakeup taken as the wake-up, for want of sched_waking" in report.notes


def test_a_wakeup_that_woke_nobody_is_left_out(import_json):
    frames, _ = import_json(switch(10, 1, "S", 2), waking(20, 1) | {"kind": "sched_wakeup", "success": 0})

    assert [e["event"] for e in events_of(frames)] == ["sched_switch"]


def test_several_nodes_become_recordings_of_their_own(import_json):
    frames, report = import_json(
        switch(10, 1, "S", 2, node="a"), switch(10, 1, "S", 2, node="b"), switch(20, 2, "S", 1, node="a")
    )

    assert report.nodes == ["a", "b"]
    assert [(f.node, f.kind, f.number) for f in frames] == [
        ("a", "session/1", 0),
        ("a", "tasks/1", 1),
        ("a", "events/1", 2),
        ("b", "session/1", 0),
        ("b", "tasks/1", 1),
        ("b", "events/1", 2),
    ]
    assert len({f.boot_id for f in frames}) == 2
    assert [f.decode(f.encode()).batch.num_rows for f in frames if f.kind == "events/1"] == [2, 1]


def test_the_same_file_gives_the_same_frames(import_json):
    lines = [switch(10, 1, "S", 2), waking(20, 1), switch(30, 2, "R+", 1)]

    first, second = (b"".join(f.encode() for f in import_json(*lines)[0]) for _ in range(2))

    assert first == second


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("garbage\n", "line 2: not JSON"),
        ("[1]\n", "line 2: unusable: a list, not an object"),
        ({"cpu": 0, "kind": "sched_switch"}, "line 2: unusable: time_ns is None, not an integer"),
        ({"time_ns": -1, "cpu": 0, "kind": "sched_switch"}, "time_ns is -1, outside"),
        ({"time_ns": 1 << 63, "cpu": 0, "kind": "sched_switch"}, "outside 0"),
        ({"time_ns": 1, "cpu": "zero", "kind": "sched_switch"}, "cpu is 'zero'"),
        ({"time_ns": 1, "cpu": 0}, "kind is None"),
        ({"time_ns": 1, "cpu": 0, "kind": "sched_switch", "node": 7}, "node is 7"),
        (
            {"time_ns": 1, "cpu": 0, "kind": "sched_switch", "prev_pid": 1, "next_pid": 2},
            "sched_switch: field prev_state is missing",
        ),
        (switch(1, 1, "Q", 2), "prev_state 'Q' is not made of"),
        (switch(1, [], "S", 2), "prev_pid is [], not a number"),
        (waking(1, 7) | {"prio": {}}, "prio is {}, not a number"),
    ],
)
def test_a_bad_line_is_counted_with_its_number_and_its_neighbours_live(import_json, line, message):
    frames, report = import_json(switch(10, 1, "S", 2), line, switch(20, 2, "S", 1))

    assert [e["time_mono_ns"] for e in events_of(frames)] == [10, 20]
    assert sum(report.skipped.values()) == 1
    assert message in report.messages[0]


def test_unknown_kinds_are_counted(import_json):
    _, report = import_json(switch(10, 1, "S", 2), *({"time_ns": 1, "cpu": 0, "kind": "frobnicate"} for _ in range(23)))

    assert report.unknown_kinds == Counter(frobnicate=23)


def test_a_file_without_any_event_is_refused(import_json, tmp_path):
    with pytest.raises(InputError, match=r"holds no event .* line 1: not JSON"):
        import_json("garbage\n")
    with pytest.raises(InputError, match="it is empty"):
        import_json("")
    with pytest.raises(InputError, match="cannot read trace"):
        import_trace(str(tmp_path / "absent"), "jsonl")
    with pytest.raises(InputError, match="'etl' is unknown"):
        import_trace(str(tmp_path / "absent"), "etl")


def test_every_kind_takes_its_own_field_names(import_json):
    """Whatever our catalogue names, a neutral line may give; no field is lost or moved."""
    special = {"comm_lo", "comm_hi", "name_lo", "name_hi", "tid", "tgid", "start_boot_ns", "prev_state"}
    for kind in BY_NAME.values():
        if kind.name in ("sched_switch", "sched_process_exec", "sched_process_exit", "sys_enter_futex"):
            continue
        fields = {f: at + 3 for at, f in enumerate(kind.fields) if f not in special and kind.fields[f].bits > 4}

        frames, report = import_json({"time_ns": 1, "cpu": 0, "kind": kind.name, "pid": 23, "child_pid": 24, **fields})

        got = [e for e in events_of(frames) if e["event"] == kind.name]
        assert len(got) == 1, (kind.name, report.messages)
        assert {f: got[0][f] for f in fields} == fields, kind.name


def test_futex_calls_name_their_word(import_json):
    line = {
        "time_ns": 1,
        "cpu": 0,
        "kind": "sys_enter",
        "id": NUMBERS["futex"],
        "args": ["0x7f10", 128, 2, 0, 0, 0],
        "common_pid": 9,
    }
    single = {"time_ns": 2, "cpu": 0, "kind": "sys_enter_futex", "uaddr": "0x7f10", "op": 129, "val": 1, "common_pid": 9}

    frames, _ = import_json(line, single)

    assert [(e["event"], e["uaddr"], e["op"], e["val"]) for e in events_of(frames)] == [
        ("sys_enter_futex", 0x7F10, 128, 2),
        ("sys_enter_futex", 0x7F10, 129, 1),
    ]


@pytest.mark.parametrize(
    ("event", "text", "expected"),
    [
        (
            "sched_switch",
            "prev_comm=a ==> b prev_pid=7 prev_prio=120 prev_state=D|W ==> next_comm=c d next_pid=8 next_prio=99",
            {"prev_comm": "a ==> b", "prev_state": "D|W", "next_comm": "c d", "next_pid": "8"},
        ),
        (
            "sched_switch",
            "my:app:7 [120] R+ ==> swapper/1:0 [120]",
            {"prev_comm": "my:app", "prev_pid": "7", "prev_state": "R+", "next_pid": "0"},
        ),
        (
            "sched_switch",
            "task bash:7 [120] (S) ==> swapper:0 [140]",
            {"prev_comm": "bash", "prev_state": "S", "next_pid": "0"},
        ),
        ("sched_waking", "comm=a pid=b pid=7 prio=120 target_cpu=003", {"comm": "a pid=b", "pid": "7", "target_cpu": "003"}),
        (
            "sched_wakeup",
            "my app:7 [120] success=1 CPU:002",
            {"comm": "my app", "pid": "7", "success": "1", "target_cpu": "002"},
        ),
        ("sched_wakeup", "task x:7 [120] success=1 [001]", {"comm": "x", "pid": "7", "target_cpu": "001"}),
        (
            "sched_process_fork",
            "comm=a pid=1 pid=7 child_comm=b child_pid=8",
            {"comm": "a pid=1", "pid": "7", "child_pid": "8"},
        ),
        ("sys_enter", "NR 202 (10, ffff, 0)", {"id": "202", "args": ["0x10", "0xffff", "0x0"]}),
        ("sys_exit", "NR 0 = -11", {"id": "0", "ret": "-11"}),
        (
            "block_rq_issue",
            "254,0 RM 4096 () 12565296 + 8 be,0,4 [my app-1 [x]]",
            {"dev": "254,0", "bytes": "4096", "rwbs": "RM"},
        ),
        ("block_rq_complete", "8,0 WS () 100 + 8 [-5]", {"sector": "100", "nr_sector": "8", "error": "-5"}),
        ("contention_begin", "00000000a1f65254 (flags=WRITE|MUTEX)", {"lock_addr": "00000000a1f65254", "flags": 36}),
        ("irq_handler_entry", "irq=42 name=virtio3-tx", {"irq": "42", "name": "virtio3-tx"}),
        ("softirq_entry", "vec=1 [action=TIMER]", {"vec": "1"}),
        ("jbd2_start_commit", "dev 254,0 transaction 77 sync 0", {"dev": "254,0", "transaction": "77"}),
    ],
)
def test_the_arguments_of_ftrace_text(event, text, expected):
    got = parse_arguments(event, text)

    assert {name: got.get(name) for name in expected} == expected


LINES = [
    (
        "    my app-1 [x]-12561   (  12561) [000] dNh3.  2262.021103: sched_waking: comm=a pid=69 prio=110 target_cpu=000",
        ("sched_waking", 0, 12561, 2_262_021_103_000, FLAG_HARDIRQ),
    ),
    (
        "          <idle>-0       [001] ..s2.  1.000000001: sched_waking: comm=a pid=69 prio=110 target_cpu=000",
        ("sched_waking", 1, 0, 1_000_000_001, FLAG_SOFTIRQ),
    ),
    (
        "          <idle>-0     [003]  6.002188: sched_waking: comm=a pid=69 prio=110 target_cpu=000",
        ("sched_waking", 3, 0, 6_002_188_000, 0),
    ),
    (
        "kworker/u16:1-77    (-------) [004] d.H.   316.196720: sched_waking: comm=a pid=69 prio=110 target_cpu=000",
        ("sched_waking", 4, 77, 316_196_720_000, FLAG_HARDIRQ | FLAG_SOFTIRQ),
    ),
    (
        "inst:     my app-1 [x]-12680 [000]  2289.149067391: sys_enter:            NR 3 (3, 0, 0, 7faa27035630, 0, 0)",
        ("sys_enter", 0, 12680, 2_289_149_067_391, 0),
    ),
    (
        "  <idle>-0         1d.h3.   12us+: sched_waking: comm=a pid=69 prio=110 target_cpu=000",
        ("sched_waking", 1, 0, 12_000, FLAG_HARDIRQ),
    ),
    (
        "            true-12602   (  12602) [001] .....  2262.034112: sys_read(fd: 3, buf: 0x7ffedafc2648, count: 0x340)",
        ("sys_enter", 1, 12602, 2_262_034_112_000, 0),
    ),
    (
        "            true-12602   (  12602) [001] .....  2262.034115: sys_read -> 0x340",
        ("sys_exit", 1, 12602, 2_262_034_115_000, 0),
    ),
    (
        "            bash-7 [001] d..2 123456789: sched:sched_waking: comm=a pid=69 prio=110 target_cpu=000",
        ("sched_waking", 1, 7, 123_456_789, 0),
    ),
]


@pytest.mark.parametrize(("line", "expected"), LINES, ids=range(len(LINES)))
def test_the_columns_of_ftrace_text_old_and_new(import_text, line, expected):
    frames, _ = import_text(line + "\n")

    event = events_of(frames)[0]
    assert (event["event"], event["cpu"], event["current"], event["time_mono_ns"], event["flags"] & ~1) == expected


@pytest.mark.parametrize(
    ("note", "count", "seqs"),
    [("CPU:1 [LOST 23 EVENTS]", 23, [0, 24]), ("CPU:1 [23 EVENTS DROPPED]", 23, [0, 24]), ("CPU:1 [LOST EVENTS]", 0, [0, 1])],
)
def test_a_note_about_lost_events_is_a_loss_at_its_place(import_text, note, count, seqs):
    line = "  a-7 [001] d..2  {}.000000: sched_waking: comm=b pid=8 prio=120 target_cpu=000\n"

    frames, report = import_text(line.format(1) + note + "\n" + line.format(2))

    assert [e["seq"] for e in events_of(frames)] == seqs
    (loss,) = rows_of(frames, "losses/1")
    assert (loss["cpu"], loss["from_mono_ns"], loss["to_mono_ns"], loss["count"]) == (1, 10**9, 2 * 10**9, count)
    assert (report.losses, report.lost_events) == (1, count)


def test_lines_that_are_no_event_are_counted_by_reason(import_text):
    event = "  a-7 [001] d..2  1.000000: sched_waking: comm=b pid=8 prio=120 target_cpu=000\n"

    _, report = import_text(
        "# tracer: nop\n#\ncpus=2\n" + event + "  a-7 [001] d..2  1.5: do_idle <-cpu_startup_entry\nhello\n"
    )

    assert report.skipped == Counter({"function trace": 1, "not an event": 1})


@pytest.mark.parametrize("name", ["tracefs.txt", "trace-cmd-instance.txt"])
def test_recorded_traces_come_in_whole(name):
    lines = (TRACES / name).read_text().splitlines()
    told = sum(1 for line in lines if "sched_switch:" in line)

    frames, report = import_trace(str(TRACES / name), "ftrace-text")

    events = events_of(frames)
    assert report.skipped == Counter()
    assert sum(1 for e in events if e["event"] == "sched_switch") == told > 10
    assert {r["comm"] for r in rows_of(frames, "tasks/1")} >= {"my app-1 [x]", "true"}
    for cpu in (0, 1):
        times = [e["time_mono_ns"] for e in events if e["cpu"] == cpu]
        assert times == sorted(times)
        assert [e["seq"] for e in events if e["cpu"] == cpu] == list(range(len(times)))


@pytest.mark.kernel
def test_a_trace_recorded_here_and_now_agrees_with_tracefs_own_counts(tmp_path):
    """Our own threads only, in our own instance; tracefs counts what it wrote."""
    instance = Path(f"/sys/kernel/tracing/instances/kprobe-test-{os.getpid()}")
    instance.mkdir()
    try:
        for name, value in (
            ("tracing_on", "0"),
            ("trace_clock", "mono"),
            ("options/event-fork", "1"),
            ("set_event_pid", str(os.getpid())),
        ):
            (instance / name).write_text(value)
        for event in ("sched_switch", "sched_waking", "sched_process_fork", "sched_process_exit"):
            (instance / f"events/sched/{event}/enable").write_text("1")
        (instance / "tracing_on").write_text("1")
        start_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        naps = [threading.Thread(target=time.sleep, args=(0.001,)) for _ in range(23)]
        for nap in naps:
            nap.start()
            nap.join()
        end_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        (instance / "tracing_on").write_text("0")
        text = (instance / "trace").read_text()
    finally:
        instance.rmdir()
    (tmp_path / "trace").write_text(text)
    written = int(text.split("entries-in-buffer/entries-written: ")[1].split("/")[0])

    frames, report = import_trace(str(tmp_path / "trace"), "ftrace-text")

    assert report.events == written
    counts = Counter(e["event"] for e in events_of(frames))
    assert counts["sched_process_fork"] == 23
    times = np.array([e["time_mono_ns"] for e in events_of(frames)])
    assert start_ns - 1_000_000 < times.min() < times.max() < end_ns + 1_000_000


def test_frames_survive_the_journey():
    frames, _ = import_trace(str(TRACES / "tracefs.txt"), "ftrace-text")

    assert [Frame.decode(f.encode()).batch.equals(f.batch) for f in frames] == [True] * len(frames)


def test_a_thread_id_that_is_none_costs_its_line_and_no_more(tmp_path):
    path = tmp_path / "trace.txt"
    line = "  x-5 [000] d..2. 1.00000{}: sched_switch: prev_comm=x prev_pid=5 prev_prio=120 prev_state=S ==> next_comm=y "
    line += "next_pid={} next_prio=120\n"
    path.write_text(line.format(1, 7) + line.format(2, -1) + line.format(3, 2**32 + 1))
    frames, report = import_trace(str(path), "ftrace-text")
    assert frames
    assert report.events == 1
    assert report.skipped["unusable"] == 2
