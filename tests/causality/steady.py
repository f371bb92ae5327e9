"""A simulator whose tasks do the same whatever happens around them: a schedule can be run again without one of them.

`Steady(seed)` draws each step of each task from a generator of its own, service times of the disk from the request, and decides
nothing else by chance: no stealing, no interrupts but timers and the disk, fixed small delays. `without` names a task that
never begins, `lockless` one that takes no lock, `disk_ns` sets every service time, `own_cpu` gives a task a CPU of its own. The
truth about a change is the same schedule, run again with it.
"""

import random

from simulator import Simulator

_SMALL_NS = 120  # delays up to this are the kernel's own: constant


class _Fixed:
    """Chance, without chance."""

    def __init__(self, rng):
        self._rng = rng

    def random(self):
        return 0.99

    def randint(self, low, high):
        return (low + high) // 2

    def randrange(self, stop):
        return self._rng.randrange(stop)

    def choice(self, options):
        return options[0]


class Steady(Simulator):
    """One schedule, that can be changed in one respect."""

    def __init__(self, seed, *, without=None, lockless=None, disk_ns=None, own_cpu=None, cpus=None):
        self.without, self.lockless, self.disk_ns, self.own_cpu = without, lockless, disk_ns, own_cpu
        self._who = None
        self.first_ns, self.done_ns = {}, {}
        rng = random.Random(f"{seed}/shape")
        self.shape = rng.randint(2, 5), cpus or rng.randint(1, 2)
        super().__init__(seed, tasks=self.shape[0], cpus=self.shape[1] + 1, duration_ns=2_000_000, quota=False)
        self.coarse = False

    @property
    def random(self):
        return self._who if self._who is not None else self._fixed

    @random.setter
    def random(self, rng):
        self._fixed = _Fixed(rng)

    def _start(self, tasks, quota):
        for cpu in self.cpus:
            cpu.occupant.set(self.now, None)
        for number in range(tasks):
            task = self._new_task(None)
            task.prio, task.tgid = 120, 100  # threads of one process: they share its locks
            # The last CPU is spare: for the task that is given one of its own.
            task.cpu = len(self.cpus) - 1 if number == self.own_cpu else number % (len(self.cpus) - 1)
            task.state.set(self.now, "blocked")
            task.wait.set(self.now, "wait.other")
            self._row(task, "snapshot", state="S")
            if number != self.without:
                delay = random.Random(f"{self.seed}/{number}/begin").randint(1, 2000)
                self._at(delay, lambda t=task: self._irq("irq.hard", lambda: self._begin(t), cpu=self.cpus[t.cpu]))

    def _begin(self, task):
        self.first_ns[task.comm] = self.now
        self._wake(task, self.cpus[self._irq_cpu])

    def _ns(self, low, high):
        return (low + high) // 2 if high <= _SMALL_NS or self._who is None else self._who.randint(low, high)

    def _choose(self, task):
        return self.cpus[task.cpu]

    def _program(self, task, depth):
        steps = self._steps(task, int(task.comm.split("-")[1]))
        while True:
            self._who = task.__dict__.setdefault("rng", random.Random(0))
            try:
                step = next(steps)
            except StopIteration:
                return
            finally:
                self._who = None
            yield step

    def _steps(self, task, number):
        plan = random.Random(f"{self.seed}/{number}")
        kinds = [plan.choice(["compute", "sleep", "lock", "disk"]) for _ in range(plan.randint(2, 12))]
        for at, kind in enumerate(kinds):
            self._who = task.rng = random.Random(f"{self.seed}/{number}/{at}")
            task.service_ns = task.rng.randint(200, 5000)
            if kind == "compute":
                yield "run", task.rng.randint(500, 20_000)
            else:
                yield from {"sleep": self._sleep, "lock": self._held, "disk": self._disk_io}[kind](task)
        self.done_ns[task.comm] = self.now
        yield from self._exit(task)

    def _held(self, task):
        """As `_locked`, with a hold that does not depend on how the lock was come by."""
        number = task.comm.split("-")[1]
        at = task.rng.randint(0, 1 << 30)
        lock = self.locks[at % len(self.locks)]
        hold = random.Random(f"{self.seed}/{number}/{at}").randint(1, 8000)
        if int(number) == self.lockless:
            yield "run", hold
            return
        while lock.owner is not None:
            task.woken = False
            lock.waiters.append(task)
            self._enter(task, "futex", op=128, val=2, uaddr=lock.address, word=2, owner=lock.owner.tid)
            yield "run", 25
            yield from self._block(task, "wait.futex", 1)
            if task in lock.waiters:
                lock.waiters.remove(task)
            yield "run", 25
            self._leave(task, "futex")
            yield "run", 10
        lock.owner = task
        yield "run", hold
        lock.owner = None
        if lock.waiters:
            self._enter(task, "futex", op=129, val=1, uaddr=lock.address)
            yield "run", 25
            if lock.waiters:
                self._wake(lock.waiters.pop(0), self.cpus[task.cpu])
            self._leave(task, "futex", 1)

    def _block(self, task, label, bits):
        if not task.woken:
            yield "block", label, bits

    def _issue(self, cpu, entry):
        task, request = entry
        self.disk.busy = True
        self.emit(cpu, "block_rq_issue", **request)
        task.wait.set(self.now, "wait.disk.device")
        service = task.service_ns if self.disk_ns is None else self.disk_ns
        self._at(service, lambda: self._irq("irq.hard", lambda: self._complete(entry), cpu=self.cpus[task.cpu]))

    def duration_ns_of(self, name):
        """From the wake-up with which a task began to the end of its last step; None if it did not get there."""
        return self.done_ns[name] - self.first_ns[name] if name in self.done_ns else None
