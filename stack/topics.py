"""The topics of kprobe on a Kafka: created when they are missing, never changed when they are there.

The number of partitions decides which messages share an order, so a topic that exists keeps its number.
"""

from collections.abc import Mapping
from typing import Final

from events.errors import StoreError
from events.topics import DEADLETTER_TOPIC, EDGES_TOPIC, OPERATIONS_TOPIC, RAW_TOPIC, VERDICTS_TOPIC

__all__ = ["create_topics"]

# A frame is one message: 16384 events are about 200 KB, a burst of task records can be more.
_CONFIG: Final[Mapping[str, str]] = {"max.message.bytes": "16777216"}
_TOPICS: Final = (RAW_TOPIC, OPERATIONS_TOPIC, EDGES_TOPIC, VERDICTS_TOPIC, DEADLETTER_TOPIC)
_TIMEOUT_S: Final = 30.0


def create_topics(bootstrap_servers: str, partitions: int, extra: Mapping[str, str] | None = None) -> list[str]:
    """Create what is missing and return its names; `extra` are librdkafka options (SASL, TLS). Raises StoreError."""
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # re-exported without saying so

    client = AdminClient({**(extra or {}), "bootstrap.servers": bootstrap_servers, "log_level": 0})
    wanted = [NewTopic(name, num_partitions=partitions, replication_factor=-1, config=dict(_CONFIG)) for name in _TOPICS]
    created = []
    for name, future in client.create_topics(wanted, operation_timeout=_TIMEOUT_S).items():
        try:
            future.result(timeout=_TIMEOUT_S + 5)
            created.append(name)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise StoreError(f"cannot create topic {name} at {bootstrap_servers}: {error.args[0].str()}") from error
    return created
