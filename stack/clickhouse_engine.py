"""The ClickHouse engine in this process: connections, sessions, queries and streamed inserts.

There is one engine a process and one process a data folder. A connection costs 0.1 ms, holds a session of its own (current
database, settings, temporary tables) and releases the interpreter while it works, so every request gets a fresh one,
requests run side by side, and settings of one request cannot reach another. A named session keeps its connection until it
expires.

Every error is an EngineError with ClickHouse's own code and text.
"""

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
from chdb import _chdb as _compiled

from stack.clickhouse_sql import quote, quote_name

__all__ = ["SESSION_TIMEOUT_MAX_S", "STREAMABLE", "Answer", "Connection", "Engine", "EngineError"]

_chdb: Any = _compiled  # has no stubs
_CODE: Final = re.compile(r"Code: (\d+)\.")
_STD_EXCEPTION: Final = 1001
_SYNTAX_ERROR, _READONLY, _SESSION_NOT_FOUND, _SESSION_LOCKED = 62, 164, 372, 373
# Formats whose blocks can be written one after another; all others need the whole result for their frame.
STREAMABLE: Final = frozenset({"Native", "RowBinary", "JSONEachRow", "JSONCompactEachRow", "TabSeparated", "TSV", "CSV"})
SESSION_TIMEOUT_MAX_S: Final = 3600


class EngineError(Exception):
    """An error as ClickHouse words it; `code` is its number."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _engine_error(error: Exception, version: str) -> EngineError:
    text = str(error).strip()
    found = _CODE.search(text)
    if "(version " not in text:
        text = f"{text} (version {version})"
    return EngineError(int(found.group(1)) if found else _STD_EXCEPTION, text)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a query gave: its bytes, and the counts of the summary header."""

    data: Iterable[memoryview | bytes] = ()
    read_rows: int = 0
    read_bytes: int = 0
    written_rows: int = 0
    written_bytes: int = 0
    result_rows: int = 0
    result_bytes: int = 0


@dataclass(slots=True)
class _Session:
    """A named session: its connection, who uses it, when it expires, and the settings that its last request had brought."""

    connection: "Connection"
    lock: threading.Lock = field(default_factory=threading.Lock)
    expires_mono_s: float = 0.0


class Engine:
    """The engine on one data folder. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._keep = _chdb.connect(self._path)  # the engine lives as long as its last connection
        self.version: str = self._text("SELECT version()")
        self.timezone: str = self._text("SELECT timezone()")
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._guard = threading.Lock()

    def _text(self, query: str) -> str:
        return bytes(self._keep.query(query, "TabSeparated").bytes()).decode().strip()

    def error(self, code: int, name: str, text: str) -> EngineError:
        """An error of ours in ClickHouse's words."""
        return EngineError(code, f"Code: {code}. DB::Exception: {text} ({name}) (version {self.version})")

    def close(self) -> None:
        """Close every connection; the engine writes what it holds and ends."""
        with self._guard:
            for session in self._sessions.values():
                session.connection.close()
            self._sessions.clear()
            self._keep.close()

    @contextmanager
    def connection(self) -> Iterator["Connection"]:
        """A fresh connection for one request."""
        connection = Connection(self, _chdb.connect(self._path))
        try:
            yield connection
        finally:
            connection.close()

    @contextmanager
    def session(self, user: str, name: str, timeout_s: int, must_exist: bool) -> Iterator["Connection"]:
        """The connection of a named session; raises EngineError if another request is using it."""
        with self._guard:
            self._expire()
            session = self._sessions.get((user, name))
            if session is None:
                if must_exist:
                    raise self.error(_SESSION_NOT_FOUND, "SESSION_NOT_FOUND", f"Session {name} not found")
                session = self._sessions[user, name] = _Session(Connection(self, _chdb.connect(self._path), named=True))
            if not session.lock.acquire(blocking=False):
                raise self.error(_SESSION_LOCKED, "SESSION_IS_LOCKED", f"Session {name} is locked by a concurrent client")
        try:
            yield session.connection
        finally:
            session.expires_mono_s = time.monotonic() + timeout_s
            session.lock.release()

    def _expire(self) -> None:
        now = time.monotonic()
        for key, session in list(self._sessions.items()):
            if not session.lock.locked() and session.expires_mono_s < now:
                session.connection.close()
                del self._sessions[key]


