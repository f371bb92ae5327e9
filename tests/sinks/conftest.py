"""Stores on the real servers, each test with a database of its own."""

import uuid

import pytest

from sinks.clickhouse import ClickHouseStore
from sinks.graph import GraphStore


@pytest.fixture
def own(stack):
    """The servers, with a ClickHouse database of this test alone."""
    return stack.with_database(f"t_{uuid.uuid4().hex[:12]}")


@pytest.fixture
def history(own):
    """A migrated, empty history."""
    store = ClickHouseStore(own.settings.clickhouse)
    store.migrate()
    yield store
    store.client.execute(f"DROP DATABASE {own.settings.clickhouse.database} SYNC", database="")
    store.close()


@pytest.fixture
def graph(stack):
    """A migrated, empty graph; Neo4j Community has one database, so tests that use it run one after another."""
    store = GraphStore(stack.settings.neo4j)
    store.migrate()
    store.clear()
    yield store
    store.clear()
    store.close()
