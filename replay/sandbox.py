"""Where a replay runs: an empty root that holds nothing but program images, without network, with a scratch folder.

What: `Sandbox` makes the scratch root, places images from the recording under their recorded paths, and gives the
child's preparation. The recording itself is only read: images are copies, mapped files are opened through a directory
descriptor. Everything is removed at `close`.
Fails: `InputError` when the scratch folder cannot be made.
"""

import ctypes
import os
import resource
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from replay.log import BlobStore

__all__ = ["BLOB_FD", "SHARED_FD", "Sandbox"]

BLOB_FD: Final = 900
SHARED_FD: Final = 901
_NEW_NAMESPACES: Final = 0x40000000 | 0x20000 | 0x08000000  # network, mounts, System V
_NEW_USER: Final = 0x10000000


class Sandbox:
    """The scratch root of one replay."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self.folder = Path(tempfile.mkdtemp(prefix="kprobe-replay-"))
        self.root = self.folder / "root"
        self.shared = self.folder / "shared"
        self.root.mkdir()
        self.shared.mkdir()

    def inside(self, path: str) -> Path:
        """The path in the scratch root; `..` cannot lead out."""
        return self.root / os.path.normpath("/" + path).lstrip("/")

    def place(self, path: str, content: Path) -> None:
        """Put a program image under the path by which the program names it."""
        target = self.inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copyfile(content, target)
        target.chmod(0o755)

    def place_images(self, images: Sequence[Sequence[str]]) -> None:
        """All images of one exec."""
        for path, name in images:
            self.place(path, self._blobs.path(name))

    def make_directory(self, path: str) -> None:
        """A working directory for relative paths at exec."""
        self.inside(path).mkdir(parents=True, exist_ok=True)

    def shared_file(self, identity: str, name: str) -> str:
        """The one writable copy of a file that is mapped shared."""
        target = self.shared / identity
        if not target.exists():
            shutil.copyfile(self._blobs.path(name), target)
        return identity

    def enter(self, cwd: str, stack_limit: Sequence[int]) -> None:
        """In the child: descriptors, limits, namespaces, root."""
        self._blobs.folder.mkdir(exist_ok=True)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
        os.dup2(os.open(self._blobs.folder, os.O_RDONLY), BLOB_FD, inheritable=True)
        os.dup2(os.open(self.shared, os.O_RDONLY), SHARED_FD, inheritable=True)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_STACK, (stack_limit[0], stack_limit[1]))
        libc = ctypes.CDLL(None)
        if os.geteuid() != 0:
            libc.unshare(_NEW_USER)
        libc.unshare(_NEW_NAMESPACES)
        os.setpgid(0, 0)
        os.chroot(self.root)
        os.chdir(cwd)

    def close(self) -> None:
        """Remove the scratch folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
