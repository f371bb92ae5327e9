/* The programs that run most often. The loader includes this text twice: once with typed loads (HOOK gives btf_NAME, for
 * programs of type tp_btf: a load of a kernel field is one instruction), once with helper calls (raw_NAME, 9 ns a load, for
 * kernels whose verifier refuses the first).
 */

/* @fields
 * task_struct.__state task_struct.state task_struct.prio task_struct.policy task_struct.se.cfs_rq cfs_rq.throttle_count
 * cfs_rq.rq rq.nr_switches task_struct.throttled task_struct.in_iowait task_struct.thread_info.cpu thread_info.cpu task_struct.cpu task_struct.files
 * files_struct.fdt fdtable.max_fds fdtable.fd file.f_inode file.private_data inode.i_mode inode.i_ino inode.i_sb
 * super_block.s_dev super_block.s_magic socket.sk pt_regs.di pt_regs.si pt_regs.dx pt_regs.r10 pt_regs.r8 pt_regs.orig_ax pt_regs.regs
 * pt_regs.orig_x0 pt_regs.syscallno
 */

#undef LOAD
#undef HOOK
#undef FN
#ifdef TYPED
#define HOOK(name) btf_##name
#define FN(name) typed_##name
/* "r": the pointer keeps the type that the verifier knows; a fault reads 0 */
#define LOAD(type, into, ptr, offset) \
  asm volatile("%0 = *(" #type " *)(%1 + %2)" : "=r"(into) : "r"(ptr), "i"(offset))
#else
#define HOOK(name) raw_##name
#define FN(name) plain_##name
#define LOAD(type, into, ptr, offset) ((into) = READ(type, ptr, offset))
#endif

#define PF_KTHREAD 0x00200000

static __always_inline u64 FN(cgroup_id)(u64 task) {
  u64 p, id;
  LOAD(u64, p, task, OFF_task_struct_cgroups);
#if CGROUP_SUBSYS >= 0
  LOAD(u64, p, p, OFF_css_set_subsys + 8 * CGROUP_SUBSYS);
  LOAD(u64, p, p, OFF_cgroup_subsys_state_cgroup);
#else
  LOAD(u64, p, p, OFF_css_set_dfl_cgrp);
#endif
  LOAD(u64, p, p, OFF_cgroup_kn);
  LOAD(u64, id, p, OFF_kernfs_node_id);
  return id;
}

/* Throttled by its cgroup's quota? Since 6.18 the task says so itself; before, its queue counts throttled ancestors. */
static __always_inline u64 FN(throttled)(u64 task) {
  u64 value = 0;
#if defined(OFF_task_struct_throttled)
  LOAD(u8, value, task, OFF_task_struct_throttled);
#elif defined(OFF_task_struct_se_cfs_rq) && defined(OFF_cfs_rq_throttle_count)
  u64 queue;
  LOAD(u64, queue, task, OFF_task_struct_se_cfs_rq);
  LOAD(u32, value, queue, OFF_cfs_rq_throttle_count);
#endif
  return value != 0;
}

static __always_inline u64 FN(is_kthread)(u64 task) {
  u64 flags;
  LOAD(u32, flags, task, OFF_task_struct_flags);
  return (flags & PF_KTHREAD) != 0;
}

static __always_inline u64 FN(state)(u64 task) {
  u64 state = 0;
#ifdef OFF_task_struct___state
  LOAD(u32, state, task, OFF_task_struct___state);
#else
  LOAD(u64, state, task, OFF_task_struct_state);
#endif
  return state;
}

#define LOAD_FIELD(type, kind, field, task, offset) \
  do {                                              \
    u64 loaded_;                                    \
    LOAD(type, loaded_, task, offset);              \
    SET(kind, field, loaded_);                      \
  } while (0)

/* Switches of this CPU since the last one that we saw, for which the kernel did not run our program: it has its own count, and
 * raises it once before each run of this tracepoint. Some kernels run no program while certain tasks are current. */
static __always_inline u64 FN(switches_not_run)(u64 prev, u64 next) {
  struct cpu_state *state = my_state();
  u64 before = state->switches, missed;
#if defined(OFF_task_struct_se_cfs_rq) && defined(OFF_cfs_rq_rq) && defined(OFF_rq_nr_switches)
  u64 count;
  LOAD(u64, count, prev, OFF_task_struct_se_cfs_rq);
  LOAD(u64, count, count, OFF_cfs_rq_rq);
  LOAD(u64, count, count, OFF_rq_nr_switches);
  missed = count - before - 1;
  state->switches = count;
#else
  missed = before != prev; /* at least one */
  state->switches = next;
#endif
  if (!before || !missed)
    return 0;
  state->not_run += missed;
  return missed < 0xffff ? missed : 0xffff;
}

int HOOK(sched_switch)(u64 *ctx) {
  u64 prev = ARG(sched_switch, prev), next = ARG(sched_switch, next), ids = bpf_get_current_pid_tgid();
  ARGS;
  LOAD_FIELD(u32, SCHED_SWITCH, NEXT_TID, next, OFF_task_struct_pid);
  LOAD_FIELD(u32, SCHED_SWITCH, NEXT_TGID, next, OFF_task_struct_tgid);
  LOAD_FIELD(u64, SCHED_SWITCH, NEXT_START_BOOT_NS, next, OFF_task_struct_start_boottime);
  LOAD_FIELD(u64, SCHED_SWITCH, PREV_START_BOOT_NS, prev, OFF_task_struct_start_boottime);
#ifdef ARG_sched_switch__prev_state
  SET(SCHED_SWITCH, PREV_STATE, ARG(sched_switch, prev_state));
#else
  SET(SCHED_SWITCH, PREV_STATE, FN(state)(prev));
#endif
#ifdef ARG_sched_switch__preempt
  SET(SCHED_SWITCH, PREEMPT, (u8)ARG(sched_switch, preempt) != 0);
#endif
  LOAD_FIELD(u32, SCHED_SWITCH, PREV_PRIO, prev, OFF_task_struct_prio);
  LOAD_FIELD(u32, SCHED_SWITCH, NEXT_PRIO, next, OFF_task_struct_prio);
  LOAD_FIELD(u32, SCHED_SWITCH, PREV_POLICY, prev, OFF_task_struct_policy);
  LOAD_FIELD(u32, SCHED_SWITCH, NEXT_POLICY, next, OFF_task_struct_policy);
  SET(SCHED_SWITCH, PREV_THROTTLED, FN(throttled)(prev));
  SET(SCHED_SWITCH, NEXT_THROTTLED, FN(throttled)(next));
  SET(SCHED_SWITCH, PREV_KTHREAD, FN(is_kthread)(prev));
  SET(SCHED_SWITCH, NEXT_KTHREAD, FN(is_kthread)(next));
#ifdef OFF_task_struct_in_iowait
  u64 iowait;
  LOAD(u8, iowait, prev, OFF_task_struct_in_iowait);
  SET(SCHED_SWITCH, PREV_IOWAIT, iowait >> OFF_task_struct_in_iowait_BIT);
#endif
  SET(SCHED_SWITCH, NEXT_CGROUP_ID, FN(cgroup_id)(next));
  SET(SCHED_SWITCH, NOT_RUN, FN(switches_not_run)(prev, next));
  return emit(KIND_SCHED_SWITCH, ids, args);
}

/* waking, wakeup and wakeup_new have one layout */
static __always_inline int FN(wake)(u32 kind, u64 task) {
  ARGS;
  LOAD_FIELD(u32, SCHED_WAKING, TID, task, OFF_task_struct_pid);
  LOAD_FIELD(u32, SCHED_WAKING, TGID, task, OFF_task_struct_tgid);
  LOAD_FIELD(u64, SCHED_WAKING, START_BOOT_NS, task, OFF_task_struct_start_boottime);
#if defined(OFF_task_struct_thread_info_cpu)
  LOAD_FIELD(u32, SCHED_WAKING, TARGET_CPU, task, OFF_task_struct_thread_info_cpu);
#elif defined(OFF_task_struct_cpu)
  LOAD_FIELD(u32, SCHED_WAKING, TARGET_CPU, task, OFF_task_struct_cpu);
#endif
  LOAD_FIELD(u32, SCHED_WAKING, PRIO, task, OFF_task_struct_prio);
  LOAD_FIELD(u32, SCHED_WAKING, POLICY, task, OFF_task_struct_policy);
  SET(SCHED_WAKING, THROTTLED, FN(throttled)(task));
  SET(SCHED_WAKING, KTHREAD, FN(is_kthread)(task));
  SET(SCHED_WAKING, STATE, FN(state)(task));
  SET(SCHED_WAKING, CGROUP_ID, FN(cgroup_id)(task));
  return emit(kind, bpf_get_current_pid_tgid(), args);
}

int HOOK(sched_waking)(u64 *ctx) { return FN(wake)(KIND_SCHED_WAKING, ARG(sched_waking, p)); }
int HOOK(sched_wakeup)(u64 *ctx) { return FN(wake)(KIND_SCHED_WAKEUP, ARG(sched_wakeup, p)); }
int HOOK(sched_wakeup_new)(u64 *ctx) { return FN(wake)(KIND_SCHED_WAKEUP_NEW, ARG(sched_wakeup_new, p)); }

int HOOK(sched_migrate_task)(u64 *ctx) {
  u64 task = ARG(sched_migrate_task, p);
  ARGS;
  LOAD_FIELD(u32, SCHED_MIGRATE_TASK, TID, task, OFF_task_struct_pid);
  LOAD_FIELD(u32, SCHED_MIGRATE_TASK, TGID, task, OFF_task_struct_tgid);
  LOAD_FIELD(u64, SCHED_MIGRATE_TASK, START_BOOT_NS, task, OFF_task_struct_start_boottime);
#if defined(OFF_task_struct_thread_info_cpu)
  LOAD_FIELD(u32, SCHED_MIGRATE_TASK, ORIG_CPU, task, OFF_task_struct_thread_info_cpu);
#elif defined(OFF_task_struct_cpu)
  LOAD_FIELD(u32, SCHED_MIGRATE_TASK, ORIG_CPU, task, OFF_task_struct_cpu);
#endif
  SET(SCHED_MIGRATE_TASK, DEST_CPU, ARG(sched_migrate_task, dest_cpu));
  return emit(KIND_SCHED_MIGRATE_TASK, bpf_get_current_pid_tgid(), args);
}

/* --- system calls: the saved registers hold the arguments at entry and still at exit */
#ifdef OFF_pt_regs_di
#define LOAD_CALL_0(into, regs) LOAD(u64, into, regs, OFF_pt_regs_di)
#define LOAD_CALL_1(into, regs) LOAD(u64, into, regs, OFF_pt_regs_si)
#define LOAD_CALL_2(into, regs) LOAD(u64, into, regs, OFF_pt_regs_dx)
#define LOAD_CALL_3(into, regs) LOAD(u64, into, regs, OFF_pt_regs_r10)
#define LOAD_CALL_4(into, regs) LOAD(u64, into, regs, OFF_pt_regs_r8)
#define LOAD_CALL_NR(into, regs) LOAD(u64, into, regs, OFF_pt_regs_orig_ax)
#else
#define LOAD_CALL_0(into, regs) LOAD(u64, into, regs, OFF_pt_regs_orig_x0)
#define LOAD_CALL_1(into, regs) LOAD(u64, into, regs, OFF_pt_regs_regs + 8)
#define LOAD_CALL_2(into, regs) LOAD(u64, into, regs, OFF_pt_regs_regs + 16)
#define LOAD_CALL_3(into, regs) LOAD(u64, into, regs, OFF_pt_regs_regs + 24)
#define LOAD_CALL_4(into, regs) LOAD(u64, into, regs, OFF_pt_regs_regs + 32)
#define LOAD_CALL_NR(into, regs) LOAD(u32, into, regs, OFF_pt_regs_syscallno)
#endif

#ifndef OBJECTS
#define OBJECTS
#define OBJECT_SOCKET 1
#define OBJECT_PIPE 2
#define OBJECT_FILE 3
#define OBJECT_OTHER 4
#define OBJECT_DEVICE 5
#define OBJECT_DIRECTORY 6
#define ANON_INODE_MAGIC 0x09041934
/* struct linux_dirent's DT_*: mode >> 12 -> object type */
static __always_inline u32 object_type(u32 mode) {
  switch (mode >> 12) {
  case 12: return OBJECT_SOCKET;
  case 1: return OBJECT_PIPE;
  case 8: return OBJECT_FILE;
  case 4: return OBJECT_DIRECTORY;
  case 2:
  case 6: return OBJECT_DEVICE;
  default: return OBJECT_OTHER;
  }
}
/* What a file descriptor of the current task stands for: the socket, or the inode and its device. The table is read
 * without its lock: a concurrent close may give the object of a moment ago. */
static __always_inline u32 object_of_fd(u64 fd, u64 *object, u32 *device) {
  u64 table = READ(u64, READ(u64, bpf_get_current_task(), OFF_task_struct_files), OFF_files_struct_fdt);
  u64 file, inode, super;
  u32 type;
  if ((u32)fd >= READ(u32, table, OFF_fdtable_max_fds))
    return 0;
  file = READ(u64, READ(u64, table, OFF_fdtable_fd), (u64)(u32)fd * 8);
  if (!file)
    return 0;
  inode = READ(u64, file, OFF_file_f_inode);
  type = object_type(READ(u16, inode, OFF_inode_i_mode));
  if (type == OBJECT_SOCKET) {
    *object = READ(u64, READ(u64, file, OFF_file_private_data), OFF_socket_sk);
    return type;
  }
  super = READ(u64, inode, OFF_inode_i_sb);
  if (type == OBJECT_OTHER || READ(u64, super, OFF_super_block_s_magic) == ANON_INODE_MAGIC) {
    *object = READ(u64, file, OFF_file_private_data); /* eventfd, epoll, timerfd: they share one inode */
    return OBJECT_OTHER;
  }
  *object = READ(u64, inode, OFF_inode_i_ino);
  *device = READ(u32, super, OFF_super_block_s_dev);
  *device = (*device >> 20) << 12 | (*device & 0xfff); /* 12 bits of major, 12 of minor: the field has 24 */
  return type;
}
#endif

static __always_inline int FN(futex)(u64 regs, u64 ids, u32 flags) {
  u64 uaddr, value;
  u32 word = 0, owner = 0;
  ARGS;
  LOAD_CALL_0(uaddr, regs);
  SET(SYS_ENTER_FUTEX, UADDR, uaddr);
  LOAD_CALL_1(value, regs);
  SET(SYS_ENTER_FUTEX, OP, value);
  LOAD_CALL_2(value, regs);
  SET(SYS_ENTER_FUTEX, VAL, value);
  LOAD_CALL_3(value, regs);
  SET(SYS_ENTER_FUTEX, TIMEOUT, value);
  LOAD_CALL_4(value, regs);
  SET(SYS_ENTER_FUTEX, UADDR2, value);
  /* never faults a page in: an absent page reads as 0 */
  bpf_probe_read_user(&word, sizeof word, (void *)uaddr);
  bpf_probe_read_user(&owner, sizeof owner, (void *)(uaddr + 8));
  SET(SYS_ENTER_FUTEX, WORD, word);
  SET(SYS_ENTER_FUTEX, OWNER, owner);
  return emit_as(KIND_SYS_ENTER_FUTEX, flags, ids, args);
}

int HOOK(sys_enter)(u64 *ctx) {
  u64 ids = bpf_get_current_pid_tgid(), regs, nr, value, object = 0;
  u32 flags = flags_of_process(ids >> 32), traits, device = 0;
  if (!(flags & WATCHED))
    return 0;
  regs = ARG(sys_enter, regs);
  nr = ARG(sys_enter, id);
  traits = VALUE_OF(struct config, MAP_CONFIG)->syscall[nr & (SYSCALLS_MAX - 1)];
  if (traits & SYSCALL_FUTEX)
    return FN(futex)(regs, ids, flags);
  ARGS;
  SET(SYS_ENTER, NR, nr);
  LOAD_CALL_0(value, regs);
  SET(SYS_ENTER, ARG0, value);
  if (traits & SYSCALL_TAKES_FD) {
    SET(SYS_ENTER, OBJECT_TYPE, object_of_fd(value, &object, &device));
    SET(SYS_ENTER, OBJECT, object);
    SET(SYS_ENTER, OBJECT_DEV, device);
  }
  LOAD_CALL_1(value, regs);
  SET(SYS_ENTER, ARG1, value);
  LOAD_CALL_2(value, regs);
  SET(SYS_ENTER, ARG2, value);
  return emit_as(KIND_SYS_ENTER, flags, ids, args);
}

int HOOK(sys_exit)(u64 *ctx) {
  u64 ids = bpf_get_current_pid_tgid(), regs, nr, value, object = 0, ret;
  u32 flags = flags_of_process(ids >> 32), device = 0;
  if (!(flags & WATCHED))
    return 0;
  regs = ARG(sys_exit, regs);
  ret = ARG(sys_exit, ret);
  LOAD_CALL_NR(nr, regs);
  ARGS;
  SET(SYS_EXIT, NR, nr);
  SET(SYS_EXIT, RET, ret);
  LOAD_CALL_0(value, regs);
  SET(SYS_EXIT, ARG0, value);
  LOAD_CALL_1(value, regs);
  SET(SYS_EXIT, ARG1, value);
  if (VALUE_OF(struct config, MAP_CONFIG)->syscall[nr & (SYSCALLS_MAX - 1)] & SYSCALL_GIVES_FD && (s64)ret >= 0) {
    SET(SYS_EXIT, OBJECT_TYPE, object_of_fd(ret, &object, &device));
    SET(SYS_EXIT, OBJECT, object);
    SET(SYS_EXIT, OBJECT_DEV, device);
  }
  return emit_as(KIND_SYS_EXIT, flags, ids, args);
}
