"""Workqueues: functions that kernel threads run in process context (v6.12 kernel/workqueue.c).

A work item is queued at most once: bit 0 of its `data` says that it is. Each CPU has a pool of workers for normal and one for high
priority, and there is one pool that is bound to no CPU. A pool bound to a CPU runs one item at a time until that sleeps; then the
next worker takes over. Workers are threads made when they are first needed, and never end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from emu.kernel.execution import IDLE, MASK64, Execution
from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.kthread import Kthreads
from emu.kernel.task import KernelThread
from emu.kernel.task_struct import TASK_IDLE

DATA, ENTRY, FUNC, SIZE = 0, 8, 24, 32
WORK_STRUCT_PENDING = 1
WQ_UNBOUND, WQ_HIGHPRI, WQ_ORDERED = 1 << 1, 1 << 4, 1 << 17
WQ_MAX_ACTIVE = 512
WQ_DFL_ACTIVE = WQ_MAX_ACTIVE // 2
NR_CPUS = 8192
WORK_CPU_UNBOUND = NR_CPUS
WORKQUEUE_STRUCT_SIZE = 512
_GFP = int(GFP_KERNEL | Gfp.ZERO)
# Bits of `data` above which a pool's number stands while an item is not queued.
OFFQ_POOL_SHIFT = {"6.12": 21, "6.1": 5, "5.4": 5}
OFFQ_POOL_NONE = (1 << 31) - 1


@dataclass(slots=True, eq=False)
class Workqueue:
    """One workqueue, named to guests by the address `la`."""

    name: str
    la: int
    flags: int
    max_active: int
    draining: bool = False


@dataclass(slots=True, eq=False)
class Item:
    """A work item on its way: a guest's work_struct at `la`, or the model's own function."""

    la: int
    function: Callable[[], None] | None
    queue: Workqueue
    pool: Pool
    pending: bool = True
    done: bool = False


@dataclass(slots=True, eq=False)
class Worker:
    """A thread of a pool, with the item that it runs and the ones that only it may run."""

    pool: Pool
    number: int
    thread: KernelThread | None = None
    item: Item | None = None
    scheduled: deque[Item] = field(default_factory=deque)
    sleeping: bool = False
    idle: bool = False


@dataclass(slots=True, eq=False)
class Pool:
    """Workers of a CPU, or of none (`cpu` None), and the items that wait for them."""

    number: int
    cpu: int | None
    highpri: bool
    worklist: deque[Item] = field(default_factory=deque)
    workers: list[Worker] = field(default_factory=list)

    def comm(self, number: int) -> str:
        """A worker's name."""
        if self.cpu is None:
            return f"kworker/u{self.number}:{number}"
        return f"kworker/{self.cpu}:{number}{'H' if self.highpri else ''}"


