"""The scenario behind `kprobe demo`: real servers, a real service, real kernel events, and the sentence at the end.

Nothing is scripted but the order of steps: the settlement service handles payments one after another; during one of them
(4821) a batch job starts on the ledger writer's CPU with a higher priority. The probe records both, the flow judges, and
what is printed comes out of the stores. With `healthy`, no batch job starts, and the same run says that nothing was wrong.

Every process of the run is watched: if one dies before its work is done, the run ends with an error that names it and shows the
end of its log. Everything that the run started is stopped at its end, in any case, unless `keep` is set and it succeeded.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from events.errors import KprobeError
from events.settings import Settings

__all__ = ["Demo", "DemoError", "Outcome"]

SETTLEMENT: Final = 4821  # the one that the batch job hits
PAYMENT_OFFSET: Final = 98721 - SETTLEMENT
FIRST: Final = 4812
LAST: Final = 4826
DEADLINE_MS: Final = 250
_CYPHER: Final = (
    f"MATCH (t:Task)-[d:DELAYED]->(o:Operation {{id: '{SETTLEMENT}'}}) "
    "RETURN t.comm, t.tgid, d.kind, d.ns ORDER BY d.ns DESC LIMIT 5"
)
_ALL: Final = f"MATCH (t:Task)-[:DELAYED]->(:Operation {{id: '{SETTLEMENT}'}}) RETURN t.tgid"
_SQL: Final = (
    "SELECT edge, from_comm, from_tgid, to_comm, ns FROM causal_edges FINAL "
    f"WHERE operation_id = '{SETTLEMENT}' AND start_mono_ns >= {{start_mono_ns}} ORDER BY ns DESC LIMIT 5"
)
_BATCH_LEAD_S: Final = 0.05  # the batch job computes for this long before the payment arrives


class DemoError(KprobeError):
    """A process of the run died, or something that should happen did not; the message names which, and its log."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the run produced. `live` is the verdict from the stores, `offline` the one of the capture file."""

    live: dict[str, Any]
    offline: dict[str, Any]
    capture: Path
    operations: Path
    config: Path
    batch_pid: int | None
    folder: Path
    queries: tuple[tuple[str, list[dict[str, Any]]], ...]  # what one can ask the two stores, and what they answered


