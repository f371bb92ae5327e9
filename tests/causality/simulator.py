"""A small kernel scheduler that writes the same records as the probe, and knows the truth about every nanosecond.

CPUs with run queues, fair and real-time tasks with random programs (compute, sleep, futex, pipe, disk, fork and wait),
interrupts with nested softirqs, migrations, CPU quota, wake-ups that race with going to sleep, reused tids. Time is an
integer; everything is decided by one seeded generator, so a schedule is its seed.

The truth is not read back from the records. While the simulation runs, each variable that matters (who is on a CPU, on
which queue a task stands, what it waits for, which interrupt is being served) is written to a step function of time
(`Steps`); what a nanosecond was spent on follows from these alone (`Truth.label_at`).
"""

import heapq
import itertools
import random
from bisect import bisect_right
from dataclasses import dataclass, field

from events.kinds import BY_NAME
from events.syscalls import NUMBERS

TASK_DEAD = 0x80
BASE_NS = 1_000_000
TIMER_VECTOR = 236


class Steps:
    """A value over time: what was set last holds."""

    def __init__(self, value=None):
        self.times = [-1]
        self.values = [value]

    def set(self, time_ns, value):
        if self.times[-1] == time_ns:
            self.values[-1] = value
        elif self.values[-1] != value:
            self.times.append(time_ns)
            self.values.append(value)

    def at(self, time_ns):
        return self.values[bisect_right(self.times, time_ns) - 1]


@dataclass(eq=False, repr=False)
class Task:
    """One life of one thread. State: `running`, `runnable`, `blocked` or `dead`."""

    tid: int
    start_boot_ns: int
    comm: str
    tgid: int = 0
    prio: int = 120
    group: "Group | None" = None
    parent: "Task | None" = None
    cpu: int = 0
    program: object = None
    left_ns: int = 0
    woken: bool = False
    children: int = 0
    deactivating: bool = False
    late_waker: object = None
    ended_ns: int | None = None
    state: Steps = field(default_factory=Steps)
    queue: Steps = field(default_factory=Steps)  # CPU on which it runs or waits to run
    kernel: Steps = field(default_factory=lambda: Steps(False))  # in a system call
    throttled: Steps = field(default_factory=lambda: Steps(False))
    wait: Steps = field(default_factory=Steps)  # label of what it waits for
    wakes: list = field(default_factory=list)  # (time, waker Task or "irq")

    @property
    def key(self):
        return self.tid, self.start_boot_ns


@dataclass(eq=False)
class Group:
    """A cgroup with a CPU quota."""

    cgroup_id: int
    quota_ns: int
    period_ns: int
    timer: int
    used_ns: int = 0
    members: list = field(default_factory=list)


@dataclass(eq=False)
class Cpu:
    number: int
    current: Task | None = None
    queue: list = field(default_factory=list)
    frames: list = field(default_factory=list)  # "irq.hard", "irq.soft": innermost last
    since_ns: int | None = None
    generation: int = 0
    resched: bool = False
    held_irqs: list = field(default_factory=list)
    occupant: Steps = field(default_factory=Steps)
    irq: Steps = field(default_factory=Steps)


@dataclass
class Lock:
    address: int
    owner: Task | None = None
    waiters: list = field(default_factory=list)


@dataclass
class Pipe:
    inode: int
    bytes: int = 0
    readers: list = field(default_factory=list)


@dataclass(eq=False)
class Disk:
    busy: bool = False
    queue: list = field(default_factory=list)


