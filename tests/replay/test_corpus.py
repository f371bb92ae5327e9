"""Small C programs, one per corner of the kernel's interface: record equals replay, or the replay says where it is not.

Each case checks itself natively and ends with EXIT-SUCCESS. `identical` with other output would be the worst answer: there
must be none. What is refused or left by name is counted; the floors are what each family reaches, less two for cases whose
signal lands inside a computation, where a busy machine may lead the replay past the place.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

CORPUS = Path(__file__).parent / "corpus"
KPROBE = [sys.executable, "-m", "cli.main", "replay"]
FLOOR = {"signals": 40, "processes": 40, "threads": 23, "memory": 18}


def _kprobe(request, folder, *args):
    command = ["timeout", "-k", "2", "20", *KPROBE, *map(str, args)]
    environment = {"PYTHONPATH": str(request.config.rootpath), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("family", FLOOR)
def test_each_case_replays_identically_or_says_where_not(family, tmp_path, request):
    binary = tmp_path / family
    subprocess.run(["cc", "-O1", "-w", "-pthread", "-o", binary, CORPUS / f"{family}.c", "-lrt"], check=True)
    cases = subprocess.run([binary], capture_output=True, text=True, check=True).stdout.split()
    identical, wrong = [], []

    for case in cases:
        recording = tmp_path / f"{case}.rec"
        recorded = _kprobe(request, tmp_path, "record", "-o", recording, "--", binary, case)
        replayed = _kprobe(request, tmp_path, "run", recording, "--json")
        if 124 in (recorded.returncode, replayed.returncode) or not replayed.stdout:
            print(f"{case}: no answer; kprobe replay run {recording}: {replayed.stderr[-300:]!r}")
            continue
        document = json.loads(replayed.stdout)
        same = document["stdout_sha256"] == hashlib.sha256(recorded.stdout).hexdigest()
        if document["identical"] and same and document["exit_status"] == recorded.returncode:
            identical.append(case)
        elif document["identical"]:
            wrong.append((case, str(recording)))
        else:
            print(f"{case}: {document['divergence']['class']}, {document['divergence']['actual'][:100]}")

    assert not wrong, f"identical, but not the same output: {wrong}"
    assert len(identical) >= FLOOR[family], f"{len(identical)} of {len(cases)}; missing: {sorted(set(cases) - set(identical))}"
