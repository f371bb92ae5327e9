"""ClickHouse: the history. Raw events, tasks and losses as Arrow columns; operations, verdicts and edges as rows.

Everything is idempotent by identity. An insert with a token is dropped if its token was seen (a retry, a replay of the same
messages); a batch that was cut differently after a crash is caught by the tables' keys, which name the event, the verdict, the
edge: rows of one key become one, at a merge and in every read of this module.

Reads are few: a verdict is one point read, a window of events one range read. Errors are StoreError with the
server's address and a remedy; transient ones are retried with bounded backoff first (`sinks.retry`).

An instance belongs to one thread.
"""

import fnmatch
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from events.errors import InputError
from events.frames import Clocks
from events.records import EVENTS, LOSSES, TASKS, columns_to_arrow
from events.settings import ClickHouseSettings
from sinks.clickhouse_client import ClickHouseClient
from sinks.retry import RETRY_LIMIT_S
from sinks.schema import Migration, migrations_of, to_apply

__all__ = ["ClickHouseStore", "CulpritSelector"]

_LZ4: Final = pa.ipc.IpcWriteOptions(compression=pa.Codec("lz4"))
_DAY_NS: Final = 86_400_000_000_000
_AGED_TABLES: Final = ("kernel_events", "tasks", "losses")
_MIGRATIONS_TABLE: Final = """\
CREATE TABLE IF NOT EXISTS migrations
(version UInt32, title String, checksum String, applied_at DateTime64(3, 'UTC') DEFAULT now64(3))
ENGINE = ReplacingMergeTree(applied_at) ORDER BY version"""
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


