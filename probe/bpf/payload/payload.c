/* Payload: what the system calls of watched processes read from and wrote to memory, with all six arguments.
 *
 * Taken at sys_exit alone, where the saved registers still hold the arguments, the length is known, and the pages were just
 * touched by the kernel. At sys_enter only the time is kept, and those calls are taken that do not come back (exit) or that
 * come back to another memory (execve). After a successful execve the initial stack is taken: arguments, environment,
 * auxiliary vector, the random bytes.
 *
 * Which bytes, the plan says: per call number, regions as (argument, kind of length, parameter). A record holds a head and
 * regions: address, bytes taken, bytes wanted, then the bytes. It is built in a scratch area of the CPU and goes to the CPU's
 * payload ring in its exact length. Reads do not fault: a page that is not resident is flagged and counted, never waited for.
 * Programs run with preemption off and sys_exit does not nest, so the scratch area has one user at a time.
 */

/* @fields
 * pt_regs.di pt_regs.si pt_regs.dx pt_regs.r10 pt_regs.r8 pt_regs.r9 pt_regs.orig_ax pt_regs.sp
 * task_struct.mm mm_struct.env_end
 */

#define MAP_PAYLOAD_RINGS 1011
#define MAP_PAYLOAD_STATE 1012
#define MAP_PAYLOAD_PLAN 1013
#define MAP_PAYLOAD_SCRATCH 1014
#define MAP_PAYLOAD_ENTRY 1015

#define DATA_BYTES 65536
#define PLAN_CALLS 512
#define PLAN_REGIONS 6
#define STRING_BYTES 4096
#define VECTORS_MAX 64
#define CONTROL_BYTES 4096
#define IMAGE_PAGES 40

#define CALL_TAKEN 1    /* flags of a planned call: it is recorded */
#define CALL_AT_ENTRY 2 /* when it is entered */
#define CALL_VECTOR 4   /* args[1], args[2] are an iovec array and its length */
#define CALL_MESSAGE 8  /* args[1] is a struct msghdr */
#define CALL_RECEIVES 16 /* vector or message: only what the call wrote, ret bytes */

#define LENGTH_FIXED 1      /* param */
#define LENGTH_RESULT 2     /* ret * param */
#define LENGTH_ARGUMENT 3   /* args[param & 7] * (param >> 3) */
#define LENGTH_STRING 4     /* to the NUL */
#define LENGTH_BEHIND 5     /* *(u32 *)args[param & 7], at most param >> 3 */
#define LENGTH_RESULT_IF 6  /* ret, if args[param & 7] */
#define LENGTH_FD_SET 7     /* of args[0] descriptors */
#define LENGTH_IOCTL 8      /* by the request in args[1] */
#define LENGTH_FCNTL 9      /* by the command in args[1] */
#define LENGTH_RESULT_PLUS 10 /* ret + param */
#define ONLY_SUCCESS 64     /* bits of the kind: not if the call failed; only if it was interrupted */
#define ONLY_INTERRUPTED 128

#define RECORD_CALL 1
#define RECORD_ENTRY 2
#define RECORD_IMAGE 3

#define TRUNCATED 1  /* flags of a record: more bytes than there is room for, or more vectors */
#define UNREADABLE 2 /* a region was not in memory */

struct payload_state { /* one cache line a CPU */
  u64 sequence, truncated, unreadable, refused, pad[4];
};

struct planned_call {
  u8 flags, unused[7];
  struct { u8 argument, kind; u16 param; } region[PLAN_REGIONS];
};

struct payload_record {
  u64 time_mono_ns, entry_mono_ns;
  u32 seq;
  u16 cpu;
  u8 kind, flags;
  u32 tgid, tid;
  s64 ret;
  u64 args[8]; /* six, and room for a masked index */
  u32 nr, bytes;
};

struct scratch {
  struct payload_record head;
  u8 data[2 * DATA_BYTES + 64];
};

#define CLAMP(value, max) asm volatile("if %0 <= %1 goto +1\n\t%0 = %1" : "+r"(value) : "i"(max))

