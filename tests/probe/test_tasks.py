"""Names stay with their lives, and a cgroup path names its container whatever runtime made it."""

import numpy as np
import pyarrow as pa
import pytest

from events.records import TASKS
from probe.tasks import TaskTable, container_id, with_container

ID = "0123456789abcdef" * 4
OTHER = "f" * 64

PATHS = {
    "docker, systemd driver": (f"/system.slice/docker-{ID}.scope", ID),
    "docker, cgroupfs driver": (f"/docker/{ID}", ID),
    "docker in docker": (f"/docker/{OTHER}/docker/{ID}", ID),
    "process below a container": (f"/docker/{ID}/init.scope", ID),
    "containerd, systemd driver": (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-{ID}.scope", ID,
    ),
    "containerd, cgroupfs driver": (f"/kubepods/burstable/pod3f2c9b6e-7d1f-4f9f-8d9b-1f3c5d7e9a0b/{ID}", ID),
    "containerd, nested unit": (f"/system.slice/containerd.service/kubepods-burstable-pod1.slice:cri-containerd:{ID}", ID),
    "cri-o": (f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/crio-{ID}.scope", ID),
    "cri-o, inside the scope": (f"/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope/container", ID),
    "cri-o's monitor": (f"/kubepods.slice/kubepods-pod1.slice/crio-conmon-{ID}.scope", None),
    "podman": (f"/machine.slice/libpod-{ID}.scope", ID),
    "podman, inside the scope": (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container", ID),
    "podman, cgroupfs driver": (f"/libpod_parent/libpod-{ID}", ID),
    "podman's monitor": (f"/machine.slice/libpod-conmon-{ID}.scope", None),
    "a plain service": ("/system.slice/postgresql.service", None),
    "the root": ("/", None),
    "nothing": (None, None),
    "63 digits are no id": (f"/docker/{ID[1:]}", None),
    "a longer word is no id": (f"/docker/{ID}0", None),
}  # fmt: skip


@pytest.mark.parametrize(("path", "expected"), PATHS.values(), ids=PATHS.keys())
def test_the_container_of_a_cgroup(path, expected):
    assert container_id(path) == expected


def test_a_row_that_knows_its_container_keeps_it():
    assert with_container({"cgroup": f"/docker/{ID}", "container": "web-1"})["container"] == "web-1"
    assert with_container({"cgroup": f"/docker/{ID}", "container": None})["container"] == ID


def table(*rows):
    made = TaskTable()
    made.add(pa.RecordBatch.from_pylist([{f.name: row.get(f.name) for f in TASKS} for row in rows], schema=TASKS))
    return made


def test_a_reused_thread_id_is_two_tasks():
    tasks = table(
        {"time_mono_ns": 10, "reason": "fork", "tid": 7, "tgid": 7, "start_boot_ns": 10, "comm": "sh", "cgroup": "/a"},
        {"time_mono_ns": 20, "reason": "exec", "tid": 7, "tgid": 7, "start_boot_ns": 10, "comm": "ledger"},
        {"time_mono_ns": 30, "reason": "exit", "tid": 7, "tgid": 7, "start_boot_ns": 10, "exit_code": 256},
        {"time_mono_ns": 90, "reason": "fork", "tid": 7, "tgid": 7, "start_boot_ns": 90, "comm": "batch"},
    )

    lives = list(tasks.lives())

    assert [(t["start_boot_ns"], t["comm"]) for t in lives] == [(10, "ledger"), (90, "batch")]
    assert "cgroup" not in lives[1]
    assert tasks.at(7, 25)["comm"] == "ledger"
    assert tasks.at(7, 25)["cgroup"] == "/a"
    assert tasks.at(7, 95)["comm"] == "batch"


def test_names_follow_time():
    tasks = table(
        {"time_mono_ns": 20, "reason": "exec", "tid": 7, "start_boot_ns": 10, "comm": "ledger"},
        {"time_mono_ns": 10, "reason": "fork", "tid": 7, "start_boot_ns": 10, "comm": "sh"},
    )

    names = tasks.comms(np.array([7, 7, 7, 0, 8]), np.array([5, 15, 20, 20, 20]), np.array([0, 0, 0, 3, 0]))

    assert names == ["sh", "sh", "ledger", "swapper/3", ""]
