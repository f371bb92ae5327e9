"""The catalogue of kernel events: numbers, families, and where each field lies in the record.

A record has five 64-bit arguments, `a0` to `a4` (`events.records`). This table is the only place that says which bits of
which argument a field occupies: the BPF side gets it as generated macros (`c_header`), the Python side as
`Kind.get(columns, "next_tid")`, so that the two cannot disagree. Numbers are part of the capture format: never
reuse one, never change the meaning of one; add new kinds at the end of a family's range.

Field names are those of the kernel's tracepoint formats where such a field exists, with two changes: what the kernel calls
`pid` is `tid` here, and a process id is `tgid`. Every `*_start_boot_ns` is `task_struct.start_boottime`, which equals field 22
of /proc/PID/stat (there in ticks). `tgid`/`tid` in the record's head are those of `current`.

Families are the unit of detection, of shedding under load, and of what `kprobe doctor` reports.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["BY_NAME", "BY_NUMBER", "FAMILIES", "KINDS", "Field", "Kind", "c_header"]


@dataclass(frozen=True, slots=True)
class Field:
    """Bits [shift, shift + bits) of argument `arg`; two's complement if `signed`."""

    name: str
    arg: int
    shift: int
    bits: int
    signed: bool


@dataclass(frozen=True, slots=True)
class Kind:
    """One event kind: `number` in the record, the kernel's tracepoint `name`, its `family` and its fields."""

    number: int
    name: str
    family: str
    fields: Mapping[str, Field]

    def get(self, columns: Mapping[str, npt.NDArray[Any]], field: str) -> npt.NDArray[Any]:
        """A field of all rows of `columns` (which must be of this kind): int64 if signed or narrower, else uint64.

        `columns` maps at least "a0".."a4" to uint64 arrays of one length. Raises KeyError for an unknown field.
        """
        f = self.fields[field]
        raw = columns[f"a{f.arg}"]
        if f.bits == 64:
            return raw.view(np.int64) if f.signed else raw
        part = (raw >> np.uint64(f.shift)) & np.uint64((1 << f.bits) - 1)
        out = part.astype(np.int64)
        if f.signed:
            out -= (out >> (f.bits - 1)) << f.bits
        return out

    def decode(self, args: tuple[int, ...]) -> dict[str, int]:
        """All fields of one record's five arguments, for listings (never on a hot path)."""
        out = {}
        for f in self.fields.values():
            value = args[f.arg] >> f.shift & (1 << f.bits) - 1
            out[f.name] = value - (1 << f.bits) if f.signed and value >> (f.bits - 1) else value
        return out

    def encode(self, **values: int) -> tuple[int, int, int, int, int]:
        """Five arguments from field values; absent fields are 0. Raises KeyError for an unknown field."""
        args = [0] * 5
        for name, value in values.items():
            f = self.fields[name]
            args[f.arg] |= (value & (1 << f.bits) - 1) << f.shift
        return args[0], args[1], args[2], args[3], args[4]


_TASK = "tid:0.0:32 tgid:0.32:32 start_boot_ns:1"
_COMM = "comm_lo:2 comm_hi:3"  # 16 bytes, little endian, zero padded
_RQ = "rq:0 dev:1.0:32 bytes:1.32:32 sector:2 bio:3 cmd_flags:4.0:32 error:4.32:32s"
_BIO = "bio:0 dev:1.0:32 bytes:1.32:32 sector:2 opf:3.0:32 error:3.32:32s cgroup_id:4"
_MM_BEGIN = "order:0.0:32s may_writepage:0.32:32 gfp_flags:1 cgroup_id:2 target_cgroup_id:3"
_SKB = "skb:0 saddr:1.0:32 daddr:1.32:32 sport:2.0:16 dport:2.16:16 ip_len:2.32:16 tcp_flags:2.48:8 protocol:2.56:8 "
_SKB += "seq:3.0:32 ack_seq:3.32:32 ifindex:4.0:16 netns_ino:4.32:32"
_SK = "sk:0 saddr:1.0:32 daddr:1.32:32 sport:2.0:16 dport:2.16:16 family:2.32:16 "

