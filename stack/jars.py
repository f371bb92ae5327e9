"""The jars of Kafka and Neo4j: named in `pom.xml`, fetched once by Maven into a cache, used offline from then on.

The cache is `$KPROBE_CACHE`, else `$XDG_CACHE_HOME/kprobe`, else `~/.cache/kprobe`; within it, one folder for each content
of `pom.xml`, so that an upgrade fetches anew and a downgrade finds its old jars. A folder appears complete or not at
all: Maven writes beside it and the folder is renamed. Two starters at once wait for each other.

`python -m stack.jars` fetches everything, for an installation that prepares to work offline.
Fails with StoreError when Maven is missing or cannot fetch; the message carries Maven's own last lines.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from events.errors import StoreError

__all__ = ["PROFILES", "cache_dir", "class_path", "find_java"]

PROFILES: Final = ("kafka", "neo4j")
_POM: Final = Path(__file__).with_name("pom.xml")
_REMEDY: Final = "on Debian or Ubuntu: apt-get install openjdk-17-jre-headless maven"
_JAVA_MIN: Final = 17  # Kafka 4 and Neo4j 5 both need it
_FETCH_TIMEOUT_S: Final = 1200.0  # 170 MB over a slow line


def cache_dir() -> Path:
    """Where fetched jars are kept between runs."""
    if os.environ.get("KPROBE_CACHE"):
        return Path(os.environ["KPROBE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kprobe"


def find_java() -> str:
    """The path of a Java that is new enough. Raises StoreError with the remedy."""
    java = shutil.which("java")
    if java is None:
        raise StoreError(f"Kafka and Neo4j need Java {_JAVA_MIN} or newer, and there is no `java` on PATH; {_REMEDY}")
    shown = subprocess.run([java, "-version"], capture_output=True, text=True, check=False, timeout=60).stderr
    parts = shown.split('"')
    major = parts[1].split(".")[0] if len(parts) > 1 else ""
    if not major.isdigit() or int(major) < _JAVA_MIN:
        raise StoreError(f"Kafka and Neo4j need Java {_JAVA_MIN} or newer; {java} says {shown.strip()!r}; {_REMEDY}")
    return java


def class_path(profile: str, say: Callable[[str], None] = lambda _: None) -> str:
    """The class path of one server, after fetching its jars if they are not there yet."""
    folder = cache_dir() / f"jars-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:12]}" / profile
    if not folder.is_dir():
        with _locked(folder.parent):
            if not folder.is_dir():  # another starter may have fetched while we waited
                say(f"fetching its jars with Maven into {folder} (once)")
                _fetch(profile, folder)
    return f"{folder}/*"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(profile: str, folder: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise StoreError(f"the jars of {profile} are fetched by Maven, and there is no `mvn` on PATH; {_REMEDY}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{profile}-") as partial:
        target = Path(partial) / profile
        command = [maven, "-q", "-B", "-f", str(_POM), f"-P{profile}", "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={target}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_FETCH_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise StoreError(f"Maven did not fetch the jars of {profile} within {_FETCH_TIMEOUT_S:.0f} s") from error
        if done.returncode != 0 or not any(target.glob("*.jar")):
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            raise StoreError(
                f"Maven could not fetch the jars of {profile} (exit status {done.returncode}); is the network, or a proxy in "
                f"~/.m2/settings.xml, set up? Its last lines:\n{tail}"
            )
        target.rename(folder)


def main() -> None:
    """Fetch the jars of every server."""
    for profile in PROFILES:
        print(class_path(profile, lambda text, name=profile: print(f"{name}: {text}", file=sys.stderr)))  # type: ignore[misc]


if __name__ == "__main__":
    main()
