"""/metrics (Prometheus text) and /healthz of the probe, on loopback unless `probe.listen` says otherwise.

/healthz answers 200 while the recording can be relied on, with `degraded` and the troubles when something is wrong that it
survives (Kafka away, a family shed), and 503 when it cannot: detached, accounts that do not add up, rings not drained. A
restart is the remedy for 503 only.

The numbers are read from the agent when they are asked for; nothing is counted twice, and no request waits for the recording.
"""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from events.errors import ConfigError
from probe.agent import Agent

__all__ = ["AgentCollector", "MetricsServer"]


class AgentCollector:
    """The agent's numbers as Prometheus metrics."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        """Called for each scrape."""
        yield from self._hops()
        yield from self._rings()
        agent = self._agent
        yield GaugeMetricFamily(
            "kprobe_cpu_share", "Share of one CPU used, over the limit window", value=agent.limits.cpu_share
        )
        yield GaugeMetricFamily("kprobe_resident_bytes", "Resident memory", value=agent.limits.rss_bytes)
        yield GaugeMetricFamily("kprobe_families_shed", "Families given up to stay within the limits", value=len(agent.shed))
        bad = len(agent.summary.violations)
        yield CounterMetricFamily("kprobe_accounting_violations", "Accounts that did not add up (a bug)", value=bad)

    def _hops(self) -> Iterator[Metric]:
        events = CounterMetricFamily("kprobe_events", "Events a hop was given, and delivered", labels=["hop", "what"])
        pending = GaugeMetricFamily("kprobe_events_pending", "Events a hop holds", labels=["hop"])
        dropped = CounterMetricFamily("kprobe_events_dropped", "Events a hop dropped", labels=["hop", "reason"])
        for account in (self._agent.account, *(o.account for o in self._agent.outputs)):
            events.add_metric([account.hop, "accepted"], account.accepted)
            events.add_metric([account.hop, "delivered"], account.delivered)
            pending.add_metric([account.hop], account.pending)
            for reason, count in sorted(account.dropped.items()):
                dropped.add_metric([account.hop, reason], count)
        yield from (events, pending, dropped)
        for output in self._agent.outputs:
            spool = getattr(output, "spool", None)
            if spool is not None:
                yield GaugeMetricFamily("kprobe_spool_bytes", "Bytes in the spool", value=spool.size_bytes)
                away = GaugeMetricFamily("kprobe_kafka_away", "1 while Kafka is away", value=int(output.health() is not None))
                yield away

    def _rings(self) -> Iterator[Metric]:
        per_cpu = CounterMetricFamily("kprobe_ring_events", "Events of a CPU's ring", labels=["cpu", "what"])
        for cpu, delivered in sorted(self._agent.ring.delivered.items()):
            per_cpu.add_metric([str(cpu), "delivered"], delivered)
            per_cpu.add_metric([str(cpu), "lost"], self._agent.ring.lost[cpu])
        yield per_cpu


class MetricsServer:
    """Serves both paths from a thread until it is closed. `listen` is HOST:PORT; port 0 takes a free one (`address` has it)."""

    def __init__(self, agent: Agent, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"probe.listen {listen!r} is not HOST:PORT, e.g. 127.0.0.1:9464")
        registry = CollectorRegistry(auto_describe=False)
        registry.register(AgentCollector(agent))
        try:
            self._server = ThreadingHTTPServer((host, int(port)), _handler(agent, registry))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot serve metrics at {listen} (probe.listen): {error}") from error
        self._server.daemon_threads = True
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _handler(agent: Agent, registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """GET /metrics and /healthz."""

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif self.path == "/healthz":
                failures, troubles = agent.failures(), agent.troubles()
                status = "failed" if failures else "degraded" if troubles else "ok"
                body = orjson.dumps({"status": status, "troubles": [*failures, *troubles]})
                self._answer(503 if failures else 200, "application/json", body)
            else:
                self._answer(404, "text/plain", b"there are /metrics and /healthz\n")

        def _answer(self, code: int, content_type: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
            """Scrapes are not worth a line each."""

    return Handler