@dataclass
class Truth:
    """What really happened; `tasks` in order of their birth."""

    tasks: list
    cpus: list
    start_ns: int
    end_ns: int

    def label_at(self, task, time_ns):
        """(label, who) of one nanosecond of a task's life: `who` is the occupant of its CPU for `runq`."""
        state = task.state.at(time_ns)
        if state == "blocked":
            return task.wait.at(time_ns), None
        cpu = self.cpus[task.queue.at(time_ns)]
        irq = cpu.irq.at(time_ns)
        if state == "running":
            return irq or ("run.kernel" if task.kernel.at(time_ns) else "run.user"), None
        if task.throttled.at(time_ns):
            return "runq.quota", None
        if irq:
            return irq, None
        occupant = cpu.occupant.at(time_ns)
        return ("runq", occupant.key) if occupant else ("runq.idle", None)

    def boundaries(self, task, start_ns, end_ns):
        """All times in [start, end) at which the label of `task` may change, and the two ends."""
        steps = [task.state, task.queue, task.kernel, task.throttled, task.wait]
        steps += [s for cpu in self.cpus for s in (cpu.occupant, cpu.irq)]
        inside = {t for s in steps for t in s.times if start_ns < t < end_ns}
        return sorted(inside | {start_ns, end_ns})

    def ledger(self, task, start_ns, end_ns):
        """[(start, end, label, who)] covering [start, end), neighbours merged."""
        out = []
        for a, b in itertools.pairwise(self.boundaries(task, start_ns, end_ns)):
            label = self.label_at(task, a)
            if out and out[-1][2:] == label:
                out[-1] = (out[-1][0], b, *label)
            else:
                out.append((a, b, *label))
        return out

    def states(self, task):
        """[(start, end, state, cpu, waker)] of a life, from its first proof to its end."""
        times = sorted(
            {t for s in (task.state,) for t in s.times if t >= 0}
            | {t for t in task.queue.times if t >= 0 and task.state.at(t) == "running"}
        )
        wakes = dict(task.wakes)
        end = task.ended_ns if task.ended_ns is not None else self.end_ns
        out = []
        for a, b in itertools.pairwise([*times, end]):
            state = task.state.at(a)
            if state in (None, "dead") or a >= b:
                continue
            cpu = task.queue.at(a) if state == "running" else None
            out.append((a, b, state, cpu, wakes.get(a) if state == "runnable" else None))
        return out


