"""Faults of the network and of peers: slow peers, preempted peers, loss, resets, exits, kills."""

import os
import random
import signal
import subprocess

from benchmarks.accuracy.lab import Actor, Lab, mono_ns, set_nice
from benchmarks.accuracy.scenarios_cpu import decoy
from benchmarks.accuracy.scenarios_locks import fifo
from benchmarks.accuracy.scenarios_memory import died
from benchmarks.accuracy.truth import Judged, Play, blame, scenario

__all__: list[str] = []


def _connected(client: Actor, server: Actor, port: int, *, address: str = "127.0.0.1") -> None:
    """Connects slot 1 of `client` with slot 2 of `server`."""
    server.main.run(f"listen 3 {port} {'' if address == '127.0.0.1' else address}".strip())
    server.main.send("accept 2 3")
    client.main.run(f"connect 1 {port}" + ("" if address == "127.0.0.1" else f" {address}"))
    server.main.done()


def _port(rng: random.Random) -> int:
    return rng.randint(20000, 30000)


_ASK = "send 1 200; recv 1 300"


def _serve(server: Actor, work: str) -> None:
    server.main.send(f"repeat -1; recv 2 200; {work}; send 2 300")


@scenario()
def slow_peer(lab: Lab, rng: random.Random) -> Play:
    """The peer at the other end of a loopback connection takes its time."""
    python = rng.random() < 0.3
    victim, peer = lab.actor("payments", python=python).pin(0), lab.actor("fraud-check").pin(1)
    _connected(victim, peer, _port(rng))
    work = rng.choice(("cpu", "sleep"))
    _serve(peer, f"{work} {rng.randint(100000, 180000)}")
    decoy(lab, rng, 0)
    yield [victim.pid, peer.pid]
    victim.main.run(f"op peer payment 30000000; {_ASK}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("peer_slow", peer.pid, path=(victim.pid, peer.pid)), op.duration_ns > 80_000_000)]


@scenario()
def slow_peer_veth(lab: Lab, rng: random.Random) -> Play:
    """The same across a veth pair between two network namespaces."""
    a, b, _, to = lab.netns_pair()
    victim, peer = lab.actor("payments", netns=a).pin(0), lab.actor("fraud-check", netns=b).pin(1)
    _connected(victim, peer, _port(rng), address=to)
    work = rng.choice(("cpu", "sleep"))
    _serve(peer, f"{work} {rng.randint(100000, 180000)}")
    decoy(lab, rng, 0)
    yield [victim.pid]
    victim.main.run(f"op peer-veth payment 30000000; {_ASK}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("peer_slow", peer.pid, path=(victim.pid, peer.pid)), op.duration_ns > 80_000_000)]


@scenario()
def peer_preempted(lab: Lab, rng: random.Random) -> Play:
    """The peer waits for its CPU behind a third process."""
    victim, peer, hog = lab.actor("payments").pin(0), lab.actor("fraud-check").pin(1), lab.actor("reindex").pin(1)
    _connected(victim, peer, _port(rng))
    _serve(peer, "cpu 30000")
    decoy(lab, rng, 0)
    real_time = rng.random() < 0.5
    if real_time:
        fifo(hog, rng)
    else:
        set_nice(hog.pid, -10)
    yield [victim.pid]
    hog.main.send("cpu 400000")
    victim.main.run(f"op peer-preempted payment 30000000; {_ASK}; end")
    op = victim.main.operations[-1]
    kind = "cpu_preempted_rt" if real_time else "cpu_preempted"
    return [Judged(op, blame(kind, hog.pid, path=(victim.pid, peer.pid, hog.pid)), op.duration_ns > 100_000_000)]


@scenario()
def peer_on_lock(lab: Lab, rng: random.Random) -> Play:
    """The peer waits for a lock that another of its threads holds asleep."""
    victim, peer = lab.actor("payments").pin(0), lab.actor("accounts", 2).pin(1)
    _connected(victim, peer, _port(rng))
    _serve(peer, "lock 1; unlock 1")
    holder = peer.threads[1]
    decoy(lab, rng, 0)
    yield [victim.pid, peer.pid]
    holder.send(f"lock 1; mark held; sleep {rng.randint(120000, 200000)}; unlock 1")
    holder.until_mark("held")
    victim.main.run(f"op peer-lock payment 30000000; {_ASK}; end")
    op = victim.main.operations[-1]
    truth = blame("lock_holder", holder.tid, path=(victim.pid, peer.pid, holder.tid))
    return [Judged(op, truth, op.duration_ns > 80_000_000)]


@scenario()
def packet_loss(lab: Lab, rng: random.Random) -> Play:
    """The victim's segments are dropped for a while and sent again; the peer is quick."""
    a, b, _, to = lab.netns_pair()
    victim, peer = lab.actor("payments", netns=a).pin(0), lab.actor("fraud-check", netns=b)
    port = _port(rng)
    _connected(victim, peer, port, address=to)
    _serve(peer, "cpu 200")
    decoy(lab, rng, 0)
    victim.main.run(_ASK)
    yield [victim.pid]
    rule = ["INPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP"]
    subprocess.run(["ip", "netns", "exec", b, "iptables", "-I", *rule], check=True, timeout=10)
    victim.main.send(f"op loss payment 60000000; {_ASK}; end")
    peer_quiet = mono_ns() + rng.randint(20, 120) * 1_000_000
    while mono_ns() < peer_quiet:
        os.sched_yield()
    subprocess.run(["ip", "netns", "exec", b, "iptables", "-D", *rule], check=True, timeout=10)
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("net_loss"), op.duration_ns > 150_000_000)]


