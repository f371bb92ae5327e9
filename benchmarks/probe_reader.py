"""What the probe itself costs: reader CPU an event, from the ring to bytes handed to Kafka; frames, and bytes on the wire.

    python -m benchmarks.probe_reader [--rounds 3] [--seconds 5] [--rate 500000] [--bootstrap HOST:PORT] [--json FILE]

A loop of getppid calls (`capture_loop.c`) runs on every CPU, paced (flat out it can make more events than any two cores can
both make and read; `benchmarks.capture` has the storm), and is watched with the families syscalls and sched; the agent of
`kprobe probe` drains, makes frames and sends them to a real Kafka (its own, in a temporary folder, unless --bootstrap is
given). CPU an event is the process time of the whole agent process, librdkafka's threads included, over the events delivered;
what the idle agent costs is measured before and reported beside it, not subtracted. Frame costs are for frames of recorded
events, the best of 15. A lost event or a drop makes the run fail. Needs root, a C compiler, Java and Maven.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from events.frames import Frame
from events.identity import read_boot_id
from events.kinds import FAMILIES
from events.settings import KafkaSettings, ProbeSettings, StackSettings
from probe.agent import Agent
from probe.framing import Framer, Sealed, seal
from probe.producer import KafkaOutput
from probe.source import KernelSource
from probe.watch import Selector
from stack.local import LocalStack

HERE = Path(__file__).parent
BAR_NS = 400.0
NODE = "benchmark"
_PACE_S = 0.05
OFF = [f for f in FAMILIES if f not in ("syscalls", "sched")]


@contextlib.contextmanager
def kafka_at(bootstrap: str | None, folder: Path) -> Iterator[KafkaSettings]:
    """The Kafka to write to: one that runs, or one of our own."""
    if bootstrap:
        yield KafkaSettings(bootstrap_servers=bootstrap)
        return
    port = 21092
    servers = LocalStack(StackSettings(data_dir=folder / "stack", kafka_port=port, kafka_controller_port=port + 1))
    servers.servers = [s for s in servers.servers if s.name == "kafka"]
    servers.up()
    try:
        yield KafkaSettings(bootstrap_servers=f"127.0.0.1:{port}")
    finally:
        servers.down()


@contextlib.contextmanager
def loop(folder: Path) -> Iterator[int]:
    """The load, on every CPU, until the block ends; yields its pid."""
    binary = folder / "capture_loop"
    subprocess.run(["gcc", "-O2", "-pthread", "-o", str(binary), str(HERE / "capture_loop.c")], check=True)
    child = subprocess.Popen([str(binary), str(os.cpu_count())], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert child.stdin is not None
    try:
        yield child.pid
    finally:
        child.kill()
        child.stdin.close()
        child.wait()


class Keeping(KafkaOutput):
    """Keeps a few frames for the measurements of frames; they are what Kafka got."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: list[Sealed] = []
        self.sent_bytes = 0

    def send(self, sealed: Sealed) -> None:
        """As the base class."""
        super().send(sealed)
        if sealed.events:
            self.sent_bytes += len(sealed.data)
            if len(self.kept) < 8 and sealed.rows > 8000:
                self.kept.append(sealed)


def agent_run(kafka: KafkaSettings, folder: Path, pid: int, seconds: float, begin: Callable[[], None]) -> dict[str, Any]:
    """One recording; CPU and events are counted from `begin` to the last acknowledgement."""
    settings = ProbeSettings(families_off=OFF, spool_dir=folder / "spool", cpu_share_max=64, memory_max_bytes=1 << 34)
    source = KernelSource(settings, [Selector.parse(f"pid:{pid}")])
    source.open()
    output = Keeping(kafka, settings, NODE)
    agent = Agent(source, Framer(node=NODE, boot_id=read_boot_id(), recording=uuid.uuid4().hex), [output], settings)
    begin()
    began_cpu, began = time.process_time_ns(), time.monotonic()
    summary = agent.run(lambda: time.monotonic() - began >= seconds)
    cpu_ns, took_s = time.process_time_ns() - began_cpu, time.monotonic() - began
    if summary.incomplete or summary.violations or output.account.pending:
        raise SystemExit(f"not a clean run: {summary.incomplete} {summary.violations} pending {output.account.pending}")
    return {
        "events": summary.events,
        "cpu_ns": cpu_ns,
        "took_s": took_s,
        "wire_bytes": output.sent_bytes,
        "kept": output.kept,
    }


def frame_costs(kept: Sequence[Sealed]) -> dict[str, float]:
    """Nanoseconds an event to encode, seal, decode."""
    frame = Frame.decode(kept[len(kept) // 2].data)
    rows = frame.batch.num_rows
    data = frame.encode()

    def best(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(15):
            began = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - began)
        return min(times) / rows

    return {
        "rows_a_frame": rows,
        "encode_ns": best(frame.encode),
        "seal_ns": best(lambda: seal(frame)),
        "decode_ns": best(lambda: Frame.decode(data)),
        "bytes_an_event": len(data) / rows,
    }


def _feed(child: "subprocess.Popen[bytes]", rate: float, ended: threading.Event) -> None:
    """Ask for batches at the pace that makes `rate` events a second and CPU (a call is two events, a batch 1000 calls)."""
    assert child.stdin is not None
    with child.stdin as stdin:
        while not ended.wait(_PACE_S):
            stdin.write(f"{max(round(rate * _PACE_S / 2000), 1)}\n".encode())
            stdin.flush()


def one_round(kafka: KafkaSettings, folder: Path, seconds: float, rate: float) -> dict[str, Any]:
    """Idle, then under load."""
    with loop(folder) as pid:
        idle = agent_run(kafka, folder, pid, 3.0, lambda: None)
    with contextlib.ExitStack() as stack:
        child = subprocess.Popen(
            [str(folder / "capture_loop"), str(os.cpu_count())], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        stack.callback(child.wait)
        stack.callback(child.kill)
        ended = threading.Event()
        feeder = threading.Thread(target=_feed, args=(child, rate, ended))

        def begin() -> None:
            feeder.start()
            stack.callback(feeder.join)
            stack.callback(ended.set)

        busy = agent_run(kafka, folder, child.pid, seconds, begin)
    return {
        "events_per_s": busy["events"] / busy["took_s"],
        "reader_ns_an_event": busy["cpu_ns"] / busy["events"],
        "idle_cpu_share": idle["cpu_ns"] / 1e9 / idle["took_s"],
        "wire_bytes_an_event": busy["wire_bytes"] / busy["events"],
        **frame_costs(busy["kept"]),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=500_000, help="events a second and CPU (default: %(default)s)")
    parser.add_argument("--bootstrap", help="a Kafka that runs (its topic kprobe.raw.v1 gets the events)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with kafka_at(options.bootstrap, folder) as kafka:
            rounds = [one_round(kafka, folder, options.seconds, options.rate) for _ in range(options.rounds)]
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    print(f"{'figure':<44} {'median':>12}   rounds")
    for key, value in medians.items():
        each = " ".join(f"{r[key]:.4g}" for r in rounds)
        print(f"{key:<44} {value:>12.4g}   {each}")
    met = medians["reader_ns_an_event"] <= BAR_NS
    print(f"bar: reader_ns_an_event <= {BAR_NS:g}: {'met' if met else 'NOT met'}")
    document = {
        "benchmark": "probe_reader",
        "cpus": os.cpu_count(),
        "bar_ns": BAR_NS,
        "met": met,
        "median": medians,
        "rounds": rounds,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=2))
    else:
        print(json.dumps(document))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
