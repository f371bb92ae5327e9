-- Raw kernel events: the authoritative history. Sorted by second, then by kind: rows of one kind have like arguments, which is
-- worth more to the codecs than perfect time order, and a window of time still reads whole seconds only. The key names the
-- event (node, boot, cpu, seq), therefore a row that was sent twice becomes one again even when the batches were cut otherwise.
CREATE TABLE IF NOT EXISTS kernel_events
(
    day          Date CODEC(ZSTD(1)),
    node         LowCardinality(String) CODEC(ZSTD(1)),
    boot_id      LowCardinality(String) CODEC(ZSTD(1)),
    time_mono_ns Int64 CODEC(Delta, ZSTD(1)),
    seq          UInt64 CODEC(DoubleDelta, ZSTD(1)),
    cpu          UInt16 CODEC(ZSTD(1)),
    kind         UInt8 CODEC(ZSTD(1)),
    flags        UInt8 CODEC(ZSTD(1)),
    tgid         UInt32 CODEC(ZSTD(1)),
    tid          UInt32 CODEC(ZSTD(1)),
    a0           UInt64 CODEC(ZSTD(1)),
    a1           UInt64 CODEC(ZSTD(1)),
    a2           UInt64 CODEC(ZSTD(1)),
    a3           UInt64 CODEC(Delta, ZSTD(1)),
    a4           UInt64 CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree
PARTITION BY day
ORDER BY (node, boot_id, intDiv(time_mono_ns, 1000000000), kind, cpu, seq)
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1;

-- What was true of a thread, from a time on.
CREATE TABLE IF NOT EXISTS tasks
(
    day                  Date CODEC(ZSTD(1)),
    node                 LowCardinality(String),
    boot_id              LowCardinality(String),
    time_mono_ns         Int64 CODEC(Delta, ZSTD(1)),
    reason               LowCardinality(String),
    tid                  UInt32 CODEC(ZSTD(1)),
    tgid                 Nullable(UInt32) CODEC(ZSTD(1)),
    start_boot_ns        Int64 CODEC(ZSTD(1)),
    comm                 LowCardinality(Nullable(String)),
    cmdline              Nullable(String) CODEC(ZSTD(1)),
    parent_tid           Nullable(UInt32) CODEC(ZSTD(1)),
    parent_tgid          Nullable(UInt32) CODEC(ZSTD(1)),
    parent_start_boot_ns Nullable(Int64) CODEC(ZSTD(1)),
    cgroup_id            Nullable(UInt64) CODEC(ZSTD(1)),
    cgroup               LowCardinality(Nullable(String)),
    container            LowCardinality(Nullable(String)),
    kthread              Nullable(Bool),
    observer             Nullable(Bool),
    watched              Nullable(Bool),
    prio                 Nullable(Int16),
    policy               Nullable(UInt8),
    exit_code            Nullable(Int32),
    state                LowCardinality(Nullable(String)),
    cpu                  Nullable(Int32),
    syscall_nr           Nullable(Int64),
    syscall_arg0         Nullable(UInt64),
    syscall_arg1         Nullable(UInt64),
    syscall_arg2         Nullable(UInt64),
    wchan                LowCardinality(Nullable(String))
)
ENGINE = ReplacingMergeTree
PARTITION BY day
ORDER BY (node, boot_id, tid, start_boot_ns, time_mono_ns, reason)
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1;

-- Where events are missing, and how many.
CREATE TABLE IF NOT EXISTS losses
(
    day          Date CODEC(ZSTD(1)),
    node         LowCardinality(String),
    boot_id      LowCardinality(String),
    cpu          Nullable(UInt16),
    reason       LowCardinality(String),
    hop          LowCardinality(String),
    family       LowCardinality(Nullable(String)),
    from_mono_ns Int64 CODEC(Delta, ZSTD(1)),
    to_mono_ns   Int64 CODEC(Delta, ZSTD(1)),
    first_seq    Nullable(UInt64) CODEC(ZSTD(1)),
    last_seq     Nullable(UInt64) CODEC(ZSTD(1)),
    count        UInt64 CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree
PARTITION BY day
ORDER BY (node, boot_id, from_mono_ns, to_mono_ns, reason, hop, ifNull(family, ''), ifNull(cpu, 65535), ifNull(first_seq, 0), count)
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1;

-- Operations as they were announced. The last version of a row wins.
CREATE TABLE IF NOT EXISTS operations
(
    seen_at       DateTime64(6, 'UTC') DEFAULT now64(6) CODEC(Delta, ZSTD(1)),
    operation_id  String CODEC(ZSTD(1)),
    type          LowCardinality(String),
    node          LowCardinality(String),
    tid           UInt32,
    start_mono_ns Int64 CODEC(Delta, ZSTD(1)),
    end_mono_ns   Int64 CODEC(Delta, ZSTD(1)),
    deadline_ns   Nullable(Int64),
    outcome       LowCardinality(String),
    attributes    Map(LowCardinality(String), String) CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree(seen_at)
ORDER BY operation_id;

-- One verdict an operation: the document as it was judged, byte for byte, and what one searches by.
CREATE TABLE IF NOT EXISTS verdicts
(
    seen_at            DateTime64(6, 'UTC') DEFAULT now64(6) CODEC(Delta, ZSTD(1)),
    operation_id       String CODEC(ZSTD(1)),
    type               LowCardinality(String),
    node               LowCardinality(String),
    boot_id            LowCardinality(String),
    status             LowCardinality(String),
    start_mono_ns      Int64 CODEC(Delta, ZSTD(1)),
    end_mono_ns        Int64 CODEC(Delta, ZSTD(1)),
    duration_ns        Int64 CODEC(ZSTD(1)),
    deadline_ns        Nullable(Int64),
    lost_events        UInt64,
    unknown_ns         Int64,
    complete           Bool,
    cause              LowCardinality(String),
    culprit_kinds      Array(LowCardinality(String)),
    culprit_comms      Array(LowCardinality(String)),
    culprit_tids       Array(UInt32),
    culprit_tgids      Array(UInt32),
    culprit_cgroups    Array(LowCardinality(String)),
    culprit_containers Array(LowCardinality(String)),
    culprit_ns         Array(Int64),
    algorithm          LowCardinality(String),
    hash               String CODEC(ZSTD(1)),
    sentence           String CODEC(ZSTD(1)),
    verdict            String CODEC(ZSTD(3)),
    INDEX by_status status TYPE set(8) GRANULARITY 1,
    INDEX by_comm culprit_comms TYPE bloom_filter(0.01) GRANULARITY 1
)
ENGINE = ReplacingMergeTree(seen_at)
ORDER BY operation_id
SETTINGS index_granularity = 256;

-- One row a causal edge of an operation.
CREATE TABLE IF NOT EXISTS causal_edges
(
    seen_at            DateTime64(6, 'UTC') DEFAULT now64(6) CODEC(Delta, ZSTD(1)),
    operation_id       String CODEC(ZSTD(1)),
    edge_id            String CODEC(ZSTD(1)),
    edge               LowCardinality(String),
    node               LowCardinality(String),
    boot_id            LowCardinality(String),
    start_mono_ns      Int64 CODEC(Delta, ZSTD(1)),
    end_mono_ns        Int64 CODEC(Delta, ZSTD(1)),
    ns                 Int64 CODEC(ZSTD(1)),
    from_tid           UInt32,
    from_tgid          UInt32,
    from_comm          LowCardinality(String),
    from_start_boot_ns Int64,
    from_cgroup        LowCardinality(String),
    to_tid             UInt32,
    to_tgid            UInt32,
    to_comm            LowCardinality(String),
    to_start_boot_ns   Int64,
    to_cgroup          LowCardinality(String),
    confidence         LowCardinality(String),
    algorithm          LowCardinality(String),
    document           String CODEC(ZSTD(3))
)
ENGINE = ReplacingMergeTree(seen_at)
ORDER BY (operation_id, edge_id)
SETTINGS index_granularity = 1024;
