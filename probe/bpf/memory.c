/* Memory and files: reclaim, compaction, the OOM killer, writeback, the ext4 journal, page faults, locks, resident sizes. */

/* @fields
 * shrink_control.gfp_mask shrink_control.memcg mem_cgroup.css bdi_writeback.bdi bdi_writeback.memcg_css
 * backing_dev_info.dev device.devt wb_writeback_work.nr_pages wb_writeback_work.reason writeback_control.nr_to_write
 * inode.i_wb super_block.s_bdi address_space.host folio.index page.index task_struct.nr_dirtied_pause
 * journal_s.j_fs_dev journal_s.j_tail_sequence transaction_s.t_tid transaction_s.t_synchronous_commit block_device.bd_dev
 * transaction_run_stats_s.rs_locked transaction_run_stats_s.rs_flushing transaction_run_stats_s.rs_logging
 * transaction_run_stats_s.rs_handle_count transaction_run_stats_s.rs_blocks transaction_run_stats_s.rs_blocks_logged
 * file.f_path.dentry dentry.d_inode dentry.d_parent pt_regs.ip pt_regs.pc mutex.owner rw_semaphore.owner
 * rt_mutex_base.owner percpu_rw_semaphore.writer.task mm_struct.rss_stat percpu_counter.count mm_rss_stat.count
 */

#define JIFFIES_TO_MS(jiffies) ((jiffies) * (u64)TICK_NS / 1000000)

/* --- reclaim: whose memory is taken (target) is told by mm_shrink_slab_start and, since 7.3, by the begin event */
static __always_inline u64 my_memory_cgroup(void) {
#if MEMORY_SUBSYS >= 0
  u64 set = READ(u64, bpf_get_current_task(), OFF_task_struct_cgroups);
  return cgroup_id_of_css(READ(u64, set, OFF_css_set_subsys + 8 * MEMORY_SUBSYS));
#else
  return 0;
#endif
}

static __always_inline int reclaim_begins(u32 kind, u64 order, u64 gfp_flags, u64 may_writepage) {
  ARGS;
  SET(MM_VMSCAN_DIRECT_RECLAIM_BEGIN, ORDER, order);
  SET(MM_VMSCAN_DIRECT_RECLAIM_BEGIN, MAY_WRITEPAGE, may_writepage);
  SET(MM_VMSCAN_DIRECT_RECLAIM_BEGIN, GFP_FLAGS, gfp_flags);
  SET(MM_VMSCAN_DIRECT_RECLAIM_BEGIN, CGROUP_ID, my_memory_cgroup());
  return emit(kind, bpf_get_current_pid_tgid(), args);
}

#define RECLAIM_BEGIN(name, KIND)                                                        \
  int raw_##name(u64 *ctx) {                                                             \
    return reclaim_begins(KIND_##KIND, ARG(name, order), (u32)ARG(name, gfp_flags), 0);  \
  }

RECLAIM_BEGIN(mm_vmscan_direct_reclaim_begin, MM_VMSCAN_DIRECT_RECLAIM_BEGIN)
RECLAIM_BEGIN(mm_vmscan_memcg_reclaim_begin, MM_VMSCAN_MEMCG_RECLAIM_BEGIN)
RECLAIM_BEGIN(mm_vmscan_memcg_softlimit_reclaim_begin, MM_VMSCAN_MEMCG_SOFTLIMIT_RECLAIM_BEGIN)
RECLAIM_BEGIN(mm_vmscan_node_reclaim_begin, MM_VMSCAN_NODE_RECLAIM_BEGIN)

#define RECLAIM_END(name, KIND)                           \
  int raw_##name(u64 *ctx) {                              \
    ARGS;                                                 \
    SET(KIND, NR_RECLAIMED, ARG(name, nr_reclaimed));     \
    return EMIT(KIND);                                    \
  }

