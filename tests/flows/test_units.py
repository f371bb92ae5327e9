"""The parts of the flow that need no server."""

import json
import pickle
import urllib.error
import urllib.request

import pytest
from world import node_frames

from events.errors import ConfigError
from events.settings import FlowSettings, Settings
from flows import causal
from flows.kafka_source import Gate, _Rewind
from flows.messages import DeadLetter, FrameMessage, Message, Submission
from flows.metrics import FlowMetrics, serve
from flows.shards import SHARDS, shard_of
from flows.supervisor import prepare_recovery

SECOND = 1_000_000_000


def message(value, offset=0, **more):
    return Message("raw", 0, offset, b"node-a", value, 0, **more)


@pytest.mark.parametrize("workers", range(1, 17))
def test_shards_spread_evenly_over_any_number_of_workers(workers):
    """Truth from outside: the hash that Bytewax's runtime uses, written down here once more."""
    shares = [sum(1 for shard in SHARDS if siphash13(shard.encode() + b"\xff") % workers == w) for w in range(workers)]

    assert max(shares) - min(shares) <= 1


def siphash13(data):
    mask = (1 << 64) - 1
    v = [0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573]

    def rotate(x, bits):
        return ((x << bits) | (x >> (64 - bits))) & mask

    def round_():
        v[0] = (v[0] + v[1]) & mask
        v[1] = rotate(v[1], 13) ^ v[0]
        v[0] = rotate(v[0], 32)
        v[2] = (v[2] + v[3]) & mask
        v[3] = rotate(v[3], 16) ^ v[2]
        v[0] = (v[0] + v[3]) & mask
        v[3] = rotate(v[3], 21) ^ v[0]
        v[2] = (v[2] + v[1]) & mask
        v[1] = rotate(v[1], 17) ^ v[2]
        v[2] = rotate(v[2], 32)

    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 0xFF])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        round_()
        v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(3):
        round_()
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_the_shard_of_a_node_never_changes():
    """A change would orphan the state of every recovery folder there is."""
    assert [SHARDS.index(shard_of(node)) for node in ("node-a", "node-b", "ledger-1")] == [3, 13, 4]


def test_a_frame_message_is_pickled_as_its_bytes():
    frames, _ = node_frames("node-a", 11)
    item = FrameMessage(message(frames[-1].encode()))

    copy = pickle.loads(pickle.dumps(item))

    assert copy.message == item.message
    assert copy.frame.batch == item.frame.batch


def test_decode_sets_the_malformed_aside_and_keeps_their_neighbours():
    frames, _ = node_frames("node-a", 11)
    good = frames[-1].encode()
    metrics = FlowMetrics()

    found = list(causal.decode([message(good), message(good[:-40], 1), message(b"", 2), message(good, 3)], metrics))

    assert [type(f) for f in found] == [FrameMessage, DeadLetter, DeadLetter, FrameMessage]
    assert found[1].message.value == good[:-40]
    assert metrics.registry.get_sample_value("kprobe_flow_dead_letters_total", {"topic": "raw"}) == 2


def test_what_is_read_again_is_neither_written_nor_refused_again():
    frames, _ = node_frames("node-a", 11)
    found = list(causal.decode([message(frames[-1].encode(), replayed=True), message(b"x", 1, replayed=True)], FlowMetrics()))

    assert [type(f) for f in found] == [FrameMessage]
    assert causal._rows(found) == []


@pytest.mark.parametrize(
    "value", [b"", b"{", b"[]", b"7", b'{"operation_id": "a"}', b"\xff\xfe", b'{"operation_id": "a", "tid": true}']
)
def test_parse_refuses_what_is_no_operation(value):
    (found,) = causal.parse([message(value)], FlowMetrics())

    assert isinstance(found, DeadLetter)
    assert found.reason.startswith("not an operation: ")


