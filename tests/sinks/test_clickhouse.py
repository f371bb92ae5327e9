"""The history on a real ClickHouse engine: what is written twice is there once, what is read is what was written."""

import hashlib
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orjson
import pytest
import samples

from events.errors import InputError, StoreError
from events.frames import Clocks
from events.records import EVENTS, columns_from_arrow, columns_to_arrow
from events.settings import ClickHouseSettings
from sinks import schema
from sinks.clickhouse import ClickHouseStore
from sinks.documents import CulpritSelector

pytestmark = pytest.mark.servers
WHERE = {"node": "node-1", "boot_id": samples.BOOT}
ALL = ("node-1", samples.BOOT, 0, 2**62)


def in_order(columns):
    """Columns sorted as `events` returns them."""
    order = np.lexsort((columns["seq"], columns["cpu"]))
    return {name: values[order] for name, values in columns.items()}


def assert_holds(history, columns):
    """Exactly these events are stored, every field of every one."""
    got, expected = columns_from_arrow(history.events(*ALL)), in_order(columns)
    for name in EVENTS.names:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_events_come_back_bit_for_bit(history):
    columns = samples.event_columns(10007, seed=1)

    history.insert_events(columns, **WHERE, token="raw-0-0-9")

    assert_holds(history, columns)
    batch = history.events(*ALL)
    assert batch.schema.equals(EVENTS)
    assert history.events("node-2", samples.BOOT, 0, 2**62).num_rows == 0


def test_a_window_and_a_choice_of_cpus_are_read_alone(history):
    columns = in_order(samples.event_columns(10007, seed=2, cpus=3))
    history.insert_events(columns_to_arrow(columns), **WHERE, token="t")
    begin, end = (int(x) for x in np.quantile(columns["time_mono_ns"], [0.25, 0.5]))
    inside = (columns["time_mono_ns"] >= begin) & (columns["time_mono_ns"] < end)

    window = history.events("node-1", samples.BOOT, begin, end)
    cpu = history.events("node-1", samples.BOOT, begin, end, cpus=[1])

    np.testing.assert_array_equal(window.column("seq").to_numpy(), columns["seq"][inside])
    np.testing.assert_array_equal(cpu.column("seq").to_numpy(), columns["seq"][inside & (columns["cpu"] == 1)])


def test_a_batch_with_a_known_token_is_dropped(history):
    columns = samples.event_columns(1009, seed=3)

    for _ in range(3):
        history.insert_events(columns, **WHERE, token="raw-1-10-19")

    assert history.client.rows("SELECT count() AS n FROM kernel_events")[0]["n"] == 1009


@pytest.mark.parametrize("seed", range(3))
def test_batches_cut_otherwise_after_a_crash_give_the_same_rows(history, seed):
    """Any cuts, any order, any repeats: the key of a row names the event."""
    columns = samples.event_columns(4001, seed=seed)
    random = np.random.default_rng(seed)
    for attempt in range(3):
        cuts = [0, *sorted(random.integers(0, 4001, 5)), 4001]
        pieces = list(itertools.pairwise(cuts))
        random.shuffle(pieces)
        for begin, end in pieces:
            part = {name: values[begin:end] for name, values in columns.items()}
            history.insert_events(part, **WHERE, token=f"{seed}-{attempt}-{begin}-{end}")

    assert_holds(history, columns)
    history.client.execute("OPTIMIZE TABLE kernel_events FINAL")
    assert history.client.rows("SELECT count() AS n FROM kernel_events")[0]["n"] == 4001


def test_a_row_that_is_twice_in_one_batch_is_read_once(history):
    columns = samples.event_columns(1009, seed=6)
    twice = {name: np.concatenate([values, values]) for name, values in columns.items()}

    history.insert_events(twice, **WHERE, token="t")

    assert_holds(history, columns)


def test_events_are_dated_by_the_clocks_of_their_frame(history):
    clocks = Clocks(mono_ns=5, boot_ns=5, real_ns=1_700_000_000 * 10**9)

    history.insert_events(samples.event_columns(3, seed=4), **WHERE, token="x", clocks=clocks)

    # Older than the retention: it may be dropped at once, by whole days, and is dated by its own clock until then.
    days = {row["day"] for row in history.client.rows("SELECT DISTINCT toString(day) AS day FROM kernel_events")}
    assert days <= {"2023-11-14"}


