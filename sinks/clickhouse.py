"""ClickHouse: the history. Raw events, tasks and losses as Arrow columns; `sinks.documents` adds what is judged.

Everything is idempotent by identity. An insert with a token is dropped if its token was seen (a retry, a replay of the same
messages); a batch that was cut differently after a crash is caught by the tables' keys, which name the event, the verdict, the
edge: rows of one key become one, at a merge and in every read of this module.

A window of events is one range read. Errors are StoreError with the server's address and a remedy; transient ones are retried
with bounded backoff first (`sinks.retry`). An instance belongs to one thread.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from events.frames import Clocks
from events.records import EVENTS, LOSSES, TASKS, columns_to_arrow
from sinks.documents import CulpritSelector, DocumentStore, array_literal
from sinks.schema import Migration, migrations_of, to_apply

__all__ = ["ClickHouseStore", "CulpritSelector"]

_LZ4: Final = pa.ipc.IpcWriteOptions(compression=pa.Codec("lz4"))
_DAY_NS: Final = 86_400_000_000_000
_AGED_TABLES: Final = ("kernel_events", "tasks", "losses")
_MIGRATIONS_TABLE: Final = """\
CREATE TABLE IF NOT EXISTS migrations
(version UInt32, title String, checksum String, applied_at DateTime64(3, 'UTC') DEFAULT now64(3))
ENGINE = ReplacingMergeTree(applied_at) ORDER BY version"""


class ClickHouseStore(DocumentStore):
    """All tables of one database."""

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

    # --- reads

    def holds_event(self, node: str, boot_id: str, *, time_mono_ns: int, kind: int, cpu: int, seq: int) -> bool:
        """Whether an event is stored: one point read along the table's key."""
        found = self.client.rows(
            "SELECT 1 AS found FROM kernel_events WHERE node = {node:String} AND boot_id = {boot:String}"
            " AND time_mono_ns = {time:Int64} AND kind = {kind:UInt8} AND cpu = {cpu:UInt16} AND seq = {seq:UInt64} LIMIT 1",
            {"node": node, "boot": boot_id, "time": time_mono_ns, "kind": kind, "cpu": cpu, "seq": seq},
        )
        return bool(found)

    def events(self, node: str, boot_id: str, from_ns: int, to_ns: int, cpus: Sequence[int] = ()) -> pa.RecordBatch:
        """Events of [from_ns, to_ns) on the monotonic clock as a batch of `EVENTS`, each once, by CPU and sequence number."""
        table = self.client.table(
            f"SELECT {', '.join(EVENTS.names)} FROM kernel_events FINAL"
            " WHERE node = {node:String} AND boot_id = {boot:String}"
            " AND time_mono_ns >= {from:Int64} AND time_mono_ns < {to:Int64}"
            " AND (empty({cpus:Array(UInt16)}) OR has({cpus:Array(UInt16)}, cpu)) ORDER BY cpu, seq",
            {"node": node, "boot": boot_id, "from": from_ns, "to": to_ns, "cpus": array_literal(cpus)},
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