class Connection:
    """One session of the engine; used by one request at a time."""

    def __init__(self, engine: Engine, raw: Any, *, named: bool = False) -> None:
        self._engine = engine
        self._raw = raw
        self._named = named
        self._original: dict[str, str] = {}  # values that settings of the last request replaced, in a named session
        self._applied: dict[str, str] = {}

    def close(self) -> None:
        """End the session."""
        self._raw.close()

    def prepare(self, database: str, settings: Mapping[str, str], parameters: Mapping[str, str]) -> None:
        """Set what one request brings: its database, settings and query parameters."""
        if database:
            self._run(f"USE {quote_name(database)}")
        if settings != self._applied:
            self.restore()
            self._apply(settings)
        for name, value in parameters.items():
            self._run(f"SET {quote_name(f'param_{name}')} = {quote(value)}")

    def restore(self) -> None:
        """Take back the settings of the last request: a named session outlives its requests, their settings do not."""
        if self._original:
            self._set(self._original)
        self._original, self._applied = {}, {}

    def _apply(self, settings: Mapping[str, str]) -> None:
        if not settings:
            return
        original: dict[str, str] = {}
        if self._named:
            names = ", ".join(quote(name) for name in settings)
            rows = self._run(f"SELECT name, value FROM system.settings WHERE name IN ({names})", "JSONCompactEachRow")
            original = dict(map(orjson.loads, bytes(rows.bytes()).splitlines()))
        self._set(settings)
        self._original, self._applied = original, dict(settings)

    def _set(self, settings: Mapping[str, str]) -> None:
        self._run("SET " + ", ".join(f"{quote_name(name)} = {quote(value)}" for name, value in settings.items()))

    def classify(self, query: bytes) -> str:
        """READ_ONLY, MUTATING, CONTROL or UNKNOWN. Raises EngineError for more than one statement."""
        found = self._raw.classify_query(query)
        if found["statement_count"] > 1:
            raise self._engine.error(_SYNTAX_ERROR, "SYNTAX_ERROR", "Multi-statements are not allowed")
        return str(found["query_class"].name)

    def readonly_error(self) -> EngineError:
        """What a GET gets for a query that changes something."""
        text = "Cannot execute query in readonly mode. For queries over HTTP, method GET implies readonly. "
        return self._engine.error(_READONLY, "READONLY", text + "You should use method POST for modifying queries.")

    def external_table(self, name: str, structure: str, data_format: str, content: bytes) -> None:
        """A temporary table with these rows, replacing one of the same name; `name` comes quoted."""
        self._run(f"CREATE OR REPLACE TEMPORARY TABLE {name} ({structure}) ENGINE = Memory")
        self.insert(f"INSERT INTO {name}".encode(), data_format, (content,))

    def query(self, query: bytes, result_format: str) -> Answer:
        """Run a query to its end."""
        result = self._run(query, result_format)
        view = result.get_memview()
        return Answer(
            data=(view.view(),) if result.size() else (),
            read_rows=result.storage_rows_read(),
            read_bytes=result.storage_bytes_read(),
            written_rows=result.rows_written(),
            written_bytes=result.bytes_written(),
            result_rows=result.rows_read(),
            result_bytes=result.bytes_read(),
        )

    def stream(self, query: bytes, result_format: str) -> Iterator[bytes]:
        """The result block by block; raises EngineError between two blocks if the query fails half-way."""
        try:
            handle = self._raw.send_query(query, result_format)
            while True:
                block = self._raw.streaming_fetch_result(handle)
                if block.size() == 0 and block.rows_read() == 0:
                    return
                yield bytes(block.bytes())
        except RuntimeError as error:
            raise _engine_error(error, self._engine.version) from error

    def insert(self, statement: bytes, data_format: str, chunks: Iterable[bytes]) -> Answer:
        """Stream rows in `data_format` into the engine, which parses them; nothing is parsed here."""
        began = None
        try:
            began = self._raw.send_insert(statement.decode(), data_format)
            for chunk in chunks:
                if chunk:
                    self._raw.insert_append(began, chunk)
            result = self._raw.insert_done(began)
        except RuntimeError as error:
            raise _engine_error(error, self._engine.version) from error
        except BaseException:
            if began is not None:
                self._raw.insert_cancel(began)  # the client went away half-way
            raise
        return Answer(written_rows=result.rows_written(), written_bytes=result.bytes_written())

    def _run(self, query: str | bytes, result_format: str = "TabSeparated") -> Any:
        try:
            return self._raw.query(query, result_format)
        except RuntimeError as error:
            raise _engine_error(error, self._engine.version) from error