class ClickHouseStore:
    """The tables of one database."""

    def __init__(self, settings: ClickHouseSettings, retry_limit_s: float = RETRY_LIMIT_S) -> None:
        if not _DATABASE_NAME.fullmatch(settings.database):
            raise InputError(f"clickhouse.database {settings.database!r} is not a name of letters, digits and _")
        self.settings = settings
        self.client = ClickHouseClient(settings, retry_limit_s)

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    # --- schema

    def migrate(self) -> list[int]:
        """Bring the database up to date; returns the versions applied now. Safe to repeat and to run twice at once."""
        self.client.execute(f"CREATE DATABASE IF NOT EXISTS {self.settings.database}", database="")
        self.client.execute(_MIGRATIONS_TABLE)
        rows = self.client.rows("SELECT version, checksum FROM migrations FINAL")
        applied = {int(row["version"]): str(row["checksum"]) for row in rows}
        pending = to_apply(migrations_of("clickhouse"), applied, f"ClickHouse database {self.settings.database}")
        for migration in pending:
            self._apply(migration)
        self._set_retention()
        return [m.version for m in pending]

    def _apply(self, migration: Migration) -> None:
        for statement in migration.statements:
            self.client.execute(statement)
        row = {"version": migration.version, "title": migration.title, "checksum": migration.checksum}
        self.client.insert_lines("migrations", orjson.dumps(row))

    def _set_retention(self) -> None:
        """Raw rows are dropped by whole days; verdicts, operations and edges are small and stay."""
        wanted = f"TTL day + toIntervalDay({self.settings.retention_days})"
        for row in self.client.rows(
            "SELECT name, create_table_query AS text FROM system.tables WHERE database = currentDatabase()"
        ):
            if row["name"] in _AGED_TABLES and wanted not in row["text"]:
                self.client.execute(f"ALTER TABLE {row['name']} MODIFY {wanted} SETTINGS materialize_ttl_after_modify = 0")

    # --- writes: raw rows

    def insert_events(
        self,
        columns: Mapping[str, npt.NDArray[Any]] | pa.RecordBatch,
        *,
        node: str,
        boot_id: str,
        token: str,
        clocks: Clocks | None = None,
    ) -> None:
        """Insert events (columns or a batch of `EVENTS`) of one node and boot; `clocks` of their frame date them, else now."""
        batch = columns if isinstance(columns, pa.RecordBatch) else columns_to_arrow(columns)
        self._insert_raw("kernel_events", batch.select(EVENTS.names), node, boot_id, token, clocks)

    def insert_tasks(
        self, batch: pa.RecordBatch, *, node: str, boot_id: str, token: str = "", clocks: Clocks | None = None
    ) -> None:
        """Insert rows of `TASKS`."""
        self._insert_raw("tasks", _plain(batch, TASKS), node, boot_id, token, clocks)

    def insert_losses(
        self, batch: pa.RecordBatch, *, node: str, boot_id: str, token: str = "", clocks: Clocks | None = None
    ) -> None:
        """Insert rows of `LOSSES`."""
        self._insert_raw("losses", _plain(batch, LOSSES), node, boot_id, token, clocks)

    def _insert_raw(
        self, table: str, batch: pa.RecordBatch, node: str, boot_id: str, token: str, clocks: Clocks | None
    ) -> None:
        """Insert a batch with the columns that all its rows share, as dictionaries of one entry: a byte a row."""
        if batch.num_rows == 0:
            return
        real_ns = clocks.real_ns if clocks else time.time_ns()
        day = pa.array([real_ns // _DAY_NS], type=pa.int32()).cast(pa.date32())
        zeros = pa.array(np.zeros(batch.num_rows, dtype=np.int8))
        shared = {
            "day": day.take(zeros),
            "node": pa.DictionaryArray.from_arrays(zeros, [node]),
            "boot_id": pa.DictionaryArray.from_arrays(zeros, [boot_id]),
        }
        names = [*shared, *batch.schema.names]
        whole = pa.RecordBatch.from_arrays([*shared.values(), *batch.columns], names=names)
        self.client.insert(table, whole, _LZ4, token)

    # --- writes: documents

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

    # --- reads

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
            {"statuses": _array(statuses), "type": kind, "node": node, "limit": limit},
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

    def edges_of(self, operation_ids: Sequence[str]) -> list[dict[str, Any]]:
        """The causal edges of several operations."""
        rows = self.client.rows(
            "SELECT document FROM causal_edges FINAL WHERE operation_id IN {ids:Array(String)} ORDER BY operation_id, edge_id",
            {"ids": _array(operation_ids)},
        )
        return [orjson.loads(row["document"]) for row in rows]

    def events(self, node: str, boot_id: str, from_ns: int, to_ns: int, cpus: Sequence[int] = ()) -> pa.RecordBatch:
        """Events of [from_ns, to_ns) on the monotonic clock as a batch of `EVENTS`, each once, by CPU and sequence number."""
        table = self.client.table(
            f"SELECT {', '.join(EVENTS.names)} FROM kernel_events FINAL"
            " WHERE node = {node:String} AND boot_id = {boot:String}"
            " AND time_mono_ns >= {from:Int64} AND time_mono_ns < {to:Int64}"
            " AND (empty({cpus:Array(UInt16)}) OR has({cpus:Array(UInt16)}, cpu)) ORDER BY cpu, seq",
            {"node": node, "boot": boot_id, "from": from_ns, "to": to_ns, "cpus": _array(cpus)},
        )
        return _one_batch(table, EVENTS)

    def tasks(self, node: str, boot_id: str, until_ns: int) -> pa.Table:
        """Task rows of one boot up to a time, in time order."""
        return self._rows_of("tasks", TASKS, "time_mono_ns < {until:Int64}", "time_mono_ns, tid", node, boot_id, until_ns)

    def losses(self, node: str, boot_id: str, until_ns: int) -> pa.Table:
        """Losses of one boot that begin before a time."""
        order = "from_mono_ns, to_mono_ns, cpu, reason"
        return self._rows_of("losses", LOSSES, "from_mono_ns < {until:Int64}", order, node, boot_id, until_ns)

    def _rows_of(
        self, table: str, schema: pa.Schema, condition: str, order: str, node: str, boot_id: str, until_ns: int
    ) -> pa.Table:
        return self.client.table(
            f"SELECT {', '.join(schema.names)} FROM {table} FINAL"
            f" WHERE node = {{node:String}} AND boot_id = {{boot:String}} AND {condition} ORDER BY {order}",
            {"node": node, "boot": boot_id, "until": until_ns},
        )


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


def _plain(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with its dictionaries as strings: few rows, and a null in a dictionary is not a null of the engine."""
    fields = [pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    return batch.select(schema.names).cast(pa.schema(fields))


def _one_batch(table: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    arrays = [table.column(f.name).cast(f.type).combine_chunks() for f in schema]
    return pa.RecordBatch.from_arrays([_whole(a, f.type) for a, f in zip(arrays, schema, strict=True)], schema=schema)


def _whole(column: Any, kind: pa.DataType) -> pa.Array:
    """One array: `combine_chunks` of a column without rows gives a chunked array without chunks."""
    if isinstance(column, pa.ChunkedArray):
        return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=kind)
    return column


def _array(values: Iterable[str | int]) -> str:
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