def test_tasks_and_losses_keep_their_nulls_and_are_there_once(history):
    tasks = [
        {"time_mono_ns": 5, "reason": "fork", "tid": 7, "tgid": 7, "start_boot_ns": 3, "comm": "ledgerd", "kthread": False},
        {"time_mono_ns": 6, "reason": "exit", "tid": 7, "start_boot_ns": 3, "exit_code": -9},
    ]
    losses = [
        {
            "cpu": 0,
            "reason": "ring_full",
            "hop": "ring",
            "from_mono_ns": 1,
            "to_mono_ns": 5,
            "first_seq": 1,
            "last_seq": 4,
            "count": 4,
        },
        {"reason": "shed", "hop": "probe", "family": "net", "from_mono_ns": 1, "to_mono_ns": 5, "count": 0},
    ]
    for token in ("a", "a", "b"):
        history.insert_tasks(samples.task_rows(*tasks), **WHERE, token=token)
        history.insert_losses(samples.loss_rows(*losses), **WHERE, token=token)

    rows = history.tasks("node-1", samples.BOOT, 100).to_pylist()
    assert [{k: v for k, v in row.items() if v is not None} for row in rows] == tasks
    lost = history.losses("node-1", samples.BOOT, 100).to_pylist()
    assert [{k: v for k, v in row.items() if v is not None} for row in lost] == losses
    assert history.tasks("node-1", samples.BOOT, 6).num_rows == 1


def test_a_verdict_is_kept_byte_for_byte(history):
    verdict = samples.verdict(4821, sentence='quotes " and \\ and \n and é and \u2028 and 😀')
    strange = orjson.dumps(samples.verdict(4822), option=orjson.OPT_INDENT_2)

    history.insert_verdicts([verdict, strange])

    stored = orjson.loads(history.verdict("4821"))
    body = {k: v for k, v in stored.items() if k != "hash"}
    assert stored["hash"] == "sha256:" + hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()
    assert history.verdict("4821") == orjson.dumps(verdict)
    assert history.verdict("4822") == strange
    assert history.verdict("nobody") is None


def test_a_verdict_is_one_read(history):
    history.insert_verdicts([samples.verdict(1)])
    before = history.client.queries

    history.verdict("1")

    assert history.client.queries - before == 1


def test_sending_everything_twice_gives_the_same_tables(history):
    verdicts = [samples.verdict(n) for n in range(23)]
    operations = [
        {k: v[k] for k in ("operation_id", "type", "start_mono_ns", "end_mono_ns", "deadline_ns", "node")} for v in verdicts
    ]
    operations = [{**o, "tid": 812, "outcome": "ok", "amount": "17"} for o in operations]

    def everything():
        rows = history.client.rows
        tables = [
            rows(f"SELECT * EXCEPT seen_at FROM {t} FINAL ORDER BY ALL") for t in ("operations", "verdicts", "causal_edges")
        ]
        return tables, history.operations(), history.victims(CulpritSelector("comm:batch*"))

    def send():
        history.insert_operations(operations)
        history.insert_verdicts(verdicts)
        history.insert_edges([e for v in verdicts for e in samples.edges(v)])

    send()
    once = everything()
    send()

    assert everything() == once
    assert [len(t) for t in once[0]] == [23, 23, 23]


def test_a_corrected_verdict_replaces_the_first_one(history):
    history.insert_verdicts([samples.verdict(9, status="ok")])
    history.insert_verdicts([samples.verdict(9, status="late")])

    assert history.verdict("9") == orjson.dumps(samples.verdict(9, status="late"))
    assert [row["status"] for row in history.operations()] == ["late"]


def test_operations_are_listed_with_what_is_known_about_them(history):
    history.insert_verdicts(
        [samples.verdict(1, status="ok"), samples.verdict(2), samples.verdict(3, status="failed", node="node-2")]
    )
    history.insert_operations([{"operation_id": "4", "type": "order", "tid": 1, "start_mono_ns": 1, "end_mono_ns": 8}])

    listed = {row["operation_id"]: row for row in history.operations()}

    assert {k: v["status"] for k, v in listed.items()} == {"1": "ok", "2": "late", "3": "failed", "4": "pending"}
    assert (listed["4"]["duration_ns"], listed["4"]["type"], listed["2"]["cause"]) == (7, "order", "cpu_preempted")
    assert [r["operation_id"] for r in history.operations(statuses=["late", "failed"])] == ["3", "2"]
    assert [r["operation_id"] for r in history.operations(node="node-2")] == ["3"]
    assert [r["operation_id"] for r in history.operations(kind="order")] == ["4"]
    assert len(history.operations(limit=2)) == 2


