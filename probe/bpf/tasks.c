/* Births, deaths and names of tasks, and the watch set that follows them; cgroups; the snapshot of all tasks. */

/* @fields
 * task_struct.exit_code task_struct.signal signal_struct.live task_struct.normal_prio task_struct.mm mm_struct.arg_start
 * mm_struct.arg_end task_struct.real_parent task_struct.on_cpu task_struct.exit_state
 * bpf_iter_meta.seq cgroup.self cgroup_subsys_state.parent
 */

#define BOUND(value, max) asm volatile("if %0 <= %1 goto +1\n\t%0 = %1" : "+r"(value) : "i"(max))

static __always_inline struct text_record *begin_text(u32 kind, u64 key) {
  struct text_record *record = bpf_ringbuf_reserve(MAP(MAP_TEXT), sizeof *record, 0);
  if (!record) {
    my_state()->text_dropped++;
    return 0;
  }
  record->time_mono_ns = bpf_ktime_get_ns();
  record->key = key;
  record->kind = kind;
  record->tid = bpf_get_current_pid_tgid();
  record->cpu = bpf_get_smp_processor_id();
  record->bytes = 0;
  return record;
}

static __always_inline void send_argv(u64 task) {
  u64 mm = READ(u64, task, OFF_task_struct_mm);
  u64 from = READ(u64, mm, OFF_mm_struct_arg_start), bytes = READ(u64, mm, OFF_mm_struct_arg_end) - from;
  struct text_record *record = begin_text(TEXT_ARGV, 0);
  if (!record)
    return;
  BOUND(bytes, TEXT_BYTES); /* on the very register that is passed: the verifier does not follow copies */
  if (bpf_probe_read_user(record->text, bytes, (void *)from) == 0)
    record->bytes = bytes;
  else
    my_state()->unreadable++;
  bpf_ringbuf_submit(record, NO_WAKEUP);
}

static __always_inline void send_path(u32 kind, u64 key, u64 path) {
  struct text_record *record = begin_text(kind, key);
  long bytes;
  if (!record)
    return;
  bytes = bpf_probe_read_kernel_str(record->text, TEXT_BYTES, (void *)path);
  if (bytes > 0)
    record->bytes = bytes - 1;
  bpf_ringbuf_submit(record, NO_WAKEUP);
}

/* A process whose name matches one of the patterns joins the watch set. */
static __always_inline void watch_by_name(u32 tgid, u64 *comm) {
  struct config *config = VALUE_OF(struct config, MAP_CONFIG);
  u64 n = config->patterns;
#pragma unroll
  for (u32 i = 0; i < PATTERNS_MAX; i++)
    if (i < n && (comm[0] & config->pattern[i][0]) == config->pattern[i][1] &&
        (comm[1] & config->pattern[i][2]) == config->pattern[i][3])
      watch_process(tgid);
}

static __always_inline u64 cgroup_key(u64 cgroup) {
  u64 hierarchy = READ(u32, READ(u64, cgroup, OFF_cgroup_root), OFF_cgroup_root_hierarchy_id);
  return hierarchy << 48 | READ(u64, READ(u64, cgroup, OFF_cgroup_kn), OFF_kernfs_node_id);
}

static __always_inline u64 cgroup_id(u64 cgroup) {
  return READ(u64, READ(u64, cgroup, OFF_cgroup_kn), OFF_kernfs_node_id);
}

static __always_inline int cgroup_is_watched(u64 key) {
  return VALUE_OF(struct config, MAP_CONFIG)->cgroups && lookup_element(MAP(MAP_CGROUPS), &key) != 0;
}

/* Runs before the child can: no event of a descendant is missed. Every process begins with its parent's byte, so a reused
 * pid never inherits that of its predecessor. */
int raw_sched_process_fork(u64 *ctx) {
  u64 parent = ARG(sched_process_fork, parent), child = ARG(sched_process_fork, child);
  u32 parent_tgid = READ(u32, parent, OFF_task_struct_tgid), tgid = READ(u32, child, OFF_task_struct_tgid);
  u64 cgroup = cgroup_id_of_task(child);
  ARGS;
  if (tgid != parent_tgid) {
    u8 flags = flags_of_process(parent_tgid);
    set_process(tgid, flags);
    if (cgroup_is_watched(VALUE_OF(struct config, MAP_CONFIG)->hierarchy << 48 | cgroup))
      watch_process(tgid);
  }
  SET_TASK(SCHED_PROCESS_FORK, child);
  SET_COMM(SCHED_PROCESS_FORK, child + OFF_task_struct_comm);
  SET(SCHED_PROCESS_FORK, CGROUP_ID, cgroup);
  return EMIT(SCHED_PROCESS_FORK);
}

