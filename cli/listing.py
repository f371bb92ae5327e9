"""Listings: an aligned table for people, one JSON document (`--json`) or one object a line (`--jsonl`) for programs."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from cli.render import aligned

__all__ = ["print_listing", "write_line"]

Row = Mapping[str, Any]


def print_listing(
    name: str,
    rows: Sequence[Row],
    columns: Mapping[str, Callable[[Row], str]],
    *,
    json: bool,
    jsonl: bool,
    right: Sequence[int] = (),
) -> None:
    """Print rows on stdout; `columns` maps each heading to what stands under it."""
    if jsonl:
        for row in rows:
            write_line(orjson.dumps(row))
    elif json:
        write_line(orjson.dumps({"schema": f"kprobe.{name}/1", name: rows}))
    elif rows:
        table = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
        print("\n".join(aligned(table, right=right)))
    else:
        print(f"no {name}", file=sys.stderr)


def write_line(data: bytes) -> None:
    """Bytes as they are, and a newline, on stdout."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data + b"\n")
    sys.stdout.buffer.flush()