@scenario()
def reset(lab: Lab, rng: random.Random) -> Play:
    """The peer resets the connection while the victim waits for its answer."""
    victim, peer = lab.actor("payments").pin(0), lab.actor("gateway").pin(1)
    _connected(victim, peer, _port(rng))
    decoy(lab, rng, 0)
    yield [victim.pid]
    peer.main.send(f"recv 2 200; sleep {rng.randint(20000, 60000)}; reset 2")
    victim.main.run(f"op reset payment 1000000000; {_ASK}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("net_reset", peer.pid), op.outcome == "failed")]


@scenario()
def peer_exits(lab: Lab, rng: random.Random) -> Play:
    """The peer exits instead of answering."""
    victim, peer = lab.actor("payments").pin(0), lab.actor("gateway").pin(1)
    _connected(victim, peer, _port(rng))
    decoy(lab, rng, 0)
    yield [victim.pid]
    peer.main.send(f"recv 2 200; sleep {rng.randint(20000, 60000)}; exit 7")
    victim.main.run(f"op peer-exit payment 1000000000; {_ASK}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("peer_exited", peer.pid), op.outcome == "failed")]


@scenario()
def peer_timeout(lab: Lab, rng: random.Random) -> Play:
    """The peer is too slow and the victim's receive timeout ends the operation."""
    victim, peer = lab.actor("payments").pin(0), lab.actor("gateway").pin(1)
    _connected(victim, peer, _port(rng))
    victim.main.run("timeout 1 120")
    decoy(lab, rng, 0)
    yield [victim.pid, peer.pid]
    peer.main.send("recv 2 200; sleep 900000; send 2 300")
    victim.main.run(f"op peer-timeout payment 1000000000; {_ASK}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("peer_slow", peer.pid), op.outcome == "failed")]


@scenario()
def sigkill(lab: Lab, rng: random.Random) -> Play:
    """SIGKILL from another process; a decoy sends harmless signals."""
    victim, killer, other = lab.actor("payments").pin(0), lab.actor("operator"), lab.actor("killer-bot")
    yield [victim.pid]
    started = mono_ns()
    victim.main.send(rng.choice(("sleep 5000000", "cpu 5000000")))
    other.main.run(f"kill {victim.pid} 23; kill {victim.pid} 0")
    killer.main.run(f"sleep {rng.randint(10000, 50000)}; kill {victim.pid} 9")
    return [died(victim, "sigkill", started, blame("killed_signal", killer.pid))]


@scenario()
def segfault(lab: Lab, rng: random.Random) -> Play:
    """The victim ends itself by a signal of its own making."""
    victim, other = lab.actor("payments").pin(0), lab.actor("killer-bot")
    yield [victim.pid]
    started = mono_ns()
    other.main.run(f"kill {victim.pid} 23")
    victim.main.send(f"cpu {rng.randint(3000, 20000)}; kill {victim.pid} {int(signal.SIGABRT)}")
    return [died(victim, "segfault", started, blame("killed_signal", victim.pid, 0))]


@scenario(healthy=True)
def healthy_network(lab: Lab, rng: random.Random) -> Play:
    """Quick answers over loopback, in time, beside hogs."""
    victim, peer = lab.actor("payments").pin(0), lab.actor("fraud-check").pin(1)
    _connected(victim, peer, _port(rng))
    _serve(peer, "cpu 500")
    decoy(lab, rng, rng.choice((0, 1)))
    yield [victim.pid]
    for i in range(5):
        victim.main.run(f"op healthy-net-{i} payment 200000000; {_ASK}; end")
    return [Judged(op, blame(set()), op.in_time) for op in victim.main.operations]


@scenario(healthy=True)
def healthy_other_reset(lab: Lab, rng: random.Random) -> Play:
    """Another connection is reset and another process killed meanwhile; the victim works on; no deadline."""
    victim, client, peer = lab.actor("payments").pin(0), lab.actor("other-client"), lab.actor("gateway")
    _connected(client, peer, _port(rng))
    yield [victim.pid]
    victim.main.send(f"op healthy-reset payment 0; cpu {rng.randint(30000, 50000)}; end")
    peer.main.run("reset 2")
    client.kill()
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame(set()), op.run_delay_ns < op.duration_ns // 8)]
