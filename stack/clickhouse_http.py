"""ClickHouse's HTTP interface in front of the engine in this process: `python -m stack.clickhouse_http FOLDER PORT`.

Speaks the protocol of the real server as far as clients use it, so that nobody needs to know which one answers:

- GET and POST on `/`: the query in `?query=`, in the body, or split over both (the body then continues the query; for an INSERT
  it is the data); GET implies readonly. `/ping`, `/replicas_status`.
- parameters `database`, `default_format`, `query_id`, `session_id` (with `session_timeout`, `session_check`), `param_NAME`
  for `{NAME:Type}`, `compress`, `decompress`, `wait_end_of_query`, `user`, `password`; every other one is a setting. Headers
  X-ClickHouse-User, -Key, -Database, -Format; Basic authorization. multipart/form-data: fields are parameters, files are
  external tables.
- bodies compressed both ways (`stack.clickhouse_codec`), chunked or with a length.
- answers carry X-ClickHouse-Query-Id, -Format, -Timezone, -Summary and -Server-Display-Name; an error carries
  -Exception-Code, ClickHouse's text and the status that the real server gives it. An error after the first block of a streamed
  answer breaks the connection off after the text, as there: a cut answer is never taken for a whole one.

Rows are never parsed here: an INSERT streams its body into the engine in the client's own format. One user, whose name and
password come from KPROBE_LOCAL_CLICKHOUSE_USER and _PASSWORD (default: `default` without a password). Loopback only.
Ends cleanly on SIGTERM: no new requests, the running ones finish.
"""

import base64
import binascii
import email.policy
import hmac
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import orjson

from stack.clickhouse_codec import CodecError, choose_encoding, decode, decode_blocks, encode, encode_blocks
from stack.clickhouse_engine import SESSION_TIMEOUT_MAX_S, STREAMABLE, Answer, Connection, Engine, EngineError
from stack.clickhouse_sql import inline_insert, is_select, output_format, quote_name

__all__ = ["Server", "http_status", "main"]

# Parameters that are neither settings nor query parameters.
_RESERVED: Final = frozenset(
    {"query", "database", "default_format", "user", "password", "quota_key", "query_id", "session_id", "session_timeout"}
    | {"session_check", "close_session", "compress", "decompress", "wait_end_of_query", "buffer_size", "role", "stacktrace"}
    | {"client_protocol_version"}
)
# Settings of the HTTP server itself: the engine knows them, but they change nothing there.
_HTTP_SETTINGS: Final = frozenset(
    {"enable_http_compression", "http_zlib_compression_level", "send_progress_in_http_headers", "add_http_cors_header"}
    | {"http_headers_progress_interval_ms", "cancel_http_readonly_queries_on_client_close", "http_wait_end_of_query"}
    | {"http_response_buffer_size"}
)
_CONTENT_TYPES: Final[Mapping[str, str]] = {
    "JSON": "application/json; charset=UTF-8",
    "JSONCompact": "application/json; charset=UTF-8",
    "JSONEachRow": "application/x-ndjson; charset=UTF-8",
    "JSONCompactEachRow": "application/x-ndjson; charset=UTF-8",
    "CSV": "text/csv; charset=UTF-8; header=absent",
    "CSVWithNames": "text/csv; charset=UTF-8; header=present",
    "TabSeparated": "text/tab-separated-values; charset=UTF-8",
    "TSV": "text/tab-separated-values; charset=UTF-8",
    "Native": "application/octet-stream",
    "Arrow": "application/octet-stream",
    "ArrowStream": "application/octet-stream",
    "Parquet": "application/octet-stream",
    "RowBinary": "application/octet-stream",
}
_STATUS: Final[Mapping[int, frozenset[int]]] = {
    401: frozenset({194}),
    403: frozenset({192, 193, 516, 512, 497}),
    400: frozenset({36, 427, 6, 25, 26, 38, 41, 72, 441, 675, 676, 27, 376, 15, 44, 8, 56, 223, 167, 168, 62, 117, 53, 321}),
    404: frozenset({60, 46, 47, 50, 81, 115, 106, 63, 73, 336, 78, 511}),
    408: frozenset({159}),
    411: frozenset({381}),
    413: frozenset({66}),
    501: frozenset({48}),
    503: frozenset({209, 76, 439}),
}
_HEAD_BYTES: Final = 1 << 18  # as the real server's max_query_size: an INSERT must be recognisable within it
_READ_BYTES: Final = 1 << 18
_IDLE_TIMEOUT_S: Final = 300.0
_DRAIN_TIMEOUT_S: Final = 15.0
_DRAIN_MAX_BYTES: Final = 1 << 28
_AUTHENTICATION_FAILED: Final = (516, "AUTHENTICATION_FAILED")
_EXTERNAL_SUFFIXES: Final = ("_format", "_types", "_structure")
_NOT_FOUND: Final = (
    "There is no handle {path}\n\nUse / or /ping for health checks.\n"
    "Or /replicas_status for more sophisticated health checks.\n\n"
    "Send queries from your program with POST method or GET /?query=...\n"
)


