"""`kprobe graph`: the causal graph of one operation."""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from cli.render import format_ns, task_name

__all__ = ["app"]

app = typer.Typer()

Document = Mapping[str, Any]


class _Format(StrEnum):
    dot = "dot"
    json = "json"
    cypher = "cypher"


@app.command()
def graph(
    operation: Annotated[str, typer.Argument(help="The operation's id.")],
    form: Annotated[_Format, typer.Option("--format", help="Graphviz, one JSON document, or Cypher statements.")] = _Format.dot,
) -> None:
    """The causal graph of one operation: threads as nodes, edges with kind, nanoseconds and confidence.

    `kprobe graph 4821 --format dot | dot -Tsvg` draws it; the Cypher statements make it in any Neo4j, and can be repeated.
    """
    import orjson

    from causality.graph import edges_of
    from cli.why import fetch_verdict

    verdict = orjson.loads(fetch_verdict(operation))
    edges = [edge for edge in edges_of(verdict) if edge["from"] and edge["to"]]
    if form is _Format.json:
        print(orjson.dumps(_document(verdict, edges)).decode())
        return
    for line in _dot(verdict, edges) if form is _Format.dot else _cypher(verdict, edges):
        print(line)


def _nodes(verdict: Document, edges: Sequence[Document]) -> dict[str, Document]:
    """Every thread by its key, the operation's own first."""
    from sinks.graph import task_key

    boot = verdict["boot_id"]
    tasks = [verdict["thread"], *(edge[end] for edge in edges for end in ("from", "to"))]
    # The operation's thread stands in the edges with more fields than in the verdict's head: the fuller one is kept.
    return {task_key(boot, task): task for task in sorted(tasks, key=len)}


def _document(verdict: Document, edges: Sequence[Document]) -> dict[str, Any]:
    from sinks.graph import task_key

    boot = verdict["boot_id"]
    names = ("operation_id", "type", "node", "boot_id", "status", "duration_ns", "hash")
    return {
        "schema": "kprobe.graph/1",
        **{name: verdict[name] for name in names},
        "thread": task_key(boot, verdict["thread"]),
        "nodes": [{"key": key, **task} for key, task in sorted(_nodes(verdict, edges).items())],
        "edges": [{**edge, "from": task_key(boot, edge["from"]), "to": task_key(boot, edge["to"])} for edge in edges],
    }


def _dot(verdict: Document, edges: Sequence[Document]) -> Iterator[str]:
    from sinks.graph import task_key

    boot, victim = verdict["boot_id"], task_key(verdict["boot_id"], verdict["thread"])
    yield f"digraph {_quoted(verdict['operation_id'])} {{"
    yield f"  label={_quoted(verdict['sentence'])}; labelloc=t; rankdir=LR; node [shape=box];"
    for key, task in sorted(_nodes(verdict, edges).items()):
        style = ", style=bold" if key == victim else ""
        yield f"  {_quoted(key)} [label={_quoted(task_name(task))}{style}];"
    for edge in edges:
        label = _quoted(f"{edge['edge']} {format_ns(edge['ns'])}")
        style = ", style=dashed" if edge["confidence"] in ("inferred", "statistical") else ""
        yield f"  {_quoted(task_key(boot, edge['from']))} -> {_quoted(task_key(boot, edge['to']))} [label={label}{style}];"
    yield "}"


def _cypher(verdict: Document, edges: Sequence[Document]) -> Iterator[str]:
    from sinks.graph import task_key

    boot = verdict["boot_id"]
    yield f"MERGE (o:Operation {{id: {_quoted(verdict['operation_id'])}}}) SET o.sentence = {_quoted(verdict['sentence'])};"
    for key, task in sorted(_nodes(verdict, edges).items()):
        values = f"t.comm = {_quoted(task['comm'])}, t.tid = {task['tid']}, t.tgid = {task['tgid']}"
        yield f"MERGE (t:Task {{key: {_quoted(key)}}}) SET {values};"
    for edge in edges:
        ends = [f"({v}:Task {{key: {_quoted(task_key(boot, edge[end]))}}})" for v, end in (("a", "from"), ("b", "to"))]
        values = f"c.edge = {_quoted(edge['edge'])}, c.ns = {edge['ns']}, c.operation_id = {_quoted(edge['operation_id'])}"
        yield f"MATCH {ends[0]}, {ends[1]} MERGE (a)-[c:CAUSED {{id: {_quoted(edge['edge_id'])}}}]->(b) SET {values};"


def _quoted(text: str) -> str:
    """A string literal; the escapes of Graphviz and Cypher agree on these."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
