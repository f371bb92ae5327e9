"""The table of rooms in the design holds: who may import whom, and nothing imports BCC at module level."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room -> rooms it may import (itself always); "all" is every room
MAY_IMPORT = {
    "events": set(),
    "probe": {"events"},
    "causality": {"events"},
    "sinks": {"events"},
    "stack": {"events"},
    "flows": {"events", "causality", "sinks"},
    "replay": {"events", "causality", "sinks"},
    "api": "all",
    "cli": "all",
    "demo": "all",
}
ROOMS = set(MAY_IMPORT)
# What pure inference must never reach for: I/O, servers, dataflow, kernel.
IMPURE = {
    "asyncio", "bcc", "bytewax", "chdb", "clickhouse_connect", "confluent_kafka", "http", "io", "multiprocessing", "neo4j",
    "os", "pathlib", "random", "requests", "select", "shutil", "signal", "socket", "subprocess", "tempfile", "threading",
    "time", "urllib",
}


def _modules():
    for room in sorted(ROOMS):
        yield from sorted((ROOT / room).rglob("*.py"))


def _imports(path):
    """(top-level name, line, at module level?) of each absolute import."""
    tree = ast.parse(path.read_text(), str(path))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; rooms are named in full"
            yield (node.module or "").split(".")[0], node.lineno, id(node) in top


@pytest.mark.parametrize("path", list(_modules()), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_the_design_allows(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[room]

    wrong = [
        f"line {line}: {name}"
        for name, line, _ in _imports(path)
        if name in ROOMS and name != room and allowed != "all" and name not in allowed
    ]

    assert wrong == []


@pytest.mark.parametrize("path", sorted((ROOT / "causality").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_causality_is_pure(path):
    assert [f"line {line}: {name}" for name, line, _ in _imports(path) if name in IMPURE] == []


def test_every_module_imports_without_bcc():
    """BCC comes from the distribution; a laptop without it must still analyze and replay."""
    code = "import importlib, sys\nsys.modules['bcc'] = None\nfor m in sys.argv[1:]: importlib.import_module(m)\n"
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in _modules()]
    import subprocess

    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", list(_modules()), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_opens_with_its_manual_page(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


def test_the_project_names_no_folder_of_a_developers_machine():
    """Absolute paths of one machine, registry hosts and tooling words have no place in the product."""
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # Put together here so that this file does not contain them.
    hosts = ["pypi" + ".org", "repo1." + "maven", "registry." + "npmjs", "deb." + "debian.org"]
    words = ["/wo" + "rk/", "/root/" + ".pyenv", *hosts]

    found = [
        f"{name}: {word}"
        for name in files
        if (ROOT / name).is_file()
        for word in words
        if word.encode() in (ROOT / name).read_bytes()
    ]

    assert found == []
