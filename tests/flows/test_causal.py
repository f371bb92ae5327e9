"""The flow on a real Kafka and ClickHouse: the same verdicts however it runs, and whatever happens to it meanwhile."""

import json
import os
import random
import signal
import subprocess
import threading

import pytest
from confluent_kafka import TopicPartition
from stack_fixture import free_ports
from world import World, finish, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(240)]


def start_flow(world, folder, *arguments, **flow):
    """Start `kprobe flow`."""
    return world.spawn(["-m", "cli.main", "flow", *arguments], recovery_dir=folder, **flow)


def start_cluster(world):
    """Start the two processes of one Bytewax cluster."""
    addresses = ";".join(f"127.0.0.1:{port}" for port in free_ports(2))
    return [world.start("-i", number, "-a", addresses, "-s", "1", stop_at_end=True) for number in range(2)]


def test_the_verdicts_are_the_same_in_all_four_ways_to_run(world, tmp_path):
    world.fill()
    world.run("-s", "1")
    hashes, edges, stored = world.verdicts(), world.edges(), world.stored()
    assert hashes.keys() == world.operations.keys()
    assert len(stored["events"]) == world.event_count

    threads = world.with_outputs_of_its_own()
    threads.run("-w", "3", "-s", "1")
    cluster = world.with_outputs_of_its_own()
    for process in start_cluster(cluster):
        finish(process)
    processes = world.with_outputs_of_its_own()
    said = finish(start_flow(processes, tmp_path / "recovery", "--processes", "2", "--stop-at-end"))

    assert "flow process 1 started" in said
    for other in (threads, cluster, processes):
        assert (other.verdicts(), other.edges(), other.stored()) == (hashes, edges, stored)


def test_the_verdicts_do_not_depend_on_how_events_are_cut_into_messages(stack):
    found = []
    for events_a_frame in (7, 1000):
        world = World(stack.settings, seed=5)
        world.fill(events_a_frame=events_a_frame)
        world.run("-s", "1", raw_rows=False, stores=False, max_batch_messages=events_a_frame % 5 + 1)
        found.append((world.verdicts(), world.edges()))

    assert found[0] == found[1]
    assert len(found[0][0]) == 24


def test_a_malformed_message_is_set_aside_and_its_neighbours_live(world):
    messages = world.messages(nodes=("node-a",))
    good = world.operations["node-a-0"]
    garbage = [
        ("raw", "node-a", b"\x00\x01not a frame"),
        ("operations", "node-a", json.dumps(good | {"operation_id": "broken", "tid": "x"}).encode()),
    ]
    stranger = ("operations", "node-x", json.dumps(good | {"node": "node-x", "operation_id": "x"}).encode())
    half = len(messages) // 2
    world.send(*messages[:half], *garbage, stranger, *messages[half:])

    world.run("-s", "1")

    letters = world.read("deadletter")
    headers = [dict(letter.headers()) for letter in letters]
    assert sorted(letter.value() for letter in letters) == sorted([garbage[0][2], garbage[1][2], stranger[2]])
    reasons = sorted(h["reason"].decode() for h in headers)
    assert reasons[0].startswith("not an Arrow IPC stream")
    assert reasons[1].startswith("not an operation: operation 'broken': tid is 'x'")
    assert reasons[2].startswith("operation 'x' no frame of node 'node-x' was recorded")
    assert all(h["topic"].decode() in world.topics.values() and int(h["offset"]) >= 0 for h in headers)
    assert world.verdicts().keys() == {i for i in world.operations if i.startswith("node-a")}
    assert len(world.stored()["events"]) == world.event_count


