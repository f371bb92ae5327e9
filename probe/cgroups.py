"""Control groups: which hierarchy events speak of, its groups by id and path, and the container a path stands for.

Events carry the id of a task's group in one hierarchy: that of the CPU controller, which is version 2's unified tree, or on
older set-ups the version 1 tree mounted with `cpu`. An id is the inode number of the group's directory.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

__all__ = ["CgroupTable", "Hierarchy", "container_of", "find_hierarchy"]

_CONTAINER: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_ID_BITS: Final = 48


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One tree of groups: where it is mounted, its number (0 for version 2), and whether it is version 1."""

    mount: Path | None
    number: int
    version_1: bool

    def key(self, cgroup_id: int) -> int:
        """The group's name in the kernel side's watch set: ids of two trees may be equal."""
        return self.number << _ID_BITS | cgroup_id


def find_hierarchy(proc: Path = Path("/proc")) -> Hierarchy:
    """The tree that has the CPU controller, else version 2's, else none mounted."""
    mounts = []
    for line in (proc / "self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        words = right.split()  # type, device, options
        mounts.append((words[0], words[-1].split(","), Path(left.split()[4])))
    for kind, options, mount in mounts:
        if kind == "cgroup" and "cpu" in options:
            return Hierarchy(mount, _number_of("cpu", proc), version_1=True)
    unified = [mount for kind, _, mount in mounts if kind == "cgroup2"]
    return Hierarchy(unified[0] if unified else None, 0, version_1=False)


def _number_of(controller: str, proc: Path) -> int:
    for line in (proc / "cgroups").read_text().splitlines():
        words = line.split()
        if words[0] == controller:
            return int(words[1])
    return 0


def container_of(path: str) -> str | None:
    """The id of the container that runs in the group at `path`: the 64 hex digits that every runtime puts there."""
    found = _CONTAINER.findall(path)
    return found[-1] if found else None


@dataclass(slots=True)
class CgroupTable:
    """Paths of the groups of one hierarchy by id, kept up to date from events."""

    hierarchy: Hierarchy
    paths: dict[int, str] = field(default_factory=dict)

    def scan(self) -> None:
        """Read all groups that exist now."""
        if self.hierarchy.mount is None:
            return
        root = str(self.hierarchy.mount)
        for folder, _, _ in os.walk(root):
            try:
                inode = os.stat(folder).st_ino
            except FileNotFoundError:  # removed since
                continue
            self.paths[inode] = folder[len(root) :] or "/"

    def made(self, key: int, path: str) -> None:
        """A group came to be, in any hierarchy; only those of ours are kept."""
        if key >> _ID_BITS == self.hierarchy.number:
            self.paths[key & (1 << _ID_BITS) - 1] = path

    def path(self, cgroup_id: int) -> str | None:
        """Path of a group; None if it was never seen."""
        return self.paths.get(cgroup_id)
