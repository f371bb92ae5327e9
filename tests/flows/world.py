"""A small world for the flow's tests: several simulated nodes, their operations, topics of the test's own, and runs of the
flow.

The frames are those of `tests/causality/simulator.py`, cut into many messages; the operations are windows of its tasks,
announced before, between and after the frames that hold their events.
"""

import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import orjson

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "causality"))

from simulator import Simulator  # noqa: E402  the path is set above
from tape import Tape  # noqa: E402

from events.frames import Clocks  # noqa: E402
from sinks.topics import TopicWriter  # noqa: E402

NODES = ("node-a", "node-b", "node-c")


def node_frames(node, seed, events_a_frame=40):
    """Frames of one node in the order of their numbers, and its tasks' windows."""
    simulator = Simulator(seed, tasks=6, cpus=2, duration_ns=200_000)
    truth = simulator.run()
    frames = Tape.of(simulator, truth).frames(batch=events_a_frame)
    boot_id = f"{seed:032x}"
    base_real_ns = time.time_ns()
    clocks = [f.watermark.node_mono_ns for f in frames]
    return [
        dataclasses.replace(
            f, node=node, boot_id=boot_id, recording=f"{node}-{seed}", clocks=Clocks(now, now, base_real_ns + now)
        )
        for f, now in zip(frames, clocks, strict=True)
    ], truth


def node_operations(node, truth, rng, count):
    """Windows in the lives of threads."""
    operations = []
    for number in range(count):
        task = rng.choice(truth.tasks)
        states = truth.states(task)
        first, last = states[0][0], states[-1][1]
        start = rng.randint(first, last - 100)
        end = rng.randint(start + 50, last)
        operations.append({
            "operation_id": f"{node}-{number}", "type": "settlement", "tid": task.tid, "start_mono_ns": start,
            "end_mono_ns": end, "deadline_ns": 5000, "outcome": "", "node": node, "batch": "7",
        })  # fmt: skip
    return operations


