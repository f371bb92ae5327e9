"""Pairs in which coincidence in time picks the wrong process: the loud one is there at the right moment, another did it."""

import os
import random
import subprocess

from benchmarks.accuracy.lab import Lab
from benchmarks.accuracy.scenarios_cpu import decoy, one_of
from benchmarks.accuracy.scenarios_locks import fifo
from benchmarks.accuracy.truth import Judged, Play, blame, scenario

__all__: list[str] = []


@scenario()
def pair_lock_not_burst(lab: Lab, rng: random.Random) -> Play:
    """A burst fills the victim's CPU exactly while the victim waits for a lock whose holder sleeps elsewhere."""
    app, burst = lab.actor("ledger", 2), lab.actor(one_of(rng)).pin(0)
    victim, holder = app.threads
    victim.pin(0)
    holder.pin(1)
    hold = rng.randint(120000, 200000)
    yield [app.pid]
    holder.send(f"lock 1; mark held; sleep {hold}; unlock 1")
    holder.until_mark("held")
    burst.main.send(f"sleep 3000; cpu {hold // 2}")
    victim.run("op not-burst payment 30000000; lock 1; unlock 1; end")
    op = victim.operations[-1]
    truth = blame("lock_holder", holder.tid, path=(victim.tid, holder.tid))
    return [Judged(op, truth, op.duration_ns > 90_000_000 and op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def pair_burst_not_lock(lab: Lab, rng: random.Random) -> Play:
    """The victim takes a busy lock without waiting long; a real-time burst takes its CPU."""
    app, burst = lab.actor("ledger", 2), lab.actor("feed-handler").pin(0)
    victim, other = app.threads
    victim.pin(0)
    other.pin(1)
    fifo(burst, rng)
    yield [app.pid]
    other.send("repeat 40; lock 1; sleep 200; unlock 1; sleep 4000")
    victim.send("op not-lock payment 60000000; cpu 20000; lock 1; cpu 20000; unlock 1; cpu 10000; end")
    burst.main.run(f"sleep 5000; cpu {rng.randint(100000, 150000)}")
    victim.done()
    other.done()
    op = victim.operations[-1]
    return [Judged(op, blame("cpu_preempted_rt", burst.pid), op.run_delay_ns > 80_000_000)]


@scenario()
def pair_disk_not_burst(lab: Lab, rng: random.Random) -> Play:
    """A burst fills the victim's CPU exactly while the victim waits for its own slow device."""
    disk = lab.slow_disk(64)
    victim, burst = lab.actor("payments").pin(0), lab.actor(one_of(rng)).pin(0)
    victim.main.run(f"open 1 {disk.device} rd")
    yield [victim.pid]
    service = rng.randint(90000, 140000)
    disk.set_service_us(service)
    burst.main.send(f"sleep 3000; cpu {service // 2}")
    victim.main.run("op not-burst-disk payment 30000000; read 1 4096 8192; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("disk_slow"), op.duration_ns > 80_000_000 and op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def pair_peer_not_chatter(lab: Lab, rng: random.Random) -> Play:
    """The victim waits for a quiet peer while others send over the same interface all the time."""
    port = rng.randint(30000, 32000)
    victim, peer = lab.actor("payments").pin(0), lab.actor("fraud-check").pin(1)
    noisy, sink = lab.actor("market-data"), lab.actor("dashboard")
    for server, client, number in ((peer, victim, port), (sink, noisy, port + 1)):
        server.main.run(f"listen 3 {number}")
        server.main.send("accept 2 3")
        client.main.run(f"connect 1 {number}")
        server.main.done()
    peer.main.send(f"repeat -1; recv 2 200; {rng.choice(('cpu', 'sleep'))} {rng.randint(100000, 180000)}; send 2 300")
    sink.main.send("repeat -1; recv 2 1400; send 2 100")
    noisy.main.send("repeat -1; send 1 1400; recv 1 100; usleep 500")
    yield [victim.pid]
    victim.main.run("op not-chatter payment 30000000; send 1 200; recv 1 300; end")
    op = victim.main.operations[-1]
    truth = blame("peer_slow", peer.pid, path=(victim.pid, peer.pid))
    return [Judged(op, truth, op.duration_ns > 80_000_000 and op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def pair_sleep_not_signals(lab: Lab, rng: random.Random) -> Play:
    """The victim sleeps by its own timer while another process sends harmless signals and a hog uses its CPU."""
    victim, other = lab.actor("payments").pin(0), lab.actor("killer-bot").pin(1)
    decoy(lab, rng, 0)
    yield [victim.pid]
    other.main.send(f"repeat 10; kill {victim.pid} 23; sleep 8000")
    victim.main.run(f"op not-signals payment 30000000; sleep {rng.randint(90000, 140000)}; end")
    other.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("own_sleep"), op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def pair_work_after_storm(lab: Lab, rng: random.Random) -> Play:
    """A storm on the victim's CPU ends as the operation begins; the operation's own work makes it late."""
    victim, storm = lab.actor("payments").pin(0), lab.actor(one_of(rng)).pin(0)
    yield [victim.pid]
    storm.main.run("cpu 150000")
    victim.main.run(f"op after-storm payment 30000000; cpu {rng.randint(90000, 140000)}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("own_cpu"), op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def pair_two_holders(lab: Lab, rng: random.Random) -> Play:
    """Two locks are held; the victim needs only one, and its holder is the quiet one."""
    app = lab.actor("ledger", 4)
    victim, quiet, loud, waiter = app.threads
    victim.pin(0)
    quiet.pin(1)
    loud.pin(1)
    yield [app.pid]
    quiet.send(f"lock 1; mark held; sleep {rng.randint(120000, 180000)}; unlock 1")
    loud.send("lock 2; mark held; cpu 150000; unlock 2")
    quiet.until_mark("held")
    loud.until_mark("held")
    waiter.send("lock 2; unlock 2")
    victim.run("op two-holders payment 30000000; lock 1; unlock 1; end")
    op = victim.operations[-1]
    truth = blame("lock_holder", quiet.tid, path=(victim.tid, quiet.tid))
    return [Judged(op, truth, op.duration_ns > 90_000_000 and op.run_delay_ns < op.duration_ns // 4)]


# --- what the groups above do not hold


@scenario()
def own_threads_compete(lab: Lab, rng: random.Random) -> Play:
    """Threads of the victim's own process share its CPU."""
    app = lab.actor("pricing", 4).pin(rng.choice((0, 1)))
    victim, *others = app.threads
    yield [app.pid]
    for other in others:
        other.send("cpu 300000")
    victim.run("op own-threads payment 60000000; cpu 40000; end")
    op = victim.operations[-1]
    return [Judged(op, blame("cpu_preempted", *(o.tid for o in others)), op.run_delay_ns > op.duration_ns // 2)]


@scenario()
def unpinned_among_hogs(lab: Lab, rng: random.Random) -> Play:
    """Nobody is pinned: hogs on all CPUs, and the victim moves between them."""
    victim = lab.actor("payments")
    hogs = [lab.actor("nightly") for _ in range(6)]
    yield [victim.pid]
    for hog in hogs:
        hog.main.send("forever")
    victim.main.run("sleep 50000; op unpinned payment 60000000; cpu 50000; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("cpu_preempted", *(h.pid for h in hogs)), op.run_delay_ns > op.duration_ns // 2)]


@scenario()
def round_robin_hog(lab: Lab, rng: random.Random) -> Play:
    """Two round-robin real-time tasks take the victim's CPU."""
    cpu = rng.choice((0, 1))
    victim, hogs = lab.actor("payments").pin(cpu), [lab.actor("feed-handler").pin(cpu) for _ in range(2)]
    decoy(lab, rng, 1 - cpu)
    for hog in hogs:
        os.sched_setscheduler(hog.pid, os.SCHED_RR, os.sched_param(rng.randint(1, 50)))
    yield [victim.pid]
    victim.main.send("op rr-hog payment 90000000; cpu 60000; end")
    for hog in hogs:
        hog.main.send(f"sleep 5000; cpu {rng.randint(60000, 80000)}")
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("cpu_preempted_rt", *(h.pid for h in hogs)), op.run_delay_ns > 90_000_000)]


@scenario()
def mapped_file_slow(lab: Lab, rng: random.Random) -> Play:
    """Page faults of a mapped file read from a slow device."""
    disk = lab.slow_disk(64)
    where = lab.filesystem(disk.device)
    victim = lab.actor("payments").pin(0)
    decoy(lab, rng, 1)
    victim.main.run(f"open 1 {where}/rates rwc; write 1 1048576 0; fsync 1; dropcache 1; mapfile 1 1 1")
    yield [victim.pid]
    disk.set_service_us(rng.randint(3000, 5000))
    victim.main.run("op mapped payment 30000000; peek 1; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("disk_slow"), op.duration_ns > 60_000_000 and op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def peer_on_slow_disk(lab: Lab, rng: random.Random) -> Play:
    """The worker behind a pipe reads from a slow device."""
    disk = lab.slow_disk(64)
    there, back = lab.pipe(), lab.pipe()
    victim = lab.actor("payments", fds=(there[1], back[0])).pin(0)
    worker = lab.actor("scoring", fds=(there[0], back[1])).pin(1)
    victim.main.run(f"use 1 {there[1]}; use 2 {back[0]}")
    worker.main.run(f"use 1 {there[0]}; use 2 {back[1]}; open 3 {disk.device} rd")
    worker.main.send("repeat -1; read 1 64; read 3 4096 8192; write 2 64")
    decoy(lab, rng, 0)
    yield [victim.pid, worker.pid]
    disk.set_service_us(rng.randint(90000, 140000))
    victim.main.run("op peer-disk payment 30000000; write 1 64; read 2 64; end")
    disk.set_service_us(0)
    op = victim.main.operations[-1]
    return [Judged(op, blame("disk_slow"), op.duration_ns > 80_000_000 and op.run_delay_ns < op.duration_ns // 4)]


@scenario()
def answer_from_nowhere(lab: Lab, rng: random.Random) -> Play:
    """A datagram to another node is never answered; the victim's timeout ends the operation."""
    a, b, _, to = lab.netns_pair()
    victim = lab.actor("payments", netns=a).pin(0)
    rule = ["-A", "INPUT", "-p", "udp", "-j", "DROP"]
    subprocess.run(["ip", "netns", "exec", b, "iptables", *rule], check=True, timeout=10)
    decoy(lab, rng, 0)
    victim.main.run(f"udp 1 9 {to}; timeout 1 {rng.randint(100, 180)}")
    yield [victim.pid]
    victim.main.run("op nowhere payment 1000000000; send 1 200; recv 1 300; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("net_peer"), op.outcome == "failed")]


@scenario()
def handshake_lost(lab: Lab, rng: random.Random) -> Play:
    """The first segment of a connection is dropped and sent again a second later."""
    a, b, _, to = lab.netns_pair()
    victim, peer = lab.actor("payments", netns=a).pin(0), lab.actor("gateway", netns=b)
    port = rng.randint(20000, 30000)
    peer.main.run(f"listen 3 {port} {to}")
    rule = ["INPUT", "-p", "tcp", "--dport", str(port), "--syn", "-j", "DROP"]
    subprocess.run(["ip", "netns", "exec", b, "iptables", "-I", *rule], check=True, timeout=10)
    decoy(lab, rng, 0)
    yield [victim.pid]
    victim.main.send(f"op handshake payment 60000000; connect 1 {port} {to}; end")
    victim_waits = lab.actor("clock")
    victim_waits.main.run("sleep 300000")
    subprocess.run(["ip", "netns", "exec", b, "iptables", "-D", *rule], check=True, timeout=10)
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("net_loss"), op.duration_ns > 500_000_000 and op.outcome == "ok")]


@scenario()
def answer_lost(lab: Lab, rng: random.Random) -> Play:
    """The peer's answer is dropped on its way back and sent again."""
    a, b, _, to = lab.netns_pair()
    victim, peer = lab.actor("payments", netns=a).pin(0), lab.actor("gateway", netns=b)
    port = rng.randint(20000, 30000)
    peer.main.run(f"listen 3 {port} {to}")
    peer.main.send("accept 2 3; repeat -1; recv 2 200; cpu 200; send 2 300")
    victim.main.run(f"connect 1 {port} {to}; send 1 200; recv 1 300")
    rule = ["INPUT", "-p", "tcp", "--sport", str(port), "-j", "DROP"]
    subprocess.run(["ip", "netns", "exec", a, "iptables", "-I", *rule], check=True, timeout=10)
    decoy(lab, rng, 0)
    yield [victim.pid]
    victim.main.send("op answer-lost payment 60000000; send 1 200; recv 1 300; end")
    clock = lab.actor("clock")
    clock.main.run(f"sleep {rng.randint(30000, 120000)}")
    subprocess.run(["ip", "netns", "exec", a, "iptables", "-D", *rule], check=True, timeout=10)
    victim.main.done()
    op = victim.main.operations[-1]
    return [Judged(op, blame("net_loss"), op.duration_ns > 150_000_000)]


@scenario()
def python_gil(lab: Lab, rng: random.Random) -> Play:
    """Other threads of a Python program compute and keep the interpreter's lock."""
    app = lab.actor("pyapp", 4, python=True)
    victim, *others = app.threads
    yield [app.pid]
    for other in others:
        other.send("cpu 600000")
    victim.run("op gil payment 60000000; sleep 1000; cpu 30000; end")
    op = victim.operations[-1]
    kinds = {"peer_slow", "lock_holder", "lock_convoy"}
    return [Judged(op, blame(kinds, *(o.tid for o in others)), op.duration_ns > 80_000_000)]


@scenario()
def python_queue(lab: Lab, rng: random.Random) -> Play:
    """A thread of a Python program takes from a queue that another one fills late."""
    app = lab.actor("pyapp", 2, python=True)
    victim, other = app.threads
    decoy(lab, rng, 0)
    yield [app.pid]
    other.send(f"sleep {rng.randint(120000, 180000)}; put 1")
    victim.run("op queue payment 30000000; get 1; end")
    op = victim.operations[-1]
    truth = blame({"peer_slow", "lock_holder"}, other.tid, path=(victim.tid, other.tid))
    return [Judged(op, truth, op.duration_ns > 90_000_000)]


@scenario()
def python_subprocess(lab: Lab, rng: random.Random) -> Play:
    """A Python program waits for a program that it runs."""
    victim = lab.actor("pyapp", python=True).pin(0)
    decoy(lab, rng, 1)
    yield [victim.pid]
    victim.main.run(f"op subprocess payment 30000000; run {rng.randint(120, 180) / 1000}; end")
    op = victim.main.operations[-1]
    return [Judged(op, blame("peer_slow", -1), op.run_delay_ns < op.duration_ns // 3)]