# number, name, family, fields ("name:arg[.shift:bits[s]]")
_TABLE: Final = (
    # --- sched: the last family to be shed; everything else hangs on it. not_run: switches of this CPU, since the one before
    #     in the record, for which the kernel did not run the probe's program
    (1, "sched_switch", "sched", "next_tid:0.0:32 next_tgid:0.32:32 next_start_boot_ns:1 "
        "prev_state:2.0:16 prev_prio:2.16:8 next_prio:2.24:8 prev_policy:2.32:4 next_policy:2.36:4 preempt:2.40:1 "
        "prev_throttled:2.41:1 prev_iowait:2.42:1 prev_kthread:2.43:1 next_kthread:2.44:1 next_throttled:2.45:1 "
        "not_run:2.48:16 next_cgroup_id:3 prev_start_boot_ns:4"),
    (2, "sched_waking", "sched", f"{_TASK} target_cpu:2.0:16 prio:2.16:8 policy:2.24:4 throttled:2.28:1 kthread:2.29:1 "
        "state:2.32:16 cgroup_id:3"),
    (3, "sched_wakeup", "sched", f"{_TASK} target_cpu:2.0:16 prio:2.16:8 policy:2.24:4 throttled:2.28:1 kthread:2.29:1 "
        "state:2.32:16 cgroup_id:3"),
    (4, "sched_wakeup_new", "sched", f"{_TASK} target_cpu:2.0:16 prio:2.16:8 policy:2.24:4 throttled:2.28:1 "
        "kthread:2.29:1 state:2.32:16 cgroup_id:3"),
    (5, "sched_migrate_task", "sched", f"{_TASK} orig_cpu:2.0:16 dest_cpu:2.16:16"),
    (6, "sched_process_fork", "sched", f"{_TASK} {_COMM} cgroup_id:4"),   # the child; current = the parent
    (7, "sched_process_exec", "sched", f"old_tid:0.0:32 start_boot_ns:1 {_COMM} cgroup_id:4"),
    (8, "sched_process_exit", "sched", f"exit_code:0.0:32 group_dead:0.32:1 start_boot_ns:1 {_COMM} cgroup_id:4"),
    (9, "sched_process_free", "sched", _TASK),
    (10, "task_rename", "sched", f"{_TASK} {_COMM}"),                      # comm: the new name
    (11, "sched_pi_setprio", "sched", f"{_TASK} old_prio:2.0:8 new_prio:2.8:8 pi_tid:2.32:32"),
    # --- syscalls: object_type 0 none, 1 socket (object = sk), 2 pipe, 3 regular file, 4 other anonymous, 5 device,
    #     6 directory (object = inode number; for pipes and files with the device in object_dev)
    (16, "sys_enter", "syscalls", "nr:0.0:32 object_type:0.32:8 object_dev:0.40:24 arg0:1 arg1:2 arg2:3 object:4"),
    (17, "sys_exit", "syscalls", "nr:0.0:32 object_type:0.32:8 object_dev:0.40:24 ret:1.0:64s arg0:2 arg1:3 object:4"),
    # futex enters come as this kind instead of sys_enter: word = *uaddr, owner = *(uaddr + 8), both as read at the call
    (18, "sys_enter_futex", "syscalls", "op:0.0:32 val:0.32:32 uaddr:1 word:2.0:32 owner:2.32:32 uaddr2:3 timeout:4"),
    # --- block: rq and bio are kernel pointers; pointers are reused: (pointer, time) names a request
    (24, "block_rq_insert", "block", _RQ),
    (25, "block_rq_issue", "block", _RQ),
    (26, "block_rq_complete", "block", _RQ),
    (27, "block_rq_merge", "block", _RQ),
    (28, "block_rq_requeue", "block", _RQ),
    (29, "block_rq_error", "block", _RQ),
    (30, "block_bio_queue", "block", _BIO),
    (31, "block_bio_backmerge", "block", _BIO),
    (32, "block_bio_frontmerge", "block", _BIO),
    (33, "block_bio_complete", "block", _BIO),
    (34, "block_bio_remap", "block", _BIO + " "),
    (35, "block_split", "block", _BIO),
    (36, "block_plug", "block", ""),
    (37, "block_unplug", "block", "nr_rq:0.0:32 explicit:0.32:1"),
    (38, "block_io_start", "block", _RQ),
    (39, "block_io_done", "block", _RQ),
    # --- reclaim: cgroup_id = current's memory cgroup, target_cgroup_id = the cgroup being reclaimed (0 = global)
    (40, "mm_vmscan_direct_reclaim_begin", "reclaim", _MM_BEGIN),
    (41, "mm_vmscan_direct_reclaim_end", "reclaim", "nr_reclaimed:0"),
    (42, "mm_vmscan_memcg_reclaim_begin", "reclaim", _MM_BEGIN),
    (43, "mm_vmscan_memcg_reclaim_end", "reclaim", "nr_reclaimed:0"),
    (44, "mm_vmscan_memcg_softlimit_reclaim_begin", "reclaim", _MM_BEGIN),
    (45, "mm_vmscan_memcg_softlimit_reclaim_end", "reclaim", "nr_reclaimed:0"),
    (46, "mm_vmscan_kswapd_wake", "reclaim", "nid:0.0:32s zid:0.32:32s order:1.0:32s"),
    (47, "mm_vmscan_kswapd_sleep", "reclaim", "nid:0.0:32s"),
    (48, "mm_vmscan_node_reclaim_begin", "reclaim", _MM_BEGIN),
    (49, "mm_vmscan_node_reclaim_end", "reclaim", "nr_reclaimed:0"),
    (50, "mm_vmscan_wakeup_kswapd", "reclaim", "nid:0.0:32s zid:0.32:32s order:1.0:32s gfp_flags:2"),
    (51, "mm_shrink_slab_start", "reclaim", "target_cgroup_id:0 gfp_flags:1"),
    (52, "mm_vmscan_throttled", "reclaim", "nid:0.0:32s reason:0.32:32s usec_timeout:1.0:32 usec_delayed:1.32:32"),
    (54, "mm_compaction_begin", "compaction", "sync:0.0:1"),
    (55, "mm_compaction_end", "compaction", "status:0.0:32s"),
    (56, "mm_compaction_try_to_compact_pages", "compaction", "order:0.0:32s gfp_flags:1 prio:2.0:32s"),
    (58, "mark_victim", "oom", f"{_TASK} {_COMM} cgroup_id:4"),           # current = whose allocation invoked the killer
    # --- writeback and dirty throttling
    (60, "balance_dirty_pages", "writeback", "pause_jiffies:0.0:32s paused_ms:0.32:32s dirtied:1.0:32 "
        "dirtied_pause:1.32:32 bdi_dev:2.0:32 dirty_ratelimit:3 cgroup_ino:4"),
    (61, "writeback_start", "writeback", "bdi_dev:0.0:32 reason:0.32:32 nr_pages:1 cgroup_ino:4"),
    (62, "writeback_written", "writeback", "bdi_dev:0.0:32 reason:0.32:32 nr_pages:1 cgroup_ino:4"),
    (63, "writeback_single_inode", "writeback", "bdi_dev:0.0:32 ino:1 wrote:2 cgroup_ino:4"),
    (64, "writeback_dirty_inode", "writeback", "bdi_dev:0.0:32 flags:0.32:32 ino:1"),
    (65, "folio_wait_writeback", "writeback", "bdi_dev:0.0:32 ino:1 index:2"),
    (66, "wbt_timer", "writeback", "bdi_dev:0.0:32 inflight:1.0:32"),
    # --- jbd2: transaction = journal transaction id (tid of the kernel's format)
    (70, "jbd2_start_commit", "jbd2", "dev:0.0:32 sync_commit:0.32:1 transaction:1.0:32"),
    (71, "jbd2_commit_locking", "jbd2", "dev:0.0:32 sync_commit:0.32:1 transaction:1.0:32"),
    (72, "jbd2_commit_flushing", "jbd2", "dev:0.0:32 sync_commit:0.32:1 transaction:1.0:32"),
    (73, "jbd2_commit_logging", "jbd2", "dev:0.0:32 sync_commit:0.32:1 transaction:1.0:32"),
    (74, "jbd2_end_commit", "jbd2", "dev:0.0:32 sync_commit:0.32:1 transaction:1.0:32 head:1.32:32"),
    (75, "jbd2_run_stats", "jbd2", "dev:0.0:32 transaction:1.0:32 locked_ms:2.0:32 flushing_ms:2.32:32 "
        "logging_ms:3.0:32 handle_count:3.32:32 blocks:4.0:32 blocks_logged:4.32:32"),
    (76, "jbd2_handle_start", "jbd2", "dev:0.0:32 transaction:1.0:32 type:1.32:32 line:2.0:32 requested_blocks:2.32:32"),
    (77, "jbd2_handle_stats", "jbd2", "dev:0.0:32 transaction:1.0:32 type:1.32:32 interval_jiffies:2.0:32 sync:2.32:32 "
        "requested_blocks:3.0:32 dirtied_blocks:3.32:32"),
    (78, "ext4_sync_file_enter", "jbd2", "dev:0.0:32 datasync:0.32:1 ino:1 parent_ino:2"),
    (79, "ext4_sync_file_exit", "jbd2", "dev:0.0:32 ret:0.32:32s ino:1"),
    (80, "jbd2_lock_buffer_stall", "jbd2", "dev:0.0:32 stall_ms:1"),
    # --- interrupts
    (84, "irq_handler_entry", "irq", "irq:0.0:32s name_lo:1 name_hi:2"),
    (85, "irq_handler_exit", "irq", "irq:0.0:32s ret:0.32:32s"),
    (86, "softirq_entry", "softirq", "vec:0.0:32"),
    (87, "softirq_exit", "softirq", "vec:0.0:32"),
    (88, "softirq_raise", "softirq", "vec:0.0:32"),
    (89, "tasklet_entry", "softirq", "tasklet:0 func:1"),
    (90, "tasklet_exit", "softirq", "tasklet:0 func:1"),
    (92, "local_timer_entry", "irq_vectors", "vector:0.0:32"),
    (93, "local_timer_exit", "irq_vectors", "vector:0.0:32"),
    (94, "reschedule_entry", "irq_vectors", "vector:0.0:32"),
    (95, "reschedule_exit", "irq_vectors", "vector:0.0:32"),
    (96, "call_function_entry", "irq_vectors", "vector:0.0:32"),
    (97, "call_function_exit", "irq_vectors", "vector:0.0:32"),
    (98, "call_function_single_entry", "irq_vectors", "vector:0.0:32"),
    (99, "call_function_single_exit", "irq_vectors", "vector:0.0:32"),
    (100, "irq_work_entry", "irq_vectors", "vector:0.0:32"),
    (101, "irq_work_exit", "irq_vectors", "vector:0.0:32"),
    (102, "ipi_send_cpu", "irq_vectors", "target_cpu:0.0:32 callsite:1 callback:2"),
    (103, "ipi_send_cpumask", "irq_vectors", "cpumask_lo:0 callsite:1 callback:2"),
    (104, "nmi_handler", "irq_vectors", "handler:0 delta_ns:1.0:64s handled:2.0:32s"),  # fires at its end
    # --- timers
    (106, "hrtimer_start", "timers", "hrtimer:0 function:1 expires_ns:2.0:64s softexpires_ns:3.0:64s mode:4.0:32"),
    (107, "hrtimer_expire_entry", "timers", "hrtimer:0 function:1 now_ns:2.0:64s"),
    (108, "hrtimer_expire_exit", "timers", "hrtimer:0"),
    (109, "hrtimer_cancel", "timers", "hrtimer:0"),
    (110, "timer_expire_entry", "timers", "timer:0 function:1 now_jiffies:2"),
    (111, "timer_expire_exit", "timers", "timer:0"),
    (112, "timer_start", "timers", "timer:0 function:1 expires_jiffies:2"),
    # --- workqueue
    (116, "workqueue_queue_work", "workqueue", "work:0 function:1 req_cpu:2.0:32s"),
    (117, "workqueue_activate_work", "workqueue", "work:0 function:1"),
    (118, "workqueue_execute_start", "workqueue", "work:0 function:1"),
    (119, "workqueue_execute_end", "workqueue", "work:0 function:1"),
    # --- sockets and network; addresses are IPv4, or the last 4 bytes of an IPv6 address (family tells)
    (122, "inet_sock_set_state", "sock", _SK + "oldstate:3.0:16 newstate:3.16:16 protocol:3.32:16 netns_ino:4.0:32"),
    (126, "tcp_retransmit_skb", "tcp", _SK + "state:2.48:8 seq:3.0:32 end_seq:3.32:32 netns_ino:4.0:32"),
    (127, "tcp_send_reset", "tcp", _SK + "state:2.48:8 reason:3.0:32 netns_ino:4.0:32"),
    (128, "tcp_receive_reset", "tcp", _SK + "netns_ino:4.0:32"),
    (129, "tcp_probe", "tcp", _SK + "seq:3.0:32 end_seq:3.32:32 ack_seq:4.0:32 netns_ino:4.32:32"),
    (130, "tcp_destroy_sock", "tcp", _SK + "netns_ino:4.0:32"),
    (132, "kfree_skb", "tcp", "skb:0 location:1 reason:2.0:32 protocol:2.32:16 rx_sk:3"),
    (133, "sk_data_ready", "tcp", _SK + "protocol:3.0:16 netns_ino:4.0:32"),
    (136, "net_dev_queue", "net", _SKB),
    (137, "net_dev_start_xmit", "net", _SKB),
    (138, "net_dev_xmit", "net", "skb:0 rc:1.0:32s len:1.32:32 ifindex:4.0:16"),
    (139, "netif_receive_skb", "net", _SKB),
    (140, "napi_poll", "net", "napi:0 work:1.0:32s budget:1.32:32s ifindex:4.0:16"),
    # --- signals: target in tid/tgid/start_boot_ns; current = the sender (generate) or the target (deliver)
    (144, "signal_generate", "signals", f"{_TASK} sig:2.0:8 group:2.8:8 result:2.16:8 code:2.32:32s"),
    (145, "signal_deliver", "signals", "sig:0.0:32 code:0.32:32s sa_handler:1 sa_flags:2"),
    # --- faults: no exit event exists; a fault ends with the task's next event
    (148, "page_fault_user", "faults", "address:0 ip:1 error_code:2"),
    (149, "page_fault_kernel", "faults", "address:0 ip:1 error_code:2"),
    # --- kernel locks: flags 1 spin, 2 read, 4 write, 8 rt, 16 percpu, 32 mutex; owner 0 = unknown
    (152, "contention_begin", "locks", "lock:0 flags:1.0:32 owner_tid:2.0:32 owner_tgid:2.32:32 "
        "owner_start_boot_ns:3 owner_word:4"),
    (153, "contention_end", "locks", "lock:0 ret:1.0:32s"),
    (154, "mmap_lock_start_locking", "locks", "mm:0 write:1.0:1 success:1.1:1"),
    (155, "mmap_lock_acquire_returned", "locks", "mm:0 write:1.0:1 success:1.1:1"),
    (156, "mmap_lock_released", "locks", "mm:0 write:1.0:1 success:1.1:1"),
    # --- cgroups; paths travel as text records
    (160, "cgroup_mkdir", "cgroup", "cgroup_id:0 root:1.0:32s level:1.32:32s"),
    (161, "cgroup_rmdir", "cgroup", "cgroup_id:0 root:1.0:32s level:1.32:32s"),
    (162, "cgroup_attach_task", "cgroup", f"{_TASK} cgroup_id:2 root:3.0:32s"),
    (163, "cgroup_freeze", "cgroup", "cgroup_id:0"),
    (164, "cgroup_unfreeze", "cgroup", "cgroup_id:0"),
    (165, "cgroup_notify_frozen", "cgroup", "cgroup_id:0 frozen:1.0:1"),
    # --- CFS quota: no tracepoint exists; the state rides on sched_switch, the end is the period timer's exit
    (168, "cfs_period_timer", "throttle", "hrtimer:0 slack:1.0:1 cgroup_id:2"),  # at hrtimer_expire_exit of that timer
    (172, "cpu_idle", "power", "state:0.0:32s"),
    (173, "rss_stat", "memory", "mm_id:0.0:32 curr:0.32:1 member:1.0:32s size_bytes:2.0:64s"),
    (174, "filemap_fault", "memory", "dev:0.0:32 ino:1 index:2"),
)