RECLAIM_END(mm_vmscan_direct_reclaim_end, MM_VMSCAN_DIRECT_RECLAIM_END)
RECLAIM_END(mm_vmscan_memcg_reclaim_end, MM_VMSCAN_MEMCG_RECLAIM_END)
RECLAIM_END(mm_vmscan_memcg_softlimit_reclaim_end, MM_VMSCAN_MEMCG_SOFTLIMIT_RECLAIM_END)
RECLAIM_END(mm_vmscan_node_reclaim_end, MM_VMSCAN_NODE_RECLAIM_END)

int raw_mm_vmscan_kswapd_wake(u64 *ctx) {
  ARGS;
  SET(MM_VMSCAN_KSWAPD_WAKE, NID, ARG(mm_vmscan_kswapd_wake, nid));
  SET(MM_VMSCAN_KSWAPD_WAKE, ZID, ARG(mm_vmscan_kswapd_wake, zid));
  SET(MM_VMSCAN_KSWAPD_WAKE, ORDER, ARG(mm_vmscan_kswapd_wake, order));
  return EMIT(MM_VMSCAN_KSWAPD_WAKE);
}

int raw_mm_vmscan_kswapd_sleep(u64 *ctx) {
  ARGS;
  SET(MM_VMSCAN_KSWAPD_SLEEP, NID, ARG(mm_vmscan_kswapd_sleep, nid));
  return EMIT(MM_VMSCAN_KSWAPD_SLEEP);
}

int raw_mm_vmscan_wakeup_kswapd(u64 *ctx) {
  ARGS;
  SET(MM_VMSCAN_WAKEUP_KSWAPD, NID, ARG(mm_vmscan_wakeup_kswapd, nid));
  SET(MM_VMSCAN_WAKEUP_KSWAPD, ZID, ARG(mm_vmscan_wakeup_kswapd, zid));
  SET(MM_VMSCAN_WAKEUP_KSWAPD, ORDER, ARG(mm_vmscan_wakeup_kswapd, order));
  SET(MM_VMSCAN_WAKEUP_KSWAPD, GFP_FLAGS, (u32)ARG(mm_vmscan_wakeup_kswapd, gfp_flags));
  return EMIT(MM_VMSCAN_WAKEUP_KSWAPD);
}

int raw_mm_shrink_slab_start(u64 *ctx) {
  u64 control = ARG(mm_shrink_slab_start, sc);
  ARGS;
#ifdef OFF_shrink_control_memcg
  u64 memcg = READ(u64, control, OFF_shrink_control_memcg);
  if (memcg)
    SET(MM_SHRINK_SLAB_START, TARGET_CGROUP_ID, cgroup_id_of_css(memcg + OFF_mem_cgroup_css));
#endif
  SET(MM_SHRINK_SLAB_START, GFP_FLAGS, READ(u32, control, OFF_shrink_control_gfp_mask));
  return EMIT(MM_SHRINK_SLAB_START);
}

int raw_mm_vmscan_throttled(u64 *ctx) {
  ARGS;
  SET(MM_VMSCAN_THROTTLED, NID, ARG(mm_vmscan_throttled, nid));
  SET(MM_VMSCAN_THROTTLED, REASON, ARG(mm_vmscan_throttled, reason));
  SET(MM_VMSCAN_THROTTLED, USEC_TIMEOUT, ARG(mm_vmscan_throttled, usec_timeout));
  SET(MM_VMSCAN_THROTTLED, USEC_DELAYED, ARG(mm_vmscan_throttled, usec_delayed));
  return EMIT(MM_VMSCAN_THROTTLED);
}

int raw_mm_compaction_begin(u64 *ctx) {
  ARGS;
  SET(MM_COMPACTION_BEGIN, SYNC, (u8)ARG(mm_compaction_begin, sync) != 0);
  return EMIT(MM_COMPACTION_BEGIN);
}

int raw_mm_compaction_end(u64 *ctx) {
  ARGS;
  SET(MM_COMPACTION_END, STATUS, ARG(mm_compaction_end, status));
  return EMIT(MM_COMPACTION_END);
}