class Simulator:
    """One random schedule. `run` returns the truth; `records` and `task_rows` are then what a probe would have seen."""

    def __init__(self, seed, *, tasks=None, cpus=None, duration_ns=None, quota=None):
        self.random = rng = random.Random(seed)
        self.seed = seed
        self.now = BASE_NS
        self.duration_ns = duration_ns or rng.choice([20_000, 60_000, 200_000])
        self.records = []
        self.task_rows = []
        self._events = []
        self._order = itertools.count()
        self.cpus = [Cpu(n) for n in range(cpus or rng.randint(1, 4))]
        self.locks = [Lock(0x7F00_0000_1000 + 64 * n) for n in range(rng.randint(1, 3))]
        self.pipes = [Pipe(900 + n) for n in range(rng.randint(1, 2))]
        self.disk = Disk()
        self.requests = itertools.count()
        self.free_requests = []
        self.free_tids = list(range(103, 103 + rng.randint(8, 30)))
        self.lives = []
        self.groups = []
        self.coarse = rng.random() < 0.3  # times on a grid: many events at the same nanosecond
        self._start(tasks or rng.randint(2, 8), rng.random() < 0.3 if quota is None else quota)

    # --- the outside: what starts, and how long it goes on

    def run(self):
        """Simulate, and return the truth."""
        end = BASE_NS + self.duration_ns
        while self._events and self._events[0][0] <= end:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = end
        return Truth(self.lives, self.cpus, BASE_NS, end)

    def _start(self, tasks, quota):
        for cpu in self.cpus:
            cpu.occupant.set(self.now, None)
        for _ in range(tasks):
            task = self._new_task(None)
            task.state.set(self.now, "blocked")
            task.wait.set(self.now, "wait.other")
            self._row(task, "snapshot", state="S")
            self._at(self._ns(1, 2000), lambda t=task: self._irq("irq.hard", lambda: self._wake(t, self.cpus[self._irq_cpu])))
        if quota and not self.coarse:  # a refill and a throttling of the same nanosecond have no order
            task = self.random.choice(self.lives)
            group = Group(77, self._ns(500, 4000), self._ns(5000, 20000), 0xFFFF_8880_0000_7700)
            task.group = group
            group.members.append(task)
            self.groups.append(group)
            self._at(group.period_ns, lambda: self._period(group))
        for _ in range(self.random.randint(0, 12)):
            self._at(self._ns(1, self.duration_ns), lambda: self._irq("irq.hard", None))

    def _new_task(self, parent, *, thread=False):
        tid = self.free_tids.pop(self.random.randrange(len(self.free_tids)))
        start = self.now + 5_000_000_000 if parent else 1_000_000 + tid
        task = Task(tid, start, f"task-{len(self.lives)}", parent=parent)
        task.tgid = parent.tgid if thread else tid
        task.prio = self.random.choice([10, 50, 98]) if self.random.random() < 0.15 else 120
        task.cpu = self.random.randrange(len(self.cpus))
        task.program = self._program(task, 0 if parent is None else 2)
        self.lives.append(task)
        return task

    def _row(self, task, reason, **more):
        row = {"time_mono_ns": self.now, "reason": reason, "tid": task.tid, "tgid": task.tgid, "comm": task.comm}
        row |= {"start_boot_ns": task.start_boot_ns, "kthread": False, "observer": False, "watched": True, "prio": task.prio}
        if task.parent:
            parent = task.parent
            row |= {"parent_tid": parent.tid, "parent_tgid": parent.tgid, "parent_start_boot_ns": parent.start_boot_ns}
        self.task_rows.append(row | more)

    def _ns(self, low, high):
        value = self.random.randint(low, high)
        return max(500, value // 500 * 500) if self.coarse else value

    def _at(self, delay_ns, action):
        heapq.heappush(self._events, (self.now + delay_ns, next(self._order), action))

    # --- records

    def emit(self, cpu, name, **values):
        """One record, as the probe would write it now on `cpu`."""
        current = cpu.current
        tid, tgid = (current.tid, current.tgid) if current else (0, 0)
        self.records.append((self.now, cpu.number, BY_NAME[name].number, tgid, tid, BY_NAME[name].encode(**values)))

    def _target(self, task):
        return {"tid": task.tid, "tgid": task.tgid, "start_boot_ns": task.start_boot_ns}

    def _enter(self, task, name, **values):
        kind = "sys_enter_futex" if name == "futex" else "sys_enter"
        number = {} if name == "futex" else {"nr": NUMBERS[name]}
        self.emit(self.cpus[task.cpu], kind, **number, **values)
        task.kernel.set(self.now, True)

    def _leave(self, task, name, ret=0):
        self.emit(self.cpus[task.cpu], "sys_exit", nr=NUMBERS[name], ret=ret)
        task.kernel.set(self.now, False)

    # --- what tasks do: generators that yield ("run", ns) and ("block", label, state bits)

    def _program(self, task, depth):
        steps = [self._compute, self._sleep, self._locked, self._pipe_write, self._pipe_read, self._disk_io]
        for _ in range(self.random.randint(3, 25)):
            step = self.random.choice(steps)
            yield from step(task)
            if depth < 1 and self.random.random() < 0.08 and len(self.free_tids) > 2:
                yield from self._fork(task)
        yield from self._exit(task)

    def _compute(self, task):
        yield "run", self._ns(1, 4000)

    def _block(self, task, label, bits):
        """Go to sleep unless woken already; the way there takes time, and a wake-up may come in it."""
        if self.random.random() < 0.3:
            yield "run", self._ns(1, 60)
        if task.woken:
            return
        yield "block", label, bits

    def _sleep(self, task):
        cpu = self.cpus[task.cpu]
        timer = 0xFFFF_C900_0000_0000 + task.tid * 64
        duration = self._ns(1, 6000)
        task.woken = False
        self._enter(task, "clock_nanosleep", arg0=1)
        yield "run", self._ns(1, 80)
        self.emit(self.cpus[task.cpu], "hrtimer_start", hrtimer=timer, function=0x51, expires_ns=self.now + duration)
        self._at(duration, lambda: self._irq("irq.hard", lambda: self._expire(task, timer), cpu=cpu, timer=True))
        yield from self._block(task, "wait.timer", 1)
        yield "run", self._ns(1, 80)
        self._leave(task, "clock_nanosleep")

    def _expire(self, task, timer):
        cpu = self.cpus[self._irq_cpu]
        self.emit(cpu, "hrtimer_expire_entry", hrtimer=timer, function=0x51, now_ns=self.now)
        self._wake(task, cpu)
        self.emit(cpu, "hrtimer_expire_exit", hrtimer=timer)

    def _locked(self, task):
        lock = self.random.choice(self.locks)
        while lock.owner is not None:
            task.woken = False
            lock.waiters.append(task)
            self._enter(task, "futex", op=128, val=2, uaddr=lock.address, word=2, owner=lock.owner.tid)
            yield "run", self._ns(1, 50)
            yield from self._block(task, "wait.futex", 1)
            if task in lock.waiters:
                lock.waiters.remove(task)
            yield "run", self._ns(1, 50)
            self._leave(task, "futex")
            yield "run", self._ns(1, 20)
        lock.owner = task
        yield "run", self._ns(1, 3000)
        lock.owner = None
        if lock.waiters:
            self._enter(task, "futex", op=129, val=1, uaddr=lock.address)
            yield "run", self._ns(1, 50)
            if lock.waiters:
                self._wake(lock.waiters.pop(0), self.cpus[task.cpu])
            self._leave(task, "futex", 1)

    def _pipe_write(self, task):
        pipe = self.random.choice(self.pipes)
        self._enter(task, "write", arg0=4, object_type=2, object=pipe.inode)
        yield "run", self._ns(1, 100)
        pipe.bytes += 1
        if pipe.readers:
            self._wake(pipe.readers.pop(0), self.cpus[task.cpu])
        yield "run", self._ns(1, 50)
        self._leave(task, "write", 1)

    def _pipe_read(self, task):
        pipe = self.random.choice(self.pipes)
        self._enter(task, "read", arg0=3, object_type=2, object=pipe.inode)
        yield "run", self._ns(1, 50)
        while not pipe.bytes:
            task.woken = False
            pipe.readers.append(task)
            yield from self._block(task, "wait.pipe", 1)
            if task in pipe.readers:
                pipe.readers.remove(task)
            yield "run", self._ns(1, 50)
        pipe.bytes -= 1
        self._leave(task, "read", 1)

    def _disk_io(self, task):
        number = next(self.requests)
        # Pointers of finished requests are reused at once.
        pointer = self.free_requests.pop() if self.free_requests else 0xFFFF_8880_1000_0000 + 256 * number
        request = {"rq": pointer, "dev": 254 << 20, "bytes": 4096, "sector": 8 * number}
        task.woken = False
        self._enter(task, "pread64", arg0=5, object_type=3, object=12)
        yield "run", self._ns(1, 80)
        cpu = self.cpus[task.cpu]
        self.emit(cpu, "block_bio_queue", bio=number + 1, **{k: request[k] for k in ("dev", "bytes", "sector")}, cgroup_id=1)
        self.emit(cpu, "block_rq_insert", **request, bio=number + 1)
        task.wait.set(self.now, "wait.disk.queue")
        entry = (task, request | {"bio": number + 1})
        if self.disk.busy:
            self.disk.queue.append(entry)
        else:
            self._issue(cpu, entry)
        yield from self._block(task, None, 2)
        yield "run", self._ns(1, 80)
        self._leave(task, "pread64", 4096)

    def _issue(self, cpu, entry):
        task, request = entry
        self.disk.busy = True
        self.emit(cpu, "block_rq_issue", **request)
        task.wait.set(self.now, "wait.disk.device")
        self._at(self._ns(200, 5000), lambda: self._irq("irq.hard", lambda: self._complete(entry)))

    def _complete(self, entry):
        task, request = entry
        cpu = self.cpus[self._irq_cpu]
        self.emit(cpu, "block_rq_complete", **request)
        self.free_requests.append(request["rq"])
        self.disk.busy = False
        self._wake(task, cpu)
        if self.disk.queue:
            self._issue(cpu, self.disk.queue.pop(0))

    def _fork(self, task):
        wait = self.random.random() < 0.6
        self._enter(task, "clone")
        yield "run", self._ns(1, 200)
        cpu = self.cpus[task.cpu]
        child = self._new_task(task, thread=self.random.random() < 0.5)
        task.children += 1
        self._row(child, "fork")
        self.emit(cpu, "sched_process_fork", **self._target(child))
        child.state.set(self.now, "runnable")
        child.wakes.append((self.now, task))
        self._enqueue(child, self.cpus[child.cpu], by=cpu, kind="sched_wakeup_new")
        yield "run", self._ns(1, 100)
        self._leave(task, "clone", child.tid)
        if wait:
            task.woken = False
            self._enter(task, "wait4")
            yield "run", self._ns(1, 50)
            while task.children:
                task.woken = False
                yield from self._block(task, "wait.child", 1)
                yield "run", self._ns(1, 50)
            self._leave(task, "wait4")

    def _exit(self, task):
        self._enter(task, "exit_group")
        yield "run", self._ns(1, 300)
        cpu = self.cpus[task.cpu]
        self.emit(cpu, "sched_process_exit", group_dead=int(task.tgid == task.tid), start_boot_ns=task.start_boot_ns)
        yield "run", self._ns(1, 100)
        parent = task.parent
        if parent is not None and parent.ended_ns is None:
            parent.children -= 1
            if parent.state.at(self.now) == "blocked" and parent.wait.at(self.now) == "wait.child":
                self._wake(parent, self.cpus[task.cpu])
        yield "exit", None

    # --- the scheduler

    def _advance(self, cpu):
        """Let the current task of `cpu` take its next step."""
        task = cpu.current
        step = next(task.program)
        if step[0] == "run":
            task.left_ns = step[1]
            self._resume(cpu)
        elif step[0] == "exit":
            self._switch(cpu, TASK_DEAD)
        else:
            _, label, bits = step
            if label is not None:
                task.wait.set(self.now, label)
            task.deactivating = True  # no longer queued, but still on its CPU until the switch
            delay = self._ns(1, 40) if self.random.random() < 0.3 else 0
            if delay:
                cpu.generation += 1
                self._at(delay, lambda: self._finish_block(cpu, bits))
            else:
                self._switch(cpu, bits)

    def _finish_block(self, cpu, bits):
        if cpu.frames:  # interrupts are off in the switch itself: what came before it ends first
            self._at(self._ns(1, 40), lambda: self._finish_block(cpu, bits))
        else:
            self._switch(cpu, bits)

    def _resume(self, cpu):
        if cpu.frames or cpu.current is None or cpu.current.deactivating or cpu.since_ns is not None:
            return
        cpu.since_ns = self.now
        cpu.generation += 1
        generation = cpu.generation
        task = cpu.current
        left = task.left_ns
        group = task.group
        if group is not None and group.quota_ns - group.used_ns < left:
            self._at(max(group.quota_ns - group.used_ns, 1), lambda: self._if(cpu, generation, self._throttle))
            return
        self._at(left, lambda: self._if(cpu, generation, self._done))
        if task.prio >= 100 and any(t.prio >= 100 for t in cpu.queue):
            self._at(self._ns(100, 2500), lambda: self._if(cpu, generation, self._tick))

    def _if(self, cpu, generation, action):
        if cpu.generation == generation:
            action(cpu)

    def _pause(self, cpu):
        if cpu.since_ns is None:
            return
        spent = self.now - cpu.since_ns
        cpu.current.left_ns -= spent
        if cpu.current.group:
            cpu.current.group.used_ns += spent
        cpu.since_ns = None
        cpu.generation += 1

    def _done(self, cpu):
        self._pause(cpu)
        self._advance(cpu)

    def _tick(self, cpu):
        self._pause(cpu)
        self._switch(cpu, 0, preempt=1)

    def _throttle(self, cpu):
        self._pause(cpu)
        task = cpu.current
        if task.group.used_ns < task.group.quota_ns:  # refilled meanwhile
            self._resume(cpu)
            return
        task.throttled.set(self.now, True)
        self._switch(cpu, 0, throttled=1)

    def _period(self, group):
        def refill():
            cpu = self.cpus[self._irq_cpu]
            self.emit(cpu, "hrtimer_expire_entry", hrtimer=group.timer, function=0x52, now_ns=self.now)
            group.used_ns = 0
            for task in group.members:
                task.throttled.set(self.now, False)
                if task.state.at(self.now) == "runnable":
                    self._kick(self.cpus[task.queue.at(self.now)], task)
            self.emit(cpu, "cfs_period_timer", hrtimer=group.timer, cgroup_id=group.cgroup_id)
            self.emit(cpu, "hrtimer_expire_exit", hrtimer=group.timer)

        self._irq("irq.hard", refill, timer=True)
        self._at(group.period_ns, lambda: self._period(group))

    def _pick(self, cpu):
        ready = [t for t in cpu.queue if not t.throttled.at(self.now)]
        if not ready and self.random.random() < 0.5:
            ready = self._steal(cpu)
        if not ready:
            return None
        best = min(t.prio for t in ready)
        return next(t for t in ready if t.prio == best)

    def _steal(self, cpu):
        """A CPU that runs dry takes a waiting task from another queue."""
        for other in self.cpus:
            ready = [t for t in other.queue if not t.throttled.at(self.now) and t.group is None]
            if other is not cpu and ready and (other.current is not None):
                task = ready[-1]
                other.queue.remove(task)
                self.emit(cpu, "sched_migrate_task", **self._target(task), orig_cpu=other.number, dest_cpu=cpu.number)
                cpu.queue.append(task)
                self._place(task, cpu)
                return [task]
        return []

    def _place(self, task, cpu):
        task.cpu = cpu.number
        task.queue.set(self.now, cpu.number)

    def _switch(self, cpu, bits, *, preempt=0, throttled=0):
        """Take the current task off, put the best waiting one on."""
        prev = cpu.current
        cpu.resched = False
        cpu.since_ns = None
        cpu.generation += 1
        runnable = prev is not None and bits == 0
        if runnable:
            cpu.queue.append(prev)
        following = self._pick(cpu)
        if following is not None:
            cpu.queue.remove(following)
        if following is prev:
            self._resume(cpu)
            return
        self._emit_switch(cpu, prev, following, bits, preempt, throttled)
        self._leave_cpu(cpu, prev, bits)
        cpu.current = following
        cpu.occupant.set(self.now, following)
        if following is not None:
            following.state.set(self.now, "running")
            self._place(following, cpu)
        self._late_wakeup(cpu, prev)
        if following is not None:
            self._resume_or_advance(cpu)

    def _resume_or_advance(self, cpu):
        if cpu.current.left_ns > 0:
            self._resume(cpu)
        elif not cpu.frames:
            self._advance(cpu)

    def _emit_switch(self, cpu, prev, following, bits, preempt, throttled):
        values = {"prev_state": bits, "preempt": preempt, "prev_throttled": throttled, "prev_prio": 120, "next_prio": 120}
        if prev is not None:
            values |= {"prev_start_boot_ns": prev.start_boot_ns, "prev_prio": prev.prio, "prev_policy": int(prev.prio < 100)}
        if following is not None:
            values |= {f"next_{k}": v for k, v in self._target(following).items()}
            values |= {"next_prio": following.prio, "next_policy": int(following.prio < 100)}
            values["next_cgroup_id"] = following.group.cgroup_id if following.group else 1
        values["prev_iowait"] = int(bits == 2)
        self.emit(cpu, "sched_switch", **values)

    def _leave_cpu(self, cpu, prev, bits):
        if prev is None:
            return
        if bits == TASK_DEAD:
            prev.state.set(self.now, "dead")
            prev.ended_ns = self.now
            self.free_tids.append(prev.tid)
        elif bits:
            prev.state.set(self.now, "blocked")
        else:
            prev.state.set(self.now, "runnable")

    def _late_wakeup(self, cpu, prev):
        """The wake-up of a task that was on its way off the CPU takes effect once it is off."""
        if prev is None:
            return
        prev.deactivating = False
        if prev.late_waker is not None:
            waker, prev.late_waker = prev.late_waker, None
            prev.state.set(self.now, "runnable")
            prev.wakes.append((self.now, waker))
            self._enqueue(prev, cpu, by=cpu)

    def _enqueue(self, task, cpu, *, by, kind="sched_wakeup"):
        cpu.queue.append(task)
        task.woken = True
        self._place(task, cpu)
        self.emit(by, kind, **self._target(task), target_cpu=cpu.number, prio=task.prio)
        self._kick(cpu, task)

    def _kick(self, cpu, task):
        """Have `cpu` think again if `task` should run there now."""
        current = cpu.current
        wanted = current is None or (task.prio < current.prio and not current.deactivating)
        if wanted and not cpu.resched:
            cpu.resched = True
            self._at(self._ns(1, 120), lambda: self._reschedule(cpu))

    def _reschedule(self, cpu):
        if not cpu.resched:
            return
        if cpu.frames:
            self._at(self._ns(1, 50), lambda: self._reschedule(cpu))
            return
        if cpu.current is None:
            cpu.resched = False
            if any(not t.throttled.at(self.now) for t in cpu.queue):
                self._switch(cpu, 0)
            return
        if cpu.current.deactivating:
            cpu.resched = False
            return
        self._pause(cpu)
        if cpu.current.left_ns == 0:
            cpu.current.left_ns = 1
        self._switch(cpu, 0, preempt=1)

    def _wake(self, task, by):
        """try_to_wake_up, called on CPU `by`."""
        state = task.state.at(self.now)
        if state == "running" and not task.deactivating:
            # Not asleep yet: it will find itself awake when it looks again.
            if not task.woken:
                self.emit(by, "sched_waking", **self._target(task), target_cpu=task.cpu, prio=task.prio)
                self.emit(by, "sched_wakeup", **self._target(task), target_cpu=task.cpu, prio=task.prio)
                task.woken = True
            return
        if state not in ("running", "blocked") or task.late_waker is not None:
            return
        waker = "irq" if by.frames else by.current
        self.emit(by, "sched_waking", **self._target(task), target_cpu=task.cpu, prio=task.prio)
        if task.deactivating:
            task.woken = True
            task.late_waker = waker
            return
        cpu = self._choose(task)
        if cpu.number != task.cpu:
            self.emit(by, "sched_migrate_task", **self._target(task), orig_cpu=task.cpu, dest_cpu=cpu.number)
        task.state.set(self.now, "runnable")
        task.wakes.append((self.now, waker))
        self._enqueue(task, cpu, by=by)

    def _choose(self, task):
        if task.group is not None or self.random.random() < 0.6:
            return self.cpus[task.cpu]
        idle = [c for c in self.cpus if c.current is None]
        return self.random.choice(idle or self.cpus)

    # --- interrupts

    def _irq(self, label, action, *, cpu=None, timer=False):
        """Serve an interrupt: now, or once the CPU can take it."""
        cpu = cpu or self.random.choice(self.cpus)
        if "irq.hard" in cpu.frames:
            cpu.held_irqs.append((label, action, timer))
            return
        self._pause(cpu)
        number = self.random.randint(1, 60)
        cpu.frames.append(label)
        cpu.irq.set(self.now, cpu.frames[-1])
        if timer:
            self.emit(cpu, "local_timer_entry", vector=TIMER_VECTOR)
        else:
            self.emit(cpu, "irq_handler_entry", irq=number)
        before = self._ns(1, 60)
        self._at(before, lambda: self._irq_body(cpu, action, number, timer))

    def _irq_body(self, cpu, action, number, timer):
        if action is not None:
            self._irq_cpu = cpu.number
            action()
        self._at(self._ns(1, 60), lambda: self._irq_end(cpu, number, timer))

    def _irq_end(self, cpu, number, timer):
        if timer:
            self.emit(cpu, "local_timer_exit", vector=TIMER_VECTOR)
        else:
            self.emit(cpu, "irq_handler_exit", irq=number, ret=1)
        cpu.frames.pop()
        cpu.irq.set(self.now, cpu.frames[-1] if cpu.frames else None)
        if cpu.held_irqs:
            label, action, was_timer = cpu.held_irqs.pop(0)
            self._irq(label, action, cpu=cpu, timer=was_timer)
        elif not cpu.frames and self.random.random() < 0.3:
            self._softirq(cpu)
        else:
            self._after_irq(cpu)

    def _softirq(self, cpu):
        vec = self.random.choice([1, 3, 4, 9])
        cpu.frames.append("irq.soft")
        cpu.irq.set(self.now, "irq.soft")
        self.emit(cpu, "softirq_entry", vec=vec)
        self._at(self._ns(1, 300), lambda: self._softirq_end(cpu, vec))

    def _softirq_end(self, cpu, vec):
        if cpu.frames[-1] != "irq.soft":  # a hard interrupt is being served on top
            self._at(self._ns(1, 50), lambda: self._softirq_end(cpu, vec))
            return
        self.emit(cpu, "softirq_exit", vec=vec)
        cpu.frames.pop()
        cpu.irq.set(self.now, cpu.frames[-1] if cpu.frames else None)
        self._after_irq(cpu)

    def _after_irq(self, cpu):
        if not cpu.frames and cpu.current is not None and not cpu.current.deactivating:
            self._resume_or_advance(cpu)