static long (*read_user_string)(void *to, u32 bytes, const void *from) = (void *)114;
static long (*output)(void *ring, void *data, u64 bytes, u64 flags) = (void *)130;
static long (*forget_element)(void *map, void *key) = (void *)3;

/* Where the next region begins is kept in the record, not in a register: the verifier would follow each of its values. */

/* Appends one region. */
static __always_inline void append(struct scratch *s, u64 address, u64 wanted) {
  u64 at = s->head.bytes, have = wanted, room;
  u8 *to;
  if (!address || !wanted)
    return;
  if (at > DATA_BYTES - 32) {
    s->head.flags |= TRUNCATED;
    return;
  }
  room = DATA_BYTES - 16 - at;
  if (have > room) {
    have = room;
    s->head.flags |= TRUNCATED;
  }
  CLAMP(at, DATA_BYTES);
  to = s->data + at;
  CLAMP(have, DATA_BYTES);
  if (bpf_probe_read_user(to + 16, have, (void *)address)) {
    s->head.flags |= UNREADABLE;
    have = 0;
  }
  *(u64 *)to = address;
  *(u32 *)(to + 8) = have;
  *(u32 *)(to + 12) = wanted;
  s->head.bytes += 16 + ((have + 7) & ~7ULL);
}

static __always_inline void append_string(struct scratch *s, u64 address) {
  u64 at = s->head.bytes;
  long bytes;
  u8 *to;
  if (!address)
    return;
  if (at > DATA_BYTES - 32 - STRING_BYTES) {
    s->head.flags |= TRUNCATED;
    return;
  }
  CLAMP(at, DATA_BYTES);
  to = s->data + at;
  bytes = read_user_string(to + 16, STRING_BYTES, (void *)address);
  if (bytes < 0) {
    s->head.flags |= UNREADABLE;
    bytes = 0;
  }
  *(u64 *)to = address;
  *(u32 *)(to + 8) = bytes;
  *(u32 *)(to + 12) = bytes;
  s->head.bytes += 16 + (((u64)bytes + 7) & ~7ULL);
}

static __always_inline void append_vectors(struct scratch *s, u64 vectors, u64 count, u64 limit) {
  if (count > VECTORS_MAX) {
    count = VECTORS_MAX;
    s->head.flags |= TRUNCATED;
  }
  append(s, vectors, count * 16);
#pragma clang loop unroll(disable)
  for (u32 i = 0; i < VECTORS_MAX; i++) {
    u64 vector[2] = {0, 0}, bytes;
    if (i >= count || !limit)
      break;
    if (bpf_probe_read_user(vector, sizeof vector, (void *)(vectors + 16 * i))) {
      s->head.flags |= UNREADABLE;
      break;
    }
    bytes = vector[1] < limit ? vector[1] : limit;
    append(s, vector[0], bytes);
    limit -= bytes;
  }
}

/* The vectors of a message are left to the caller, in `args` 6 and 7: one loop over vectors is enough for all. */
static __always_inline void append_message(struct scratch *s, u64 message) {
  u64 head[7] = {0, 0, 0, 0, 0, 0, 0}; /* name, name length, vectors, count, control, control length, flags */
  if (bpf_probe_read_user(head, sizeof head, (void *)message)) {
    s->head.flags |= UNREADABLE;
    return;
  }
  append(s, message, sizeof head);
  append(s, head[0], (u32)head[1] < 128 ? (u32)head[1] : 128);
  append(s, head[4], head[5] < CONTROL_BYTES ? head[5] : CONTROL_BYTES);
  s->head.args[6] = head[2];
  s->head.args[7] = head[3];
}

static __always_inline u64 ioctl_bytes(u32 request) {
  if (request > 0xffff)
    return request >> 16 & 0x3fff;
  return (request & 0xff00) == 0x5400 ? 36 : 40;
}