def test_an_operation_without_a_node_goes_to_every_shard_and_one_with_a_node_to_its_own():
    row = {"operation_id": "a", "type": "t", "tid": 7, "start_mono_ns": 1, "end_mono_ns": 2}
    parsed = list(
        causal.parse([message(json.dumps(row).encode()), message(json.dumps(row | {"node": "n"}).encode())], FlowMetrics())
    )

    routed = list(causal._route_operations(parsed))

    assert [type(p) for p in parsed] == [Submission, Submission]
    assert [shard for shard, _ in routed] == [*SHARDS, shard_of("n")]


def test_the_rewind_offset_covers_the_retention_of_every_clock_that_speaks():
    rewind = _Rewind(10 * SECOND)
    for offset in range(100):
        rewind.saw(offset, "a", offset * SECOND, offset * SECOND)
    assert rewind.offset(100) in (88, 89)

    rewind.saw(100, "b", 5, 99 * SECOND)
    for offset in range(101, 150):
        rewind.saw(offset, "a", offset * SECOND, offset * SECOND)
    assert rewind.offset(150) == 100

    for offset in range(150, 250):
        rewind.saw(offset, "a", offset * SECOND, offset * SECOND)
    assert rewind.offset(250) in (238, 239)


def test_without_clocks_nothing_is_rewound():
    assert _Rewind(SECOND).offset(17) == 17


def test_the_gate_opens_when_every_partition_has_read_its_backlog():
    gate = Gate()
    gate.expect(2)
    gate.enter(0, backlog=True)
    assert not gate.open(waited_s=0)
    gate.enter(1, backlog=False)
    assert not gate.open(waited_s=100)
    gate.leave(0)
    assert gate.open(waited_s=0)
    assert gate.had_backlog


@pytest.mark.parametrize(("value", "left"), [("0", False), ("", False), ("false", False), ("1", True)])
def test_bytewaxs_open_api_is_never_on_by_accident(monkeypatch, value, left):
    monkeypatch.setenv("BYTEWAX_DATAFLOW_API_ENABLED", value)

    causal.silence_api()

    import os

    assert ("BYTEWAX_DATAFLOW_API_ENABLED" in os.environ) is left


def test_the_module_makes_a_flow_only_when_asked():
    assert "flow" not in vars(causal)
    assert causal.build(Settings(flow=FlowSettings(stores=False, raw_rows=False))).flow_id == causal.FLOW_ID
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        causal.nonsense  # noqa: B018


def test_metrics_and_health_are_served():
    metrics = FlowMetrics()
    metrics.events.labels("node-a").inc(23)
    host, port = serve(metrics, "127.0.0.1:0")

    with urllib.request.urlopen(f"http://{host}:{port}/metrics") as answer:
        assert 'kprobe_flow_events_total{node="node-a"} 23.0' in answer.read().decode()
    with urllib.request.urlopen(f"http://{host}:{port}/healthz") as answer:
        assert json.load(answer) == {"status": "ok"}
    metrics._alive_mono_s -= 1000
    with pytest.raises(urllib.error.HTTPError, match="503") as caught:
        urllib.request.urlopen(f"http://{host}:{port}/healthz")
    caught.value.close()


def test_a_taken_address_is_no_reason_to_stop(capsys):
    _, port = serve(FlowMetrics(), "127.0.0.1:0")

    _, other = serve(FlowMetrics(), f"127.0.0.1:{port}")

    assert other != port
    assert f"127.0.0.1:{port} cannot be used" in capsys.readouterr().err


def test_a_malformed_address_is_refused():
    with pytest.raises(ConfigError, match="give HOST:PORT"):
        serve(FlowMetrics(), "9465")


def test_recovery_folders_belong_to_a_number_of_processes(tmp_path):
    assert [f.name for f in prepare_recovery(tmp_path, 2)] == ["process-0", "process-1"]
    assert prepare_recovery(tmp_path, 2)
    with pytest.raises(ConfigError, match="positions of 2 flow processes, not of 3"):
        prepare_recovery(tmp_path, 3)
