"""The parts of the ClickHouse server that need no engine: reading SQL, checksums, compression, process files."""

import gzip
import os
import random
import subprocess
import sys
from pathlib import Path

import lz4.frame
import pytest
import zstandard

from stack.cityhash import cityhash128
from stack.clickhouse_codec import CodecError, choose_encoding, decode, decode_blocks, encode, encode_blocks
from stack.clickhouse_http import http_status
from stack.clickhouse_sql import inline_insert, is_select, output_format
from stack.process import PidFile, Running

INSERTS = [
    (b"INSERT INTO t (`a`, `b`) FORMAT Native\n\x01\x02", "Native", b"\x01\x02"),
    (b"insert into t values (1, 'FORMAT CSV')", "Values", b" (1, 'FORMAT CSV')"),
    (b"INSERT INTO t SETTINGS async_insert=0 FORMAT CSV\r\n1,2\n", "CSV", b"1,2\n"),
    (b"/* FORMAT x */ INSERT INTO `format` -- VALUES\n FORMAT TSV 1\t2", "TSV", b"1\t2"),
    (b"INSERT INTO t FORMAT RowBinary\n\n\t ", "RowBinary", b"\n\t "),
    (b"insert into t", "", b""),
]


@pytest.mark.parametrize(("text", "data_format", "data"), INSERTS, ids=[i[0][:24].decode() for i in INSERTS])
def test_rows_of_an_insert_begin_where_the_engine_says(text, data_format, data):
    found = inline_insert(text)

    assert (found.format, text[found.data_at :]) == (data_format, data)


@pytest.mark.parametrize(
    "text",
    [
        b"INSERT INTO t SELECT 1 FORMAT CSV",
        b"INSERT INTO t (a) (SELECT 1)",
        b"SELECT 'insert into t values'",
        b"",
        b"WITH 1 AS x SELECT x",
    ],
)
def test_other_queries_have_no_rows_inside(text):
    assert inline_insert(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"SELECT 1 FORMAT JSON", "JSON"),
        (b"SELECT 'x FORMAT y' -- FORMAT z\n FORMAT CSV;", "CSV"),
        (b"SELECT 1 FORMAT TSV SETTINGS max_threads = 1", "TSV"),
        (b"SELECT format('{}', 1) AS format FROM t", ""),
        (b"SELECT 1", ""),
    ],
)
def test_the_format_clause_is_the_one_at_the_end(text, expected):
    assert output_format(text) == expected


def test_only_a_select_is_streamed():
    assert [is_select(t) for t in (b"select 1", b"-- x\n WITH 1 AS a SELECT a", b"SHOW TABLES", b"")] == [
        True,
        True,
        False,
        False,
    ]


# Computed with the C++ implementation of version 1.0.2: (low, high).
CITY = [
    (b"", (4463240938071824939, 4374473821787594281)),
    (b"kprobe", (10063683482046105586, 8882365890768092239)),
    (b"0123456789ab", (11092445464680716682, 6632539208097662018)),
    (b"x" * 40, (9733449124956313899, 13846749531710900790)),
    (bytes(range(256)), (3637695182468831899, 18106141058285419923)),
]


@pytest.mark.parametrize(("data", "expected"), CITY, ids=[str(len(d)) for d, _ in CITY])
def test_the_checksum_is_that_of_clickhouse(data, expected):
    assert cityhash128(data) == expected


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "lz4"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_a_body_survives_compression_whatever_the_chunks(encoding, piece):
    data = random.Random(23).randbytes(3001) + b"a" * 5003
    packed = b"".join(encode(encoding, [data[:4001], b"", data[4001:]]))

    unpacked = b"".join(decode(encoding, (packed[i : i + piece] for i in range(0, len(packed), piece))))

    assert unpacked == data


def test_several_frames_are_one_body():
    for encoding, frames in {
        "gzip": gzip.compress(b"one ") + gzip.compress(b"two"),
        "lz4": lz4.frame.compress(b"one ") + lz4.frame.compress(b"two"),
        "zstd": zstandard.compress(b"one ") + zstandard.compress(b"two"),
    }.items():
        assert b"".join(decode(encoding, [frames])) == b"one two", encoding


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "lz4"])
def test_half_a_body_is_an_error(encoding):
    packed = b"".join(encode(encoding, [os.urandom(4001)]))

    with pytest.raises(CodecError, match="ends in the middle"):
        list(decode(encoding, [packed[:-5]]))


def test_a_body_that_is_not_compressed_is_an_error():
    with pytest.raises(CodecError, match="not gzip"):
        list(decode("gzip", [b"SELECT 1"]))
    with pytest.raises(CodecError, match="Unknown compression method 'snappy'"):
        list(decode("snappy", [b"SELECT 1"]))


def test_blocks_of_clickhouse_are_checked():
    data = os.urandom(1009) + b"b" * 2_000_003
    packed = b"".join(encode_blocks([data]))

    assert b"".join(decode_blocks(packed[i : i + 1013] for i in range(0, len(packed), 1013))) == data
    with pytest.raises(CodecError, match="Checksum doesn't match"):
        list(decode_blocks([packed[:100] + bytes([packed[100] ^ 1]) + packed[101:]]))
    with pytest.raises(CodecError, match="middle of a block"):
        list(decode_blocks([packed[:-1]]))


@pytest.mark.parametrize(
    ("accept", "expected"),
    [("gzip, zstd", "zstd"), ("gzip, deflate, br", "gzip"), ("br", ""), ("", ""), ("zstd;q=0, lz4", "lz4"), ("identity", "")],
)
def test_the_answer_uses_an_encoding_that_the_client_offers(accept, expected):
    assert choose_encoding(accept) == expected


@pytest.mark.parametrize(("code", "status"), [(62, 400), (60, 404), (516, 403), (159, 408), (48, 501), (252, 500), (202, 500)])
def test_an_exception_has_the_status_of_the_real_server(code, status):
    assert http_status(code) == status


def test_a_pid_file_names_one_life_of_a_process(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    file = PidFile(tmp_path / "x.pid")

    file.write(Running(child.pid, ticks))
    assert file.read() == Running(child.pid, ticks)
    # The same pid given to another process, another boot, half a file, no file: all stale.
    file.write(Running(child.pid, ticks - 1))
    assert file.read() is None
    file.path.write_text(file.path.read_text().replace('"boot_id":"', '"boot_id":"0'))
    assert file.read() is None
    file.path.write_text('{"pid"')
    assert file.read() is None
    file.remove()
    assert file.read() is None

    file.write(Running(child.pid, ticks))
    child.communicate(b"\n")
    assert file.read() is None
