"""The commands that ask the stores, run as a user runs them, against real servers."""

import hashlib
import json
import subprocess
import sys
import uuid
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Consumer, TopicPartition

from sinks.clickhouse import ClickHouseStore
from sinks.graph import GraphStore
from sinks.topics import TopicWriter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "sinks"))

import samples  # noqa: E402

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def own(stack):
    """A database with three verdicts and one operation that nobody has judged."""
    own = stack.with_database(f"t_{uuid.uuid4().hex[:12]}")
    store = ClickHouseStore(own.settings.clickhouse)
    store.migrate()
    incomplete = {"lost_events": 7, "unknown_ns": 5, "lost_ns": 3, "missing": ["block"], "complete": False}
    store.insert_verdicts([samples.verdict(4821), samples.verdict(1, status="ok"), samples.verdict(2, completeness=incomplete)])
    store.insert_operations([{"operation_id": "4", "type": "order", "tid": 1, "start_mono_ns": 1, "end_mono_ns": 8}])
    yield own
    store.client.execute(f"DROP DATABASE {own.settings.clickhouse.database} SYNC", database="")
    store.close()


@pytest.fixture
def kprobe(own):
    """Run the command line to its end."""

    def run(*arguments):
        command = [sys.executable, "-m", "cli.main", *arguments]
        return subprocess.run(command, env=own.environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)

    return run


def test_why_prints_the_sentence_the_ledger_and_the_cause(kprobe):
    done = kprobe("why", "4821")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("settlement 4821 ledger write took 812.4 ms (deadline 750 ms)")
    assert "cause 1: cpu_preempted by batch-recon (pid 4721), 790.1 ms, exact; without it 22.3 ms" in done.stdout
    assert "\x1b" not in done.stdout


def test_why_as_json_is_what_was_stored_so_that_its_hash_checks(kprobe):
    done = kprobe("why", "4821", "--json")

    assert done.stdout.encode() == orjson.dumps(samples.verdict(4821)) + b"\n"
    body = json.loads(done.stdout)
    digest = body.pop("hash")
    assert digest == "sha256:" + hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def test_the_exit_status_says_what_the_answer_is_worth(kprobe):
    incomplete, unknown, pending = kprobe("why", "2"), kprobe("why", "nobody"), kprobe("why", "4")

    assert incomplete.returncode == 3
    assert "evidence incomplete: lost events 7" in incomplete.stdout
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "no operation 'nobody' is known" in unknown.stderr
    assert pending.returncode == 2
    assert "not judged yet" in pending.stderr


def test_listings_hold_what_they_should_in_every_form(kprobe):
    table, document, lines = kprobe("operations"), kprobe("operations", "--json"), kprobe("operations", "--jsonl")

    listed = json.loads(document.stdout)["operations"]
    assert {r["operation_id"]: r["status"] for r in listed} == {"4821": "late", "2": "late", "1": "ok", "4": "pending"}
    assert [json.loads(line) for line in lines.stdout.splitlines()] == listed
    assert [line.split()[0] for line in table.stdout.splitlines()] == ["OPERATION", *(r["operation_id"] for r in listed)]
    incidents = json.loads(kprobe("incidents", "--json").stdout)["incidents"]
    assert [r["operation_id"] for r in incidents] == ["4821", "2"]
    wrong = kprobe("operations", "--status", "bad")
    assert (wrong.returncode, "is not one of ok, late" in wrong.stderr) == (2, True)


def test_victims_are_listed_by_culprit(kprobe):
    found = json.loads(kprobe("victims", "--culprit", "comm:batch-*", "--json").stdout)["victims"]

    assert [(r["operation_id"], r["hurt_ns"]) for r in found] == [("2", 790_100_000), ("4821", 790_100_000)]
    assert kprobe("victims", "--culprit", "batch").returncode == 2


def test_the_graph_of_an_operation_in_every_format(kprobe, own):
    document = json.loads(kprobe("graph", "4821", "--format", "json").stdout)
    assert [n["comm"] for n in document["nodes"]] == ["batch-recon", "ledgerd"]
    assert [(e["edge"], e["ns"]) for e in document["edges"]] == [("preempted", 790_100_000)]

    dot = kprobe("graph", "4821", "--format", "dot").stdout
    assert dot.startswith('digraph "4821" {')
    assert '[label="preempted 790.1 ms"]' in dot

    graph = GraphStore(own.settings.neo4j)
    graph.migrate()
    graph.clear()
    for _ in range(2):
        for statement in kprobe("graph", "4821", "--format", "cypher").stdout.splitlines():
            graph.query(statement.removesuffix(";"))
    assert graph.counts() == {"Operation": 1, "Task": 2, "CAUSED": 1}
    graph.clear()
    graph.close()


def test_rebuild_makes_the_graph_from_the_history(kprobe, own):
    graph = GraphStore(own.settings.neo4j)
    graph.migrate()
    graph.write([samples.verdict(99)], [])  # nothing that the history knows: it must go

    for _ in range(2):
        done = kprobe("rebuild", "--json")

        assert json.loads(done.stdout)["verdicts"] == 3
        assert graph.counts() == {"Operation": 3, "Task": 2, "RAN_ON": 3, "DELAYED": 2, "CAUSED": 2}
    graph.clear()
    graph.close()


def test_migrate_can_be_repeated(kprobe):
    kprobe("migrate")

    done = kprobe("migrate", "--json")

    assert json.loads(done.stdout) == {"schema": "kprobe.migrate/1", "clickhouse": [], "neo4j": [], "topics": []}


def test_tail_shows_messages_as_they_are(kprobe, own):
    writer = TopicWriter(own.settings.kafka)
    number = uuid.uuid4().int % 10**6
    verdict = samples.verdict(number)
    writer.send("kprobe.verdicts.v1", str(number), orjson.dumps(verdict))
    writer.flush()

    everything = str(_messages_of("kprobe.verdicts.v1", own))  # the topic is shared: others may have judged before
    raw = kprobe("tail", "verdicts", "--from-start", "--limit", everything, "--jsonl")
    text = kprobe("tail", "verdicts", "--from-start", "--limit", everything)

    assert raw.stdout.encode().splitlines().count(orjson.dumps(verdict)) == 1
    assert text.stdout.splitlines().count(f"{number}  late  {verdict['sentence']}") == 1


def _messages_of(topic, own):
    """How many messages the partitions of a topic hold."""
    consumer = Consumer({"bootstrap.servers": own.kafka, "group.id": f"t-{uuid.uuid4().hex}"})
    try:
        parts = [TopicPartition(topic, p) for p in consumer.list_topics(topic, timeout=10).topics[topic].partitions]
        return sum(high - low for low, high in (consumer.get_watermark_offsets(p, timeout=10) for p in parts))
    finally:
        consumer.close()
