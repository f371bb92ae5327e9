"""The migrations of both stores: numbered files in `migrations/`, applied once, in order, and recorded in the store.

Every statement can be repeated without harm (IF NOT EXISTS), so that two processes that start together may both apply
a migration: the result is the same and the record is one. A store that knows a migration which this kprobe does not is refused:
an older program must not write into a newer schema.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from events.errors import StoreError

__all__ = ["Migration", "migrations_of", "to_apply"]

_FOLDER: Final = Path(__file__).with_name("migrations")
_NAME: Final = re.compile(r"(?P<store>[a-z0-9]+)_(?P<version>\d{4})_(?P<title>\w+)\.(?:sql|cypher)")
_COMMENT: Final = re.compile(r"^\s*(--|//).*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of a schema; `checksum` tells whether the file is still what was applied."""

    version: int
    title: str
    statements: tuple[str, ...]
    checksum: str


def migrations_of(store: str, folder: Path = _FOLDER) -> tuple[Migration, ...]:
    """The migrations of "clickhouse" or "neo4j", in order."""
    found = []
    for path in folder.iterdir():
        name = _NAME.fullmatch(path.name)
        if name is None or name["store"] != store:
            continue
        text = path.read_text()
        statements = tuple(s.strip() for s in _COMMENT.sub("", text).split(";") if s.strip())
        checksum = hashlib.sha256("\n".join(statements).encode()).hexdigest()
        found.append(Migration(int(name["version"]), name["title"], statements, checksum))
    return tuple(sorted(found, key=lambda m: m.version))


def to_apply(known: Sequence[Migration], applied: dict[int, str], where: str) -> list[Migration]:
    """What is left to do. Raises StoreError if the store is ahead of this kprobe, or was built from other files."""
    newest = max((m.version for m in known), default=0)
    ahead = [version for version in applied if version > newest]
    if ahead:
        raise StoreError(
            f"{where} has schema version {max(ahead)}, this kprobe knows up to {newest}: upgrade it, or use another database"
        )
    for migration in known:
        if applied.get(migration.version, migration.checksum) != migration.checksum:
            raise StoreError(
                f"{where}: migration {migration.version} ({migration.title}) is not the one that was applied there; "
                "it was changed afterwards. Use the kprobe that made the database, or another database"
            )
    return [m for m in known if m.version not in applied]
