"""The documents in ClickHouse: operations, verdicts and causal edges, written and read as rows.

Idempotent by identity: the tables keep one row an operation, a verdict, an edge, and the last one written wins; every read
sees it so, merged or not. A verdict is kept byte for byte, so that its hash can be checked; to read it is one point read.

Apart from `sinks.clickhouse` because it needs neither numpy nor Arrow: commands that show a verdict start in half the time.
Errors are StoreError with the server's address and a remedy. An instance belongs to one thread.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from events.errors import InputError
from events.settings import ClickHouseSettings
from sinks.clickhouse_client import ClickHouseClient
from sinks.retry import RETRY_LIMIT_S

__all__ = ["CulpritSelector", "DocumentStore", "array_literal"]

_DATABASE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Document = Mapping[str, Any] | bytes


class CulpritSelector:
    """Whom `kprobe victims` asks about: `comm:GLOB`, `pid:N`, `cgroup:PATH` (and below) or `container:ID` (or its start)."""

    def __init__(self, text: str) -> None:
        kind, _, value = text.partition(":")
        if kind not in ("comm", "pid", "cgroup", "container") or not value or (kind == "pid" and not value.isdigit()):
            raise InputError(f"culprit {text!r} is not one of comm:GLOB, pid:N, cgroup:PATH, container:ID")
        self.kind = kind
        self.value = value

    def condition(self) -> tuple[str, str]:
        """A condition on one element (`kind`, `comm`, `tid`, `tgid`, `cgroup`, `container`) with {culprit}, and its value."""
        if self.kind == "comm":
            return "match(comm, {culprit:String})", "^" + fnmatch.translate(self.value).removesuffix(r"\Z") + "$"
        if self.kind == "pid":
            return "(tgid = {culprit:UInt32} OR tid = {culprit:UInt32})", self.value
        if self.kind == "cgroup":
            value = self.value.rstrip("/")
            return "(cgroup = {culprit:String} OR startsWith(cgroup, concat({culprit:String}, '/')))", value
        return "startsWith(container, {culprit:String})", self.value


class DocumentStore:
    """Operations, verdicts and causal edges of one database."""

    def __init__(self, settings: ClickHouseSettings, retry_limit_s: float = RETRY_LIMIT_S) -> None:
        if not _DATABASE_NAME.fullmatch(settings.database):
            raise InputError(f"clickhouse.database {settings.database!r} is not a name of letters, digits and _")
        self.settings = settings
        self.client = ClickHouseClient(settings, retry_limit_s)

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def insert_operations(self, operations: Iterable[Mapping[str, Any]]) -> None:
        """Insert operations: mappings with the fields of the operations file, `node`, and any further attributes."""
        self._insert_documents("operations", [_operation_row(o) for o in operations])

    def insert_verdicts(self, verdicts: Iterable[Document]) -> None:
        """Insert verdicts; bytes are kept as they are, a mapping as orjson writes it."""
        self._insert_documents("verdicts", [_verdict_row(v) for v in verdicts])

    def insert_edges(self, edges: Iterable[Mapping[str, Any]]) -> None:
        """Insert causal edges (schema kprobe.edge/1)."""
        self._insert_documents("causal_edges", [_edge_row(e) for e in edges])

    def _insert_documents(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            self.client.insert_lines(table, b"\n".join(orjson.dumps(row) for row in rows))

    def verdict(self, operation_id: str) -> bytes | None:
        """The verdict as it was stored, byte for byte; None if there is none. One read."""
        rows = self.client.rows(
            "SELECT verdict FROM verdicts WHERE operation_id = {id:String} ORDER BY seen_at DESC LIMIT 1", {"id": operation_id}
        )
        return str(rows[0]["verdict"]).encode() if rows else None

    def operation(self, operation_id: str) -> dict[str, Any] | None:
        """An operation as it was announced; None if it was not."""
        rows = self.client.rows(
            "SELECT * EXCEPT seen_at FROM operations WHERE operation_id = {id:String} ORDER BY seen_at DESC LIMIT 1",
            {"id": operation_id},
        )
        return rows[0] if rows else None

    def operations(
        self, *, statuses: Sequence[str] = (), kind: str = "", node: str = "", limit: int = 100
    ) -> list[dict[str, Any]]:
        """Operations, the latest first, with what was judged about them; status "pending" has no verdict yet."""
        conditions = ["(empty({statuses:Array(String)}) OR has({statuses:Array(String)}, status))"]
        conditions += ["({type:String} = '' OR type = {type:String})", "({node:String} = '' OR node = {node:String})"]
        return self.client.rows(
            f"SELECT * FROM ({_OPERATIONS}) WHERE {' AND '.join(conditions)}"
            " ORDER BY end_mono_ns DESC, operation_id LIMIT {limit:UInt32}",
            {"statuses": array_literal(statuses), "type": kind, "node": node, "limit": limit},
        )

    def victims(self, culprit: CulpritSelector, limit: int = 100) -> list[dict[str, Any]]:
        """Operations that one culprit hurt, worst first: its nanoseconds and the kinds of cause, per operation."""
        condition, value = culprit.condition()
        query = f"""\
SELECT operation_id, any(type) AS type, any(node) AS node, any(status) AS status, any(duration_ns) AS duration_ns,
       any(deadline_ns) AS deadline_ns, groupUniqArray(kind) AS kinds, groupUniqArray(comm) AS comms,
       groupUniqArray(tgid) AS pids, sum(ns) AS hurt_ns, any(sentence) AS sentence
