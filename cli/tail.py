"""`kprobe tail`: follow edges or verdicts as they appear on their topics."""

import sys
import uuid
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Final

import typer

from cli.render import format_ns, task_name
from events.errors import StoreError
from events.settings import KafkaSettings, load
from events.topics import EDGES_TOPIC, VERDICTS_TOPIC

__all__ = ["app"]

app = typer.Typer()
_POLL_S: Final = 0.5


class _What(StrEnum):
    edges = "edges"
    verdicts = "verdicts"


@app.command()
def tail(
    what: Annotated[_What, typer.Argument(help="What to follow.")],
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Begin with the oldest message, not with the next one.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="End after this many; 0: never.")] = 0,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print each message as it is, one a line.")] = False,
) -> None:
    """Follow the causal edges or the verdicts as the flow publishes them. Ctrl-C ends it."""
    import orjson

    from cli.listing import write_line

    topic = EDGES_TOPIC if what is _What.edges else VERDICTS_TOPIC
    seen = 0
    try:
        for value in _follow(load().kafka, topic, from_start):
            if jsonl:
                write_line(value)
            else:
                print(_line(what, orjson.loads(value)), flush=True)
            seen += 1
            if seen == limit:
                return
    except KeyboardInterrupt:
        return


def _follow(settings: KafkaSettings, topic: str, from_start: bool) -> Iterator[bytes]:
    """The messages of all partitions as they come, without a consumer group: nobody else's position is touched."""
    from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaException, TopicPartition

    options = {"group.id": f"kprobe-tail-{uuid.uuid4()}", "enable.auto.commit": False, "log_level": 0}
    consumer: Any = Consumer({**options, **settings.extra, "bootstrap.servers": settings.bootstrap_servers})
    try:
        found = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        if not found:
            raise StoreError(f"there is no topic {topic} at {settings.bootstrap_servers}; `kprobe migrate` creates it")
        begin = OFFSET_BEGINNING if from_start else OFFSET_END
        consumer.assign([TopicPartition(topic, partition, begin) for partition in found])
        print(f"following {topic}", file=sys.stderr, flush=True)
        while True:
            message = consumer.poll(_POLL_S)
            if message is None:
                continue
            if message.error():
                raise StoreError(f"Kafka at {settings.bootstrap_servers}: {topic}: {message.error().str()}")
            yield message.value()
    except KafkaException as error:
        remedy = "is it running? `kprobe up` starts a local one, kafka.bootstrap_servers says where it is"
        raise StoreError(f"Kafka at {settings.bootstrap_servers}: {error.args[0].str()}; {remedy}") from error
    finally:
        consumer.close()


def _line(what: _What, message: dict[str, Any]) -> str:
    if what is _What.verdicts:
        return f"{message['operation_id']}  {message['status']}  {message['sentence']}"
    ends = f"{task_name(message['from']) or '?'} -> {task_name(message['to']) or '?'}"
    return f"{message['operation_id']}  {message['edge']}  {ends}  {format_ns(message['ns'])}  {message['confidence']}"
