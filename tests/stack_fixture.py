"""The fixture `stack`: one set of real servers (Kafka, Neo4j, ClickHouse) for a whole test session, on free ports.

Tests that use it carry the marker `servers`. They share the servers, so each uses names of its own: a database
(`stack.with_database("...")`), a topic, operation ids.
"""

import dataclasses
import os
import socket
import sys

import pytest

from events.settings import ClickHouseSettings, KafkaSettings, Neo4jSettings, Settings, StackSettings


@dataclasses.dataclass(frozen=True)
class StackUnderTest:
    """Addresses of the running servers; `settings` points at them, `environment` does so for a child process."""

    settings: Settings

    @property
    def kafka(self):
        return self.settings.kafka.bootstrap_servers

    @property
    def clickhouse_url(self):
        return self.settings.clickhouse.url

    @property
    def bolt_uri(self):
        return self.settings.neo4j.uri

    @property
    def environment(self):
        s = self.settings
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("KPROBE_")},
            "KPROBE_KAFKA__BOOTSTRAP_SERVERS": s.kafka.bootstrap_servers,
            "KPROBE_CLICKHOUSE__URL": s.clickhouse.url,
            "KPROBE_CLICKHOUSE__DATABASE": s.clickhouse.database,
            "KPROBE_NEO4J__URI": s.neo4j.uri,
            "KPROBE_STACK__DATA_DIR": str(s.stack.data_dir),
            "KPROBE_STACK__KAFKA_PORT": str(s.stack.kafka_port),
            "KPROBE_STACK__KAFKA_CONTROLLER_PORT": str(s.stack.kafka_controller_port),
            "KPROBE_STACK__CLICKHOUSE_PORT": str(s.stack.clickhouse_port),
            "KPROBE_STACK__NEO4J_PORT": str(s.stack.neo4j_port),
        }

    def with_database(self, name):
        """The same servers, with a ClickHouse database of the test's own."""
        clickhouse = self.settings.clickhouse.model_copy(update={"database": name})
        return dataclasses.replace(self, settings=self.settings.model_copy(update={"clickhouse": clickhouse}))


def free_ports(count):
    """Ports of loopback that nobody uses now; all are held together, so that no two are equal."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def stack_settings(data_dir, partitions=2):
    """Settings for servers below `data_dir` on free ports, whatever the environment says."""
    kafka, controller, clickhouse, neo4j = free_ports(4)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("KPROBE_")]:
            patch.delenv(name)
        return Settings(
            kafka=KafkaSettings(bootstrap_servers=f"127.0.0.1:{kafka}"),
            clickhouse=ClickHouseSettings(url=f"http://127.0.0.1:{clickhouse}"),
            neo4j=Neo4jSettings(uri=f"bolt://127.0.0.1:{neo4j}"),
            stack=StackSettings(
                data_dir=data_dir,
                kafka_port=kafka,
                kafka_controller_port=controller,
                clickhouse_port=clickhouse,
                neo4j_port=neo4j,
                partitions=partitions,
            ),
        )


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """The running servers; they are stopped when the session ends."""
    from stack.local import LocalStack

    settings = stack_settings(tmp_path_factory.mktemp("stack"))
    servers = LocalStack(settings.stack, lambda line: print(line, file=sys.stderr))
    servers.up()
    yield StackUnderTest(settings)
    servers.down()
