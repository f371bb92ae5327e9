"""Neo4j: the graph one can walk. Operations, the threads that ran them or stood in their way, and the edges between them.

    (:Task)-[:CAUSED {id, operation_id, edge, ns, ...}]->(:Task)     one causal edge
    (:Task)-[:DELAYED {id, operation_id, kind, ns, rank}]->(:Operation)    one culprit of one cause
    (:Operation)-[:RAN_ON]->(:Task)

A Task is one life of one thread: its `key` is boot id, tid and start time. Every write is a MERGE on a unique key that sets
values and never adds to them, nodes first, then relationships, in batches sorted by key: sending everything twice, or again
after a crash half-way, gives the same graph. A verdict that replaces another takes that one's relationships with it.

A projection: it can be rebuilt from ClickHouse (`kprobe rebuild`). Errors are StoreError with the address and a
remedy; transient ones are retried by the driver, bounded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

from events.errors import StoreError
from events.settings import Neo4jSettings
from sinks.schema import Migration, migrations_of, to_apply

__all__ = ["GraphStore", "task_key"]

_BATCH_ROWS: Final = 5000
_RETRY_LIMIT_S: Final = 15.0

_OPERATIONS: Final = "UNWIND $rows AS r MERGE (o:Operation {id: r.id}) SET o = r"
_TASKS: Final = "UNWIND $rows AS r MERGE (t:Task {key: r.key}) SET t += r"
_RAN_ON: Final = """\
UNWIND $rows AS r
MATCH (o:Operation {id: r.id}) MATCH (t:Task {key: r.key})
MERGE (o)-[:RAN_ON]->(t)"""
_DELAYED: Final = """\
UNWIND $rows AS r
MATCH (t:Task {key: r.task}) MATCH (o:Operation {id: r.values.operation_id})
MERGE (t)-[d:DELAYED {id: r.values.id}]->(o) SET d = r.values"""
_CAUSED: Final = """\
UNWIND $rows AS r
MATCH (a:Task {key: r.from}) MATCH (b:Task {key: r.to})
MERGE (a)-[c:CAUSED {id: r.values.id}]->(b) SET c = r.values"""
_STALE_DELAYED: Final = """\
UNWIND $rows AS r
MATCH (:Task)-[d:DELAYED]->(:Operation {id: r.id}) WHERE NOT d.id IN r.keep
DELETE d"""
_STALE_CAUSED: Final = """\
UNWIND $rows AS r
MATCH (:Task)-[c:CAUSED {operation_id: r.id}]->(:Task) WHERE NOT c.id IN r.keep
DELETE c"""
_EMPTY: Final = "MATCH (n:Operation|Task) CALL (n) { DETACH DELETE n } IN TRANSACTIONS OF 10000 ROWS"

_TIMES: Final = ("start_mono_ns", "end_mono_ns", "duration_ns", "deadline_ns")
_OPERATION_FIELDS: Final = ("type", "node", "boot_id", "status", *_TIMES, "sentence", "algorithm", "hash")
_TASK_FIELDS: Final = ("tid", "tgid", "comm", "start_boot_ns", "cgroup", "container", "class")
_EDGE_FIELDS: Final = (
    "operation_id",
    "edge",
    "kind",
    "ns",
    "start_mono_ns",
    "end_mono_ns",
    "evidence",
    "confidence",
    "algorithm",
)

Row = dict[str, Any]
Document = Mapping[str, Any]


def task_key(boot_id: str, task: Mapping[str, Any]) -> str:
    """The identity of a thread as one string."""
    return f"{boot_id}/{task['tid']}/{task['start_boot_ns']}"


class GraphStore:
    """The graph of one Neo4j database. An instance belongs to one thread."""

    def __init__(self, settings: Neo4jSettings, retry_limit_s: float = _RETRY_LIMIT_S) -> None:
        import neo4j
        from neo4j.exceptions import ConfigurationError

        self.settings = settings
        auth = (settings.user, settings.password) if settings.user else None
        try:
            self._driver: Any = neo4j.GraphDatabase.driver(
                settings.uri,
                auth=auth,
                max_transaction_retry_time=retry_limit_s,
                initial_retry_delay=0.1,
                connection_timeout=5.0,
                notifications_min_severity="OFF",  # an empty database warns about each label that it has not seen yet
            )
        except (ValueError, ConfigurationError) as error:
            raise StoreError(
                f"neo4j.uri {settings.uri!r} is no address of a Neo4j server ({error}); e.g. bolt://HOST:7687"
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._driver.close()

    def migrate(self) -> list[int]:
        """Bring constraints and indexes up to date; returns the versions applied now. Safe to repeat and to run at once."""
        with self._errors():
            rows = self._driver.execute_query(
                "MATCH (m:Migration) RETURN m.version AS version, m.checksum AS checksum", database_=self.settings.database
            ).records
        applied = {int(row["version"]): str(row["checksum"]) for row in rows}
        pending = to_apply(migrations_of("neo4j"), applied, f"Neo4j at {self.settings.uri}")
        for migration in pending:
            self._apply(migration)
        return [m.version for m in pending]

    def write(self, verdicts: Iterable[Document], edges: Iterable[Document]) -> None:
        """Write verdicts and causal edges; of every operation that is named here, these are all of its edges."""
        judged, caused = list(verdicts), list(edges)
        with self._errors(), self._driver.session(database=self.settings.database) as session:
            for query, rows in _statements(judged, caused):
                for batch in _batches(rows):
                    session.execute_write(_run, query, batch)

    def clear(self) -> None:
        """Remove everything that can be rebuilt."""
        with self._errors(), self._driver.session(database=self.settings.database) as session:
            session.run(_EMPTY).consume()

    def counts(self) -> dict[str, int]:
        """How many nodes and relationships of each kind there are."""
        query = (
            "MATCH (n) RETURN labels(n)[0] AS name, count(*) AS count"
            " UNION ALL MATCH ()-[r]->() RETURN type(r) AS name, count(*) AS count"
        )
        with self._errors():
            rows = self._driver.execute_query(query, database_=self.settings.database).records
        return {row["name"]: row["count"] for row in rows if row["name"] != "Migration"}

    def query(self, text: str, **parameters: Any) -> list[Row]:
        """The rows of a read."""
        with self._errors():
            records = self._driver.execute_query(text, parameters, database_=self.settings.database).records
        return [dict(record) for record in records]

    def _apply(self, migration: Migration) -> None:
        record = "MERGE (m:Migration {version: $version}) SET m.title = $title, m.checksum = $checksum"
        values = {"version": migration.version, "title": migration.title, "checksum": migration.checksum}
        with self._errors(), self._driver.session(database=self.settings.database) as session:
            for statement in migration.statements:
                session.execute_write(_run_statement, statement, {})
            session.execute_write(_run_statement, record, values)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Driver errors become StoreError with address and remedy."""
        from neo4j.exceptions import AuthError, DriverError, Neo4jError, ServiceUnavailable

        try:
            yield
        except AuthError as error:
            remedy = "set KPROBE_NEO4J__USER and KPROBE_NEO4J__PASSWORD"
            raise StoreError(f"Neo4j at {self.settings.uri} refuses user {self.settings.user!r}; {remedy}") from error
        except (ServiceUnavailable, OSError) as error:
            remedy = "is it running? `kprobe up` starts a local one, neo4j.uri says where it is"
            raise StoreError(f"Neo4j at {self.settings.uri} is unreachable ({_one_line(error)}); {remedy}") from error
        except (DriverError, Neo4jError) as error:
            raise StoreError(
                f"Neo4j at {self.settings.uri} failed: {_one_line(error)}; `kprobe rebuild` makes the graph anew"
            ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _run(transaction: Any, query: str, rows: Sequence[Row]) -> None:
    transaction.run(query, rows=rows).consume()


def _run_statement(transaction: Any, statement: str, values: Mapping[str, Any]) -> None:
    transaction.run(statement, values).consume()


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    found = iter(rows)
    while batch := list(islice(found, _BATCH_ROWS)):
        yield batch


def _statements(verdicts: Sequence[Document], edges: Sequence[Document]) -> Iterator[tuple[str, list[Row]]]:
    """The statements in order: nodes, then what is stale, then relationships."""
    yield _OPERATIONS, _by([_operation(v) for v in verdicts], lambda r: r["id"])
    yield _TASKS, _by(_tasks(verdicts, edges), lambda r: r["key"])
    delayed = [row for v in verdicts for row in _delayed(v)]
    caused = [_caused(e) for e in edges if e["from"] and e["to"]]
    yield _STALE_DELAYED, _keep({v["operation_id"] for v in verdicts}, delayed)
    yield _STALE_CAUSED, _keep({document["operation_id"] for document in (*verdicts, *edges)}, caused)
    yield _RAN_ON, [{"id": v["operation_id"], "key": task_key(v["boot_id"], v["thread"])} for v in verdicts]
    yield _DELAYED, _by(delayed, lambda r: r["values"]["id"])
    yield _CAUSED, _by(caused, lambda r: r["values"]["id"])


def _by(rows: Iterable[Row], key: Callable[[Row], str]) -> list[Row]:
    """One row a key, the last one, in the order of keys: all writers lock in the same order."""
    unique = {key(row): row for row in rows}
    return [unique[k] for k in sorted(unique)]


def _keep(operation_ids: Iterable[str], rows: Sequence[Row]) -> list[Row]:
    """Per operation, the ids of the relationships that it has now."""
    keep: dict[str, list[str]] = {operation_id: [] for operation_id in sorted(operation_ids)}
    for row in rows:
        keep.setdefault(row["values"]["operation_id"], []).append(row["values"]["id"])
    return [{"id": operation_id, "keep": ids} for operation_id, ids in keep.items()]


def _operation(verdict: Document) -> Row:
    row = {name: verdict[name] for name in _OPERATION_FIELDS}
    causes = verdict["causes"]
    row |= {"id": verdict["operation_id"], "cause": causes[0]["kind"] if causes else None}
    return {**row, "complete": verdict["completeness"]["complete"]}


def _tasks(verdicts: Iterable[Document], edges: Iterable[Document]) -> Iterator[Row]:
    for edge in edges:
        yield from (_task(edge, edge[end]) for end in ("from", "to") if edge[end])
    for verdict in verdicts:
        for cause in verdict["causes"]:
            yield from (_task(verdict, each["task"]) for each in _culprits(cause) if each["task"])
        yield _task(verdict, verdict["thread"])


def _task(where: Document, task: Mapping[str, Any]) -> Row:
    row = {name: task[name] for name in _TASK_FIELDS if task.get(name) is not None}
    return {**row, "key": task_key(where["boot_id"], task), "node": where["node"], "boot_id": where["boot_id"]}


def _culprits(cause: Document) -> Sequence[Mapping[str, Any]]:
    return cause.get("culprits") or [{"task": cause.get("culprit"), "ns": cause["ns"]}]


def _delayed(verdict: Document) -> Iterator[Row]:
    for cause in verdict["causes"]:
        for each in _culprits(cause):
            if each["task"]:
                key = task_key(verdict["boot_id"], each["task"])
                values = {
                    "operation_id": verdict["operation_id"],
                    "kind": cause["kind"],
                    "rank": cause["rank"],
                    "ns": each["ns"],
                }
                values["id"] = f"{verdict['operation_id']}/{cause['rank']}/{cause['kind']}/{key}"
                yield {"task": key, "values": {**values, "confidence": cause["confidence"]}}


def _caused(edge: Document) -> Row:
    values = {name: edge[name] for name in _EDGE_FIELDS if edge.get(name) is not None} | {"id": edge["edge_id"]}
    return {"from": task_key(edge["boot_id"], edge["from"]), "to": task_key(edge["boot_id"], edge["to"]), "values": values}