def test_killed_at_random_moments_it_leaves_what_an_uninterrupted_run_leaves(world, recovery):
    """GIVEN messages that arrive over some seconds WHEN the flow is killed again and again THEN nothing is lost or doubled."""
    rng = random.Random(seed := int(os.environ.get("KPROBE_TEST_SEED", "4821")))
    print(f"KPROBE_TEST_SEED={seed}")
    messages = world.messages(events_a_frame=8)
    victim = world.with_outputs_of_its_own()
    stop = threading.Event()

    def trickle():
        for at in range(0, len(messages), 8):
            world.send(*messages[at : at + 8])
            if stop.wait(0.15):
                return

    feeder = threading.Thread(target=trickle)
    feeder.start()
    try:
        kills = 0
        while feeder.is_alive() or kills < 3:
            process = victim.start(*recovery)
            wait_until(lambda: victim.read("verdicts") or not feeder.is_alive(), "a first verdict")
            try:
                out, _ = process.communicate(timeout=rng.uniform(2.0, 5.0))
                raise AssertionError(f"the flow ended by itself:\n{out.decode()}")
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            kills += 1
    finally:
        stop.set()
        feeder.join()
    victim.run(*recovery)
    world.run("-s", "1")

    assert victim.stored() == world.stored()
    assert len(victim.stored()["events"]) == world.event_count
    assert (victim.verdicts(), victim.edges()) == (world.verdicts(), world.edges())


def test_sigterm_drains_and_the_next_start_goes_on_there(world, tmp_path):
    messages = world.messages(nodes=("node-a", "node-b"))
    half = len(messages) // 2
    world.send(*messages[:half])
    process = start_flow(world, tmp_path / "recovery")
    wait_until(lambda: world.read("verdicts"), "a first verdict")

    process.send_signal(signal.SIGTERM)

    assert "flow process 0" in finish(process, 30)
    assert world.stored()["events"]
    world.send(*messages[half:])
    finish(start_flow(world, tmp_path / "recovery", "--stop-at-end"))
    assert world.verdicts().keys() == world.operations.keys()
    assert len(world.stored()["events"]) == world.event_count


def test_a_position_that_retention_removed_is_an_error_that_says_how_to_go_on(world, recovery):
    world.fill(nodes=("node-a",))
    world.run(*recovery)
    before = len(world.read("raw"))
    world.fill(nodes=("node-a",))
    partition = next(m.partition() for m in world.read("raw"))
    target = TopicPartition(world.topics["raw"], partition, before + 3)
    world.admin.delete_records([target])[TopicPartition(world.topics["raw"], partition)].result(20)

    said = finish(world.start(*recovery, stop_at_end=True), status=1)

    assert (
        f"3 messages of {world.topics['raw']}/{partition} (offsets {before} to {before + 2}) were removed by retention" in said
    )
    assert "KPROBE_FLOW__ON_GAP=continue" in said
    assert "going on at offset" in world.run(*recovery, on_gap="continue")


def test_a_process_that_dies_is_named_and_started_again(world, tmp_path):
    world.fill(nodes=("node-a",))
    process = start_flow(world, tmp_path / "recovery")
    wait_until(lambda: world.read("verdicts"), "a first verdict")
    child = next(c for c in _children(process.pid))

    os.kill(child, signal.SIGKILL)

    wait_until(lambda: set(_children(process.pid)) - {child}, "another child")
    process.send_signal(signal.SIGTERM)
    said = finish(process, 30)
    assert f"flow process 0 (pid {child}) was killed by SIGKILL; starting it again in 0.5 s (1 of 5)" in said


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def test_children_end_with_a_killed_supervisor_and_a_second_flow_is_refused_meanwhile(world, tmp_path):
    process = start_flow(world, tmp_path / "recovery")
    (child,) = wait_until(lambda: _children(process.pid), "a child")

    said = finish(start_flow(world, tmp_path / "recovery"), status=2)
    process.kill()

    assert "another `kprobe flow` runs on" in said
    wait_until(lambda: not os.path.exists(f"/proc/{child}"), "the child's end")
    process.communicate()


def test_another_number_of_processes_is_refused(world, tmp_path):
    finish(start_flow(world, tmp_path / "recovery", "--processes", "2", "--stop-at-end"))

    said = finish(start_flow(world, tmp_path / "recovery", "--processes", "3", "--stop-at-end"), status=2)

    assert "holds the positions of 2 flow processes, not of 3: give --processes 2" in said


def test_a_missing_topic_is_named_with_its_remedy(world):
    world.topics = world.topics | {"raw": "test.nowhere"}

    said = finish(world.start(stop_at_end=True), status=1)

    assert "topic test.nowhere does not exist; `kprobe up` or `kprobe migrate` creates it" in said