@dataclass(slots=True)
class _Child:
    """One process of the run and where its output went."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self, lines: int = 12) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


@dataclass
class Demo:
    """One run. `say` gets a line for each step; `folder` receives logs, the capture and the service's own log."""

    settings: Settings
    folder: Path
    say: Callable[[str], None]
    healthy: bool = False
    keep: bool = False
    timeout_s: float = 90.0
    _children: list[_Child] = field(default_factory=list)
    _stack_is_ours: bool = False

    def run(self) -> Outcome:
        """All steps in order. Raises DemoError; stops whatever it started."""
        self.folder.mkdir(parents=True, exist_ok=True)
        succeeded = False
        try:
            outcome = self._steps()
            succeeded = True
            return outcome
        finally:
            if not (self.keep and succeeded):
                self._stop_everything()

    def _steps(self) -> Outcome:
        config = self._write_config()
        self._start_stack()
        service_port = self._start_service()
        self._start_recording(config)
        batch_pid = self._drive(service_port)
        operations = self.folder / "operations.csv"
        self._publish(operations)
        live = self._await_verdict(operations)
        queries = (self._ask_neo4j(live), self._ask_clickhouse(live))
        self._stop("probe")
        offline = self._analyze(operations)
        capture = self.folder / "incident.kcap"
        return Outcome(live, offline, capture, operations, config, batch_pid, self.folder, queries)

    # --- configuration and processes

    def _write_config(self) -> Path:
        """The settings of this run: those of the site, with the run's own watch set, spool and recovery folders."""
        content = self.settings.model_dump(mode="json")
        content["probe"] |= {"spool_dir": str(self.folder / "spool"), "listen": f"127.0.0.1:{_free_port()}"}
        # Servers that already run hold the frames of earlier runs: this run begins where they end.
        content["flow"] |= {
            "recovery_dir": str(self.folder / "recovery"), "listen": f"127.0.0.1:{_free_port()}", "start": "latest",
        }  # fmt: skip
        path = self.folder / "kprobe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def _environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("KPROBE_")}
        return clean | {"KPROBE_CONFIG": str(self.folder / "kprobe.yaml")}

    def _kprobe(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "cli.main", *arguments]

    def _start(self, name: str, command: Sequence[str]) -> _Child:
        log = self.folder / f"{name}.log"
        # A process group of its own keeps a Ctrl-C away from the child. Not a session of its own: the scheduler's autogroups
        # give every session an equal share, and the batch job's priority would mean nothing to the service.
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self._environment(),
                process_group=0,
            )
        child = _Child(name, process, log)
        self._children.append(child)
        return child

    def _check_alive(self) -> None:
        for child in self._children:
            status = child.process.poll()
            if status is not None:
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                raise DemoError(f"the {child.name} (pid {child.process.pid}) {how}; its log {child.log} ends:\n{child.tail()}")

    def _await(self, what: str, ready: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """The first true value of `ready`; DemoError if a process dies or the time is over."""
        deadline_s = time.monotonic() + (timeout_s or self.timeout_s)
        while True:
            value = ready()
            if value:
                return value
            self._check_alive()
            if time.monotonic() > deadline_s:
                logs = "\n".join(f"  {c.name}: {c.log}" for c in self._children)
                raise DemoError(f"{what} did not happen within {timeout_s or self.timeout_s:.0f} s; the logs are\n{logs}")
            time.sleep(0.05)

    # --- steps

    def _start_stack(self) -> None:
        done = subprocess.run(self._kprobe("status", "--json"), capture_output=True, env=self._environment(), check=False)
        if done.returncode == 0:
            self.say("servers: already running, left as they are")
            return
        self.say("servers: starting Kafka, Neo4j and the ClickHouse engine")
        self._stack_is_ours = True
        done = subprocess.run(self._kprobe("up", "--detach"), env=self._environment(), stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise DemoError(f"the servers did not start: `kprobe up` ended with status {done.returncode} (see above)")

    def _start_service(self) -> int:
        self.say("service: starting the settlement service and its clearing house")
        cpu = max(os.sched_getaffinity(0))
        port_file = str(self.folder / "clearing.port")
        self._start("clearing house", [sys.executable, "-m", "demo.clearing", "--port-file", port_file])
        clearing_port = self._await("the clearing house's start", lambda: _read_port(self.folder / "clearing.port"))
        self._start("settlement service", [
            sys.executable, "-m", "demo.settlement", "--port-file", str(self.folder / "service.port"),
            "--clearing", f"127.0.0.1:{clearing_port}", "--journal", str(self.folder / "ledger.journal"),
            "--log", str(self.folder / "operations.csv"), "--deadline-ms", str(DEADLINE_MS), "--cpu", str(cpu),
        ])  # fmt: skip
        port = self._await("the settlement service's start", lambda: _read_port(self.folder / "service.port"))
        return int(port)

    def _start_recording(self, config: Path) -> None:
        service = next(c for c in self._children if c.name == "settlement service")
        self.say("flow: Kafka to causes, with Bytewax")
        self._start("flow", self._kprobe("flow"))
        self._await("the flow's start", lambda: _healthy(config, "flow"))
        self.say(f"probe: recording kernel events around the service (pid {service.process.pid}), passively")
        self._start("probe", self._kprobe(
            "probe", "--config", str(config), "--watch", f"pid:{service.process.pid}",
            "--capture", str(self.folder / "incident.kcap"),
        ))  # fmt: skip
        self._await("recording", lambda: _healthy(config, "probe"))

    def _drive(self, port: int) -> int | None:
        """Send the payments one after another; during SETTLEMENT the batch job computes. Returns its pid."""
        self.say(f"payments: settling {FIRST} to {LAST}")
        try:
            return self._settle_all(port)
        except OSError as error:
            service = next(c for c in self._children if c.name == "settlement service")
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.process.wait(timeout=2)  # its connection ends a moment before its process
            self._check_alive()
            raise DemoError(f"the settlement service does not answer on port {port}: {error}") from error

    def _settle_all(self, port: int) -> int | None:
        batch_pid = None
        with socket.create_connection(("127.0.0.1", port), timeout=self.timeout_s) as client, client.makefile("rb") as answers:
            for number in range(FIRST, LAST + 1):
                disturbed = number == SETTLEMENT and not self.healthy
                with self._batch_job() if disturbed else contextlib.nullcontext() as pid:
                    batch_pid = pid or batch_pid
                    body = {"settlement": number, "payment": number + PAYMENT_OFFSET, "amount": f"{number}.50"}
                    client.sendall(json.dumps(body).encode() + b"\n")
                    if not answers.readline():
                        raise ConnectionError("it hung up")
                self._check_alive()
        return batch_pid

    @contextlib.contextmanager
    def _batch_job(self) -> Iterator[int]:
        command = [sys.executable, "-m", "demo.batch", "--cpu", str(max(os.sched_getaffinity(0)))]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as batch:
            try:
                assert batch.stdout is not None
                batch.stdout.readline()
                time.sleep(_BATCH_LEAD_S)  # not a wait for something: the job is meant to be running already
                self.say(f"batch job: batch-recon (pid {batch.pid}) starts on the ledger writer's CPU")
                yield batch.pid
            finally:
                batch.kill()

    def _publish(self, operations: Path) -> None:
        """What a log shipper does: the service's own log, line by line, to the operations topic."""
        import csv

        from events.identity import read_node_name
        from events.topics import OPERATIONS_TOPIC
        from sinks.topics import TopicWriter

        node = self.settings.probe.node or read_node_name()
        writer = TopicWriter(self.settings.kafka)
        with operations.open(newline="") as lines:
            for row in csv.DictReader(lines):
                writer.send(OPERATIONS_TOPIC, node.encode(), json.dumps(row | {"node": node}).encode())
        writer.flush()

    def _await_verdict(self, operations: Path) -> dict[str, Any]:
        self.say("verdict: waiting for the flow")
        start_mono_ns = _start_of(operations, SETTLEMENT)

        def stored() -> dict[str, Any] | None:
            command = self._kprobe("why", str(SETTLEMENT), "--json")
            done = subprocess.run(command, capture_output=True, env=self._environment(), check=False)
            if done.returncode not in (0, 3):
                return None
            verdict: dict[str, Any] = json.loads(done.stdout)
            return verdict if verdict["start_mono_ns"] == start_mono_ns else None

        result: dict[str, Any] = self._await("the verdict", stored)
        return result

    def _ask_neo4j(self, live: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        """Wait until the graph has this verdict, then ask it who delayed the settlement."""
        from sinks.graph import GraphStore

        store = GraphStore(self.settings.neo4j)
        stored = f"MATCH (o:Operation {{id: '{SETTLEMENT}', hash: $hash}}) RETURN o.id"
        culprits = {cause["culprit"]["tgid"] for cause in live["causes"] if cause["culprit"]}

        def answered() -> bool:
            """The operation is written first, who delayed it after that; a healthy one was delayed by nobody."""
            return bool(store.query(stored, hash=live["hash"])) and culprits <= {r["t.tgid"] for r in store.query(_ALL)}

        try:
            self._await("the graph's copy of the verdict", answered)
            return _CYPHER, store.query(_CYPHER)
        finally:
            store.close()

    def _ask_clickhouse(self, live: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
        from sinks.clickhouse_client import ClickHouseClient

        client = ClickHouseClient(self.settings.clickhouse)
        try:
            # Servers that are kept still have the edges of earlier runs.
            query = _SQL.format(start_mono_ns=live["start_mono_ns"])
            return query, client.rows(query)
        finally:
            client.close()

    def _analyze(self, operations: Path) -> dict[str, Any]:
        self.say("offline: judging the capture file that was recorded alongside")
        command = self._kprobe("analyze", str(self.folder / "incident.kcap"), "--operations", str(operations), "--jsonl")
        done = subprocess.run(command, capture_output=True, env=self._environment(), check=False)
        if done.returncode not in (0, 3):
            raise DemoError(f"kprobe analyze ended with status {done.returncode}: {done.stderr.decode(errors='replace')}")
        verdicts = [json.loads(line) for line in done.stdout.splitlines()]
        return next(v for v in verdicts if v["operation_id"] == str(SETTLEMENT))

    # --- the end

    def _stop(self, name: str) -> None:
        """End one process cleanly (SIGTERM), so that it can finish its files."""
        for child in [c for c in self._children if c.name == name]:
            self._children.remove(child)
            child.process.terminate()
            try:
                child.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
                raise DemoError(f"the {name} did not stop within 30 s; its log {child.log} ends:\n{child.tail()}") from None

    def _stop_everything(self) -> None:
        for child in reversed(self._children):
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        for child in reversed(self._children):
            try:
                child.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._children.clear()
        if self._stack_is_ours:
            self.say("servers: stopping")
            subprocess.run(self._kprobe("down"), env=self._environment(), capture_output=True, check=False)


def remove_old_runs(parent: Path, keep: int = 5) -> None:
    """Leave the newest runs of the demonstration; a run is some megabytes."""
    runs = sorted((p for p in parent.glob("run-*") if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for old in runs[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _start_of(operations: Path, settlement: int) -> int:
    """start_mono_ns of one settlement in the service's log."""
    for line in operations.read_text().splitlines()[1:]:
        fields = line.split(",")
        if fields[0] == str(settlement):
            return int(fields[3])
    raise DemoError(f"the service's log {operations} has no settlement {settlement}")


def _healthy(config: Path, section: str) -> bool:
    """Whether the process that listens where the settings say answers its /healthz."""
    import urllib.request

    listen = yaml.safe_load(config.read_text())[section]["listen"]
    try:
        with urllib.request.urlopen(f"http://{listen}/healthz", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _read_port(path: Path) -> str | None:
    """The port that a service wrote into its file, once it has."""
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None