SELECTORS = [
    ("comm:batch-*", {"1", "2"}),
    ("comm:batch-recon", {"1"}),
    ("comm:*[", set()),
    ("pid:200", {"2"}),
    ("pid:201", {"2"}),
    ("cgroup:/batch", {"1"}),
    ("cgroup:/batch/night", {"1"}),
    ("cgroup:/bat", set()),
    ("container:abc", {"3"}),
]


@pytest.mark.parametrize(("selector", "expected"), SELECTORS, ids=[s for s, _ in SELECTORS])
def test_victims_are_found_by_their_culprit(history, selector, expected):
    culprits = [
        samples.task(100, "batch-recon", cgroup="/batch/night"),
        samples.task(201, "batch-report", tgid=200, cgroup="/reports"),
        samples.task(300, "java", cgroup="/x", container="abcdef"),
    ]
    history.insert_verdicts([samples.verdict(i + 1, culprit=c) for i, c in enumerate(culprits)])

    found = history.victims(CulpritSelector(selector))

    assert {row["operation_id"] for row in found} == expected
    assert all(row["hurt_ns"] == 790_100_000 for row in found)


@pytest.mark.parametrize("text", ["batch", "comm:", "pid:x", "port:80", ""])
def test_a_selector_that_is_none_is_an_input_error(text):
    with pytest.raises(InputError, match="is not one of comm:GLOB, pid:N, cgroup:PATH, container:ID"):
        CulpritSelector(text)


def test_migrations_are_applied_once_and_by_two_at_once(own):
    store = ClickHouseStore(own.settings.clickhouse)
    with ThreadPoolExecutor(4) as pool:
        stores = [ClickHouseStore(own.settings.clickhouse) for _ in range(4)]
        done = list(pool.map(lambda s: s.migrate(), stores))

    assert all(versions in ([], [1]) for versions in done)
    assert store.migrate() == []
    assert store.client.rows("SELECT version, title FROM migrations FINAL") == [{"version": 1, "title": "tables"}]
    for each in (*stores, store):
        each.close()


def test_a_schema_moves_forward_and_never_back(own, tmp_path, monkeypatch):
    """From version 1 with rows in it to version 2, again, and back to a kprobe that knows only version 1."""
    folder = tmp_path / "migrations"
    shutil.copytree(Path(schema.__file__).with_name("migrations"), folder)
    store = ClickHouseStore(own.settings.clickhouse)
    store.migrate()
    store.insert_verdicts([samples.verdict(1)])
    newer = folder / "clickhouse_0002_note.sql"
    newer.write_text("-- adds; a column\nALTER TABLE verdicts ADD COLUMN IF NOT EXISTS note String DEFAULT 'none';\n")

    with monkeypatch.context() as patch:
        patch.setattr("sinks.clickhouse.migrations_of", lambda name: schema.migrations_of(name, folder))
        assert store.migrate() == [2]
        assert store.migrate() == []
        assert store.client.rows("SELECT operation_id, note FROM verdicts") == [{"operation_id": "1", "note": "none"}]
        newer.write_text("ALTER TABLE verdicts ADD COLUMN IF NOT EXISTS other String;\n")
        with pytest.raises(StoreError, match=r"migration 2 \(note\) is not the one that was applied there"):
            store.migrate()

    with pytest.raises(StoreError, match="has schema version 2, this kprobe knows up to 1"):
        store.migrate()
    store.close()


def test_retention_is_a_setting_and_can_be_changed(own):
    def drops_after():
        rows = store.client.rows("SELECT name, create_table_query AS q FROM system.tables WHERE database = currentDatabase()")
        return {r["name"]: r["q"].partition("toIntervalDay(")[2].partition(")")[0] for r in rows if "toIntervalDay" in r["q"]}

    for days in (14, 3):
        store = ClickHouseStore(own.settings.clickhouse.model_copy(update={"retention_days": days}))
        store.migrate()
        assert drops_after() == dict.fromkeys(("kernel_events", "tasks", "losses"), str(days))
        store.close()


def test_errors_name_the_address_and_the_remedy(own, stack):
    def error_of(**changes):
        store = ClickHouseStore(own.settings.clickhouse.model_copy(update=changes), retry_limit_s=0.0)
        with pytest.raises(StoreError) as caught:
            store.verdict("1")
        store.close()
        return str(caught.value)

    assert "kprobe migrate" in error_of()
    assert "KPROBE_CLICKHOUSE__PASSWORD" in error_of(password="wrong")
    away = error_of(url="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 is unreachable" in away
    assert "kprobe up" in away
    with pytest.raises(InputError, match="not a name"):
        ClickHouseStore(ClickHouseSettings(database="x; DROP"))
