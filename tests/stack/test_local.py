"""`kprobe up`, `status`, `down`: real servers through their whole life, and everything that can be wrong before they start."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
from stack_fixture import StackUnderTest, stack_settings

from events.errors import StoreError
from stack import jars
from stack.local import LocalStack
from stack.servers import Kafka

ROOT = Path(__file__).resolve().parents[2]


def kprobe(under_test, *arguments, **options):
    """Run the command line to its end."""
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(
        command, env=under_test.environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180, **options
    )


def wait_until(condition, what, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


def clickhouse(under_test, query):
    return urllib.request.urlopen(under_test.clickhouse_url, query.encode(), timeout=30).read().decode()


def store_something(under_test, number):
    """One row, one message, one node; each survives what comes if `stored` finds them."""
    from confluent_kafka import Producer

    clickhouse(under_test, "CREATE TABLE IF NOT EXISTS kept (n UInt32) ENGINE = MergeTree ORDER BY n")
    clickhouse(under_test, f"INSERT INTO kept VALUES ({number})")
    producer = Producer({"bootstrap.servers": under_test.kafka, "acks": "all", "log_level": 0})
    producer.produce("kprobe.verdicts.v1", str(number).encode(), partition=0)
    assert producer.flush(30) == 0
    graph(under_test, "CREATE (:Kept {n: $n})", n=number)


def stored(under_test):
    from confluent_kafka import Consumer, TopicPartition

    rows = clickhouse(under_test, "SELECT groupArray(n) FROM (SELECT n FROM kept ORDER BY n)").strip()
    consumer = Consumer({"bootstrap.servers": under_test.kafka, "group.id": "t", "log_level": 0})
    _, end = consumer.get_watermark_offsets(TopicPartition("kprobe.verdicts.v1", 0), timeout=30)
    consumer.close()
    nodes = graph(under_test, "MATCH (k:Kept) RETURN k.n AS n ORDER BY n")
    return json.loads(rows), end, [r["n"] for r in nodes]


def graph(under_test, query, **parameters):
    import neo4j

    with neo4j.GraphDatabase.driver(under_test.bolt_uri, auth=None) as driver:
        return driver.execute_query(query, parameters).records


@pytest.mark.servers
@pytest.mark.slow
def test_the_servers_keep_their_data_whatever_ends_them(tmp_path):
    """Foreground start, a killed server restarted, a clean stop, a detached start, all killed, recovered, stopped."""
    under_test = StackUnderTest(stack_settings(tmp_path / "servers"))
    servers = LocalStack(under_test.settings.stack)
    log = (tmp_path / "up.log").open("w")
    foreground = subprocess.Popen([sys.executable, "-m", "cli.main", "up"], env=under_test.environment, cwd=ROOT, stderr=log)
    try:
        wait_until(lambda: "Ctrl-C stops them" in (tmp_path / "up.log").read_text(), "the start")
        store_something(under_test, 1)
        victim = servers.pids()["clickhouse"]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: servers.pids().get("clickhouse", victim) != victim and _answers(under_test), "the restart")
        assert stored(under_test) == ([1], 1, [1])
    finally:
        foreground.send_signal(signal.SIGTERM)
        assert foreground.wait(60) == 0
        log.close()
    assert (servers.pids(), kprobe(under_test, "status").returncode) == ({}, 1)

    try:
        document = json.loads(kprobe(under_test, "up", "--detach", "--json").stdout)
        assert [(s["name"], s["state"]) for s in document["servers"]] == [
            ("neo4j", "up"),
            ("kafka", "up"),
            ("clickhouse", "up"),
        ]
        store_something(under_test, 2)
        killed = servers.pids()
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not servers.pids(), "the kill")
        status = kprobe(under_test, "status")
        assert (status.returncode, status.stdout.count("`kprobe up` recovers it")) == (1, 3)

        recovered = kprobe(under_test, "up", "--detach")

        assert recovered.returncode == 0, recovered.stderr
        assert stored(under_test) == ([1, 2], 2, [1, 2])
        assert set(killed.values()).isdisjoint(servers.pids().values())
        again = kprobe(under_test, "up", "--detach")
        assert "all servers were running already" in again.stderr
    finally:
        down = kprobe(under_test, "down")
    assert "stopped neo4j, kafka, clickhouse" in down.stderr
    assert (servers.pids(), kprobe(under_test, "down").returncode) == ({}, 0)


def _answers(under_test):
    try:
        return clickhouse(under_test, "SELECT 1") == "1\n"
    except OSError:
        return False


def test_a_taken_port_is_named_with_its_holder_before_anything_starts(tmp_path):
    under_test = StackUnderTest(stack_settings(tmp_path))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", under_test.settings.stack.clickhouse_port))
        holder.listen()

        done = kprobe(under_test, "up", "--detach")

    assert done.returncode == 1
    assert (
        f"port {under_test.settings.stack.clickhouse_port}, meant for clickhouse, is held by pid {os.getpid()}" in done.stderr
    )
    assert "KPROBE_STACK__CLICKHOUSE_PORT" in done.stderr
    assert LocalStack(under_test.settings.stack).pids() == {}


def test_a_server_that_ends_while_starting_shows_the_end_of_its_log(tmp_path):
    settings = stack_settings(tmp_path)
    servers = LocalStack(settings.stack)
    servers.servers = [s for s in servers.servers if s.name == "clickhouse"]
    (tmp_path / "clickhouse").mkdir(parents=True)
    (tmp_path / "clickhouse" / "data").write_text("a file where the folder should be")

    with pytest.raises(
        StoreError, match=r"clickhouse ended while starting; the end of its log .*clickhouse\.log:\ncannot open .*/data: "
    ):
        servers.up()

    assert servers.pids() == {}


@pytest.mark.parametrize(("present", "missing"), [((), "java"), (("java",), "mvn")])
def test_missing_java_or_maven_is_an_error_with_the_remedy(tmp_path, monkeypatch, present, missing):
    for name in present:
        tool = tmp_path / name
        tool.write_text("#!/bin/sh\necho 'openjdk version \"17.0.1\"' >&2\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KPROBE_CACHE", str(tmp_path / "cache"))
    servers = LocalStack(stack_settings(tmp_path / "data").stack)

    with pytest.raises(StoreError, match=rf"no `{missing}` on PATH; on Debian or Ubuntu: apt-get install openjdk-17"):
        servers.up()


def test_an_old_java_is_refused(tmp_path, monkeypatch):
    (tmp_path / "java").write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(StoreError, match="need Java 17 or newer"):
        jars.find_java()


def test_a_maven_that_fails_shows_its_last_lines_and_leaves_no_folder(tmp_path, monkeypatch):
    (tmp_path / "mvn").write_text("#!/bin/sh\necho 'Could not resolve host'\nexit 1\n")
    (tmp_path / "mvn").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KPROBE_CACHE", str(tmp_path / "cache"))

    with pytest.raises(StoreError, match="Could not resolve host"):
        jars.class_path("kafka")

    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_dir() and p.name.startswith("kafka")] == []


def test_kafka_is_formatted_whatever_its_cluster_id_begins_with(tmp_path, monkeypatch):
    """One id in 64 begins with a dash, which the storage tool takes for an option."""
    settings = stack_settings(tmp_path).stack
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(bytes=b"\xf8" + bytes(range(15))))

    Kafka(settings).command(print)

    properties = (tmp_path / "kafka" / "logs" / "meta.properties").read_text()
    assert "cluster.id=-AABAgMEBQYHCAkKCwwNDg" in properties
