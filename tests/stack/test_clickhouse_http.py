"""The ClickHouse HTTP interface as its users see it: plain curl and an unmodified clickhouse-connect."""

import gzip
import json
import shutil
import socket
import subprocess
import threading
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
import zstandard

from stack.clickhouse_codec import decode_blocks, encode_blocks

pytestmark = pytest.mark.servers


@pytest.fixture
def curl(stack):
    """Run curl on the server; returns (status, headers, body). The query goes into the body unless `query` says otherwise."""
    program = shutil.which("curl")
    assert program, "needs curl: apt-get install curl"

    def run(path="/", *options, data=None):
        command = [program, "-sS", "-i", "--max-time", "60", *options]
        command += ["--data-binary", "@-"] if data is not None else []
        done = subprocess.run([*command, stack.clickhouse_url + path], input=data, capture_output=True, check=True)
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head, _, body = body.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:]), body

    return run


@pytest.fixture
def connect(stack):
    """New clients of clickhouse-connect, closed at the end."""
    import clickhouse_connect

    url, clients = urlsplit(stack.clickhouse_url), []

    def make(**options):
        clients.append(clickhouse_connect.get_client(host=url.hostname, port=url.port, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def table(curl):
    """A table of this test alone, (a UInt64, s String)."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    assert curl(data=f"CREATE TABLE {name} (a UInt64, s String) ENGINE = MergeTree ORDER BY a".encode())[0] == 200
    yield name
    curl(data=f"DROP TABLE {name} SYNC".encode())


def test_curl_asks_in_every_way_that_the_protocol_knows(curl):
    assert curl("/ping")[2] == b"Ok.\n"
    assert curl("/replicas_status")[2] == b"Ok.\n"
    assert curl("/")[2] == b"Ok.\n"
    assert curl("/?query=SELECT%2041%2B1")[2] == b"42\n"
    assert curl(data=b"SELECT 42")[2] == b"42\n"
    assert curl("/?query=SELECT%2040%2B", data=b"2")[2] == b"42\n"
    assert curl("/?param_x=a%5Ctb", data=b"SELECT {x:String}")[2] == b"a\\tb\n"
    assert curl("/?max_threads=3", data=b"SELECT getSetting('max_threads')")[2] == b"3\n"
    assert curl("/?database=system", data=b"SELECT currentDatabase()")[2] == b"system\n"
    assert curl(data=b"SHOW DATABASES LIKE 'system'")[2] == b"system\n"
    assert curl("/nothing")[0] == 404


def test_an_answer_carries_the_headers_of_clickhouse(curl):
    status, headers, body = curl(
        "/?query_id=q-7&default_format=JSONEachRow&wait_end_of_query=1", data=b"SELECT number AS n FROM numbers(3)"
    )

    assert (status, body) == (200, b'{"n":0}\n{"n":1}\n{"n":2}\n')
    assert headers["X-ClickHouse-Query-Id"] == "q-7"
    assert headers["X-ClickHouse-Format"] == "JSONEachRow"
    assert headers["X-ClickHouse-Timezone"]
    assert headers["Content-Type"] == "application/x-ndjson; charset=UTF-8"
    assert json.loads(headers["X-ClickHouse-Summary"])["result_rows"] == "3"


ERRORS = [
    (b"SELEC 1", 400, "62"),
    (b"SELECT * FROM nowhere", 404, "60"),
    (b"SELECT nothing", 404, "47"),
    (b"SELECT 1; SELECT 2", 400, "62"),
    (b"SELECT 1 FORMAT Nope", 404, "73"),
    (b"SELECT throwIf(1)", 500, "395"),
    (b"INSERT INTO nowhere FORMAT CSV\n1", 404, "60"),
]


@pytest.mark.parametrize(("query", "status", "code"), ERRORS, ids=[e[0].decode()[:24] for e in ERRORS])
def test_an_error_has_clickhouses_code_and_status(curl, query, status, code):
    got, headers, body = curl(data=query)

    assert (got, headers["X-ClickHouse-Exception-Code"]) == (status, code)
    assert body.startswith(f"Code: {code}. DB::Exception: ".encode())


def test_wrong_settings_databases_and_passwords_are_refused(curl):
    assert curl("/?nothing_such=1", data=b"SELECT 1")[1]["X-ClickHouse-Exception-Code"] == "115"
    assert curl("/?database=nowhere", data=b"SELECT 1")[1]["X-ClickHouse-Exception-Code"] == "81"
    assert curl("/?user=default&password=wrong", data=b"SELECT 1")[0] == 403
    assert curl("/", "-u", "nobody:x", data=b"SELECT 1")[1]["X-ClickHouse-Exception-Code"] == "516"
    assert curl("/", "-H", "X-ClickHouse-User: default", data=b"SELECT 1")[2] == b"1\n"
    assert curl("/?user=default", "-u", "default:", data=b"SELECT 1")[0] == 403  # two ways at once


def test_a_get_changes_nothing(curl, table):
    status, headers, _ = curl(f"/?query=INSERT%20INTO%20{table}%20VALUES%20(1,'x')")

    assert (status, headers["X-ClickHouse-Exception-Code"]) == (500, "164")
    assert curl(f"/?query=SELECT%20count()%20FROM%20{table}")[2] == b"0\n"


@pytest.mark.parametrize(
    ("data_format", "data"),
    [
        ("CSV", b'1,"x"\n2,"y"\n'),
        ("TabSeparated", b"1\tx\n2\ty\n"),
        ("JSONEachRow", b'{"a":1,"s":"x"}\n{"a":2,"s":"y"}'),
        ("Values", b"(1,'x'),(2,'y')"),
    ],
)
def test_rows_are_inserted_from_the_query_or_the_body(curl, table, data_format, data):
    assert curl(f"/?query=INSERT%20INTO%20{table}%20FORMAT%20{data_format}", data=data)[0] == 200
    status, headers, _ = curl(data=f"INSERT INTO {table} FORMAT {data_format}\n".encode() + data)

    assert (status, json.loads(headers["X-ClickHouse-Summary"])["written_rows"]) == (200, "2")
    assert curl(data=f"SELECT a, s, count() FROM {table} GROUP BY ALL ORDER BY a".encode())[2] == b"1\tx\t2\n2\ty\t2\n"


@pytest.mark.parametrize("data_format", ["Native", "ArrowStream", "Arrow", "Parquet", "RowBinary", "JSONEachRow"])
def test_what_a_format_gives_it_takes_back(curl, table, data_format):
    curl(data=f"INSERT INTO {table} SELECT number, toString(number) FROM numbers(10007)".encode())
    status, _, body = curl(data=f"SELECT * FROM {table} ORDER BY a FORMAT {data_format}".encode())

    assert (
        curl(f"/?query=INSERT%20INTO%20{table}%20FORMAT%20{data_format}", "-H", "Transfer-Encoding: chunked", data=body)[0]
        == 200
    )

    assert status == 200
    assert curl(data=f"SELECT count(), uniqExact(a, s), sum(a) FROM {table}".encode())[2] == b"20014\t10007\t100130042\n"


def test_bodies_are_compressed_both_ways(curl, table):
    rows = b"".join(b"%d\tabc\n" % i for i in range(1009))
    insert = f"/?query=INSERT%20INTO%20{table}%20FORMAT%20TSV"
    assert curl(insert, "-H", "Content-Encoding: gzip", data=gzip.compress(rows))[0] == 200
    assert curl(insert, "-H", "Content-Encoding: zstd", data=zstandard.compress(rows))[0] == 200
    assert curl(f"{insert}&decompress=1", data=b"".join(encode_blocks([rows])))[0] == 200
    query = f"SELECT DISTINCT * FROM {table} ORDER BY a".encode()

    packed = curl("/", "-H", "Accept-Encoding: gzip", data=query)
    blocks = curl("/?compress=1", data=query)

    assert packed[1]["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed[2]) == rows == b"".join(decode_blocks([blocks[2]]))
    assert curl("/", "--compressed", data=query)[2] == rows
    assert curl(data=f"SELECT count() FROM {table}".encode())[2] == b"3027\n"
    assert curl(insert, "-H", "Content-Encoding: gzip", data=b"1\tx\n")[1]["X-ClickHouse-Exception-Code"] == "271"


def test_a_large_result_is_streamed_and_a_late_error_cuts_it_off(curl, stack):
    status, headers, body = curl(data=b"SELECT number FROM numbers(1000003) FORMAT RowBinary")
    assert (status, len(body), "Content-Length" in headers) == (200, 8000024, False)

    done = subprocess.run(
        ["curl", "-sS", stack.clickhouse_url, "-d", "SELECT throwIf(number = 900001) FROM numbers(1000003) FORMAT TSV"],
        capture_output=True,
        check=False,
    )

    assert done.returncode != 0  # curl sees that the answer is cut
    assert b"__exception__" in done.stdout
    assert b"Code: 395" in done.stdout


def test_a_session_keeps_its_tables_and_settings(curl):
    session = f"/?session_id={uuid.uuid4()}"
    curl(session, data=b"CREATE TEMPORARY TABLE mine (a Int32)")
    curl(session, data=b"INSERT INTO mine VALUES (7)")
    curl(session, data=b"SET max_threads = 1")

    assert curl(session, data=b"SELECT a FROM mine")[2] == b"7\n"
    assert curl(f"{session}&max_threads=5", data=b"SELECT getSetting('max_threads')")[2] == b"5\n"
    assert curl(session, data=b"SELECT getSetting('max_threads')")[2] == b"1\n"
    assert curl(data=b"SELECT a FROM mine")[0] == 404
    assert curl(f"/?session_id={uuid.uuid4()}&session_check=1", data=b"SELECT 1")[1]["X-ClickHouse-Exception-Code"] == "372"


def test_a_session_serves_one_request_at_a_time(curl):
    session = f"/?session_id={uuid.uuid4()}"
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(curl, session, data=b"SELECT sleepEachRow(0.5) FROM numbers(3) FORMAT Null")
        codes = set()
        while not slow.done() and "373" not in codes:
            codes.add(curl(session, data=b"SELECT 1")[1].get("X-ClickHouse-Exception-Code"))

        assert "373" in codes or slow.result()[1].get("X-ClickHouse-Exception-Code") == "373"


def test_queries_run_side_by_side(stack):
    """A long query does not hold up the others: they finish while it runs."""
    url = stack.clickhouse_url
    finished = threading.Event()

    def slow():
        urllib.request.urlopen(url, b"SELECT sleepEachRow(1) FROM numbers(3) FORMAT Null").read()
        finished.set()

    def quick(i):
        return urllib.request.urlopen(url, b"SELECT %d" % i).read(), finished.is_set()

    thread = threading.Thread(target=slow)
    thread.start()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(quick, range(40)))
    thread.join()

    assert [a for a, _ in answers] == [b"%d\n" % i for i in range(40)]
    assert not any(late for _, late in answers)


def test_a_client_that_leaves_in_the_middle_of_an_insert_leaves_no_rows(stack, curl, table):
    url = urlsplit(stack.clickhouse_url)
    with socket.create_connection((url.hostname, url.port)) as connection:
        head = f"POST /?query=INSERT%20INTO%20{table}%20FORMAT%20TSV HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode() + b"1\tx\n" * 1000)

    assert curl(data=f"SELECT count() FROM {table}".encode())[2] == b"0\n"


def test_external_tables_come_with_a_form(curl, tmp_path):
    rows = tmp_path / "rows.tsv"
    rows.write_text("1\n2\n39\n")
    form = ["-F", f"ext=@{rows}", "-F", "ext_structure=x UInt8"]

    assert curl("/?query=SELECT%20sum(x)%20FROM%20ext", *form)[2] == b"42\n"
    assert curl("/", *form, "-F", "query=SELECT sum(x) + {n:UInt8} FROM ext", "-F", "param_n=1")[2] == b"43\n"


@pytest.mark.parametrize("compress", [False, "lz4", "zstd", "gzip"])
def test_clickhouse_connect_works_unmodified(connect, table, compress):
    client = connect(compress=compress)
    numbers = list(range(50021))

    summary = client.insert(table, [numbers, [f"s{n % 7}" for n in numbers]], column_names=["a", "s"], column_oriented=True)
    client.insert_arrow(table, pa.table({"a": pa.array([10**9], pa.uint64()), "s": ["arrow"]}))

    assert summary.written_rows == 50021
    assert client.query(f"SELECT count(), sum(a) FROM {table} WHERE a < 10").result_rows == [(10, 45)]
    assert client.query_arrow(f"SELECT a FROM {table} WHERE s = 'arrow'").to_pydict() == {"a": [10**9]}
    assert client.query("SELECT {x:UInt8} + 1", parameters={"x": 4}).result_rows == [(5,)]
    with client.query_row_block_stream(f"SELECT a FROM {table} ORDER BY a") as stream:
        assert [row[0] for block in stream for row in block] == [*numbers, 10**9]


def test_clickhouse_connect_sees_errors_and_keeps_its_session(connect):
    from clickhouse_connect.driver.exceptions import DatabaseError, StreamFailureError

    client = connect()
    client.command("CREATE TEMPORARY TABLE mine (a Int32)")
    client.command("INSERT INTO mine VALUES (5)")

    assert client.query("SELECT * FROM mine").result_rows == [(5,)]
    with pytest.raises(DatabaseError, match="UNKNOWN_TABLE"):
        client.query("SELECT * FROM nowhere")
    with (
        pytest.raises(StreamFailureError),
        client.query_row_block_stream("SELECT throwIf(number = 900001) FROM numbers(1000003)") as stream,
    ):
        list(stream)
    assert client.query("SELECT 1").result_rows == [(1,)]


def test_a_password_is_asked_for_when_there_is_one(tmp_path, monkeypatch):
    """A server of its own, with a password: it starts healthy, and refuses whoever does not know it."""
    from stack_fixture import stack_settings

    from events.errors import StoreError
    from events.settings import ClickHouseSettings
    from sinks.documents import DocumentStore
    from stack.local import LocalStack

    settings = stack_settings(tmp_path)
    monkeypatch.setenv("KPROBE_LOCAL_CLICKHOUSE_PASSWORD", "pa\u00df: word")
    servers = LocalStack(settings.stack)
    servers.servers = [s for s in servers.servers if s.name == "clickhouse"]
    monkeypatch.setattr(servers, "_create_topics", lambda: None)  # there is no Kafka here
    servers.up()
    try:
        for password, right in (("pa\u00df: word", True), ("", False), ("wrong", False)):
            store = DocumentStore(ClickHouseSettings(url=settings.clickhouse.url, password=password, database="system"))
            if right:
                assert store.client.rows("SELECT 1 AS n") == [{"n": 1}]
            else:
                with pytest.raises(StoreError, match="KPROBE_CLICKHOUSE__PASSWORD"):
                    store.client.rows("SELECT 1 AS n")
            store.close()
    finally:
        servers.down()
