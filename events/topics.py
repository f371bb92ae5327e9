"""Names of Kafka topics and of the schemas in them; both are part of the interface and carry a version."""

from typing import Final

__all__ = [
    "DEADLETTER_TOPIC",
    "EDGES_TOPIC",
    "EDGE_SCHEMA",
    "NODE_SCHEMA",
    "OPERATIONS_TOPIC",
    "OPERATION_SCHEMA",
    "RAW_TOPIC",
    "VERDICTS_TOPIC",
    "VERDICT_SCHEMA",
]

RAW_TOPIC: Final = "kprobe.raw.v1"  # frames (events.frames); key = node
OPERATIONS_TOPIC: Final = "kprobe.operations.v1"  # JSON, the fields of the operations file; key = node, or operation id
EDGES_TOPIC: Final = "kprobe.edges.v1"  # JSON; key = operation id
VERDICTS_TOPIC: Final = "kprobe.verdicts.v1"  # JSON; key = operation id
DEADLETTER_TOPIC: Final = "kprobe.deadletter.v1"  # the original bytes; headers: reason, topic, partition, offset

NODE_SCHEMA: Final = "kprobe.node/1"  # on the operations topic: a flow process has seen this node
OPERATION_SCHEMA: Final = "kprobe.operation/1"
EDGE_SCHEMA: Final = "kprobe.edge/1"
VERDICT_SCHEMA: Final = "kprobe.verdict/1"
