/* What every program of the probe shares: the record, the sequence numbers, the watch set, safe reads.
 *
 * The loader puts in front of this text: the numbers and field positions of events/kinds.py (KIND_*, NAME__FIELD_*), the
 * places of kernel fields in the running kernel (OFF_*, absent if the kernel lacks the field), the positions of
 * tracepoint arguments (ARG_*, absent likewise), and a few facts of the machine (CGROUP_SUBSYS, MEMORY_SUBSYS, HAVE_*).
 * Map file descriptors are placeholders (MAP_*) that the loader replaces in the compiled instructions.
 *
 * No kernel header is used: a structure of another kernel's header would be silently wrong.
 */

/* @fields
 * task_struct.pid task_struct.tgid task_struct.start_boottime task_struct.comm task_struct.cgroups task_struct.flags
 * css_set.dfl_cgrp css_set.subsys cgroup_subsys_state.cgroup cgroup.kn cgroup.root cgroup.level kernfs_node.id
 * cgroup_root.hierarchy_id
 */

#define MAP_STATE 1001
#define MAP_PIDS 1002
#define MAP_CONFIG 1003
#define MAP_RINGS 1004
#define MAP_TEXT 1005
#define MAP_CGROUPS 1006

#define MAP(placeholder) ((void *)bpf_pseudo_fd(1, placeholder))          /* the map */
#define VALUE_OF(type, placeholder) ((type *)bpf_pseudo_fd(2, placeholder)) /* its only value: no look-up */

#define CPUS_MAX 1024
#define PIDS_MAX (4 << 20) /* the kernel's own limit: a pid is always below */
#define NO_WAKEUP 1

#define WATCHED 1  /* bits of a record's flags, and of a process's byte in MAP_PIDS */
#define OBSERVER 2

struct record {
  u64 time_mono_ns;
  u32 seq;
  u16 cpu;
  u8 kind, flags;
  u32 tgid, tid;
  u64 args[5];
};

#define TEXT_BYTES 992
struct text_record {
  u64 time_mono_ns, key;
  u32 kind, tid, cpu, bytes;
  char text[TEXT_BYTES];
};
#define TEXT_ARGV 1        /* key = 0: arguments of the program that `tid` has just begun, separated by NUL */
#define TEXT_CGROUP_MADE 2 /* key = hierarchy << 48 | cgroup id: its path */
#define TEXT_CGROUP_GONE 3

struct cpu_state { /* one cache line a CPU */
  u64 sequence;    /* number of the next event: counts every attempt, before the reservation */
  u64 dropped;     /* failed reservations; only counted where the kernel has no fetch-and-add */
  u64 text_dropped;
  u64 unreadable;  /* texts that were not in memory */
  u64 filter_full; /* cgroups that found no room in the watch set */
  u64 unwatched_spin; /* lock for which a process that is not watched spins: its end is left out as well */
  u64 switches;    /* the kernel's own count of this CPU's switches at the last one seen, or (no such field) whom it let in */
  u64 not_run;     /* switches for which the kernel did not run our program */
};

#define PATTERNS_MAX 8
#define PORTS_MAX 8
#define SYSCALLS_MAX 512
struct config {
  u64 period_timer, slack_timer; /* addresses of sched_cfs_period_timer, sched_cfs_slack_timer */
  u64 patterns, ports, cgroups;  /* how many of each are in use */
  u64 hierarchy;                 /* id of the cgroup hierarchy whose ids events carry */
  u64 pattern[PATTERNS_MAX][4];  /* comm, as two words: mask, value, mask, value */
  u64 port[PORTS_MAX];
  u8 syscall[SYSCALLS_MAX];      /* SYSCALL_* bits */
};
#define SYSCALL_TAKES_FD 1
#define SYSCALL_GIVES_FD 2
#define SYSCALL_FUTEX 4

static void *(*lookup_element)(void *map, void *key) = (void *)1;
static long (*update_element)(void *map, void *key, void *value, u64 flags) = (void *)2;
static u64 (*jiffies64)(void) = (void *)118;

/* Reads a kernel value at ptr + offset; 0 if it cannot be read. */
#define READ(type, ptr, offset)                                                                   \
  ({                                                                                              \
    type value_ = 0;                                                                              \
    bpf_probe_read_kernel(&value_, sizeof value_, (void *)((u64)(ptr) + (offset)));               \
    value_;                                                                                       \
  })

