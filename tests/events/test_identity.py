"""Event ids are read back from their text, and nothing else is."""

import pytest

from events.errors import InputError
from events.identity import EventId, read_boot_id, read_node_name


def test_an_event_id_survives_its_text_form():
    event = EventId("node-23", "ab" * 16, 3, 2**40)

    assert EventId.parse(str(event)) == event


@pytest.mark.parametrize("text", ["", "a/b/c", "a/b/c/d", "a/b/1/2/3", "a/b/-1/2"])
def test_other_text_is_refused(text):
    with pytest.raises(InputError, match="is not of the form NODE/BOOT/CPU/SEQ"):
        EventId.parse(text)


def test_boot_id_and_node_name_come_from_procfs(tmp_path):
    kernel = tmp_path / "sys/kernel"
    (kernel / "random").mkdir(parents=True)
    (kernel / "random/boot_id").write_text("0a1b2c3d-0000-1111-2222-333344445555\n")
    (kernel / "hostname").write_text("ledger-7\n")

    assert read_boot_id(tmp_path) == "0a1b2c3d000011112222333344445555"
    assert read_node_name(tmp_path) == "ledger-7"