def http_status(code: int) -> int:
    """The status that the real server gives an exception code."""
    return next((status for status, codes in _STATUS.items() if code in codes), 500)


class _CutOffError(Exception):
    """The client went away in the middle of its body."""


@dataclass(frozen=True, slots=True)
class _External:
    """A file of a multipart form: a table for this query only."""

    name: str
    structure: str
    format: str
    content: bytes


@dataclass(slots=True)
class _Request:
    """What one request asks for, with defaults filled in."""

    parameters: dict[str, str]
    headers: Mapping[str, str]
    body: Iterator[bytes]
    external: list[_External] = field(default_factory=list)

    @property
    def database(self) -> str:
        return self.headers.get("X-Clickhouse-Database") or self.parameters.get("database", "")

    @property
    def default_format(self) -> str:
        return self.headers.get("X-Clickhouse-Format") or self.parameters.get("default_format", "")

    def flag(self, name: str, default: bool = False) -> bool:
        """A parameter that is 0 or 1."""
        value = self.parameters.get(name)
        return default if value is None else value.lower() not in ("0", "false", "")

    def settings(self) -> dict[str, str]:
        """Every parameter that is a setting of the engine."""
        external = tuple(f"{table.name}{suffix}" for table in self.external for suffix in _EXTERNAL_SUFFIXES)
        skipped = _RESERVED | _HTTP_SETTINGS | {"", *external}
        return {k: v for k, v in self.parameters.items() if k not in skipped and not k.startswith("param_")}

    def query_parameters(self) -> dict[str, str]:
        """The values of `{name:Type}`."""
        return {k.removeprefix("param_"): v for k, v in self.parameters.items() if k.startswith("param_")}


