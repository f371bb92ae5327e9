"""What this kernel can record, and what each gap costs: families of events, fields they need, causes that depend on them.

`FAMILIES` says, per family of events/kinds.py, which cause kinds of a verdict cannot be found without it, and what
to do about it. `FIELDS` says the same of single kernel fields. `Capabilities` is the finding for the running kernel; it
is part of the session frame, of `kprobe doctor`, and of a verdict's completeness.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["FAMILIES", "FIELDS", "Capabilities", "Dependency", "FamilyState"]


@dataclass(frozen=True, slots=True)
class Dependency:
    """What hangs on a family or a field: cause kinds (interface, section 3), and the remedy where it is missing."""

    purpose: str
    causes: tuple[str, ...]
    remedy: str


FAMILIES: Final[Mapping[str, Dependency]] = {
    "sched": Dependency("who runs, who waits, who wakes whom", ("every cause",), "none: any kernel since 5.10 has these"),
    "syscalls": Dependency(
        "what a thread asked for when it waited",
        ("peer_slow", "net_peer", "own_sleep"),
        "a kernel with CONFIG_FTRACE_SYSCALLS=y",
    ),
    "block": Dependency(
        "requests to disks",
        ("disk_contention", "disk_throttle", "disk_slow", "io_error"),
        "a kernel with CONFIG_BLOCK=y and CONFIG_TRACEPOINTS=y",
    ),
    "reclaim": Dependency("memory taken back", ("memcg_reclaim", "global_reclaim"), "a kernel with CONFIG_TRACEPOINTS=y"),
    "compaction": Dependency("memory moved together", ("global_reclaim",), "a kernel with CONFIG_COMPACTION=y"),
    "oom": Dependency("processes killed for memory", ("killed_oom",), "a kernel with CONFIG_TRACEPOINTS=y"),
    "writeback": Dependency("dirty pages and who waits for them", ("dirty_throttle",), "a kernel with CONFIG_TRACEPOINTS=y"),
    "jbd2": Dependency(
        "commits of the ext4 journal",
        ("journal_commit",),
        "load the module (modprobe ext4) before kprobe starts; 5.11+ for its types",
    ),
    "irq": Dependency("hardware interrupts", ("irq_storm",), "a kernel with CONFIG_TRACEPOINTS=y"),
    "softirq": Dependency("soft interrupts", ("irq_storm",), "a kernel with CONFIG_TRACEPOINTS=y"),
    "irq_vectors": Dependency("ticks and inter-processor interrupts", ("irq_storm",), "x86 only; ipi_send_* need Linux 6.4"),
    "timers": Dependency("timers that end a sleep", ("own_sleep",), "a kernel with CONFIG_TRACEPOINTS=y"),
    "workqueue": Dependency(
        "work done by kernel threads for others", ("disk_contention",), "a kernel with CONFIG_TRACEPOINTS=y"
    ),
    "sock": Dependency("birth and death of connections", ("net_reset", "peer_exited"), "a kernel with CONFIG_INET=y"),
    "tcp": Dependency("retransmissions, resets, drops", ("net_loss", "net_reset"), "sk_data_ready needs Linux 6.3"),
    "net": Dependency("packets sent and received", ("net_peer", "net_loss"), "a kernel with CONFIG_NET=y"),
    "signals": Dependency("who signalled whom", ("killed_signal", "stopped"), "a kernel with CONFIG_TRACEPOINTS=y"),
    "faults": Dependency("page faults", ("swap_in",), "x86 only"),
    "locks": Dependency(
        "contended kernel locks and their owners",
        ("lock_holder", "lock_convoy", "priority_inversion"),
        "Linux 5.19 or newer for contention_begin",
    ),
    "cgroup": Dependency("groups made, left, frozen", ("stopped",), "a kernel with CONFIG_CGROUPS=y"),
    "throttle": Dependency("ends of a CPU quota's period", ("cpu_quota",), "a kernel with CONFIG_CFS_BANDWIDTH=y"),
    "power": Dependency("idle states", (), "a kernel with CONFIG_CPU_IDLE=y"),
    "memory": Dependency("resident size, page cache faults", (), "mm_filemap_fault needs Linux 6.11"),
}

# A field that may be known by several names, of which one is enough.
FIELDS: Final[Mapping[tuple[str, ...], Dependency]] = {
    ("task_struct.throttled", "cfs_rq.throttle_count"): Dependency(
        "is a runnable thread throttled?", ("cpu_quota",), "a kernel with CONFIG_CFS_BANDWIDTH=y"
    ),
    ("mutex.owner",): Dependency("owner of a contended mutex", ("lock_holder",), "Linux 5.19 or newer"),
    ("rw_semaphore.owner",): Dependency("owner of a contended rw_semaphore", ("lock_holder",), "Linux 5.19 or newer"),
    ("shrink_control.memcg",): Dependency(
        "cgroup whose memory is taken back", ("memcg_reclaim",), "a kernel with CONFIG_MEMCG=y"
    ),
    ("bio.bi_blkg",): Dependency("cgroup of a disk request", ("disk_throttle",), "a kernel with CONFIG_BLK_CGROUP=y"),
    ("bdi_writeback.memcg_css",): Dependency(
        "cgroup of dirty pages", ("dirty_throttle",), "a kernel with CONFIG_CGROUP_WRITEBACK=y"
    ),
    ("request.rq_disk", "request_queue.disk"): Dependency(
        "device of a disk request", ("disk_contention", "disk_slow"), "a kernel since 5.10"
    ),
}


@dataclass(slots=True)
class FamilyState:
    """One family as found: `attached` if at least one of its events is recorded; `missing` names the others."""

    attached: bool = False
    present: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the session frame carries it."""
        return {"attached": self.attached, "present": self.present, "missing": self.missing, "reason": self.reason}


@dataclass(slots=True)
class Capabilities:
    """The finding: families, missing fields, and the causes that become unavailable because of either."""

    families: dict[str, FamilyState]
    missing_fields: tuple[str, ...]

    def lacking(self) -> dict[str, Dependency]:
        """What is missing, by name of the family or the field(s), with its consequence."""
        gaps = {name: FAMILIES[name] for name, state in self.families.items() if not state.attached}
        absent = set(self.missing_fields)
        gaps.update({" | ".join(names): need for names, need in FIELDS.items() if absent.issuperset(names)})
        return gaps

    def unavailable_causes(self) -> list[str]:
        """Cause kinds that a verdict on this kernel cannot name, sorted."""
        return sorted({cause for need in self.lacking().values() for cause in need.causes})

    def to_json(self) -> dict[str, Any]:
        """As the session frame carries it, under "capabilities"."""
        return {
            "unavailable_causes": self.unavailable_causes(),
            "missing": {
                name: {"purpose": need.purpose, "causes": list(need.causes), "remedy": need.remedy}
                for name, need in sorted(self.lacking().items())
            },
        }
