"""The command line as a user meets it: help that teaches, exit statuses as documented, no traceback for our own errors."""

import subprocess
import sys

import pytest

from cli.main import COMMANDS


def kprobe(*arguments, **options):
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def test_help_lists_every_command_with_its_line():
    done = kprobe("--help")

    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert [line for _, line in COMMANDS.values() if line not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    done = kprobe(name, "--help")

    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: kprobe " + name in done.stdout
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize("arguments", [["nonsense"], ["info"], ["record", "--no-such-option"]], ids=" ".join)
def test_wrong_usage_ends_with_status_2_and_a_hint(arguments):
    done = kprobe(*arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error" in done.stderr or "kprobe:" in done.stderr


def test_an_error_of_ours_is_one_line_without_a_traceback(tmp_path):
    done = kprobe("info", str(tmp_path / "nowhere.kcap"))

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nowhere.kcap" in done.stderr


def test_output_is_not_coloured_when_it_is_not_a_terminal(tmp_path):
    assert "\x1b[" not in kprobe("--help").stdout


def test_the_command_line_starts_without_heavy_packages():
    """`kprobe --help` must not wait for packages that take half a second to import."""
    code = "import sys; from cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = set(done.stdout.split())
    assert loaded.isdisjoint({"neo4j", "networkx", "chdb", "clickhouse_connect", "pyarrow", "numpy", "bytewax", "bcc"})