class Workqueues:
    """The workqueues of one kernel. `entry` is the address of worker_thread in kernel text, which calls `worker_thread` here."""

    def __init__(self, execution: Execution, kthreads: Kthreads, version: str, entry: int = 0) -> None:
        self.execution = execution
        self.kthreads = kthreads
        self.entry = entry
        self._pool_shift = OFFQ_POOL_SHIFT[version]
        online = execution.host.cpus.online
        self.pools = [Pool(2 * cpu + high, cpu, bool(high)) for cpu in range(online) for high in (0, 1)]
        self.unbound = Pool(2 * online, None, False)
        self.pools.append(self.unbound)
        self._by_la: dict[int, Workqueue] = {}
        self._items: dict[int, list[Item]] = {}
        self._all: list[Item] = []
        self._active: dict[tuple[Workqueue, Pool], int] = {}
        self._inactive: dict[tuple[Workqueue, Pool], deque[Item]] = {}
        self._workers: dict[KernelThread, Worker] = {}
        self._flushers: list[KernelThread] = []
        self._system: Workqueue | None = None
        execution.on_sleep = self._on_sleep
        execution.on_running = self._on_running

    # ---- workqueues

    def alloc(self, name: str, flags: int, max_active: int) -> int:
        """alloc_workqueue(): its address, 0 without memory. `max_active` 0 is the default."""
        la = self.execution.host.slab.kmalloc(WORKQUEUE_STRUCT_SIZE, _GFP)
        if not la:
            return 0
        self.add(la, name, flags, max_active)
        return la

    def add(self, la: int, name: str, flags: int, max_active: int = 0) -> None:
        """A workqueue whose structure is at `la` already."""
        self._by_la[la] = Workqueue(name, la, flags, min(max(max_active or WQ_DFL_ACTIVE, 1), WQ_MAX_ACTIVE))

    def find(self, la: int) -> Workqueue | None:
        """The workqueue at an address. Of memory that holds none it reads what Linux reads: a PageFault, at its NULL in the end."""
        found = self._by_la.get(la)
        if found is None:
            self.execution.load32(la)
            self.execution.load64(0)
        return found

    def destroy(self, la: int) -> None:
        """destroy_workqueue(): run all that is queued, then free it."""
        queue = self.find(la)
        if queue is not None:
            self.drain(queue)
            del self._by_la[la]
            self.execution.host.slab.kfree(la)

    # ---- queueing

    def schedule_work(self, function: Callable[[], None]) -> None:
        """schedule_work() of the model's own: run `function` by a worker of this CPU."""
        if self._system is None:
            self._system = Workqueue("events", 0, 0, WQ_DFL_ACTIVE)
        self._insert(Item(0, function, self._system, self._pool(self._system, self.execution.cpu_id)))

    def queue_work_on(self, cpu: int, queue: Workqueue, work: int) -> bool:
        """queue_work_on(): false when the item is queued already."""
        data = self.execution.load64(work + DATA)
        if data & WORK_STRUCT_PENDING:
            return False
        self.execution.store64(work + DATA, data | WORK_STRUCT_PENDING)
        self.insert_work(cpu, queue, work)
        return True

    def insert_work(self, cpu: int, queue: Workqueue, work: int) -> None:
        """__queue_work(): the item is marked pending."""
        number = cpu if cpu < self.execution.host.cpus.online else self.execution.cpu_id
        item = Item(work, None, queue, self._pool(queue, number))
        running = self._worker_of(work)
        if running is not None and running.pool is not item.pool and not queue.flags & WQ_ORDERED:
            # An item does not run on two workers at once, so it stays in the pool that runs it.
            item.pool = running.pool
        self._items.setdefault(work, []).append(item)
        self._insert(item)

    def _pool(self, queue: Workqueue, cpu: int) -> Pool:
        if queue.flags & WQ_UNBOUND:
            return self.unbound
        return self.pools[2 * cpu + bool(queue.flags & WQ_HIGHPRI)]

    def _worker_of(self, work: int) -> Worker | None:
        return next((w for w in self._workers.values() if w.item is not None and work and w.item.la == work), None)

    def _insert(self, item: Item) -> None:
        self._all.append(item)
        key = (item.queue, item.pool)
        limit = 1 if item.queue.flags & WQ_ORDERED else item.queue.max_active
        if self._active.get(key, 0) >= limit:
            self._inactive.setdefault(key, deque()).append(item)
            return
        self._activate(item)

    def _activate(self, item: Item) -> None:
        key = (item.queue, item.pool)
        self._active[key] = self._active.get(key, 0) + 1
        item.pool.worklist.append(item)
        self._kick(item.pool)

    # ---- workers

    def _kick(self, pool: Pool) -> None:
        """Have a worker come for the pool's items, unless one that runs will (kick_pool)."""
        if not pool.worklist:
            return
        runs = [worker for worker in pool.workers if not worker.idle and not worker.sleeping]
        if pool.cpu is not None and runs:
            return
        woken = [worker for worker in runs if worker.item is None]
        if len(woken) >= len(pool.worklist):
            return
        worker = next((worker for worker in pool.workers if worker.idle), None)
        if worker is None:
            self._create_worker(pool)
        else:
            worker.idle = False
            assert worker.thread is not None
            self.execution.tasks.wake(worker.thread)

    def _create_worker(self, pool: Pool) -> None:
        worker = Worker(pool, len(pool.workers))
        with self.execution.process_context():
            task = self.kthreads.create(self.entry, 0, pool.comm(worker.number), cpu=pool.cpu)
        made = self.execution.tasks.find(task)
        if made is None:
            # No memory: the items wait for the next one that is queued, or for a worker that has time.
            return
        worker.thread = made.thread
        pool.workers.append(worker)
        self._workers[made.thread] = worker
        self.kthreads.wake_up_process(task)

    def _on_sleep(self, thread: KernelThread) -> None:
        worker = self._workers.get(thread)
        if worker is not None and worker.item is not None:
            worker.sleeping = True
            self._kick(worker.pool)

    def _on_running(self, thread: KernelThread) -> None:
        worker = self._workers.get(thread)
        if worker is not None:
            worker.sleeping = False

    def worker_thread(self) -> None:
        """The body of a worker: run items while there are any, for ever."""
        execution = self.execution
        worker = self._workers.get(execution.current())
        while worker is not None:
            item = self._next(worker)
            if item is None:
                worker.idle = True
                execution.block(IDLE, TASK_IDLE)
                worker.idle = False
            else:
                self._process(worker, item)

    def _next(self, worker: Worker) -> Item | None:
        if worker.scheduled:
            return worker.scheduled.popleft()
        pool = worker.pool
        others = [w for w in pool.workers if w is not worker and w.item is not None and not w.sleeping]
        if pool.cpu is not None and others:
            # The one that runs goes on with the list.
            return None
        while pool.worklist:
            item = pool.worklist.popleft()
            running = self._worker_of(item.la)
            if running is None:
                return item
            running.scheduled.append(item)
        return None

    def _process(self, worker: Worker, item: Item) -> None:
        """process_one_work()."""
        execution = self.execution
        worker.item = item
        item.pending = False
        if worker.pool.cpu is None:
            self._kick(worker.pool)
        try:
            if item.function is not None:
                item.function()
            else:
                execution.store64(item.la + DATA, item.pool.number << self._pool_shift)
                execution.list_init(item.la + ENTRY)
                function = execution.load64(item.la + FUNC)
                execution.waiting.call_guest(function, item.la, site="process_one_work")
        finally:
            worker.item = None
            self._finish(item)
        execution.waiting.yield_cpu()

    def _finish(self, item: Item) -> None:
        item.done = True
        self._all.remove(item)
        if item.la:
            items = self._items[item.la]
            items.remove(item)
            if not items:
                del self._items[item.la]
        key = (item.queue, item.pool)
        self._active[key] -= 1
        waiting = self._inactive.get(key)
        if waiting:
            self._activate(waiting.popleft())
        for flusher in self._flushers:
            self.execution.tasks.wake(flusher)

    # ---- waiting and cancelling

    def _wait_for(self, items: list[Item], reason: str) -> None:
        thread = self.execution.current()
        self._flushers.append(thread)
        try:
            self.execution.sleep_until(lambda: all(item.done for item in items), reason)
        finally:
            self._flushers.remove(thread)

    def flush_work(self, work: int) -> bool:
        """flush_work(): wait until the last time it was queued has run; false when it was idle."""
        self.execution.load64(work + DATA)
        items = list(self._items.get(work, ()))
        self._wait_for(items, f"flush_work 0x{work:x}")
        return bool(items)

    def flush(self, queue: Workqueue) -> None:
        """flush_workqueue(): wait for all that is queued now."""
        self._wait_for([item for item in self._all if item.queue is queue], f"flush_workqueue {queue.name}")

    def drain(self, queue: Workqueue) -> None:
        """drain_workqueue(): wait until it is empty."""
        while any(item.queue is queue for item in self._all):
            self.flush(queue)

    def cancel(self, work: int) -> bool:
        """cancel_work(): take an item off its list; whether it was queued."""
        data = self.execution.load64(work + DATA)
        for item in list(self._items.get(work, ())):
            if item.pending:
                self._unlink(item)
                self.execution.store64(work + DATA, item.pool.number << self._pool_shift)
                return True
        if data & WORK_STRUCT_PENDING and work not in self._items:
            # A delayed item whose timer has been taken away.
            self.execution.store64(work + DATA, OFFQ_POOL_NONE << self._pool_shift & MASK64)
            return True
        return False

    def _unlink(self, item: Item) -> None:
        inactive = self._inactive.get((item.queue, item.pool), deque())
        was_active = item not in inactive
        for where in (item.pool.worklist, inactive, *(worker.scheduled for worker in item.pool.workers)):
            if item in where:
                where.remove(item)
        if not was_active:
            # _finish gives back what activation took.
            self._active[(item.queue, item.pool)] += 1
        item.pending = False
        self._finish(item)

    def cancel_sync(self, work: int) -> bool:
        """cancel_work_sync(): cancel it, and wait for it if it runs; whether it was queued."""
        was = self.cancel(work)
        self._wait_for(list(self._items.get(work, ())), f"cancel_work_sync 0x{work:x}")
        return was

    def busy(self, work: int) -> int:
        """work_busy(): 1 queued, 2 running."""
        pending = self.execution.load64(work + DATA) & WORK_STRUCT_PENDING
        return pending | (2 if self._worker_of(work) is not None else 0)

    def validate(self) -> None:
        """Each item is in one place, and no more of a queue is active in a pool than may be."""
        for item in self._all:
            places = [worker for worker in self._workers.values() if worker.item is item or item in worker.scheduled]
            inactive = self._inactive.get((item.queue, item.pool), ())
            count = len(places) + item.pool.worklist.count(item) + (item in inactive)
            assert count == 1, f"an item is in {count} places"
        for (queue, _), active in self._active.items():
            assert 0 <= active <= (1 if queue.flags & WQ_ORDERED else queue.max_active), "max_active holds"