FROM verdicts FINAL
ARRAY JOIN culprit_kinds AS kind, culprit_comms AS comm, culprit_tids AS tid, culprit_tgids AS tgid,
           culprit_cgroups AS cgroup, culprit_containers AS container, culprit_ns AS ns
WHERE {condition}
GROUP BY operation_id ORDER BY hurt_ns DESC, operation_id LIMIT {{limit:UInt32}}"""
        return self.client.rows(query, {"culprit": value, "limit": limit})

    def edges(self, operation_id: str) -> list[dict[str, Any]]:
        """The causal edges of an operation, in time order."""
        rows = self.client.rows(
            "SELECT document FROM causal_edges FINAL WHERE operation_id = {id:String} ORDER BY start_mono_ns, edge_id",
            {"id": operation_id},
        )
        return [orjson.loads(row["document"]) for row in rows]

    def documents(self, after: str = "", limit: int = 1000) -> list[tuple[str, bytes]]:
        """Verdicts in the order of their operation ids, page by page: (operation id, document)."""
        rows = self.client.rows(
            "SELECT operation_id, verdict FROM verdicts FINAL WHERE operation_id > {after:String}"
            " ORDER BY operation_id LIMIT {limit:UInt32}",
            {"after": after, "limit": limit},
        )
        return [(str(row["operation_id"]), str(row["verdict"]).encode()) for row in rows]


_OPERATIONS: Final = """\
SELECT coalesce(nullIf(v.operation_id, ''), o.operation_id) AS operation_id,
       if(v.operation_id = '', o.type, v.type) AS type, if(v.operation_id = '', o.node, v.node) AS node,
       if(v.operation_id = '', 'pending', toString(v.status)) AS status,
       if(v.operation_id = '', o.start_mono_ns, v.start_mono_ns) AS start_mono_ns,
       if(v.operation_id = '', o.end_mono_ns, v.end_mono_ns) AS end_mono_ns,
       end_mono_ns - start_mono_ns AS duration_ns,
       if(v.operation_id = '', o.deadline_ns, v.deadline_ns) AS deadline_ns,
       toString(v.cause) AS cause, v.culprit_comms AS culprits, v.complete AS complete, v.sentence AS sentence
FROM (SELECT * FROM verdicts FINAL) AS v FULL OUTER JOIN (SELECT * FROM operations FINAL) AS o USING operation_id"""


def array_literal(values: Iterable[str | int]) -> str:
    """An Array literal for a query parameter."""
    quoted = (str(v) if isinstance(v, int) else "'" + v.replace("\\", "\\\\").replace("'", "\\'") + "'" for v in values)
    return "[" + ",".join(quoted) + "]"


_OPERATION_FIELDS: Final = ("operation_id", "type", "tid", "start_mono_ns", "end_mono_ns", "deadline_ns", "outcome", "node")


def _operation_row(operation: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: operation.get(name) for name in _OPERATION_FIELDS}
    attributes = operation.get("attributes")
    if not isinstance(attributes, Mapping):
        attributes = {k: v for k, v in operation.items() if k not in _OPERATION_FIELDS and k != "schema"}
    row["attributes"] = {str(k): str(v) for k, v in attributes.items()}
    row["outcome"], row["node"] = row["outcome"] or "", row["node"] or ""
    return row


def _verdict_row(verdict: Document) -> dict[str, Any]:
    document = verdict if isinstance(verdict, bytes) else orjson.dumps(verdict)
    content = orjson.loads(verdict) if isinstance(verdict, bytes) else verdict
    completeness, causes = content["completeness"], content["causes"]
    names = ("operation_id", "type", "node", "boot_id", "status", "start_mono_ns", "end_mono_ns", "duration_ns")
    row = {name: content[name] for name in (*names, "deadline_ns", "algorithm", "hash", "sentence")}
    row |= {"lost_events": completeness["lost_events"], "unknown_ns": completeness["unknown_ns"]}
    row |= {"complete": completeness["complete"], "cause": causes[0]["kind"] if causes else ""}
    return row | _culprit_columns(causes) | {"verdict": document.decode()}


def _culprit_columns(causes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Every culprit of every cause, as parallel arrays."""
    found = [
        (cause["kind"], each["task"], each["ns"])
        for cause in causes
        for each in (cause.get("culprits") or [{"task": cause.get("culprit"), "ns": cause["ns"]}])
        if each["task"] is not None
    ]
    return {
        "culprit_kinds": [kind for kind, _, _ in found],
        "culprit_comms": [task["comm"] or "" for _, task, _ in found],
        "culprit_tids": [task["tid"] for _, task, _ in found],
        "culprit_tgids": [task["tgid"] for _, task, _ in found],
        "culprit_cgroups": [task.get("cgroup") or "" for _, task, _ in found],
        "culprit_containers": [task.get("container") or "" for _, task, _ in found],
        "culprit_ns": [ns for _, _, ns in found],
    }


def _edge_row(edge: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "operation_id",
        "edge_id",
        "edge",
        "node",
        "boot_id",
        "start_mono_ns",
        "end_mono_ns",
        "ns",
        "confidence",
        "algorithm",
    )
    row = {name: edge[name] for name in names}
    for end in ("from", "to"):
        task = edge[end] or {}
        row |= {f"{end}_{name}": task.get(name) or 0 for name in ("tid", "tgid", "start_boot_ns")}
        row |= {f"{end}_{name}": task.get(name) or "" for name in ("comm", "cgroup")}
    return {**row, "document": orjson.dumps(edge).decode()}