def _parse_field(text: str) -> Field:
    name, place = text.split(":", 1)
    if "." not in place:
        return Field(name, int(place), 0, 64, signed=False)
    arg, rest = place.split(".")
    shift, bits = rest.split(":")
    return Field(name, int(arg), int(shift), int(bits.rstrip("s")), signed=bits.endswith("s"))


def _parse(number: int, name: str, family: str, fields: str) -> Kind:
    parsed = [_parse_field(f) for f in fields.split()]
    return Kind(number, name, family, MappingProxyType({f.name: f for f in parsed}))


KINDS: Final[tuple[Kind, ...]] = tuple(_parse(*row) for row in _TABLE)
BY_NUMBER: Final[Mapping[int, Kind]] = MappingProxyType({k.number: k for k in KINDS})
BY_NAME: Final[Mapping[str, Kind]] = MappingProxyType({k.name: k for k in KINDS})
FAMILIES: Final[tuple[str, ...]] = tuple(dict.fromkeys(k.family for k in KINDS))


def c_header() -> str:
    """C text for the BPF side: `KIND_<NAME>` numbers and, per field, `<NAME>__<FIELD>_ARG/_SHIFT/_MASK`."""
    lines = []
    for kind in KINDS:
        upper = kind.name.upper()
        lines.append(f"#define KIND_{upper} {kind.number}")
        for f in kind.fields.values():
            stem = f"{upper}__{f.name.upper()}"
            lines.append(f"#define {stem}_ARG {f.arg}")
            lines.append(f"#define {stem}_SHIFT {f.shift}")
            lines.append(f"#define {stem}_MASK {(1 << f.bits) - 1:#x}ULL")
    return "\n".join(lines) + "\n"