static __always_inline u64 length_of(struct scratch *s, u32 kind, u32 param) {
  u64 ret = s->head.ret, value;
  u32 behind = 0;
  switch (kind & 63) {
  case LENGTH_FIXED: return param;
  case LENGTH_RESULT: return (s64)ret > 0 ? ret * param : 0;
  case LENGTH_ARGUMENT: return s->head.args[param & 7] * (param >> 3);
  case LENGTH_BEHIND:
    bpf_probe_read_user(&behind, sizeof behind, (void *)s->head.args[param & 7]);
    return behind < param >> 3 ? behind : param >> 3;
  case LENGTH_RESULT_IF: return (s64)ret > 0 && s->head.args[param & 7] ? ret : 0;
  case LENGTH_FD_SET:
    value = (u32)s->head.args[0];
    value = value < 65536 ? value : 65536;
    return (value + 63) / 64 * 8;
  case LENGTH_IOCTL: return ioctl_bytes(s->head.args[1]);
  case LENGTH_FCNTL:
    value = (u32)s->head.args[1];
    return (value >= 5 && value <= 7) || (value >= 36 && value <= 38) ? 32 : value == 16 || value >= 1035 ? 8 : 0;
  case LENGTH_RESULT_PLUS: return (s64)ret >= 0 ? ret + param : 0;
  }
  return 0;
}

/* Page by page: the kernel leaves a random gap between the strings and what points to them, and nobody touched that yet. */
static __always_inline void append_pages(struct scratch *s, u64 from, u64 end) {
#pragma clang loop unroll(disable)
  for (u32 i = 0; i < IMAGE_PAGES; i++) {
    u64 next = (from & ~4095ULL) + 4096;
    if (from >= end)
      break;
    append(s, from, (next < end ? next : end) - from);
    from = next;
  }
  if (from < end)
    s->head.flags |= TRUNCATED;
  s->head.flags &= ~UNREADABLE;
}

static __always_inline struct planned_call *planned(u64 nr) {
  return nr < PLAN_CALLS ? VALUE_OF(struct planned_call, MAP_PAYLOAD_PLAN) + (nr & (PLAN_CALLS - 1)) : 0;
}

static __always_inline void load_registers(struct scratch *s, u64 regs) {
  s->head.args[0] = READ(u64, regs, OFF_pt_regs_di);
  s->head.args[1] = READ(u64, regs, OFF_pt_regs_si);
  s->head.args[2] = READ(u64, regs, OFF_pt_regs_dx);
  s->head.args[3] = READ(u64, regs, OFF_pt_regs_r10);
  s->head.args[4] = READ(u64, regs, OFF_pt_regs_r8);
  s->head.args[5] = READ(u64, regs, OFF_pt_regs_r9);
  s->head.args[6] = 0;
  s->head.args[7] = 0;
}

static __always_inline struct scratch *begin(u64 ids, u64 regs, u32 kind, u64 nr, u64 ret) {
  u32 cpu = bpf_get_smp_processor_id();
  struct scratch *s = lookup_element(MAP(MAP_PAYLOAD_SCRATCH), &cpu);
  if (!s)
    return 0;
  s->head.kind = kind;
  s->head.flags = 0;
  s->head.cpu = cpu;
  s->head.tgid = ids >> 32;
  s->head.tid = ids;
  s->head.nr = nr;
  s->head.ret = ret;
  s->head.entry_mono_ns = 0;
  s->head.bytes = 0;
  load_registers(s, regs);
  return s;
}

static __always_inline int send(struct scratch *s) {
  u32 cpu = s->head.cpu;
  u64 bytes = s->head.bytes;
  struct payload_state *state = VALUE_OF(struct payload_state, MAP_PAYLOAD_STATE) + (cpu & (CPUS_MAX - 1));
  void *ring = lookup_element(MAP(MAP_PAYLOAD_RINGS), &cpu);
  u64 seq = 1;
  if (!ring)
    return 0;
#ifdef HAVE_FETCH_ADD
  asm volatile("lock *(u64 *)(%1 + 0) += %0" : "+r"(seq) : "r"(&state->sequence) : "memory");
#else
  seq = state->sequence++; /* this program cannot nest in itself, and no other writes here */
#endif
  s->head.seq = seq;
  s->head.time_mono_ns = bpf_ktime_get_ns();
  if (s->head.flags & TRUNCATED)
    state->truncated++;
  if (s->head.flags & UNREADABLE)
    state->unreadable++;
  CLAMP(bytes, DATA_BYTES);
  if (output(ring, s, sizeof s->head + bytes, NO_WAKEUP))
    state->refused++; /* the gap in the numbers says which */
  return 0;
}