int raw_mm_compaction_try_to_compact_pages(u64 *ctx) {
  ARGS;
  SET(MM_COMPACTION_TRY_TO_COMPACT_PAGES, ORDER, ARG(mm_compaction_try_to_compact_pages, order));
  SET(MM_COMPACTION_TRY_TO_COMPACT_PAGES, GFP_FLAGS, (u32)ARG(mm_compaction_try_to_compact_pages, gfp_mask));
  SET(MM_COMPACTION_TRY_TO_COMPACT_PAGES, PRIO, ARG(mm_compaction_try_to_compact_pages, prio));
  return EMIT(MM_COMPACTION_TRY_TO_COMPACT_PAGES);
}

/* before 6.9 the event has the number only */
int raw_mark_victim(u64 *ctx) {
  ARGS;
#ifdef ARG_mark_victim__task
  u64 task = ARG(mark_victim, task);
  SET_TASK(MARK_VICTIM, task);
  SET_COMM(MARK_VICTIM, task + OFF_task_struct_comm);
  SET(MARK_VICTIM, CGROUP_ID, cgroup_id_of_task(task));
#else
  SET(MARK_VICTIM, TID, ctx[0]);
#endif
  return EMIT(MARK_VICTIM);
}

/* --- writeback */
static __always_inline u32 device_of_bdi(u64 bdi) {
  u64 device = READ(u64, bdi, OFF_backing_dev_info_dev);
  return device ? READ(u32, device, OFF_device_devt) : 0;
}

static __always_inline u64 cgroup_of_wb(u64 wb) {
#ifdef OFF_bdi_writeback_memcg_css
  u64 css = READ(u64, wb, OFF_bdi_writeback_memcg_css);
  return css ? cgroup_id_of_css(css) : 0;
#else
  return 0;
#endif
}

static __always_inline u32 bdi_device_of_inode(u64 inode) {
  return device_of_bdi(READ(u64, READ(u64, inode, OFF_inode_i_sb), OFF_super_block_s_bdi));
}

int raw_balance_dirty_pages(u64 *ctx) {
  u64 wb = ARG(balance_dirty_pages, wb), since = ARG(balance_dirty_pages, start_time);
  ARGS;
  SET(BALANCE_DIRTY_PAGES, PAUSE_JIFFIES, ARG(balance_dirty_pages, pause));
  if (since)
    SET(BALANCE_DIRTY_PAGES, PAUSED_MS, JIFFIES_TO_MS(jiffies64() - since));
  SET(BALANCE_DIRTY_PAGES, DIRTIED, ARG(balance_dirty_pages, dirtied));
  SET(BALANCE_DIRTY_PAGES, DIRTIED_PAUSE, READ(u32, bpf_get_current_task(), OFF_task_struct_nr_dirtied_pause));
  SET(BALANCE_DIRTY_PAGES, BDI_DEV, device_of_bdi(READ(u64, wb, OFF_bdi_writeback_bdi)));
  SET(BALANCE_DIRTY_PAGES, DIRTY_RATELIMIT, ARG(balance_dirty_pages, dirty_ratelimit));
  SET(BALANCE_DIRTY_PAGES, CGROUP_INO, cgroup_of_wb(wb));
  return EMIT(BALANCE_DIRTY_PAGES);
}

#define WRITEBACK_WORK(name, KIND)                                                            \
  int raw_##name(u64 *ctx) {                                                                  \
    u64 wb = ARG(name, wb), work = ARG(name, work);                                           \
    ARGS;                                                                                     \
    SET(KIND, BDI_DEV, device_of_bdi(READ(u64, wb, OFF_bdi_writeback_bdi)));                  \
    SET(KIND, REASON, READ(u32, work, OFF_wb_writeback_work_reason));                         \
    SET(KIND, NR_PAGES, READ(u64, work, OFF_wb_writeback_work_nr_pages));                     \
    SET(KIND, CGROUP_INO, cgroup_of_wb(wb));                                                  \
    return EMIT(KIND);                                                                        \
  }

WRITEBACK_WORK(writeback_start, WRITEBACK_START)
WRITEBACK_WORK(writeback_written, WRITEBACK_WRITTEN)

