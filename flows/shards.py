"""Fixed keys on which state lives: few, and balanced for every number of workers from 1 to 16.

Bytewax sends a key to the worker `siphash(key) mod workers`, and a handful of ordinary names spreads badly ("0" to "3" all
land on one of two workers). The sixteen names here are chosen so that their hashes are 0, 1, ... 15 modulo 720720, the
least common multiple of 1 to 16: for any number of workers up to 16, worker w gets the shards w, w + workers, ...

The shard of a node is a hash of its name that does not change between versions, machines or runs: state is found by it
again.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

__all__ = ["SHARDS", "Share", "shard_of"]

SHARDS: Final = (
    "s00973b", "s033fad", "s070343", "s0073d7", "s0c4c78", "s0e775f", "s0ea534", "s003414",
    "s014d89", "s08a326", "s032e89", "s1df3c6", "s028e7b", "s01a619", "s22cbfc", "s030d55",
)  # fmt: skip


def shard_of(node: str) -> str:
    """The shard that holds all state of `node`."""
    digest = hashlib.blake2b(node.encode(), digest_size=8).digest()
    return SHARDS[int.from_bytes(digest, "little") % len(SHARDS)]


@dataclass(slots=True)
class Share:
    """Which part of the raw topic one of several flow processes reads. `partitions` becomes known when the source starts."""

    processes: int
    process: int
    partitions: int = 0

    def partition_of(self, node: str) -> int:
        """Where producers put the frames of a node: Kafka's default for a key (murmur2), which the probe uses too."""
        return (_murmur2(node.encode()) & 0x7FFFFFFF) % max(1, self.partitions)

    def owns(self, node: str) -> bool:
        """Whether this process would read the frames of a node."""
        return self.processes == 1 or self.partition_of(node) % self.processes == self.process


def _murmur2(data: bytes) -> int:
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    value = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        value = value * m & mask ^ (k ^ k >> 24) * m & mask
    if rest := data[whole:]:
        value = (value ^ int.from_bytes(rest, "little")) * m & mask
    value = (value ^ value >> 13) * m & mask
    return value ^ value >> 15
