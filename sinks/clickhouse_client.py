"""A connection to ClickHouse's HTTP interface: one statement a call, Arrow in and out, errors with advice.

One connection, kept alive; an instance belongs to one thread. Transient failures (connection lost, server overloaded,
time-out) are retried with bounded backoff, and everything sent through here must therefore be idempotent.
"""

import base64
import http.client
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode, urlsplit

import orjson

from events.errors import ConfigError, StoreError
from events.settings import ClickHouseSettings
from sinks.retry import RETRY_LIMIT_S, TransientError, retried

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ClickHouseClient"]

Parameters = Mapping[str, str | int]

_NONE: Final[Parameters] = {}
_TIMEOUT_S: Final = 120.0
# TIMEOUT_EXCEEDED, TOO_MANY_SIMULTANEOUS_QUERIES, SOCKET_TIMEOUT, NETWORK_ERROR, MEMORY_LIMIT_EXCEEDED, TABLE_IS_READ_ONLY,
# TOO_MANY_PARTS, CANNOT_SCHEDULE_TASK, KEEPER_EXCEPTION
_TRANSIENT_CODES: Final = frozenset({159, 202, 209, 210, 241, 242, 252, 439, 999})
_TRANSIENT_STATUS: Final = frozenset({429, 502, 503, 504})
_ADVICE: Final[Mapping[int, str]] = {
    516: "set KPROBE_CLICKHOUSE__USER and KPROBE_CLICKHOUSE__PASSWORD",
    81: "`kprobe migrate` creates the database and its tables",
    60: "`kprobe migrate` creates the tables",
    16: "`kprobe migrate` brings the tables up to date",
    47: "`kprobe migrate` brings the tables up to date",
    243: "make room on the server's disk",
}


class ClickHouseClient:
    """Statements against one server. `queries` counts the requests that were sent, retries included."""

    def __init__(self, settings: ClickHouseSettings, retry_limit_s: float = RETRY_LIMIT_S) -> None:
        url = urlsplit(settings.url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"clickhouse.url {settings.url!r} is not of the form http://HOST:PORT")
        self.settings = settings
        self.queries = 0
        self._retry_limit_s = retry_limit_s
        self._path = url.path.rstrip("/") + "/"
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        default_port = 8443 if url.scheme == "https" else 8123
        self._connection = kind(url.hostname, url.port or default_port, timeout=_TIMEOUT_S)
        token = base64.b64encode(f"{settings.user}:{settings.password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}", "User-Agent": "kprobe"}

    def close(self) -> None:
        """Close the connection; the next call would open it again."""
        self._connection.close()

    def execute(self, statement: str, parameters: Parameters = _NONE, *, database: str | None = None) -> bytes:
        """Run a statement; `{name:Type}` in it stands for `parameters[name]`. Returns the answer's bytes."""
        return self._send({**self._query_parameters(parameters), "database": self._database(database)}, statement.encode())

    def rows(self, query: str, parameters: Parameters = _NONE) -> list[dict[str, Any]]:
        """The result, a dict a row: for small results."""
        answer = self.execute(f"{query} FORMAT JSONEachRow", parameters)
        return [orjson.loads(line) for line in answer.splitlines()]

    def table(self, query: str, parameters: Parameters = _NONE) -> "pa.Table":
        """The result as an Arrow table."""
        import pyarrow as pa

        answer = self.execute(f"{query} FORMAT ArrowStream", parameters)
        with pa.ipc.open_stream(pa.py_buffer(answer)) as reader:
            return reader.read_all()

    def insert(self, table: str, batch: "pa.RecordBatch", options: "pa.ipc.IpcWriteOptions", token: str = "") -> None:
        """Insert an Arrow batch; with a `token` the server drops it if it has seen the token before."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        columns = ", ".join(batch.schema.names)
        parameters = {"query": f"INSERT INTO {table} ({columns}) FORMAT ArrowStream", "database": self._database(None)}
        # Rows of one key become one at merges and in reads, which must look for them anyway; to look at every insert too
        # costs a third of its time (benchmarks/stores.py).
        parameters["optimize_on_insert"] = "0"
        if token:
            parameters |= {"insert_deduplication_token": token, "insert_deduplicate": "1"}
        self._send(parameters, memoryview(sink.getvalue()))

    def insert_lines(self, table: str, rows: bytes) -> None:
        """Insert rows that are JSON objects, one a line."""
        query = f"INSERT INTO {table} FORMAT JSONEachRow"
        self._send({"query": query, "database": self._database(None)}, rows)

    def _database(self, database: str | None) -> str:
        return self.settings.database if database is None else database

    def _query_parameters(self, values: Parameters) -> dict[str, str]:
        # Values travel in the escaping of the TSV format.
        escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\\0"})
        return {f"param_{name}": str(value).translate(escapes) for name, value in values.items()}

    def _send(self, parameters: Mapping[str, str], body: bytes | memoryview) -> bytes:
        path = f"{self._path}?{urlencode(parameters)}"
        return retried(lambda: self._attempt(path, body), self._retry_limit_s)

    def _attempt(self, path: str, body: bytes | memoryview) -> bytes:
        self.queries += 1
        try:
            self._connection.request("POST", path, body, self._headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            remedy = "is it running? `kprobe up` starts a local one, clickhouse.url says where it is"
            final = StoreError(f"ClickHouse at {self.settings.url} is unreachable ({error or type(error).__name__}); {remedy}")
            final.__cause__ = error
            raise TransientError(final) from error
        if answer.status == 200:
            return content
        raise self._refusal(answer.status, answer.headers.get("X-ClickHouse-Exception-Code", ""), content)

    def _refusal(self, status: int, code_text: str, content: bytes) -> Exception:
        code = int(code_text) if code_text.isdigit() else 0
        text = content.decode(errors="replace").strip()
        text = re.sub(r" \(version [^)]*(\([^)]*\))?\)$", "", text)[:800]
        advice = _ADVICE.get(code, "")
        remedy = f"; {advice}" if advice else ""
        error = StoreError(f"ClickHouse at {self.settings.url} refused (status {status}): {text}{remedy}")
        if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
            return TransientError(error)
        return error
