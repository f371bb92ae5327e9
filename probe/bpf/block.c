/* Block requests and bios: who submitted what, when the device got it, when it answered. */

/* @fields
 * request.__data_len request.__sector request.bio request.cmd_flags request.q request.rq_disk request_queue.disk
 * gendisk.major gendisk.first_minor bio.bi_bdev bio.bi_disk bio.bi_iter.bi_size bio.bi_iter.bi_sector bio.bi_opf
 * bio.bi_status bio.bi_blkg blkcg_gq.blkcg blkcg.css block_device.bd_dev
 */

static __always_inline u32 disk_number(u64 disk) {
  return disk ? READ(u32, disk, OFF_gendisk_major) << 20 | READ(u32, disk, OFF_gendisk_first_minor) : 0;
}

static __always_inline u32 request_device(u64 rq) {
#if defined(OFF_request_rq_disk)
  return disk_number(READ(u64, rq, OFF_request_rq_disk));
#elif defined(OFF_request_queue_disk)
  return disk_number(READ(u64, READ(u64, rq, OFF_request_q), OFF_request_queue_disk));
#else
  return 0;
#endif
}

/* blk_status_t -> errno, as blk_status_to_errno() has it; an int is an errno already (before 5.16) */
static __always_inline s32 block_errno(u64 status, u32 status_bytes) {
  if (status_bytes != 1)
    return (s32)status;
  switch ((u8)status) {
  case 0: return 0;
  case 1: return -95;   /* EOPNOTSUPP */
  case 2: return -110;  /* ETIMEDOUT */
  case 3: return -28;   /* ENOSPC */
  case 4: return -67;   /* ENOLINK */
  case 5: return -121;  /* EREMOTEIO */
  case 6: return -52;   /* EBADE */
  case 7: return -61;   /* ENODATA */
  case 8: return -84;   /* EILSEQ */
  case 9: return -12;   /* ENOMEM */
  default: return -5;   /* EIO */
  }
}

static __always_inline int request_event(u32 kind, u64 rq, u64 bytes, s32 error) {
  ARGS;
  SET(BLOCK_RQ_ISSUE, RQ, rq);
  SET(BLOCK_RQ_ISSUE, DEV, request_device(rq));
  SET(BLOCK_RQ_ISSUE, BYTES, bytes);
  SET(BLOCK_RQ_ISSUE, SECTOR, READ(u64, rq, OFF_request___sector));
  SET(BLOCK_RQ_ISSUE, BIO, READ(u64, rq, OFF_request_bio));
  SET(BLOCK_RQ_ISSUE, CMD_FLAGS, READ(u32, rq, OFF_request_cmd_flags));
  SET(BLOCK_RQ_ISSUE, ERROR, error);
  return emit(kind, bpf_get_current_pid_tgid(), args);
}

#define REQUEST_EVENT(name, KIND)                                                           \
  int raw_##name(u64 *ctx) {                                                                \
    u64 rq = ARG(name, rq);                                                                 \
    return request_event(KIND_##KIND, rq, READ(u32, rq, OFF_request___data_len), 0);        \
  }

REQUEST_EVENT(block_rq_insert, BLOCK_RQ_INSERT)
REQUEST_EVENT(block_rq_issue, BLOCK_RQ_ISSUE)
REQUEST_EVENT(block_rq_requeue, BLOCK_RQ_REQUEUE)
#ifdef ARG_block_rq_merge__rq
REQUEST_EVENT(block_rq_merge, BLOCK_RQ_MERGE)
#endif
#ifdef ARG_block_io_start__rq
REQUEST_EVENT(block_io_start, BLOCK_IO_START)
REQUEST_EVENT(block_io_done, BLOCK_IO_DONE)
#endif

int raw_block_rq_complete(u64 *ctx) {
  return request_event(KIND_BLOCK_RQ_COMPLETE, ARG(block_rq_complete, rq), ARG(block_rq_complete, nr_bytes),
                       block_errno(ARG(block_rq_complete, error), ARG_block_rq_complete__error_BYTES));
}

#ifdef ARG_block_rq_error__rq
int raw_block_rq_error(u64 *ctx) {
  return request_event(KIND_BLOCK_RQ_ERROR, ARG(block_rq_error, rq), ARG(block_rq_error, nr_bytes),
                       block_errno(ARG(block_rq_error, error), ARG_block_rq_error__error_BYTES));
}
#endif

static __always_inline int bio_event(u32 kind, u64 bio) {
  ARGS;
  SET(BLOCK_BIO_QUEUE, BIO, bio);
#if defined(OFF_bio_bi_bdev)
  SET(BLOCK_BIO_QUEUE, DEV, READ(u32, READ(u64, bio, OFF_bio_bi_bdev), OFF_block_device_bd_dev));
#elif defined(OFF_bio_bi_disk)
  SET(BLOCK_BIO_QUEUE, DEV, disk_number(READ(u64, bio, OFF_bio_bi_disk)));
#endif
  SET(BLOCK_BIO_QUEUE, BYTES, READ(u32, bio, OFF_bio_bi_iter_bi_size));
  SET(BLOCK_BIO_QUEUE, SECTOR, READ(u64, bio, OFF_bio_bi_iter_bi_sector));
  SET(BLOCK_BIO_QUEUE, OPF, READ(u32, bio, OFF_bio_bi_opf));
  SET(BLOCK_BIO_QUEUE, ERROR, block_errno(READ(u8, bio, OFF_bio_bi_status), 1));
#if defined(OFF_bio_bi_blkg) && defined(OFF_blkcg_gq_blkcg)
  u64 group = READ(u64, bio, OFF_bio_bi_blkg);
  if (group)
    SET(BLOCK_BIO_QUEUE, CGROUP_ID, cgroup_id_of_css(READ(u64, group, OFF_blkcg_gq_blkcg) + OFF_blkcg_css));
#endif
  return emit(kind, bpf_get_current_pid_tgid(), args);
}

#define BIO_EVENT(name, KIND) \
  int raw_##name(u64 *ctx) { return bio_event(KIND_##KIND, ARG(name, bio)); }

BIO_EVENT(block_bio_queue, BLOCK_BIO_QUEUE)
BIO_EVENT(block_bio_backmerge, BLOCK_BIO_BACKMERGE)
BIO_EVENT(block_bio_frontmerge, BLOCK_BIO_FRONTMERGE)
BIO_EVENT(block_bio_complete, BLOCK_BIO_COMPLETE)
BIO_EVENT(block_bio_remap, BLOCK_BIO_REMAP)
BIO_EVENT(block_split, BLOCK_SPLIT)

int raw_block_plug(u64 *ctx) {
  ARGS;
  return EMIT(BLOCK_PLUG);
}

int raw_block_unplug(u64 *ctx) {
  ARGS;
  SET(BLOCK_UNPLUG, NR_RQ, ARG(block_unplug, depth));
  SET(BLOCK_UNPLUG, EXPLICIT, (u8)ARG(block_unplug, explicit) != 0);
  return EMIT(BLOCK_UNPLUG);
}
