"""The three local servers: how each is prepared, started, and asked whether it works.

All listen on loopback only and keep everything below one folder of their own: `<data_dir>/kafka`, `.../neo4j`,
`.../clickhouse`. Health is asked in the server's own protocol, with a real request, never by a port that happens to be open.
"""

import base64
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired, run
from typing import Any, Final
from urllib.error import URLError
from urllib.request import Request, urlopen

from events.errors import StoreError
from events.settings import StackSettings
from stack.jars import class_path, find_java

__all__ = ["ClickHouse", "Kafka", "Neo4j", "Server", "servers_of"]

Say = Callable[[str], None]

_KAFKA_PROPERTIES: Final = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={logs}
# One broker: internal topics cannot have more than one replica, and no group needs to wait for another member.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# A misspelt topic is an error, not a new topic with the wrong number of partitions.
auto.create.topics.enable=false
message.max.bytes=16777216
replica.fetch.max.bytes=16777216
log.retention.hours=24
log.retention.bytes=8589934592
log.segment.bytes=268435456
"""
_KAFKA_LOGGING: Final = """\
rootLogger.level = WARN
rootLogger.appenderRef.out.ref = out
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = [%d] %p %m (%c)%n
logger.server.name = kafka.server
logger.server.level = INFO
"""


@dataclass(frozen=True, slots=True)
class Server:
    """What all servers have in common; subclasses say how to start and how to ask."""

    settings: StackSettings

    name = ""
    start_timeout_s = 60.0

    @property
    def home(self) -> Path:
        """The folder that holds this server's data."""
        return self.settings.data_dir.absolute() / self.name

    @property
    def ports(self) -> Sequence[tuple[int, str]]:
        """Each port with the variable that changes it; the first one is what clients use."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """What goes into the client's settings."""
        raise NotImplementedError

    def command(self, say: Say) -> list[str]:
        """Prepare the data folder and return the command that serves it."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Its environment: ours, so that `python -m` finds our rooms from any folder."""
        root = str(Path(__file__).resolve().parents[1])
        inherited = os.environ.get("PYTHONPATH")
        return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root}

    def ask(self) -> None:
        """One real request; raises StoreError while the server does not work."""
        raise NotImplementedError


class Kafka(Server):
    """Apache Kafka in KRaft mode: one process that is broker and controller."""

    name = "kafka"

    @property
    def ports(self) -> Sequence[tuple[int, str]]:
        return (
            (self.settings.kafka_port, "KPROBE_STACK__KAFKA_PORT"),
            (self.settings.kafka_controller_port, "KPROBE_STACK__KAFKA_CONTROLLER_PORT"),
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.settings.kafka_port}"

    def command(self, say: Say) -> list[str]:
        java, jars = find_java(), class_path("kafka", say)
        logs, properties, logging = self.home / "logs", self.home / "server.properties", self.home / "log4j2.properties"
        self.home.mkdir(parents=True, exist_ok=True)
        properties.write_text(
            _KAFKA_PROPERTIES.format(
                port=self.settings.kafka_port, controller_port=self.settings.kafka_controller_port, logs=logs
            )
        )
        logging.write_text(_KAFKA_LOGGING)
        if not (logs / "meta.properties").exists() or not (logs / "bootstrap.checkpoint").exists():
            say("formatting its storage")
            self._format(java, jars, properties)
        options = ["-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", f"-Dlog4j2.configurationFile={logging}"]
        return [java, *options, "-cp", jars, "kafka.Kafka", str(properties)]

    def _format(self, java: str, jars: str, properties: Path) -> None:
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = [java, "-XX:TieredStopAtLevel=1", "-cp", jars, "kafka.tools.StorageTool", "format", "--ignore-formatted"]
        # One word: an id may begin with a dash, and would be taken for an option.
        tool += [f"--cluster-id={cluster}", "-c", str(properties)]
        try:
            done = run(tool, capture_output=True, text=True, check=False, timeout=60)
        except TimeoutExpired as error:
            raise StoreError(f"formatting Kafka's storage in {self.home} took over 60 s") from error
        if done.returncode != 0:
            raise StoreError(f"cannot format Kafka's storage in {self.home}: {(done.stdout + done.stderr).strip()[-600:]}")

    def ask(self) -> None:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        quiet = {"log_level": 0, "socket.connection.setup.timeout.ms": 2000}
        client = AdminClient({"bootstrap.servers": self.address, **quiet})
        try:
            client.list_topics(timeout=3)
        except KafkaException as error:
            raise StoreError(f"Kafka at {self.address} does not answer: {error.args[0].str()}") from error


class Neo4j(Server):
    """Neo4j Community with Bolt, run from `Neo4jServer.java` as it is."""

    name = "neo4j"
    start_timeout_s = 120.0

    @property
    def ports(self) -> Sequence[tuple[int, str]]:
        return ((self.settings.neo4j_port, "KPROBE_STACK__NEO4J_PORT"),)

    @property
    def address(self) -> str:
        return f"bolt://127.0.0.1:{self.settings.neo4j_port}"

    def command(self, say: Say) -> list[str]:
        java, jars = find_java(), class_path("neo4j", say)
        self.home.mkdir(parents=True, exist_ok=True)
        opened = [f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in ("java.nio", "java.io", "sun.nio.ch")]
        options = ["-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-Dio.netty.tryReflectionSetAccessible=true", *opened]
        source = Path(__file__).with_name("Neo4jServer.java")
        return [java, *options, "-cp", jars, str(source), str(self.home), str(self.settings.neo4j_port)]

    def ask(self) -> None:
        import neo4j
        from neo4j.exceptions import DriverError, Neo4jError

        limits: dict[str, Any] = {"connection_timeout": 2.0, "max_transaction_retry_time": 0.0}
        try:
            with neo4j.GraphDatabase.driver(self.address, auth=None, **limits) as driver:
                driver.execute_query("RETURN 1")
        except (Neo4jError, DriverError, OSError) as error:
            raise StoreError(f"Neo4j at {self.address} does not answer: {error}") from error


class ClickHouse(Server):
    """The ClickHouse engine behind its HTTP protocol (`stack.clickhouse_http`)."""

    name = "clickhouse"

    @property
    def ports(self) -> Sequence[tuple[int, str]]:
        return ((self.settings.clickhouse_port, "KPROBE_STACK__CLICKHOUSE_PORT"),)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.settings.clickhouse_port}"

    def command(self, say: Say) -> list[str]:
        say("opening its engine")
        self.home.mkdir(parents=True, exist_ok=True)
        return [sys.executable, "-m", "stack.clickhouse_http", str(self.home), str(self.settings.clickhouse_port)]

    def ask(self) -> None:
        user, key = (os.environ.get(f"KPROBE_LOCAL_CLICKHOUSE_{name}") or "" for name in ("USER", "PASSWORD"))
        headers = {"X-ClickHouse-User": user or "default", "X-ClickHouse-Key": key}
        try:
            with urlopen(Request(f"{self.address}/?query=SELECT%201", headers=headers), timeout=3) as answer:
                content = answer.read()
        except (URLError, OSError) as error:
            raise StoreError(f"ClickHouse at {self.address} does not answer: {error}") from error
        if content != b"1\n":
            raise StoreError(f"{self.address} answers, but not as ClickHouse does: {content[:80]!r}")


def servers_of(settings: StackSettings) -> tuple[Server, ...]:
    """The servers of `kprobe up`, in the order in which they are started."""
    return Neo4j(settings), Kafka(settings), ClickHouse(settings)
