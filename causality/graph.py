"""The causal edges of a verdict, `kprobe.edge/1`: what the graph store and the edges topic hold.

One edge for each link of each cause's chain: from whoever delayed to whoever was delayed. Edges are derived from the
verdict alone, and their id is a hash of their content, so that writing them twice changes nothing.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import orjson

from events.topics import EDGE_SCHEMA

__all__ = ["edges_of"]


def edges_of(verdict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The edges of a verdict, in the order of its causes and their chains."""
    edges: dict[str, dict[str, Any]] = {}
    spans = {e: (s["start_mono_ns"], s["end_mono_ns"]) for s in verdict["ledger"] for e in s["evidence"]}
    for cause in verdict["causes"]:
        for link in cause["chain"]:
            found = [spans[e] for e in link["evidence"] if e in spans]
            edge = {
                "schema": EDGE_SCHEMA,
                "operation_id": verdict["operation_id"],
                "edge": link["edge"],
                "kind": cause["kind"],
                "from": link["from"],
                "to": link["to"],
                "ns": link["ns"],
                "start_mono_ns": min((a for a, _ in found), default=verdict["start_mono_ns"]),
                "end_mono_ns": max((b for _, b in found), default=verdict["end_mono_ns"]),
                "evidence": link["evidence"],
                "confidence": cause["confidence"],
                "completeness": verdict["completeness"],
                "algorithm": verdict["algorithm"],
                "node": verdict["node"],
                "boot_id": verdict["boot_id"],
            }
            digest = hashlib.sha256(orjson.dumps(edge, option=orjson.OPT_SORT_KEYS)).hexdigest()
            edges[digest] = {"edge_id": digest, **edge}
    return list(edges.values())
