"""What a recording needs of this machine, each with what was found and the remedy.

Nothing here loads a program: these are the questions whose answers make a clear error before anything is tried.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from events.errors import KprobeError
from probe.btf import BTF_ROOT
from probe.cgroups import find_hierarchy
from probe.compiler import bcc_directory

__all__ = ["Requirement", "requirements"]


@dataclass(frozen=True, slots=True)
class Requirement:
    """One need: without a `needed` one nothing can be recorded, without another something is left out."""

    name: str
    ok: bool
    needed: bool
    found: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """As `kprobe doctor --json` has it."""
        return asdict(self)


def requirements() -> Iterator[Requirement]:
    """All of them, in the order in which a newcomer stumbles over them."""
    root = os.geteuid() == 0
    yield Requirement("root", root, True, f"user id {os.geteuid()}", "run it as sudo kprobe ...")
    btf = BTF_ROOT / "vmlinux"
    text = f"{btf}, {btf.stat().st_size >> 10} KiB" if btf.exists() else f"no {btf}"
    yield Requirement("BTF", btf.exists(), True, text, "use a kernel built with CONFIG_DEBUG_INFO_BTF=y (all distributions do)")
    yield _bcc()
    yield Requirement("tracefs", True, False, "not needed: programs attach by BPF alone", "")
    yield Requirement("kernel headers", True, False, "not needed: fields are found by BTF", "")
    hidden = _symbols_hidden()
    found = "addresses hidden" if hidden else "addresses readable"
    yield Requirement(
        "kallsyms", not hidden, False, found, "sysctl kernel.kptr_restrict=1, else ends of CPU quota periods are not seen"
    )
    tree = find_hierarchy()
    place = f"version {1 if tree.version_1 else 2} at {tree.mount}" if tree.mount else "none mounted"
    yield Requirement("cgroups", tree.mount is not None, False, place, "mount -t cgroup2 cgroup2 /sys/fs/cgroup")


def _bcc() -> Requirement:
    try:
        return Requirement("BCC", True, True, str(bcc_directory() / "bcc"), "")
    except KprobeError as error:
        return Requirement("BCC", False, True, "not installed", str(error))


def _symbols_hidden(path: Path = Path("/proc/kallsyms")) -> bool:
    try:
        with path.open() as lines:
            return int(next(lines).split()[0], 16) == 0
    except (OSError, StopIteration, ValueError):
        return True
