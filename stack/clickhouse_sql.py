"""As much of ClickHouse's SQL as an HTTP server must read: where a query ends and inserted data begin, and in which format.

The engine parses queries; here they are only cut into tokens, so that a word inside a string, a quoted name or a comment is
never taken for a keyword. Never fails: text that is not SQL has no data part and no format, and the engine says what is
wrong with it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["InlineInsert", "inline_insert", "is_select", "output_format", "quote", "quote_name"]

_TOKEN: Final = re.compile(
    rb"""(?P<space>\s+|--[^\n]*|\#[ !][^\n]*|/\*.*?\*/)
       | (?P<text>'(?:[^'\\]|\\.)*' | `(?:[^`\\]|\\.)*` | "(?:[^"\\]|\\.)*" | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$)
       | (?P<word>[A-Za-z_]\w*)
       | (?P<other>\d\w*|.)""",
    re.DOTALL | re.VERBOSE,
)
_AFTER_FORMAT: Final = re.compile(rb"[ \t\f]*;?[ \t\f]*(?:\r?\n)?")
_OPEN: Final = frozenset(b"([{")
_CLOSE: Final = frozenset(b")]}")


@dataclass(frozen=True, slots=True)
class InlineInsert:
    """An INSERT whose rows follow it: `statement` without its FORMAT clause; `format` empty: the default one."""

    statement: bytes
    format: str
    data_at: int


def _tokens(text: bytes, start: int = 0) -> Iterator[tuple[str, bytes, int, int]]:
    """(kind, text, depth of brackets, end) of everything but blanks and comments; kind is word, text or other."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        kind, token = match.lastgroup or "other", match.group()
        if kind == "space":
            continue
        if kind == "other" and token[0] in _CLOSE:
            depth -= 1
        yield ("text" if kind == "tag" else kind), token, depth, match.end()
        if kind == "other" and token[0] in _OPEN:
            depth += 1


def inline_insert(text: bytes) -> InlineInsert | None:
    """The INSERT at the start of `text` if its rows follow inline; None for every other query."""
    tokens = _tokens(text)
    first = next(tokens, None)
    if first is None or first[1].upper() != b"INSERT":
        return None
    for kind, token, depth, end in tokens:
        word = token.upper() if kind == "word" and depth == 0 else b""
        if word in (b"SELECT", b"WITH", b"WATCH", b"FROM"):
            return None
        if word == b"VALUES":
            return InlineInsert(text[: end - len(token)], "Values", end)
        if word == b"FORMAT":
            name = next(tokens, None)
            if name is None or name[0] != "word":
                return None
            space = _AFTER_FORMAT.match(text, name[3])
            data_at = space.end() if space else name[3]
            # The engine's VALUES parser is its Values format; a format clause names any other.
            return InlineInsert(text[: end - len(token)], name[1].decode(), data_at)
        if kind == "other" and token == b"(" and depth == 0 and _is_subquery(text, end):
            return None
    return InlineInsert(text.rstrip().rstrip(b";"), "", len(text))


def _is_subquery(text: bytes, start: int) -> bool:
    first = next(_tokens(text, start), None)
    return first is not None and first[1].upper() in (b"SELECT", b"WITH")


def is_select(text: bytes) -> bool:
    """Whether this is a SELECT; the engine streams the results of no other query."""
    first = next(_tokens(text), None)
    return first is not None and first[1].upper() in (b"SELECT", b"WITH", b"(")


def output_format(text: bytes) -> str:
    """The format that a query names for its result; empty if it names none."""
    found, previous, in_settings = "", b"", False
    for kind, token, depth, _ in _tokens(text):
        word = token.upper() if kind == "word" and depth == 0 else b""
        if previous == b"FORMAT" and kind == "word":
            found = token.decode()
        elif found and word == b"SETTINGS":
            in_settings = True
        elif not in_settings and token != b";":
            found = ""  # `format` is no reserved word: the clause is the one at the end of the query
        previous = word
    return found


def quote(value: str) -> str:
    """A string literal."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def quote_name(name: str) -> str:
    """An identifier."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"