#define SET(kind, field, value) \
  (args[kind##__##field##_ARG] |= ((u64)(value) & kind##__##field##_MASK) << kind##__##field##_SHIFT)

#define ARGS u64 args[5] = {0, 0, 0, 0, 0}
#define EMIT(kind) emit(KIND_##kind, bpf_get_current_pid_tgid(), args)
#define ARG(tracepoint, name) (ctx[ARG_##tracepoint##__##name])

static __always_inline u8 flags_of_process(u32 tgid) { return VALUE_OF(u8, MAP_PIDS)[tgid & (PIDS_MAX - 1)]; }

static __always_inline void set_process(u32 tgid, u8 flags) { VALUE_OF(u8, MAP_PIDS)[tgid & (PIDS_MAX - 1)] = flags; }

static __always_inline struct cpu_state *my_state(void) {
  return VALUE_OF(struct cpu_state, MAP_STATE) + (bpf_get_smp_processor_id() & (CPUS_MAX - 1));
}

/* A process that a selector names joins the watch set, unless it is an observer. */
static __always_inline void watch_process(u32 tgid) {
  u8 flags = flags_of_process(tgid);
  if (!(flags & OBSERVER))
    set_process(tgid, flags | WATCHED);
}

static __always_inline u8 current_flags(void) { return flags_of_process(bpf_get_current_pid_tgid() >> 32); }

/* The sequence number comes before the reservation, so that a gap is a lost event; the time comes after it, so that a
 * reader who read the clock, then the ring's end, has everything that is older. An interrupt's program may run between any
 * two lines: hence fetch-and-add (a plain increment would give duplicates). */
static __always_inline int emit_as(u32 kind, u32 flags, u64 ids, u64 *args) {
  u32 cpu = bpf_get_smp_processor_id();
  struct cpu_state *state = VALUE_OF(struct cpu_state, MAP_STATE) + (cpu & (CPUS_MAX - 1));
  struct record *record;
  void *ring;
#ifdef HAVE_FETCH_ADD
  u64 seq = 1;
  asm volatile("lock *(u64 *)(%1 + 0) += %0" : "+r"(seq) : "r"(&state->sequence) : "memory");
#endif
  ring = lookup_element(MAP(MAP_RINGS), &cpu);
  if (!ring)
    return 0;
  record = bpf_ringbuf_reserve(ring, sizeof *record, 0);
  if (!record) {
#ifndef HAVE_FETCH_ADD
    __sync_fetch_and_add(&state->dropped, 1);
#endif
    return 0;
  }
#ifndef HAVE_FETCH_ADD
  u64 seq = state->dropped; /* the reader adds the record's place in the ring */
#endif
  record->time_mono_ns = bpf_ktime_get_ns();
  record->seq = seq;
  record->cpu = cpu;
  record->kind = kind;
  record->flags = flags;
  record->tgid = ids >> 32;
  record->tid = ids;
  record->args[0] = args[0];
  record->args[1] = args[1];
  record->args[2] = args[2];
  record->args[3] = args[3];
  record->args[4] = args[4];
  bpf_ringbuf_submit(record, NO_WAKEUP);
  return 0;
}

static __always_inline int emit(u32 kind, u64 ids, u64 *args) {
  return emit_as(kind, flags_of_process(ids >> 32) & (WATCHED | OBSERVER), ids, args);
}

static __always_inline u64 cgroup_id_of_css(u64 css) {
  u64 cgroup = READ(u64, css, OFF_cgroup_subsys_state_cgroup);
  return READ(u64, READ(u64, cgroup, OFF_cgroup_kn), OFF_kernfs_node_id);
}

/* Id of a task's cgroup in the hierarchy that has the CPU controller. */
static __always_inline u64 cgroup_id_of_task(u64 task) {
  u64 set = READ(u64, task, OFF_task_struct_cgroups);
#if CGROUP_SUBSYS >= 0
  return cgroup_id_of_css(READ(u64, set, OFF_css_set_subsys + 8 * CGROUP_SUBSYS));
#else
  u64 cgroup = READ(u64, set, OFF_css_set_dfl_cgrp);
  return READ(u64, READ(u64, cgroup, OFF_cgroup_kn), OFF_kernfs_node_id);
#endif
}

/* The fields that name another task: tid, tgid, start_boot_ns. */
#define SET_TASK(kind, task)                                                     \
  do {                                                                           \
    SET(kind, TID, READ(u32, task, OFF_task_struct_pid));                        \
    SET(kind, TGID, READ(u32, task, OFF_task_struct_tgid));                      \
    SET(kind, START_BOOT_NS, READ(u64, task, OFF_task_struct_start_boottime));   \
  } while (0)

#define SET_COMM(kind, source)                                          \
  do {                                                                  \
    u64 comm_[2] = {0, 0};                                              \
    bpf_probe_read_kernel_str(comm_, sizeof comm_, (void *)(source));   \
    SET(kind, COMM_LO, comm_[0]);                                       \
    SET(kind, COMM_HI, comm_[1]);                                       \
  } while (0)
