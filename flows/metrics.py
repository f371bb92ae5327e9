"""What a flow process publishes about itself: `/metrics` (Prometheus text) and `/healthz` on `flow.listen`.

Bytewax counts items, which are batches here; these count events, messages and nanoseconds. `/healthz` answers 200 while every
source has been asked within the last `STALL_LIMIT_S` seconds, else 503 and the reason (a stuck sink holds the sources back).

If the address is taken (a second process of a cluster on one machine) the system chooses a port, and a line on stderr says so.
"""

import http.server
import socketserver
import sys
import threading
import time
from typing import Any, Final

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from events.errors import ConfigError

__all__ = ["STALL_LIMIT_S", "FlowMetrics", "serve"]

_BUCKETS_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

STALL_LIMIT_S: Final = 120.0


class FlowMetrics:
    """The counters of one process. Labels are few: topics, partitions, nodes, reasons."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        partition = ["topic", "partition"]
        self.messages = Counter("kprobe_flow_messages", "Messages read", partition, registry=r)
        self.bytes = Counter("kprobe_flow_bytes", "Bytes of messages read", partition, registry=r)
        self.position = Gauge("kprobe_flow_position", "Offset of the next message to read", partition, registry=r)
        self.lag = Gauge("kprobe_flow_lag_messages", "Messages between the position and the end", partition, registry=r)
        self.gap = Counter("kprobe_flow_gap_messages", "Messages that retention removed unread", partition, registry=r)
        self.replayed = Counter("kprobe_flow_replayed_messages", "Messages read again to rebuild state", registry=r)
        self.events = Counter("kprobe_flow_events", "Kernel events folded", ["node"], registry=r)
        self.duplicates = Counter("kprobe_flow_duplicate_events", "Kernel events that were there already", ["node"], registry=r)
        self.late = Counter("kprobe_flow_late_events", "Kernel events older than the watermark", ["node"], registry=r)
        self.wakes = Counter("kprobe_flow_wake_edges", "Wake edges closed", ["node"], registry=r)
        self.watermark = Gauge("kprobe_flow_watermark_mono_ns", "All before has been seen", ["node"], registry=r)
        self.operations = Counter("kprobe_flow_operations", "Operations submitted", registry=r)
        self.pending = Gauge("kprobe_flow_pending_operations", "Operations not yet judged", ["shard"], registry=r)
        self.verdicts = Counter("kprobe_flow_verdicts", "Verdicts given", ["status"], registry=r)
        self.corrected = Counter("kprobe_flow_corrected_verdicts", "Verdicts that late data changed", registry=r)
        self.edges = Counter("kprobe_flow_edges", "Causal edges given", registry=r)
        self.dead_letters = Counter("kprobe_flow_dead_letters", "Messages that could not be used", ["topic"], registry=r)
        self.rows = Counter("kprobe_flow_rows", "Rows written to ClickHouse", ["table"], registry=r)
        self.snapshot_bytes = Gauge("kprobe_flow_snapshot_bytes", "Size of the last snapshot", ["shard"], registry=r)
        seconds: dict[str, Any] = {"registry": r, "buckets": _BUCKETS_S}
        self.age = Histogram("kprobe_flow_frame_age_seconds", "From making a frame to folding it, by wall clocks", **seconds)
        self.fold = Histogram("kprobe_flow_fold_seconds", "Folding a batch of frames", **seconds)
        self.judge = Histogram("kprobe_flow_judge_seconds", "Judging an operation", **seconds)
        self.confirm = Histogram("kprobe_flow_confirm_seconds", "Waiting for a store at an epoch's end", ["sink"], **seconds)
        self._alive_mono_s = time.monotonic()

    def alive(self) -> None:
        """A source was asked for its next batch."""
        self._alive_mono_s = time.monotonic()

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `/healthz`."""
        idle_s = time.monotonic() - self._alive_mono_s
        if idle_s > STALL_LIMIT_S:
            return 503, {"status": "stalled", "reason": f"no source was read for {idle_s:.0f} s: a sink or fold is stuck"}
        return 200, {"status": "ok"}


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    allow_reuse_address = True


def serve(metrics: FlowMetrics, listen: str) -> tuple[str, int]:
    """Serve in a daemon thread until the process ends; returns the address. Raises ConfigError for a malformed one."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"flow.listen is {listen!r}; give HOST:PORT, such as 127.0.0.1:9465 (port 0: any)")
    handler = type("_Handler", (_Handler,), {"metrics": metrics})
    try:
        server = _Server((host, int(port)), handler)
    except OSError as error:
        server = _Server((host, 0), handler)
        print(f"kprobe: flow: {listen} cannot be used ({error.strerror}); metrics are on "
              f"{host}:{server.server_address[1]}", file=sys.stderr)  # fmt: skip
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return host, int(server.server_address[1])


class _Handler(http.server.BaseHTTPRequestHandler):
    metrics: FlowMetrics

    def do_GET(self) -> None:
        """Answer `/metrics` and `/healthz`."""
        if self.path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4", generate_latest(self.metrics.registry))
        elif self.path == "/healthz":
            status, body = self.metrics.health()
            self._answer(status, "application/json", orjson.dumps(body))
        else:
            self._answer(404, "text/plain", b"/metrics and /healthz\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""