int raw_writeback_single_inode(u64 *ctx) {
  u64 inode = ARG(writeback_single_inode, inode), control = ARG(writeback_single_inode, wbc);
  ARGS;
  SET(WRITEBACK_SINGLE_INODE, BDI_DEV, bdi_device_of_inode(inode));
  SET(WRITEBACK_SINGLE_INODE, INO, READ(u64, inode, OFF_inode_i_ino));
  SET(WRITEBACK_SINGLE_INODE, WROTE,
      ARG(writeback_single_inode, nr_to_write) - READ(u64, control, OFF_writeback_control_nr_to_write));
#ifdef OFF_inode_i_wb
  SET(WRITEBACK_SINGLE_INODE, CGROUP_INO, cgroup_of_wb(READ(u64, inode, OFF_inode_i_wb)));
#endif
  return EMIT(WRITEBACK_SINGLE_INODE);
}

int raw_writeback_dirty_inode(u64 *ctx) {
  u64 inode = ARG(writeback_dirty_inode, inode);
  ARGS;
  SET(WRITEBACK_DIRTY_INODE, BDI_DEV, bdi_device_of_inode(inode));
  SET(WRITEBACK_DIRTY_INODE, FLAGS, ARG(writeback_dirty_inode, flags));
  SET(WRITEBACK_DIRTY_INODE, INO, READ(u64, inode, OFF_inode_i_ino));
  return EMIT(WRITEBACK_DIRTY_INODE);
}

/* wait_on_page_writeback(page, mapping) before 5.18: a page's index lies where a folio's does */
int raw_folio_wait_writeback(u64 *ctx) {
  u64 inode = ARG(folio_wait_writeback, mapping);
  inode = inode ? READ(u64, inode, OFF_address_space_host) : 0;
  ARGS;
  if (inode) {
    SET(FOLIO_WAIT_WRITEBACK, BDI_DEV, bdi_device_of_inode(inode));
    SET(FOLIO_WAIT_WRITEBACK, INO, READ(u64, inode, OFF_inode_i_ino));
  }
#if defined(OFF_folio_index)
  SET(FOLIO_WAIT_WRITEBACK, INDEX, READ(u64, ctx[0], OFF_folio_index));
#elif defined(OFF_page_index)
  SET(FOLIO_WAIT_WRITEBACK, INDEX, READ(u64, ctx[0], OFF_page_index));
#endif
  return EMIT(FOLIO_WAIT_WRITEBACK);
}

int raw_wbt_timer(u64 *ctx) {
  ARGS;
  SET(WBT_TIMER, BDI_DEV, device_of_bdi(ARG(wbt_timer, bdi)));
  SET(WBT_TIMER, INFLIGHT, ARG(wbt_timer, inflight));
  return EMIT(WBT_TIMER);
}

/* --- the journal of ext4 */
#define JOURNAL_EVENT(name, KIND)                                                                              \
  int raw_##name(u64 *ctx) {                                                                                   \
    u64 journal = ARG(name, journal), transaction = ARG(name, commit_transaction);                             \
    ARGS;                                                                                                      \
    SET(KIND, DEV, READ(u32, READ(u64, journal, OFF_journal_s_j_fs_dev), OFF_block_device_bd_dev));            \
    SET(KIND, SYNC_COMMIT,                                                                                     \
        READ(u8, transaction, OFF_transaction_s_t_synchronous_commit) >> OFF_transaction_s_t_synchronous_commit_BIT); \
    SET(KIND, TRANSACTION, READ(u32, transaction, OFF_transaction_s_t_tid));                                   \
    JOURNAL_HEAD(KIND)                                                                                         \
    return EMIT(KIND);                                                                                         \
  }

