"""Any sequence of operations on kernel mappings keeps every promise: an oracle that only knows lists watches each step.

The oracle knows each live area by its bounds and by the frame behind each of its pages, and each page by a mark written into it.
After every step the address space is partitioned, the page tables map exactly the oracle's pages, every frame is free, owned or a
table, and lookups agree; at the end all is given back and nothing but page tables is left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mapped_pages import walk_tables
from vmap_machine import Kernel, kernel

from emu.kernel import set_memory
from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.ioremap import Ioremap
from emu.kernel.pcpu_vm_areas import pcpu_free_vm_areas, pcpu_get_vm_areas
from emu.kernel.profile import find_profile
from emu.kernel.vm_struct import Vm, VmStruct
from emu.kernel.vread import vread_iter

PAGE = 4096
PMD = 2 << 20
ULONG_MAX = (1 << 64) - 1


@dataclass(eq=False)
class Area:
    """A live area as the oracle knows it: `frames` by page, None where nothing is mapped; `owned` frames are its own."""

    start: int
    end: int
    kind: str
    frames: list[int | None]
    owned: bool = False
    size: int = 0
    vm: VmStruct | None = None
    arrays: list[int] = field(default_factory=list)
    deferred: bool = False


class Failures:
    """Lets the n-th request of a kind fail, and all after it."""

    KINDS = ("page", "slab", "descriptor", "table", "signal")

    def __init__(self, k: Kernel) -> None:
        self.k = k
        self.kmalloc = k.slab.kmalloc
        self.seen = 0

    def _due(self, after: int) -> bool:
        self.seen += 1
        return self.seen > after

    @contextmanager
    def injected(self, plan: tuple[str, int] | None) -> Iterator[None]:
        k = self.k
        self.seen = 0
        if plan is not None:
            kind, after = plan
            if kind == "page":
                k.pages.should_fail = lambda gfp, order: self._due(after)
            elif kind == "table":
                k.pages.should_fail = lambda gfp, order: order == 0 and bool(gfp & Gfp.ZERO) and self._due(after)
            elif kind == "slab":
                k.slab.kmalloc = lambda *args: None if self._due(after) else self.kmalloc(*args)
            elif kind == "descriptor":
                k.space.cache.refuse = lambda gfp: self._due(after)
            else:
                k.task.fatal_signal_pending = True
        try:
            yield
        finally:
            k.pages.should_fail = None
            k.slab.kmalloc = self.kmalloc
            k.space.cache.refuse = None
            k.task.fatal_signal_pending = False


PLANS = st.one_of(st.none(), st.none(), st.tuples(st.sampled_from(Failures.KINDS), st.integers(0, 6)))
PAGES = st.one_of(st.integers(1, 8), st.integers(1, 40), st.sampled_from((255, 256, 512, 513, 600)))
PICK = st.integers(0, 1 << 30)
VMALLOCS = ("vmalloc", "vzalloc", "vmalloc_user", "vmalloc_32", "vmalloc_huge", "vmalloc_node", "module", "aligned", "no_guard")


class KernelMappings(RuleBasedStateMachine):
    """A kernel and its oracle."""

    @initialize(
        version=st.sampled_from(("6.12", "6.12", "6.1", "5.4")),
        cpus=st.sampled_from((1, 4)),
        nodes=st.sampled_from((1, 2)),
        levels=st.sampled_from((4, 5)),
    )
    def boot(self, version: str, cpus: int, nodes: int, levels: int) -> None:
        self.k = k = kernel(find_profile(version), size=64 << 20, nodes=nodes, cpus=cpus, levels=levels)
        self.io = Ioremap(k.vmap, k.memblock)
        self.failures = Failures(k)
        self.areas: list[Area] = []
        self.lent: list[int] = []
        self.blocks: dict[int, list[Area]] = {}
        self.pcpu: list[list[VmStruct]] = []
        self.allowed: set[str] = set()
        self.bars = 0
        layout = k.vmalloc.layout
        self.regions = ((layout.vmalloc_start, layout.vmalloc_end + 1), (layout.modules_vaddr, layout.modules_end))
        self.first_free = [(va.va_start, va.va_end) for va in k.space.free]
        self.tables0, self.free0 = self._tables()[0], k.pages.nr_free_pages()
        self.slab0 = self._slab_frames()

    # What the kernel is really like

    def _tables(self) -> tuple[int, np.ndarray, np.ndarray]:
        mm = self.k.mm
        tables, pages, frames = walk_tables(mm.memory, mm.pgd, mm.levels)
        inside = np.zeros(len(pages), dtype=bool)
        for start, end in self.regions:
            inside |= (pages >= np.uint64(start)) & (pages < np.uint64(end))
        return tables, pages[inside], frames[inside]

    def _slab_frames(self) -> int:
        slab = self.k.slab
        return len(slab._slabs) + sum(1 << order for order in slab._large.values())

    def _first_fit(self, size: int) -> int:
        low = self.regions[0][0]
        return min(max(va.va_start, low) for va in self.k.space.free if va.va_end - max(va.va_start, low) >= size)

    # The oracle's own steps

    def _pick(self, pick: int, choose: Callable[[Area], bool]) -> Area | None:
        fitting = [area for area in self.areas if choose(area) and not area.deferred]
        return fitting[pick % len(fitting)] if fitting else None

    def _mark(self, area: Area) -> None:
        for i, pfn in enumerate(area.frames):
            if pfn is not None:
                self.k.mm.memory.write_u64(pfn * PAGE + 8, area.start + i)

    def _check_marks(self, area: Area) -> None:
        for i, pfn in enumerate(area.frames):
            assert pfn is None or self.k.mm.memory.read_u64(pfn * PAGE + 8) == area.start + i, f"page {i} of {area}"

    def _own(self, la: int, kind: str, requested: int, zeroed: bool = False) -> Area:
        vm = self.k.vmalloc.find_vm_area(la)
        assert vm is not None and vm.addr == la and vm.pages is not None
        assert vm.get_vm_area_size() >= requested and vm.requested_size == requested
        area = Area(la, la + vm.size, kind, vm.pages.tolist(), owned=True, vm=vm, size=requested)
        if zeroed:
            assert all(self.k.mm.memory.read_u64(pfn * PAGE + 8) == 0 for pfn in area.frames)
        self._mark(area)
        if vm.pages_la and self.k.vmalloc.is_vmalloc_addr(vm.pages_la):
            array = self.k.vmalloc.find_vm_area(vm.pages_la)
            area.arrays = [array.addr]
            self.areas.append(Area(array.addr, array.addr + array.size, "array", array.pages.tolist(), True, vm=array))
        self.areas.append(area)
        return area

    def _forget(self, area: Area) -> None:
        self.areas.remove(area)
        for start in area.arrays:
            self.areas.remove(next(other for other in self.areas if other.start == start))

    def _lend(self, count: int) -> np.ndarray | None:
        frames = [self.k.pages.alloc_pages(GFP_KERNEL) for _ in range(count)]
        if None in frames:
            for pfn in frames:
                if pfn is not None:
                    self.k.pages.put_page(pfn)
            return None
        self.lent += frames
        return np.array(frames, dtype=np.int64)

    def _return_frames(self, frames: list[int]) -> None:
        for pfn in frames:
            self.k.pages.put_page(pfn)
            self.lent.remove(pfn)

    # Rules

    @rule(function=st.sampled_from(VMALLOCS), pages=PAGES, slack=st.integers(0, PAGE - 1), pick=PICK, plan=PLANS)
    def allocate(self, function: str, pages: int, slack: int, pick: int, plan: tuple[str, int] | None) -> None:
        v, prot = self.k.vmalloc, self.k.mm.prots.kernel
        size = pages * PAGE - slack
        (low, high), (modules, modules_end) = self.regions
        first_fit = self._first_fit((pages + 1) * PAGE)
        if plan:
            self.allowed |= {"va_alloc", "node_alloc"}
        with self.failures.injected(plan):
            if function == "module":
                la = v.vmalloc_node_range(size, 1, modules, modules_end, GFP_KERNEL, prot, Vm.FLUSH_RESET_PERMS, -1)
            elif function == "aligned":
                la = v.vmalloc_node_range(size, PAGE << pick % 10, low, high - 1, GFP_KERNEL, prot, 0, -1)
                assert la % (PAGE << pick % 10) == 0
            elif function == "no_guard":
                la = v.vmalloc_node_range(size, 1, low, high - 1, GFP_KERNEL, prot, Vm.NO_GUARD, -1)
            elif function == "vmalloc_huge":
                size = pick % 3 * (PMD // 2) + size
                la = v.vmalloc_huge(size, GFP_KERNEL | Gfp.ZERO)
            elif function == "vmalloc_node":
                la = v.vmalloc_node(size, pick % len(self.k.mm.memory.nodes))
            else:
                la = getattr(v, function)(size)
        if not la:
            assert plan or self.k.pages.nr_free_pages() < 2 * pages + 1024, "an allocation failed with memory left"
            return
        if function == "vmalloc" and len(self.k.space.nodes.nodes) == 1 and plan is None:
            assert la == first_fit
        self._own(la, "vmalloc", size, zeroed=function in ("vzalloc", "vmalloc_user", "vmalloc_huge"))

    @rule(pick=PICK, inside=st.booleans(), interrupt=st.booleans())
    def vfree(self, pick: int, inside: bool, interrupt: bool) -> None:
        area = self._pick(pick, lambda area: area.kind in ("vmalloc", "put_pages"))
        if area is None:
            return
        self._check_marks(area)
        la = area.start + (pick % len(area.frames) * PAGE if inside else 0)
        self.k.task.in_interrupt = interrupt
        self.k.vmalloc.vfree(la)
        self.k.task.in_interrupt = False
        if interrupt:
            area.deferred = True
        else:
            self._forget(area)

    @rule()
    def run_workers(self) -> None:
        self.k.task.run_work()
        for area in [area for area in self.areas if area.deferred]:
            self._forget(area)

    @rule(cpu=st.integers(0, 3))
    def move_to_cpu(self, cpu: int) -> None:
        self.k.task.current = cpu % self.k.task.possible

    @rule(pages=st.integers(1, 70), put=st.booleans(), twice=st.booleans(), plan=PLANS)
    def vmap(self, pages: int, put: bool, twice: bool, plan: tuple[str, int] | None) -> None:
        frames = self._lend(pages)
        if frames is None:
            return
        if twice and not put:
            frames = np.concatenate((frames, frames[:1]))
        flags = Vm.MAP | (Vm.MAP_PUT_PAGES if put else 0)
        if plan:
            self.allowed |= {"va_alloc"}
        with self.failures.injected(plan):
            la = self.k.vmap.vmap(frames, len(frames), flags, self.k.mm.prots.kernel_ro)
        if not la:
            assert plan
            self._return_frames(frames[:pages].tolist())
            return
        area = Area(la, la + (len(frames) + 1) * PAGE, "put_pages" if put else "vmap", frames.tolist(), vm=self._found(la))
        if put:
            for pfn in area.frames:
                self.lent.remove(pfn)
            area.owned = True
        if twice and not put:
            area.kind = "alias"
        else:
            self._mark(area)
        self.areas.append(area)

    def _found(self, la: int) -> VmStruct | None:
        return self.k.vmalloc.find_vm_area(la)

    @rule(pick=PICK)
    def vunmap(self, pick: int) -> None:
        area = self._pick(pick, lambda area: area.kind in ("vmap", "alias"))
        if area is None:
            return
        self.k.vmap.vunmap(area.start)
        self.areas.remove(area)
        if area.kind == "vmap":
            self._check_marks(area)
        self._return_frames(list(dict.fromkeys(area.frames)))

    @rule(pages=st.one_of(st.integers(1, 12), st.sampled_from((33, 64, 65, 100))), plan=PLANS)
    def vm_map_ram(self, pages: int, plan: tuple[str, int] | None) -> None:
        frames = self._lend(pages)
        if frames is None:
            return
        if plan:
            self.allowed |= {"va_alloc"}
        with self.failures.injected(plan):
            la = self.k.blocks.vm_map_ram(frames, pages)
        if not la:
            assert plan
            self._return_frames(frames.tolist())
            return
        area = Area(la, la + pages * PAGE, "ram", frames.tolist())
        self._mark(area)
        self.areas.append(area)

    @rule(pick=PICK)
    def vm_unmap_ram(self, pick: int) -> None:
        area = self._pick(pick, lambda area: area.kind == "ram")
        if area is None:
            return
        self._check_marks(area)
        self.k.blocks.vm_unmap_ram(area.start, len(area.frames))
        self.areas.remove(area)
        self._return_frames(area.frames)

    @rule(pages=st.sampled_from((1, 2, 5, 512, 1024)), offset=st.integers(0, PAGE - 1), plan=PLANS)
    def ioremap(self, pages: int, offset: int, plan: tuple[str, int] | None) -> None:
        self.bars += 1
        phys = 0x1_0000_0000 + self.bars * 4 * PMD
        if plan:
            self.allowed |= {"va_alloc"}
        with self.failures.injected(plan):
            la = self.io.ioremap(phys + offset, pages * PAGE - offset)
        if not la:
            assert plan
            return
        assert la % PAGE == offset
        la -= offset
        first = phys >> 12
        vm = self._found(la)
        self.areas.append(Area(la, la + (pages + 1) * PAGE, "io", list(range(first, first + pages)), vm=vm))

    @rule(pick=PICK)
    def iounmap(self, pick: int) -> None:
        area = self._pick(pick, lambda area: area.kind == "io")
        if area is not None:
            self.io.iounmap(area.start + pick % PAGE)
            self.areas.remove(area)

    @rule(pages=st.integers(1, 40))
    def reserve_sparse(self, pages: int) -> None:
        area = self.k.vmalloc.get_vm_area(pages * PAGE, Vm.SPARSE)
        assert area is not None
        self.areas.append(Area(area.addr, area.addr + area.size, "sparse", [None] * pages, vm=area))

    @rule(pick=PICK, first=st.integers(0, 39), count=st.integers(1, 8), plan=PLANS)
    def map_sparse(self, pick: int, first: int, count: int, plan: tuple[str, int] | None) -> None:
        area = self._pick(pick, lambda area: area.kind == "sparse")
        if area is None:
            return
        first %= len(area.frames)
        count = min(count, len(area.frames) - first)
        if any(pfn is not None for pfn in area.frames[first : first + count]):
            return
        frames = self._lend(count)
        if frames is None:
            return
        start = area.start + first * PAGE
        with self.failures.injected(plan):
            err = self.k.vmalloc.vm_area_map_pages(area.vm, start, start + count * PAGE, frames)
        assert err == 0 or (err == -12 and plan)
        # What was mapped before a table was missing stays.
        for i, pfn in enumerate(frames.tolist()):
            if err == 0 or self.k.mm.lookup(start + i * PAGE).present:
                area.frames[first + i] = pfn
                self.k.mm.memory.write_u64(pfn * PAGE + 8, area.start + first + i)
            else:
                self._return_frames([pfn])

    @rule(pick=PICK, first=st.integers(0, 39), count=st.integers(1, 40))
    def unmap_sparse(self, pick: int, first: int, count: int) -> None:
        area = self._pick(pick, lambda area: area.kind == "sparse")
        if area is None:
            return
        self._check_marks(area)
        first %= len(area.frames)
        last = min(first + count, len(area.frames))
        self.k.vmalloc.vm_area_unmap_pages(area.vm, area.start + first * PAGE, area.start + last * PAGE)
        self._return_frames([pfn for pfn in area.frames[first:last] if pfn is not None])
        area.frames[first:last] = [None] * (last - first)

    @rule(pick=PICK)
    def free_sparse(self, pick: int) -> None:
        area = self._pick(pick, lambda area: area.kind == "sparse")
        if area is not None:
            self.k.vmalloc.free_vm_area(area.vm)
            self.areas.remove(area)
            self._return_frames([pfn for pfn in area.frames if pfn is not None])

    @rule(gap=st.integers(0, 3), plan=PLANS)
    def reserve_percpu(self, gap: int, plan: tuple[str, int] | None) -> None:
        if plan:
            self.allowed |= {"pcpu_get_vm_areas:clip", "va_alloc"}
        with self.failures.injected(plan):
            vms = pcpu_get_vm_areas(self.k.vmalloc, [0, (gap + 2) * PMD], [PMD, PMD], PMD)
        if vms is None:
            assert plan
            return
        assert vms[1].addr - vms[0].addr == (gap + 2) * PMD
        self.pcpu.append(vms)
        self.areas += [Area(vm.addr, vm.addr + vm.size, "percpu", [], vm=vm) for vm in vms]

    @precondition(lambda self: self.pcpu)
    @rule(pick=PICK)
    def free_percpu(self, pick: int) -> None:
        vms = self.pcpu.pop(pick % len(self.pcpu))
        pcpu_free_vm_areas(self.k.vmalloc, vms)
        self.areas = [area for area in self.areas if area.vm not in vms]

    @rule(pick=PICK, name=st.sampled_from(("ro", "rw", "x", "nx")), plan=PLANS)
    def protect(self, pick: int, name: str, plan: tuple[str, int] | None) -> None:
        area = self._pick(pick, lambda area: area.kind == "vmalloc")
        if area is None:
            return
        page = pick % len(area.frames)
        count = min(1 + pick % 3, len(area.frames) - page)
        with self.failures.injected(plan):
            err, flush = getattr(set_memory, f"set_memory_{name}")(self.k.mm, area.start + page * PAGE, count)
        flush.flush(self.k.task, "test")
        assert err == 0 or (err == -12 and plan)

    @rule(pick=PICK, pages=PAGES, slack=st.integers(0, PAGE - 1), zero=st.booleans(), plan=PLANS)
    def vrealloc(self, pick: int, pages: int, slack: int, zero: bool, plan: tuple[str, int] | None) -> None:
        area = self._pick(pick, lambda area: area.kind == "vmalloc")
        if area is None or self.k.vmalloc.profile.version < (6, 12):
            return
        self._check_marks(area)
        size = pages * PAGE - slack
        if plan:
            self.allowed |= {"va_alloc"}
        before = self._content(area)
        with self.failures.injected(plan):
            la = self.k.vmalloc.vrealloc(area.start, size, GFP_KERNEL | (Gfp.ZERO if zero else 0))
        if not la:
            assert plan or self.k.pages.nr_free_pages() < 2 * pages + 1024
            self._check_marks(area)
            return
        kept = min(area.size, size)
        if la == area.start:
            area.size = size
            assert self._content(area)[:kept] == before[:kept]
            self._mark(area)
        else:
            self._forget(area)
            moved = self._own_quietly(la, size)
            assert self._content(moved)[:kept] == before[:kept]
            self._mark(moved)

    def _own_quietly(self, la: int, size: int) -> Area:
        pages = [(pfn, self.k.mm.memory.read_u64(pfn * PAGE + 8)) for pfn in self._found(la).pages.tolist()]
        area = self._own(la, "vmalloc", size)
        for pfn, word in pages:
            self.k.mm.memory.write_u64(pfn * PAGE + 8, word)
        return area

    def _content(self, area: Area) -> bytes:
        return b"".join(self.k.mm.memory.read(pfn * PAGE, PAGE) for pfn in area.frames)[: area.size]

    @rule(pick=PICK)
    def bad_frees(self, pick: int) -> None:
        """Frees that Linux only warns about change nothing."""
        self.allowed |= {"vfree", "vunmap", "remove_vm_area", "__vunmap", "__vunmap:bad"}
        self.k.vmalloc.vfree(self.regions[0][1] - (1 << 40))
        area = self._pick(pick, lambda area: True)
        if area is not None:
            self.k.vmalloc.vfree(area.start + 8)
        self.k.vmalloc.vfree(0)
        self.k.vmap.vunmap(0)

    @rule()
    def vm_unmap_aliases(self) -> None:
        self.k.blocks.vm_unmap_aliases()
        assert self.k.space.vmap_lazy_nr == 0

    @rule()
    def drain(self) -> None:
        self.k.space.drain()
        assert self.k.space.vmap_lazy_nr == 0

    @rule(pick=PICK, length=st.integers(1, 5 * PAGE))
    def vread(self, pick: int, length: int) -> None:
        area = self._pick(pick, lambda area: area.kind == "vmalloc" and area.vm is not None)
        if area is None:
            return
        wanted = self._content(Area(0, 0, "", area.frames, size=len(area.frames) * PAGE))[:length]
        length = len(wanted)
        assert vread_iter(self.k.vmalloc, self.k.blocks, area.start, length) == wanted

    # What must hold after each

    @invariant()
    def the_kernel_is_sound(self) -> None:
        if not hasattr(self, "k"):
            return
        k = self.k
        k.space.validate()
        k.blocks.validate()
        k.pages.validate()
        k.slab.validate()
        assert k.task.bugs == []
        sites = {warning.partition(": ")[0] for warning in k.task.warnings}
        assert sites <= self.allowed, f"warnings {sites}"
        k.task.warnings.clear()
        self.allowed = set()

    @invariant()
    def the_tables_map_exactly_the_pages_of_the_live_areas_and_every_frame_is_accounted_for(self) -> None:
        if not hasattr(self, "k"):
            return
        tables, pages, frames = self._tables()
        wanted = sorted(
            (area.start + i * PAGE, pfn) for area in self.areas for i, pfn in enumerate(area.frames) if pfn is not None
        )
        assert pages.tolist() == [la for la, _ in wanted]
        assert frames.tolist() == [pfn for _, pfn in wanted]
        owned = [pfn for area in self.areas if area.owned for pfn in area.frames]
        assert len(set(owned)) == len(owned), "a frame has two owners"
        assert not set(owned) & set(self.lent)
        assert all(self.k.pages.page_count(pfn) == 1 for pfn in owned)
        gone = len(owned) + len(self.lent) + self._slab_frames() - self.slab0 + tables - self.tables0
        assert self.k.pages.nr_free_pages() == self.free0 - gone

    @invariant()
    def lookups_agree_with_the_list(self) -> None:
        if not hasattr(self, "k"):
            return
        v = self.k.vmalloc
        for area in self.areas:
            for la in (area.start, area.end - 1):
                assert v.find_vm_area(la) is area.vm
                assert self.k.space.nodes.find(la) is not None
            for page in {0, len(area.frames) - 1} if area.frames else ():
                assert v.vmalloc_to_pfn(area.start + page * PAGE) == area.frames[page]
            if area.end - area.start > len(area.frames) * PAGE and area.kind != "percpu":
                assert v.vmalloc_to_pfn(area.end - 1) is None
        busy = [va for node in self.k.space.nodes.nodes for va in node.busy]
        named = sorted((vm.addr, vm.addr + vm.size) for va in busy if isinstance(vm := va.vm, VmStruct))
        assert named == sorted((area.start, area.end) for area in self.areas if area.vm is not None)

    def teardown(self) -> None:
        if not hasattr(self, "k") or sys.exc_info()[0] is not None:
            return
        k = self.k
        self.run_workers()
        for area in list(self.areas):
            match area.kind:
                case "vmalloc" | "put_pages":
                    k.vmalloc.vfree(area.start)
                case "vmap" | "alias":
                    k.vmap.vunmap(area.start)
                case "ram":
                    k.blocks.vm_unmap_ram(area.start, len(area.frames))
                case "io":
                    self.io.iounmap(area.start)
                case "sparse":
                    k.vmalloc.free_vm_area(area.vm)
        for vms in self.pcpu:
            pcpu_free_vm_areas(k.vmalloc, vms)
        for pfn in self.lent:
            k.pages.put_page(pfn)
        self.areas.clear()
        self.lent.clear()
        k.task.run_work()
        k.space.reclaim_and_purge()
        assert [(va.va_start, va.va_end) for va in k.space.free] == self.first_free
        assert k.space.vmap_lazy_nr == 0
        assert k.space.cache.live == len(self.first_free) + len(k.space.free.spare)
        assert self._slab_frames() == self.slab0
        assert self.io.memtypes.entries == []
        assert (k.task.bugs, k.vmalloc.nr_vmalloc_pages) == ([], 0)
        self.the_tables_map_exactly_the_pages_of_the_live_areas_and_every_frame_is_accounted_for()


TestKernelMappings = KernelMappings.TestCase
TestKernelMappings.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
