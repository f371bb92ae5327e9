"""Compression of bodies: HTTP's Content-Encoding both ways, and ClickHouse's own block format (`compress=1`, `decompress=1`).

Everything works on streams of chunks and never holds a whole body. Decoders raise CodecError for data that are not what
their header says, or that end too early: half a body must not become half an insert.

A block of ClickHouse's format is a checksum (CityHash128), then a 9-byte header (method, compressed size with the header,
uncompressed size), then data; the checksum covers header and data.
"""

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import lz4.block
import lz4.frame
import zstandard

from stack.cityhash import cityhash128

__all__ = ["CodecError", "choose_encoding", "decode", "decode_blocks", "encode", "encode_blocks"]


class CodecError(Exception):
    """A body is not compressed as its headers say; `code` is ClickHouse's number for it."""

    def __init__(self, code: int, name: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.name = name


_CANNOT_DECOMPRESS: Final = (271, "CANNOT_DECOMPRESS")
_CHECKSUM: Final = (40, "CHECKSUM_DOESNT_MATCH")
_UNKNOWN_METHOD: Final = (89, "UNKNOWN_COMPRESSION_METHOD")
_NOT_IMPLEMENTED: Final = (48, "NOT_IMPLEMENTED")
_DECODERS: Final[Mapping[str, Callable[[], Any]]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "deflate": lambda: zlib.decompressobj(15),
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "lz4": lz4.frame.LZ4FrameDecompressor,
    "xz": lzma.LZMADecompressor,
    "bz2": bz2.BZ2Decompressor,
}
_ERRORS: Final = (zlib.error, zstandard.ZstdError, lzma.LZMAError, RuntimeError, OSError, EOFError, ValueError)
_PREFERRED: Final = ("zstd", "lz4", "gzip", "deflate")  # the order of the real server, as far as we know them
_HEADER: Final = struct.Struct("<BII")
_CHECKSUM_BYTES: Final = 16
_BLOCK_BYTES: Final = 1 << 20
_BLOCK_MAX_BYTES: Final = 1 << 30
_LZ4, _ZSTD, _NONE = 0x82, 0x90, 0x02


def choose_encoding(accept: str) -> str:
    """The encoding to answer with, of those that an Accept-Encoding header lists; empty: none."""
    offered = {part.split(";")[0].strip().lower() for part in accept.split(",") if not part.replace(" ", "").endswith(";q=0")}
    return next((name for name in _PREFERRED if name in offered), "")


def decode(encoding: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Undo a Content-Encoding. Several frames after one another are one body."""
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in _DECODERS:
        raise CodecError(
            *_NOT_IMPLEMENTED, f"Unknown compression method '{encoding}'. Only {', '.join(_DECODERS)} are supported"
        )
    decoder, fresh = _DECODERS[encoding](), True
    for chunk in chunks:
        while chunk:
            if decoder.eof:
                decoder, fresh = _DECODERS[encoding](), True
            try:
                out, fresh = decoder.decompress(chunk), False
            except _ERRORS as error:
                raise CodecError(
                    *_CANNOT_DECOMPRESS, f"The body is not {encoding} as its Content-Encoding says: {error}"
                ) from error
            chunk = (decoder.unused_data or b"") if decoder.eof else b""
            yield out
    if not fresh and not decoder.eof:
        raise CodecError(*_CANNOT_DECOMPRESS, f"The {encoding} body ends in the middle")


def encode(encoding: str, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Apply a Content-Encoding."""
    if not encoding:
        yield from chunks
        return
    if encoding == "lz4":
        frame = lz4.frame.LZ4FrameCompressor()
        yield frame.begin()
        yield from (frame.compress(chunk) for chunk in chunks)
        yield frame.flush()
        return
    if encoding == "zstd":
        compressor: Any = zstandard.ZstdCompressor(level=1).compressobj()
    else:
        compressor = zlib.compressobj(3, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    yield from (compressor.compress(chunk) for chunk in chunks)
    yield compressor.flush()


def encode_blocks(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """ClickHouse's own format, LZ4."""
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), _BLOCK_BYTES):
            part = view[start : start + _BLOCK_BYTES]
            packed = lz4.block.compress(part, store_size=False)
            body = _HEADER.pack(_LZ4, len(packed) + _HEADER.size, len(part)) + packed
            yield struct.pack("<QQ", *cityhash128(body)) + body


def decode_blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Undo ClickHouse's own format; every checksum is checked."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= _CHECKSUM_BYTES + _HEADER.size:
            method, size, raw_size = _HEADER.unpack_from(buffer, _CHECKSUM_BYTES)
            if max(size, raw_size) > _BLOCK_MAX_BYTES or size < _HEADER.size:
                raise CodecError(*_CANNOT_DECOMPRESS, f"A block of {size} compressed and {raw_size} bytes cannot be right")
            end = _CHECKSUM_BYTES + size
            if len(buffer) < end:
                break
            yield _open_block(bytes(buffer[:end]), method, raw_size)
            del buffer[:end]
    if buffer:
        raise CodecError(*_CANNOT_DECOMPRESS, "The compressed body ends in the middle of a block")


def _open_block(block: bytes, method: int, raw_size: int) -> bytes:
    expected, body = struct.unpack_from("<QQ", block), block[_CHECKSUM_BYTES:]
    if cityhash128(body) != expected:
        raise CodecError(*_CHECKSUM, "Checksum doesn't match: corrupted data")
    data = body[_HEADER.size :]
    try:
        if method == _LZ4:
            return bytes(lz4.block.decompress(data, uncompressed_size=raw_size))
        if method == _ZSTD:
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=raw_size)
    except _ERRORS as error:
        raise CodecError(*_CANNOT_DECOMPRESS, f"Cannot decompress a block: {error}") from error
    if method == _NONE:
        return data
    raise CodecError(*_UNKNOWN_METHOD, f"Unknown compression method of a block: {method:#x}")