#define JOURNAL_HEAD(KIND)
JOURNAL_EVENT(jbd2_start_commit, JBD2_START_COMMIT)
JOURNAL_EVENT(jbd2_commit_locking, JBD2_COMMIT_LOCKING)
JOURNAL_EVENT(jbd2_commit_flushing, JBD2_COMMIT_FLUSHING)
JOURNAL_EVENT(jbd2_commit_logging, JBD2_COMMIT_LOGGING)
#undef JOURNAL_HEAD
#define JOURNAL_HEAD(KIND) SET(KIND, HEAD, READ(u32, journal, OFF_journal_s_j_tail_sequence));
JOURNAL_EVENT(jbd2_end_commit, JBD2_END_COMMIT)

int raw_jbd2_run_stats(u64 *ctx) {
  u64 stats = ARG(jbd2_run_stats, stats);
  ARGS;
  SET(JBD2_RUN_STATS, DEV, ARG(jbd2_run_stats, dev));
  SET(JBD2_RUN_STATS, TRANSACTION, ARG(jbd2_run_stats, tid));
  SET(JBD2_RUN_STATS, LOCKED_MS, JIFFIES_TO_MS(READ(u64, stats, OFF_transaction_run_stats_s_rs_locked)));
  SET(JBD2_RUN_STATS, FLUSHING_MS, JIFFIES_TO_MS(READ(u64, stats, OFF_transaction_run_stats_s_rs_flushing)));
  SET(JBD2_RUN_STATS, LOGGING_MS, JIFFIES_TO_MS(READ(u64, stats, OFF_transaction_run_stats_s_rs_logging)));
  SET(JBD2_RUN_STATS, HANDLE_COUNT, READ(u32, stats, OFF_transaction_run_stats_s_rs_handle_count));
  SET(JBD2_RUN_STATS, BLOCKS, READ(u32, stats, OFF_transaction_run_stats_s_rs_blocks));
  SET(JBD2_RUN_STATS, BLOCKS_LOGGED, READ(u32, stats, OFF_transaction_run_stats_s_rs_blocks_logged));
  return EMIT(JBD2_RUN_STATS);
}

int raw_jbd2_handle_start(u64 *ctx) {
  ARGS;
  SET(JBD2_HANDLE_START, DEV, ARG(jbd2_handle_start, dev));
  SET(JBD2_HANDLE_START, TRANSACTION, ARG(jbd2_handle_start, tid));
  SET(JBD2_HANDLE_START, TYPE, ARG(jbd2_handle_start, type));
  SET(JBD2_HANDLE_START, LINE, ARG(jbd2_handle_start, line_no));
  SET(JBD2_HANDLE_START, REQUESTED_BLOCKS, ARG(jbd2_handle_start, requested_blocks));
  return EMIT(JBD2_HANDLE_START);
}

int raw_jbd2_handle_stats(u64 *ctx) {
  ARGS;
  SET(JBD2_HANDLE_STATS, DEV, ARG(jbd2_handle_stats, dev));
  SET(JBD2_HANDLE_STATS, TRANSACTION, ARG(jbd2_handle_stats, tid));
  SET(JBD2_HANDLE_STATS, TYPE, ARG(jbd2_handle_stats, type));
  SET(JBD2_HANDLE_STATS, INTERVAL_JIFFIES, ARG(jbd2_handle_stats, interval));
  SET(JBD2_HANDLE_STATS, SYNC, ARG(jbd2_handle_stats, sync));
  SET(JBD2_HANDLE_STATS, REQUESTED_BLOCKS, ARG(jbd2_handle_stats, requested_blocks));
  SET(JBD2_HANDLE_STATS, DIRTIED_BLOCKS, ARG(jbd2_handle_stats, dirtied_blocks));
  return EMIT(JBD2_HANDLE_STATS);
}