int raw_sched_process_exec(u64 *ctx) {
  u64 task = ARG(sched_process_exec, p), comm[2] = {0, 0};
  ARGS;
  bpf_probe_read_kernel_str(comm, sizeof comm, (void *)(task + OFF_task_struct_comm));
  watch_by_name(bpf_get_current_pid_tgid() >> 32, comm);
  send_argv(task);
  SET(SCHED_PROCESS_EXEC, OLD_TID, ARG(sched_process_exec, old_pid));
  SET(SCHED_PROCESS_EXEC, START_BOOT_NS, READ(u64, task, OFF_task_struct_start_boottime));
  SET(SCHED_PROCESS_EXEC, COMM_LO, comm[0]);
  SET(SCHED_PROCESS_EXEC, COMM_HI, comm[1]);
  SET(SCHED_PROCESS_EXEC, CGROUP_ID, cgroup_id_of_task(task));
  return EMIT(SCHED_PROCESS_EXEC);
}

int raw_task_rename(u64 *ctx) {
  u64 task = ARG(task_rename, task), comm[2] = {0, 0};
  ARGS;
  bpf_probe_read_kernel_str(comm, sizeof comm, (void *)ARG(task_rename, comm));
  watch_by_name(READ(u32, task, OFF_task_struct_tgid), comm);
  SET_TASK(TASK_RENAME, task);
  SET(TASK_RENAME, COMM_LO, comm[0]);
  SET(TASK_RENAME, COMM_HI, comm[1]);
  return EMIT(TASK_RENAME);
}

int raw_sched_process_exit(u64 *ctx) {
  u64 task = ARG(sched_process_exit, p);
  ARGS;
  SET(SCHED_PROCESS_EXIT, EXIT_CODE, READ(u32, task, OFF_task_struct_exit_code));
#ifdef ARG_sched_process_exit__group_dead
  SET(SCHED_PROCESS_EXIT, GROUP_DEAD, (u8)ARG(sched_process_exit, group_dead) != 0);
#else
  SET(SCHED_PROCESS_EXIT, GROUP_DEAD, READ(u32, READ(u64, task, OFF_task_struct_signal), OFF_signal_struct_live) == 0);
#endif
  SET(SCHED_PROCESS_EXIT, START_BOOT_NS, READ(u64, task, OFF_task_struct_start_boottime));
  SET_COMM(SCHED_PROCESS_EXIT, task + OFF_task_struct_comm);
  SET(SCHED_PROCESS_EXIT, CGROUP_ID, cgroup_id_of_task(task));
  return EMIT(SCHED_PROCESS_EXIT);
}

int raw_sched_process_free(u64 *ctx) {
  ARGS;
  SET_TASK(SCHED_PROCESS_FREE, ARG(sched_process_free, p));
  return EMIT(SCHED_PROCESS_FREE);
}

#ifdef ARG_sched_pi_setprio__pi_task
int raw_sched_pi_setprio(u64 *ctx) {
  u64 task = ARG(sched_pi_setprio, tsk), donor = ARG(sched_pi_setprio, pi_task);
  int now = READ(s32, task, OFF_task_struct_normal_prio);
  ARGS;
  if (donor) {
    int prio = READ(s32, donor, OFF_task_struct_prio);
    now = prio < now ? prio : now;
    SET(SCHED_PI_SETPRIO, PI_TID, READ(u32, donor, OFF_task_struct_pid));
  }
  SET_TASK(SCHED_PI_SETPRIO, task);
  SET(SCHED_PI_SETPRIO, OLD_PRIO, READ(u32, task, OFF_task_struct_prio));
  SET(SCHED_PI_SETPRIO, NEW_PRIO, now);
  return EMIT(SCHED_PI_SETPRIO);
}
#endif

/* --- cgroups */
#define CGROUP_PLACE(kind, cgroup)                                                                   \
  do {                                                                                               \
    SET(kind, CGROUP_ID, cgroup_id(cgroup));                                                         \
    SET(kind, ROOT, READ(u32, READ(u64, cgroup, OFF_cgroup_root), OFF_cgroup_root_hierarchy_id));    \
    SET(kind, LEVEL, READ(u32, cgroup, OFF_cgroup_level));                                           \
  } while (0)

int raw_cgroup_mkdir(u64 *ctx) {
  u64 cgroup = ARG(cgroup_mkdir, cgrp), key = cgroup_key(cgroup), parent;
  u32 one = 1;
  ARGS;
  parent = READ(u64, READ(u64, cgroup, OFF_cgroup_self + OFF_cgroup_subsys_state_parent), OFF_cgroup_subsys_state_cgroup);
  if (parent && cgroup_is_watched(cgroup_key(parent)) && update_element(MAP(MAP_CGROUPS), &key, &one, 0))
    my_state()->filter_full++;
  send_path(TEXT_CGROUP_MADE, key, ARG(cgroup_mkdir, path));
  CGROUP_PLACE(CGROUP_MKDIR, cgroup);
  return EMIT(CGROUP_MKDIR);
}