class Server(ThreadingHTTPServer):
    """The HTTP server of one engine. `serve_forever` until `drain`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, engine: Engine, user: str = "default", password: str = "") -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.engine = engine
        self.user = user
        self.password = password
        self._running = 0
        self._changed = threading.Condition()

    def enter(self) -> None:
        """Count a request that has begun."""
        with self._changed:
            self._running += 1

    def leave(self) -> None:
        """Count a request that has ended."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def drain(self) -> bool:
        """Wait until no request runs; False if some still do after the time limit."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running == 0, _DRAIN_TIMEOUT_S)


class _Handler(BaseHTTPRequestHandler):
    """One client connection; requests follow one another on it."""

    protocol_version = "HTTP/1.1"
    server_version = "ClickHouse"
    sys_version = ""
    timeout = _IDLE_TIMEOUT_S
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: Server

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Requests are not logged; errors are, by `_fail`."""

    def _handle(self) -> None:
        self.server.enter()
        self._sent = self._cut = False
        self._body = self._read_body()
        try:
            self._route()
            self._skip_body()
            self.wfile.flush()
        except (_CutOffError, ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            self.server.leave()

    def _route(self) -> None:
        url = urlsplit(self.path)
        parameters = dict(parse_qsl(url.query, keep_blank_values=True))
        if url.path in ("/ping", "/replicas_status"):
            self._plain(200, "Ok.\n")
        elif url.path not in ("/", ""):
            self._plain(404, _NOT_FOUND.format(path=url.path))
        elif self.command != "POST" and "query" not in parameters:
            self._plain(200, "Ok.\n")
        else:
            self._query(parameters)

    def _query(self, parameters: dict[str, str]) -> None:
        self._query_id = parameters.get("query_id") or self.headers.get("X-ClickHouse-Query-Id") or str(uuid.uuid4())
        try:
            request = self._request(parameters)
            self._authenticate(request.parameters)
            with self._session(request) as connection:
                self._run(request, connection)
        except CodecError as error:
            self._fail(self.server.engine.error(error.code, error.name, str(error)))
        except EngineError as error:
            self._fail(error)

    def _request(self, parameters: dict[str, str]) -> _Request:
        headers = {name.title(): value for name, value in self.headers.items()}
        body = decode(headers.get("Content-Encoding", "").lower(), self._body)
        external: list[_External] = []
        if headers.get("Content-Type", "").lower().startswith("multipart/form-data"):
            external = _read_form(headers["Content-Type"], b"".join(body), parameters)
            body = iter(())
        request = _Request(parameters, headers, body, external)
        if request.flag("decompress"):
            request.body = decode_blocks(request.body)
        return request

    def _authenticate(self, parameters: Mapping[str, str]) -> None:
        """The one user of this server, by headers, Basic authorization or parameters, never by two of them."""
        given: list[tuple[str, str]] = []
        if "X-ClickHouse-User" in self.headers or "X-ClickHouse-Key" in self.headers:
            given.append((self.headers.get("X-ClickHouse-User", "default"), self.headers.get("X-ClickHouse-Key", "")))
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                name, _, key = base64.b64decode(token, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError) as error:
                raise self._error(_AUTHENTICATION_FAILED, "Invalid HTTP Basic authorization header") from error
            given.append((name, key))
        elif scheme:
            raise self._error(
                _AUTHENTICATION_FAILED, f"Invalid authentication: '{scheme}' HTTP Authorization scheme is not supported"
            )
        if "user" in parameters or "password" in parameters:
            given.append((parameters.get("user", "default"), parameters.get("password", "")))
        if len(given) > 1:
            raise self._error(
                _AUTHENTICATION_FAILED, "Invalid authentication: it is not allowed to use two ways simultaneously"
            )
        user, password = given[0] if given else ("default", "")
        right = hmac.compare_digest(f"{user}\0{password}".encode(), f"{self.server.user}\0{self.server.password}".encode())
        if not right:
            text = f"{user}: Authentication failed: password is incorrect, or there is no user with such name."
            raise self._error(_AUTHENTICATION_FAILED, text)
        self._user = user

    def _session(self, request: _Request) -> AbstractContextManager[Connection]:
        name = request.parameters.get("session_id")
        if not name:
            return self.server.engine.connection()
        text = request.parameters.get("session_timeout", "60")
        if not text.isdigit() or int(text) > SESSION_TIMEOUT_MAX_S:
            raise self._error((374, "INVALID_SESSION_TIMEOUT"), f"Invalid session timeout: '{text}'")
        return self.server.engine.session(self._user, name, int(text), request.flag("session_check"))

    def _run(self, request: _Request, connection: Connection) -> None:
        began = time.monotonic_ns()
        text, rest = self._head(request)
        insert = inline_insert(text)
        if insert is None:
            text += b"".join(rest)
        kind = "MUTATING" if insert is not None else connection.classify(text)
        if kind.startswith("MUTATING") and self.command != "POST":
            raise connection.readonly_error()
        # SET must change the session itself, not the settings that this one request has brought.
        settings = {} if kind == "CONTROL" and request.parameters.get("session_id") else request.settings()
        connection.prepare(request.database, settings, request.query_parameters())
        for table in request.external:
            connection.external_table(quote_name(table.name), table.structure, table.format, table.content)
        if insert is not None:
            data_format = insert.format or request.default_format or "Values"
            answer = connection.insert(insert.statement, data_format, chain((text[insert.data_at :],), rest))
            self._answer(request, answer, "", began)
            return
        result_format = output_format(text) or request.default_format or "TabSeparated"
        if result_format in STREAMABLE and is_select(text) and not request.flag("wait_end_of_query"):
            self._stream(request, connection.stream(text, result_format), result_format, began)
        else:
            self._answer(request, connection.query(text, result_format), result_format, began)

    def _head(self, request: _Request) -> tuple[bytes, Iterator[bytes]]:
        """The text of the query as far as it matters for an INSERT, and what follows it."""
        text = request.parameters.get("query", "").encode()
        if text:
            text += b"\n"
        for chunk in request.body:
            text += chunk
            if len(text) >= _HEAD_BYTES:
                break
        return text, request.body

    def _answer(self, request: _Request, answer: Answer, result_format: str, began_mono_ns: int) -> None:
        """Send a whole result, with its length."""
        chunks, encoding = self._pack(request, answer.data)
        body = list(chunks)
        summary = {
            "read_rows": answer.read_rows,
            "read_bytes": answer.read_bytes,
            "written_rows": answer.written_rows,
            "written_bytes": answer.written_bytes,
            "total_rows_to_read": 0,
            "result_rows": answer.result_rows or answer.written_rows,
            "result_bytes": answer.result_bytes or answer.written_bytes,
            "elapsed_ns": time.monotonic_ns() - began_mono_ns,
        }
        self._begin(200, result_format, encoding, summary)
        self.send_header("Content-Length", str(sum(len(chunk) for chunk in body)))
        self.end_headers()
        if self.command != "HEAD":
            for chunk in body:
                self.wfile.write(chunk)

    def _stream(self, request: _Request, blocks: Iterator[bytes], result_format: str, began_mono_ns: int) -> None:
        """Send a result block by block; the first one is awaited, so that most errors still get their own status."""
        first = next(blocks, b"")
        chunked = self.request_version != "HTTP/1.0"
        tag = uuid.uuid4().hex[:16]
        whole = chain((first,), self._marked(blocks, tag))
        chunks, encoding = self._pack(request, whole)
        self._begin(200, result_format, encoding, {"elapsed_ns": time.monotonic_ns() - began_mono_ns})
        self.send_header("X-ClickHouse-Exception-Tag", tag)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.end_headers()
        for chunk in chunks if self.command != "HEAD" else ():
            self._write_chunk(chunk, chunked)
        # After an error no final chunk is sent: the answer is visibly cut.
        if chunked and self.command != "HEAD" and not self._cut:
            self.wfile.write(b"0\r\n\r\n")

    def _marked(self, blocks: Iterator[bytes], tag: str) -> Iterator[bytes]:
        """The blocks; if the query fails half-way, its error between the marks that the answer's headers announce."""
        try:
            yield from blocks
        except EngineError as error:
            text = f"{error}\n"
            self._cut = self.close_connection = True
            yield f"\r\n__exception__\r\n{tag}\r\n{text}{len(text.encode())} {tag}\r\n__exception__\r\n".encode()

    def _write_chunk(self, chunk: bytes | memoryview, chunked: bool) -> None:
        if len(chunk) == 0:
            return
        if chunked:
            self.wfile.write(b"%x\r\n" % len(chunk))
        self.wfile.write(chunk)
        if chunked:
            self.wfile.write(b"\r\n")

    def _pack(self, request: _Request, data: Iterable[bytes | memoryview]) -> tuple[Iterable[bytes | memoryview], str]:
        if request.flag("compress"):
            data = encode_blocks(data)
        wanted = self.headers.get("Accept-Encoding", "") if request.flag("enable_http_compression", default=True) else ""
        encoding = choose_encoding(wanted)
        return encode(encoding, data), encoding

    def _begin(self, status: int, result_format: str, encoding: str, summary: Mapping[str, int]) -> None:
        self._sent = True
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        self.send_header("Connection", "Keep-Alive")
        self.send_header("Content-Type", _CONTENT_TYPES.get(result_format, "text/plain; charset=UTF-8"))
        self.send_header("X-ClickHouse-Server-Display-Name", "kprobe")
        self.send_header("X-ClickHouse-Query-Id", _header_safe(self._query_id))
        if result_format:
            self.send_header("X-ClickHouse-Format", _header_safe(result_format))
        self.send_header("X-ClickHouse-Timezone", self.server.engine.timezone)
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.send_header("X-ClickHouse-Summary", orjson.dumps({k: str(v) for k, v in summary.items()}).decode())

    def _fail(self, error: EngineError) -> None:
        """Send an error. If an answer has begun already, the connection breaks: the client must not take it for whole."""
        print(f"query {self._query_id}: {str(error)[:2000]}", flush=True)
        if self._sent:
            self.close_connection = True
            return
        body = f"{error}\n".encode()
        self._skip_body()
        self._begin(http_status(error.code), "", "", {})
        self.send_header("X-ClickHouse-Exception-Code", str(error.code))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _plain(self, status: int, text: str) -> None:
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        self.send_header("Content-Type", "text/html; charset=UTF-8")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _error(self, code_and_name: tuple[int, str], text: str) -> EngineError:
        return self.server.engine.error(*code_and_name, text)

    def _read_body(self) -> Iterator[bytes]:
        """The body as it arrives, with chunked transfer undone."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            yield from self._read_chunks()
            return
        left = self.headers.get("Content-Length", "0")
        remaining = int(left) if left.isdigit() else 0
        while remaining:
            part = self.rfile.read(min(remaining, _READ_BYTES))
            if not part:
                raise _CutOffError
            remaining -= len(part)
            yield part

    def _read_chunks(self) -> Iterator[bytes]:
        while True:
            line = self.rfile.readline(1024)
            size_text = line.split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", size_text):
                raise _CutOffError
            size = int(size_text, 16)
            if size == 0:
                while self.rfile.readline(65536).strip():
                    pass  # trailers
                return
            data = self.rfile.read(size + 2)
            if len(data) < size + 2:
                raise _CutOffError
            yield data[:-2]

    def _skip_body(self) -> None:
        """Read what is left of the body, so that the next request on this connection begins where it should."""
        skipped = 0
        for chunk in self._body:
            skipped += len(chunk)
            if skipped > _DRAIN_MAX_BYTES:
                self.close_connection = True
                return


def _header_safe(text: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", text)


def _read_form(content_type: str, body: bytes, parameters: dict[str, str]) -> list[_External]:
    """Fields of a multipart form go into `parameters`; its files are returned."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message: Any = BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    files = []
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition") or ""
        content = part.get_payload(decode=True) or b""
        if part.get_filename() is None:
            parameters[name] = content.decode()
        else:
            files.append((name, content))
    return [_external(name, content, parameters) for name, content in files]


def _external(name: str, content: bytes, parameters: Mapping[str, str]) -> _External:
    structure = parameters.get(f"{name}_structure", "")
    if not structure:
        types = parameters.get(f"{name}_types", "").split(",")
        structure = ", ".join(f"_{i + 1} {t}" for i, t in enumerate(types) if t)
    return _External(name, structure, parameters.get(f"{name}_format", "TabSeparated"), content)


def main(arguments: list[str]) -> None:
    """Serve FOLDER on PORT until SIGTERM."""
    folder, port = Path(arguments[0]), int(arguments[1])
    user = os.environ.get("KPROBE_LOCAL_CLICKHOUSE_USER") or "default"
    try:
        engine = Engine(folder / "data")
    except RuntimeError as error:
        sys.exit(f"cannot open {folder / 'data'}: {str(error).splitlines()[0]}")
    server = Server(port, engine, user, os.environ.get("KPROBE_LOCAL_CLICKHOUSE_PASSWORD", ""))
    # `shutdown` waits for the loop, which runs in this thread, the one that signals interrupt: it needs another.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"ClickHouse {engine.version} answers on http://127.0.0.1:{port}, data in {folder}", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.server_close()
    clean = server.drain()
    print("stopped" if clean else f"stopped with requests still running after {_DRAIN_TIMEOUT_S:.0f} s", flush=True)
    if clean:
        engine.close()
    sys.stdout.flush()
    os._exit(0)  # threads of idle connections, and the engine's own, must not delay the end


if __name__ == "__main__":
    main(sys.argv[1:])