int raw_ext4_sync_file_enter(u64 *ctx) {
  u64 dentry = READ(u64, ARG(ext4_sync_file_enter, file), OFF_file_f_path_dentry);
  u64 inode = READ(u64, dentry, OFF_dentry_d_inode);
  ARGS;
  SET(EXT4_SYNC_FILE_ENTER, DEV, READ(u32, READ(u64, inode, OFF_inode_i_sb), OFF_super_block_s_dev));
  SET(EXT4_SYNC_FILE_ENTER, DATASYNC, ARG(ext4_sync_file_enter, datasync) != 0);
  SET(EXT4_SYNC_FILE_ENTER, INO, READ(u64, inode, OFF_inode_i_ino));
  SET(EXT4_SYNC_FILE_ENTER, PARENT_INO,
      READ(u64, READ(u64, READ(u64, dentry, OFF_dentry_d_parent), OFF_dentry_d_inode), OFF_inode_i_ino));
  return EMIT(EXT4_SYNC_FILE_ENTER);
}

int raw_ext4_sync_file_exit(u64 *ctx) {
  u64 inode = ARG(ext4_sync_file_exit, inode);
  ARGS;
  SET(EXT4_SYNC_FILE_EXIT, DEV, READ(u32, READ(u64, inode, OFF_inode_i_sb), OFF_super_block_s_dev));
  SET(EXT4_SYNC_FILE_EXIT, RET, ARG(ext4_sync_file_exit, ret));
  SET(EXT4_SYNC_FILE_EXIT, INO, READ(u64, inode, OFF_inode_i_ino));
  return EMIT(EXT4_SYNC_FILE_EXIT);
}

int raw_jbd2_lock_buffer_stall(u64 *ctx) {
  ARGS;
  SET(JBD2_LOCK_BUFFER_STALL, DEV, ARG(jbd2_lock_buffer_stall, dev));
  SET(JBD2_LOCK_BUFFER_STALL, STALL_MS, ARG(jbd2_lock_buffer_stall, stall_ms));
  return EMIT(JBD2_LOCK_BUFFER_STALL);
}

/* --- page faults, of watched processes */
#if defined(OFF_pt_regs_ip)
#define INSTRUCTION(regs) READ(u64, regs, OFF_pt_regs_ip)
#else
#define INSTRUCTION(regs) READ(u64, regs, OFF_pt_regs_pc)
#endif

#define PAGE_FAULT(name, KIND)                            \
  int raw_##name(u64 *ctx) {                              \
    ARGS;                                                 \
    if (!(current_flags() & WATCHED))                     \
      return 0;                                           \
    SET(KIND, ADDRESS, ARG(name, address));               \
    SET(KIND, IP, INSTRUCTION(ARG(name, regs)));          \
    SET(KIND, ERROR_CODE, ARG(name, error_code));         \
    return EMIT(KIND);                                    \
  }

PAGE_FAULT(page_fault_user, PAGE_FAULT_USER)
PAGE_FAULT(page_fault_kernel, PAGE_FAULT_KERNEL)

/* --- locks: sleeping locks of everyone (a holder waits for holders in turn), spinning locks of watched processes */
#define LOCK_SPIN 1
#define LOCK_READ 2
#define LOCK_WRITE 4
#define LOCK_RT 8
#define LOCK_PERCPU 16
#define LOCK_MUTEX 32
#define OWNER_FLAGS 7 /* the low bits of an owner word */

static __always_inline u64 owner_word(u64 lock, u32 flags) {
  if (flags & LOCK_MUTEX)
    return READ(u64, lock, OFF_mutex_owner);
  if (flags & LOCK_SPIN)
    return 0;
  if (flags & LOCK_PERCPU)
    return READ(u64, lock, OFF_percpu_rw_semaphore_writer_task);
  if (flags & LOCK_RT)
    return READ(u64, lock, OFF_rt_mutex_base_owner);
  if (flags & (LOCK_READ | LOCK_WRITE))
    return READ(u64, lock, OFF_rw_semaphore_owner);
  return 0;
}

