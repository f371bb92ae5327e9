"""Tiers: a test that needs a real kernel or real servers says so, and is never silently left out where it counts.

`kernel` needs root, BTF and BCC; `servers` needs Java, Maven and the jars. A missing tier skips with its reason on a
developer's machine and fails when CI=true: skipped is not passed.
"""

import os
import shutil
from pathlib import Path

import pytest

pytest_plugins = ["stack_fixture"]  # the real servers, started once a session for whoever asks


def _missing_kernel() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "needs a kernel with BTF (/sys/kernel/btf/vmlinux)"
    if not Path("/usr/lib/python3/dist-packages/bcc").exists():
        return "needs BCC: apt-get install python3-bpfcc"
    return None


def _missing_servers() -> str | None:
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            return f"needs {tool}: apt-get install openjdk-17-jre-headless maven"
    return None


_TIERS = {"kernel": _missing_kernel, "servers": _missing_servers}


def pytest_runtest_setup(item):
    """Skip or fail a test whose tier this machine cannot run."""
    for tier, missing in _TIERS.items():
        if item.get_closest_marker(tier) is None:
            continue
        reason = missing()
        if reason is None:
            continue
        if os.environ.get("CI"):
            pytest.fail(f"tier {tier} cannot run, and in CI it must: {reason}", pytrace=False)
        pytest.skip(f"tier {tier}: {reason}")
