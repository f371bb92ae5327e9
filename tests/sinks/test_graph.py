"""The graph on a real Neo4j: what is written twice is there once, and a new verdict takes the old one's edges with it."""

import contextlib

import pytest
import samples

from events.errors import StoreError
from events.settings import Neo4jSettings
from sinks.graph import GraphStore

pytestmark = pytest.mark.servers


def shape(graph):
    """Everything that is in the graph, comparable."""
    nodes = graph.query("MATCH (n:Operation|Task) RETURN labels(n) AS l, properties(n) AS p ORDER BY l, coalesce(n.id, n.key)")
    edges = graph.query(
        "MATCH (a)-[r]->(b) RETURN type(r) AS t, properties(r) AS p, coalesce(a.id, a.key) AS a, coalesce(b.id, b.key) AS b"
        " ORDER BY t, a, b, r.id"
    )
    return nodes, edges


def all_edges(verdicts):
    return [e for v in verdicts for e in samples.edges(v)]


def test_the_graph_says_who_delayed_what(graph):
    verdict = samples.verdict(4821)

    graph.write([verdict], samples.edges(verdict))

    rows = graph.query(
        "MATCH (c:Task)-[d:DELAYED]->(o:Operation {id: '4821'})-[:RAN_ON]->(v:Task), (c)-[e:CAUSED]->(v)"
        " RETURN c.comm AS culprit, d.ns AS ns, e.edge AS edge, v.comm AS victim, o.status AS status, e.evidence AS evidence"
    )
    evidence = verdict["causes"][0]["chain"][0]["evidence"]
    expected = {"culprit": "batch-recon", "ns": 790_100_000, "edge": "preempted", "victim": "ledgerd", "status": "late"}
    assert rows == [{**expected, "evidence": evidence}]


def test_sending_everything_twice_gives_the_same_graph(graph):
    verdicts = [samples.verdict(n, culprit=samples.task(100 + n % 5)) for n in range(101)]
    graph.write(verdicts, all_edges(verdicts))
    once = shape(graph)

    graph.write(verdicts[50:], all_edges(verdicts[50:]))
    graph.write(reversed(verdicts), all_edges(verdicts))

    assert shape(graph) == once
    assert graph.counts() == {"Operation": 101, "Task": 6, "RAN_ON": 101, "DELAYED": 101, "CAUSED": 101}


def test_a_reused_tid_is_two_tasks(graph):
    lives = [samples.task(100), samples.task(100, start_boot_ns=5)]
    verdicts = [samples.verdict(i, culprit=c) for i, c in enumerate(lives)]

    graph.write(verdicts, all_edges(verdicts))

    assert len(graph.query("MATCH (t:Task {tid: 100}) RETURN t.key")) == 2


def test_a_corrected_verdict_takes_the_old_edges_with_it(graph):
    first, second = samples.verdict(9, culprit=samples.task(100)), samples.verdict(9, culprit=samples.task(200))
    other = samples.verdict(10, culprit=samples.task(100))
    for each in (first, other, second):
        edges = [{**e, "edge_id": e["edge_id"] + str(e["from"]["tid"])} for e in samples.edges(each)]
        graph.write([each], edges)

    query = "MATCH (t:Task)-[r:DELAYED|CAUSED]->() RETURN r.operation_id AS o, t.tid AS tid, type(r) AS t ORDER BY o, t"
    assert [(r["o"], r["tid"], r["t"]) for r in graph.query(query)] == [
        ("10", 100, "CAUSED"),
        ("10", 100, "DELAYED"),
        ("9", 200, "CAUSED"),
        ("9", 200, "DELAYED"),
    ]


def test_migrations_are_applied_once(stack, graph):
    assert graph.migrate() == []
    names = {r["name"] for r in graph.query("SHOW CONSTRAINTS YIELD name")}
    assert names >= {"operation_id", "task_key", "caused_id", "delayed_id"}


def test_errors_name_the_address_and_the_remedy():
    away = GraphStore(Neo4jSettings(uri="bolt://127.0.0.1:9"), retry_limit_s=0.0)
    with (
        contextlib.closing(away) as store,
        pytest.raises(StoreError, match=r"bolt://127.0.0.1:9 is unreachable .*`kprobe up`"),
    ):
        store.write([samples.verdict(1)], [])
    with pytest.raises(StoreError, match="is no address of a Neo4j server"):
        GraphStore(Neo4jSettings(uri="ftp://x"))