#ifdef ARG_contention_begin__flags
int raw_contention_begin(u64 *ctx) {
  u64 lock = ARG(contention_begin, lock), owner;
  u32 flags = ARG(contention_begin, flags);
  ARGS;
  if ((flags & (LOCK_SPIN | LOCK_MUTEX)) == LOCK_SPIN && !(current_flags() & WATCHED)) {
    my_state()->unwatched_spin = lock;
    return 0;
  }
  SET(CONTENTION_BEGIN, LOCK, lock);
  SET(CONTENTION_BEGIN, FLAGS, flags);
  owner = owner_word(lock, flags);
  SET(CONTENTION_BEGIN, OWNER_WORD, owner);
  owner &= ~(u64)OWNER_FLAGS;
  if (owner) {
    SET(CONTENTION_BEGIN, OWNER_TID, READ(u32, owner, OFF_task_struct_pid));
    SET(CONTENTION_BEGIN, OWNER_TGID, READ(u32, owner, OFF_task_struct_tgid));
    SET(CONTENTION_BEGIN, OWNER_START_BOOT_NS, READ(u64, owner, OFF_task_struct_start_boottime));
  }
  return EMIT(CONTENTION_BEGIN);
}

/* has no flags; an end without a begin is a spin of an unwatched process that an interrupt's spin came between */
int raw_contention_end(u64 *ctx) {
  struct cpu_state *state = my_state();
  ARGS;
  if (state->unwatched_spin == ARG(contention_end, lock)) {
    state->unwatched_spin = 0;
    return 0;
  }
  SET(CONTENTION_END, LOCK, ARG(contention_end, lock));
  SET(CONTENTION_END, RET, ARG(contention_end, ret));
  return EMIT(CONTENTION_END);
}
#endif

#define MMAP_LOCK(name, KIND, SUCCESS_VALUE)              \
  int raw_##name(u64 *ctx) {                              \
    ARGS;                                                 \
    if (!(current_flags() & WATCHED))                     \
      return 0;                                           \
    SET(KIND, MM, ARG(name, mm));                         \
    SET(KIND, WRITE, (u8)ARG(name, write) != 0);          \
    SET(KIND, SUCCESS, SUCCESS_VALUE);                    \
    return EMIT(KIND);                                    \
  }

MMAP_LOCK(mmap_lock_start_locking, MMAP_LOCK_START_LOCKING, 1)
MMAP_LOCK(mmap_lock_acquire_returned, MMAP_LOCK_ACQUIRE_RETURNED, (u8)ARG(mmap_lock_acquire_returned, success) != 0)
MMAP_LOCK(mmap_lock_released, MMAP_LOCK_RELEASED, 1)

/* --- sizes and the page cache, of watched processes */
int raw_rss_stat(u64 *ctx) {
  u64 mm = ARG(rss_stat, mm);
  u32 member = ARG(rss_stat, member) & 7;
  ARGS;
  if (!(current_flags() & WATCHED))
    return 0;
  SET(RSS_STAT, MM_ID, mm >> 6);
  SET(RSS_STAT, CURR, READ(u64, bpf_get_current_task(), OFF_task_struct_mm) == mm);
  SET(RSS_STAT, MEMBER, member);
#if defined(OFF_mm_rss_stat_count)
  SET(RSS_STAT, SIZE_BYTES, READ(u64, mm, OFF_mm_struct_rss_stat + OFF_mm_rss_stat_count + member * 8) * PAGE_BYTES);
#elif defined(OFF_percpu_counter_count)
  SET(RSS_STAT, SIZE_BYTES,
      READ(u64, mm, OFF_mm_struct_rss_stat + member * SIZE_percpu_counter + OFF_percpu_counter_count) * PAGE_BYTES);
#endif
  return EMIT(RSS_STAT);
}

int raw_filemap_fault(u64 *ctx) {
  u64 inode = READ(u64, ARG(filemap_fault, mapping), OFF_address_space_host);
  ARGS;
  if (!(current_flags() & WATCHED))
    return 0;
  SET(FILEMAP_FAULT, DEV, READ(u32, READ(u64, inode, OFF_inode_i_sb), OFF_super_block_s_dev));
  SET(FILEMAP_FAULT, INO, READ(u64, inode, OFF_inode_i_ino));
  SET(FILEMAP_FAULT, INDEX, ARG(filemap_fault, index));
  return EMIT(FILEMAP_FAULT);
}
