"""Fixed keys on which state lives: few, and balanced for every number of workers from 1 to 16.

Bytewax sends a key to the worker `siphash(key) mod workers`, and a handful of ordinary names spreads badly ("0" to "3" all
land on one of two workers). The sixteen names here are chosen so that their hashes are 0, 1, ... 15 modulo 720720, the
least common multiple of 1 to 16: for any number of workers up to 16, worker w gets the shards w, w + workers, ...

The shard of a node is a hash of its name that does not change between versions, machines or runs: state is found by it
again.
"""

import hashlib
from typing import Final

__all__ = ["SHARDS", "shard_of"]

SHARDS: Final = (
    "s00973b", "s033fad", "s070343", "s0073d7", "s0c4c78", "s0e775f", "s0ea534", "s003414",
    "s014d89", "s08a326", "s032e89", "s1df3c6", "s028e7b", "s01a619", "s22cbfc", "s030d55",
)  # fmt: skip


def shard_of(node: str) -> str:
    """The shard that holds all state of `node`."""
    digest = hashlib.blake2b(node.encode(), digest_size=8).digest()
    return SHARDS[int.from_bytes(digest, "little") % len(SHARDS)]
