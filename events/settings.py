"""Settings: `kprobe.yaml`, overridden by `KPROBE_*` variables, overridden by command line options.

One file holds what a site has to say. Sections are nested models; a variable names a field by its path with two
underscores, e.g. `KPROBE_KAFKA__BOOTSTRAP_SERVERS=broker-1:9092`. Every field has a default that works with the servers
of `kprobe up`. Unknown keys are an error (a typo must not silently fall back to a default).

`load` finds the file in this order: its argument, `KPROBE_CONFIG`, `./kprobe.yaml` if it exists.
"""

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from events.errors import ConfigError
from events.topics import DEADLETTER_TOPIC, EDGES_TOPIC, OPERATIONS_TOPIC, RAW_TOPIC, VERDICTS_TOPIC

__all__ = [
    "ClickHouseSettings",
    "FlowSettings",
    "KafkaSettings",
    "Neo4jSettings",
    "ProbeSettings",
    "Settings",
    "StackSettings",
    "load",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSettings(_Section):
    """Where Kafka is and how to speak to it; `extra` goes to librdkafka as it is (SASL, TLS)."""

    bootstrap_servers: str = "127.0.0.1:19092"
    extra: dict[str, str] = Field(default_factory=dict)


class ClickHouseSettings(_Section):
    """The ClickHouse HTTP interface."""

    url: str = "http://127.0.0.1:18123"
    database: str = "kprobe"
    user: str = "default"
    password: str = ""
    retention_days: int = Field(default=14, ge=1)


class Neo4jSettings(_Section):
    """The Neo4j Bolt interface; the local server has no authentication (`user` empty)."""

    uri: str = "bolt://127.0.0.1:17687"
    user: str = ""
    password: str = ""
    database: str = "neo4j"


class ProbeSettings(_Section):
    """What the agent records and what it may cost."""

    node: str = ""  # empty: the host name
    watch: list[str] = Field(default_factory=lambda: ["all"])
    exclude_servers: bool = True  # leave out the local broker and stores (pids from `kprobe up`)
    ring_bytes_per_cpu: int = Field(default=0, ge=0)  # 0: by the number of CPUs and memory_max_bytes, at most 64 MiB
    payload_ring_bytes_per_cpu: int = Field(default=32 << 20, ge=1 << 18)  # only where payloads are recorded
    drain_interval_ms: int = Field(default=10, ge=1, le=1000)
    batch_events: int = Field(default=16384, ge=1)
    batch_linger_ms: int = Field(default=50, ge=1)
    cpu_share_max: float = Field(default=0.5, gt=0)  # of one CPU, averaged over `limit_window_s`
    memory_max_bytes: int = Field(default=1 << 30, ge=64 << 20)
    limit_window_s: float = Field(default=10.0, gt=0)
    spool_dir: Path = Path(".kprobe/spool")
    spool_max_bytes: int = Field(default=4 << 30, ge=0)
    spool_drop: Literal["oldest", "newest"] = "oldest"
    spool_fsync: Literal["always", "interval", "never"] = "interval"
    producer_queue_max_bytes: int = Field(default=64 << 20, ge=1 << 20)
    listen: str = "127.0.0.1:9464"  # /metrics and /healthz
    families_off: list[str] = Field(default_factory=list)


class FlowSettings(_Section):
    """The dataflow: what it reads, how often it commits, how long it remembers."""

    group: str = "kprobe-causal"
    start: Literal["earliest", "latest"] = "earliest"  # only when there is no stored position
    retention_s: float = Field(default=120.0, gt=0)
    hold_s: float = Field(default=900.0, gt=0)  # for an operation that has not ended; then it is given up
    provisional_s: float = Field(default=1.0, ge=0)  # an open operation is judged after 1, 2, 4, ... of it; 0: only at its end
    raw_rows: bool = True
    neo4j: bool = True
    listen: str = "127.0.0.1:9465"
    recovery_dir: Path = Path(".kprobe/recovery")
    stop_at_end: bool = False  # end at the current end of the topics: for rebuilds and tests
    on_gap: Literal["stop", "continue"] = "stop"  # messages that retention removed before they were read
    stores: bool = True  # write verdicts, edges and operations to ClickHouse (and Neo4j): off, only topics are written
    processes: int = Field(default=1, ge=1)  # partitions p with p mod processes == process are this process's
    process: int = Field(default=0, ge=0)
    max_batch_messages: int = Field(default=16, ge=1)
    raw_topic: str = RAW_TOPIC
    operations_topic: str = OPERATIONS_TOPIC
    edges_topic: str = EDGES_TOPIC
    verdicts_topic: str = VERDICTS_TOPIC
    deadletter_topic: str = DEADLETTER_TOPIC


class StackSettings(_Section):
    """The local servers of `kprobe up`: ports on loopback, and one folder for all their data."""

    data_dir: Path = Path(".kprobe/stack")
    kafka_port: int = 19092
    kafka_controller_port: int = 19093
    clickhouse_port: int = 18123
    neo4j_port: int = 17687
    partitions: int = Field(default=4, ge=1)


class Settings(BaseSettings):
    """All settings of a site."""

    model_config = SettingsConfigDict(
        env_prefix="KPROBE_", env_nested_delimiter="__", extra="forbid", frozen=True, nested_model_default_partial_update=True
    )

    kafka: KafkaSettings = KafkaSettings()
    clickhouse: ClickHouseSettings = ClickHouseSettings()
    neo4j: Neo4jSettings = Neo4jSettings()
    probe: ProbeSettings = ProbeSettings()
    flow: FlowSettings = FlowSettings()
    stack: StackSettings = StackSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over file (the file's content comes as init arguments)."""
        return env_settings, init_settings


def load(path: Path | None = None) -> Settings:
    """The settings of this site. Raises ConfigError naming the file, the key and what is wrong with it."""
    if path is None and os.environ.get("KPROBE_CONFIG"):
        path = Path(os.environ["KPROBE_CONFIG"])
    if path is None and Path("kprobe.yaml").exists():
        path = Path("kprobe.yaml")
    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise ConfigError(f"cannot read settings file {path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"settings file {path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"settings file {path} must hold a mapping of sections, not {type(content).__name__}")
    try:
        return Settings(**content)
    except ValidationError as error:
        where = f"settings file {path}" if path else "KPROBE_* variables"
        lines = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors())
        raise ConfigError(f"{where}: {lines}") from error