class World:
    """Topics on one Kafka, and what was sent to them."""

    def __init__(self, settings, partitions=2, seed=1):
        from confluent_kafka.admin import AdminClient, NewTopic

        tag = uuid.uuid4().hex[:10]
        self.partitions = partitions
        names = {name: f"test.{tag}.{name}" for name in ("raw", "operations", "edges", "verdicts", "deadletter")}
        self.topics = names
        flow = settings.flow.model_copy(update={f"{name}_topic": topic for name, topic in names.items()})
        self.settings = settings.model_copy(
            update={"flow": flow, "clickhouse": settings.clickhouse.model_copy(update={"database": f"test_{tag}"})}
        )
        self.admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers, "log_level": 0})
        for future in self.admin.create_topics([NewTopic(t, partitions, 1) for t in names.values()]).values():
            future.result(20)
        self.processes = []  # whatever was started; the fixture ends what a failed test leaves
        self.rng = random.Random(seed)
        print(f"seed {seed}")

    def with_outputs_of_its_own(self):
        """The same input, with other output topics and another database."""
        from confluent_kafka.admin import NewTopic

        other, tag = copy.copy(self), uuid.uuid4().hex[:10]
        outputs = {name: f"test.{tag}.{name}" for name in ("edges", "verdicts", "deadletter")}
        for future in self.admin.create_topics([NewTopic(t, self.partitions, 1) for t in outputs.values()]).values():
            future.result(20)
        other.topics = self.topics | outputs
        clickhouse = self.settings.clickhouse.model_copy(update={"database": f"test_{tag}"})
        other.settings = self.settings.model_copy(update={"clickhouse": clickhouse})
        return other

    def messages(self, nodes=NODES, operations=8, events_a_frame=40):
        """Frames of all nodes and their operations as (topic, key, value), operations before, between and after the frames."""
        self.frames, self.operations = {}, {}
        mixed = []
        for number, node in enumerate(nodes):
            frames, truth = node_frames(node, 11 + number, events_a_frame)
            self.frames[node] = frames
            rows = node_operations(node, truth, random.Random(number), operations)
            self.operations |= {row["operation_id"]: row for row in rows}
            sent = [("raw", node, frame.encode()) for frame in frames]
            for row in rows:
                key = self.rng.choice([node, row["operation_id"]])
                sent.insert(self.rng.randint(0, len(sent)), ("operations", key, orjson.dumps(row)))
            mixed += sent
        return mixed

    def fill(self, **options):
        """Send them all."""
        self.send(*self.messages(**options))

    def send(self, *messages):
        """Send (topic, key, value)s, and return when they are delivered."""
        writer = TopicWriter(self.settings.kafka)
        for topic, key, value in messages:
            writer.send(self.topics[topic], key, value)
        writer.flush()

    @property
    def event_count(self):
        return sum(f.batch.num_rows for frames in self.frames.values() for f in frames if f.kind == "events/1")

    def environment(self, **flow):
        """Variables for a child process; `flow` are further settings of the section."""
        s = self.settings
        found = {k: v for k, v in os.environ.items() if not k.startswith(("KPROBE_", "BYTEWAX_"))}
        found |= {
            "KPROBE_KAFKA__BOOTSTRAP_SERVERS": s.kafka.bootstrap_servers,
            "KPROBE_CLICKHOUSE__URL": s.clickhouse.url,
            "KPROBE_CLICKHOUSE__DATABASE": s.clickhouse.database,
            "KPROBE_NEO4J__URI": s.neo4j.uri,
            "KPROBE_FLOW__LISTEN": "127.0.0.1:0",
            "KPROBE_FLOW__NEO4J": "false",
            "RUST_BACKTRACE": "0",
        }
        found |= {f"KPROBE_FLOW__{name.upper()}_TOPIC": topic for name, topic in self.topics.items()}
        return found | {f"KPROBE_FLOW__{name.upper()}": str(value) for name, value in flow.items()}

    def start(self, *arguments, **flow):
        """Start `python -m bytewax.run flows.causal ARGUMENTS`."""
        return self.spawn(["-m", "bytewax.run", "flows.causal", *map(str, arguments)], **flow)

    def spawn(self, arguments, **flow):
        """Start Python with these arguments in the world's environment."""
        command, environment = [sys.executable, *arguments], self.environment(**flow)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def close(self):
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def run(self, *arguments, **flow):
        """Run the flow to the end of the topics; returns its output. Fails the test if it fails."""
        return finish(self.start(*arguments, stop_at_end=True, **flow))

    def read(self, topic):
        """All messages of a topic."""
        from confluent_kafka import Consumer, TopicPartition

        consumer = Consumer({"bootstrap.servers": self.settings.kafka.bootstrap_servers, "group.id": "test", "log_level": 0})
        found = []
        for partition in range(self.partitions):
            target = TopicPartition(self.topics[topic], partition, 0)
            low, high = wait_until(lambda t=target: _offsets(consumer, t), "the offsets of a new topic")
            consumer.assign([TopicPartition(self.topics[topic], partition, low)])
            while low < high:
                for message in consumer.consume(1000, timeout=1):
                    assert message.error() is None, message.error()
                    found.append(message)
                    low = message.offset() + 1
        consumer.close()
        return found

    def verdicts(self):
        """Hash of the last verdict of each operation, from the topic."""
        return {v["operation_id"]: v["hash"] for v in (json.loads(m.value()) for m in self.read("verdicts"))}

    def stored(self):
        """Everything that ClickHouse holds, in a form that can be compared."""
        from sinks.clickhouse import ClickHouseStore

        store = ClickHouseStore(self.settings.clickhouse)
        raw = "SELECT node, boot_id, cpu, seq, time_mono_ns, kind FROM kernel_events ORDER BY node, boot_id, cpu, seq"
        found = {
            "events": store.client.rows(raw),
            "tasks": store.client.rows("SELECT node, tid, time_mono_ns, reason FROM tasks ORDER BY ALL"),
            "operations": store.client.rows("SELECT operation_id, tid, node FROM operations FINAL ORDER BY operation_id"),
            "verdicts": store.client.rows("SELECT operation_id, hash FROM verdicts FINAL ORDER BY operation_id"),
            "edges": store.client.rows("SELECT edge_id FROM causal_edges FINAL ORDER BY edge_id"),
        }
        store.close()
        return found

    def edges(self):
        """Identities of all edges on the topic."""
        return {json.loads(m.value())["edge_id"] for m in self.read("edges")}


def _offsets(consumer, target):
    from confluent_kafka import KafkaException

    try:
        return consumer.get_watermark_offsets(target, timeout=20)
    except KafkaException:
        return None  # a topic made a moment ago is not known everywhere


def finish(process, timeout_s=120, status=0):
    """The output of a process that must end with `status`."""
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{out.decode()}") from None
    assert process.returncode == status, f"status {process.returncode}:\n{out.decode()}"
    return out.decode()


def wait_until(condition, what, timeout_s=60):
    """Poll until `condition()` is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
    return found