int raw_cgroup_rmdir(u64 *ctx) {
  u64 cgroup = ARG(cgroup_rmdir, cgrp);
  ARGS;
  send_path(TEXT_CGROUP_GONE, cgroup_key(cgroup), ARG(cgroup_rmdir, path));
  CGROUP_PLACE(CGROUP_RMDIR, cgroup);
  return EMIT(CGROUP_RMDIR);
}

int raw_cgroup_attach_task(u64 *ctx) {
  u64 cgroup = ARG(cgroup_attach_task, dst_cgrp), task = ARG(cgroup_attach_task, task), key = cgroup_key(cgroup);
  u32 tgid = READ(u32, task, OFF_task_struct_tgid);
  ARGS;
  if (cgroup_is_watched(key))
    watch_process(tgid);
  SET_TASK(CGROUP_ATTACH_TASK, task);
  SET(CGROUP_ATTACH_TASK, CGROUP_ID, cgroup_id(cgroup));
  SET(CGROUP_ATTACH_TASK, ROOT, key >> 48);
  return EMIT(CGROUP_ATTACH_TASK);
}

int raw_cgroup_freeze(u64 *ctx) {
  ARGS;
  SET(CGROUP_FREEZE, CGROUP_ID, cgroup_id(ARG(cgroup_freeze, cgrp)));
  return EMIT(CGROUP_FREEZE);
}

int raw_cgroup_unfreeze(u64 *ctx) {
  ARGS;
  SET(CGROUP_UNFREEZE, CGROUP_ID, cgroup_id(ARG(cgroup_unfreeze, cgrp)));
  return EMIT(CGROUP_UNFREEZE);
}

int raw_cgroup_notify_frozen(u64 *ctx) {
  ARGS;
  SET(CGROUP_NOTIFY_FROZEN, CGROUP_ID, cgroup_id(ARG(cgroup_notify_frozen, cgrp)));
  SET(CGROUP_NOTIFY_FROZEN, FROZEN, (u32)ctx[2] != 0);
  return EMIT(CGROUP_NOTIFY_FROZEN);
}

/* --- the snapshot: one run over all tasks, each with its state at its own time */
struct task_row {
  u64 time_mono_ns, start_boot_ns, parent_start_boot_ns, cgroup_id;
  u32 tid, tgid, parent_tid, parent_tgid, state, flags, policy, on_cpu;
  s32 prio, cpu;
  u64 comm[2];
  u32 exit_state, unused;
};

static long (*write_row)(void *seq_file, void *data, u32 bytes) = (void *)127;

int iter_task(u64 *ctx) {
  u64 task = ctx[1], parent, seq, meta = ctx[0];
  struct task_row row = {};
  if (!task)
    return 0;
  asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(seq) : "r"(meta), "i"(OFF_bpf_iter_meta_seq));
  row.time_mono_ns = bpf_ktime_get_ns();
#ifdef OFF_task_struct___state
  row.state = READ(u32, task, OFF_task_struct___state);
#else
  row.state = READ(u64, task, OFF_task_struct_state);
#endif
#if defined(OFF_task_struct_on_cpu)
  row.on_cpu = READ(u32, task, OFF_task_struct_on_cpu);
#endif
#if defined(OFF_task_struct_thread_info_cpu)
  row.cpu = READ(u32, task, OFF_task_struct_thread_info_cpu);
#elif defined(OFF_task_struct_cpu)
  row.cpu = READ(u32, task, OFF_task_struct_cpu);
#endif
  row.start_boot_ns = READ(u64, task, OFF_task_struct_start_boottime);
  row.tid = READ(u32, task, OFF_task_struct_pid);
  row.tgid = READ(u32, task, OFF_task_struct_tgid);
  row.exit_state = READ(u32, task, OFF_task_struct_exit_state);
  row.flags = READ(u32, task, OFF_task_struct_flags);
  row.prio = READ(s32, task, OFF_task_struct_prio);
  row.policy = READ(u32, task, OFF_task_struct_policy);
  row.cgroup_id = cgroup_id_of_task(task);
  parent = READ(u64, task, OFF_task_struct_real_parent);
  row.parent_tid = READ(u32, parent, OFF_task_struct_pid);
  row.parent_tgid = READ(u32, parent, OFF_task_struct_tgid);
  row.parent_start_boot_ns = READ(u64, parent, OFF_task_struct_start_boottime);
  bpf_probe_read_kernel_str(row.comm, sizeof row.comm, (void *)(task + OFF_task_struct_comm));
  write_row((void *)seq, &row, sizeof row);
  return 0;
}
