"""Worlds on the session's servers."""

import pytest
from bytewax.recovery import init_db_dir
from world import World


@pytest.fixture
def world(stack):
    world = World(stack.settings)
    yield world
    world.close()


@pytest.fixture
def recovery(tmp_path):
    """A recovery folder of one partition."""
    folder = tmp_path / "recovery"
    folder.mkdir()
    init_db_dir(folder, 1)
    return "-r", str(folder), "-s", "1", "-b", "0"