static __always_inline void append_planned(struct scratch *s, struct planned_call *call) {
#pragma clang loop unroll(disable)
  for (u32 i = 0; i < PLAN_REGIONS; i++) {
    u32 kind = call->region[i].kind, argument = call->region[i].argument;
    if (!kind)
      break;
    if (kind & ONLY_SUCCESS && s->head.ret < 0)
      continue;
    if (kind & ONLY_INTERRUPTED && s->head.ret != -4 && s->head.ret != -516)
      continue;
    if ((kind & 63) == LENGTH_STRING)
      append_string(s, s->head.args[argument & 7]);
    else
      append(s, s->head.args[argument & 7], length_of(s, kind, call->region[i].param));
  }
}

int payload_enter(u64 *ctx) {
  u64 ids = bpf_get_current_pid_tgid(), nr, now, regs;
  u32 tid = ids;
  struct planned_call *call;
  struct scratch *s;
  if (!(flags_of_process(ids >> 32) & WATCHED))
    return 0;
  nr = ARG(payload_enter, id);
  call = planned(nr);
  if (!call || !(call->flags & CALL_TAKEN))
    return 0;
  now = bpf_ktime_get_ns();
  update_element(MAP(MAP_PAYLOAD_ENTRY), &tid, &now, 0);
  if (!(call->flags & CALL_AT_ENTRY))
    return 0;
  regs = ARG(payload_enter, regs);
  s = begin(ids, regs, RECORD_ENTRY, nr, 0);
  if (!s)
    return 0;
  s->head.entry_mono_ns = now;
  append_planned(s, call);
  return send(s);
}

int payload_exit(u64 *ctx) {
  u64 ids = bpf_get_current_pid_tgid(), regs, nr, ret, limit, *entry;
  u32 tid = ids;
  struct planned_call *call;
  struct scratch *s;
  if (!(flags_of_process(ids >> 32) & WATCHED))
    return 0;
  regs = ARG(payload_exit, regs);
  ret = ARG(payload_exit, ret);
  nr = READ(u64, regs, OFF_pt_regs_orig_ax);
  call = planned(nr);
  if (!call || !(call->flags & CALL_TAKEN))
    return 0;
  s = begin(ids, regs, RECORD_CALL, nr, ret);
  if (!s)
    return 0;
  entry = lookup_element(MAP(MAP_PAYLOAD_ENTRY), &tid);
  if (entry) {
    s->head.entry_mono_ns = *entry;
    forget_element(MAP(MAP_PAYLOAD_ENTRY), &tid);
  }
  if (call->flags & CALL_AT_ENTRY) {
    u64 stack = READ(u64, regs, OFF_pt_regs_sp), mm = READ(u64, bpf_get_current_task(), OFF_task_struct_mm);
    if (ret)
      return send(s); /* an execve that failed: its path came with the entry */
    s->head.kind = RECORD_IMAGE;
    append_pages(s, stack, READ(u64, mm, OFF_mm_struct_env_end));
    return send(s);
  }
  append_planned(s, call);
  limit = call->flags & CALL_RECEIVES ? ((s64)ret > 0 ? ret : 0) : 1 << 30;
  if (call->flags & CALL_MESSAGE) {
    append_message(s, s->head.args[1]);
  } else if (call->flags & CALL_VECTOR) {
    s->head.args[6] = s->head.args[1];
    s->head.args[7] = s->head.args[2];
  }
  if (s->head.args[7])
    append_vectors(s, s->head.args[6], s->head.args[7], limit);
  return send(s);
}
