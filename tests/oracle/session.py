"""A whole recorded session, made again on the model call by call from the recorded state of boot.

The recorder's commands run one after the other in one task of a quiet machine: dump, basic, variants, huge, range, vmap, ioremap,
deferred, reuse, hold. The model starts from the areas that the first dump shows and makes the same calls; what a record says then
has to come out again, absolute addresses included. What the records leave out and had to be inferred stands at its place here: that
each allocation is freed when its records are written, and that some commands begin with vm_unmap_aliases().
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from kernel_floor import recorded_facts
from test_vmalloc_facts import LEVELS, call, flags_of, model_runs, number, present_runs, prot_of
from vmap_machine import Kernel, kernel

from emu.kernel import set_memory
from emu.kernel.gfp import GFP_ATOMIC, GFP_KERNEL, Gfp
from emu.kernel.ioremap import Ioremap
from emu.kernel.memtype import PageCacheMode
from emu.kernel.profile import find_profile
from emu.kernel.vm_struct import Vm, VmStruct

PAGE = 4096
MIB = 1 << 20
# 2 GiB less what firmware kept: the second GiB of the direct map is in 2 MiB leaves there too.
RAM = (2 << 30) - 4 * MIB
ENTRY_FLAGS = 0xFFF0_0000_0000_0FFF
ACCESSED_DIRTY = 0x60
INT_MAX = 0x7FFF_FFFF

Record = dict


@dataclass(frozen=True)
class Difference:
    """A record that the model does not reproduce."""

    command: str
    record: Record
    got: object
    wanted: object


def areas(records: list[Record], kind: str) -> list[tuple[int, int]]:
    """The "free", "busy" or "lazy" areas of a dump, ascending; 6.12 numbers busy and lazy by node."""
    return sorted((number(r["s"]), number(r["e"])) for r in records if "s" in r and r["t"].rstrip("0123456789") == kind)


class Session:
    """One main-* recording and the kernel that plays it. `compared` counts by (command, kind)."""

    def __init__(self, name: str) -> None:
        self.name = name
        _, version, levels = name.split("-")
        self.facts = recorded_facts(name)
        dump = [record for record in self.facts if record["cmd"] == "dump"]
        lazy = areas(dump, "lazy")
        boot = tuple(sorted(areas(dump, "busy") + lazy))
        self.k: Kernel = kernel(find_profile(version), size=RAM, levels=int(levels[0]), busy=boot)
        self.k.task.yields = True
        for start, _ in lazy:
            self.k.vmap.vunmap(start)
        self.io = Ioremap(self.k.vmap, self.k.memblock)
        # Mapped uncached by boot: the HPET and the local APIC.
        for start in (0xFED00000, 0xFEE00000):
            self.io.memtypes.reserve(start, start + PAGE, PageCacheMode.UC_MINUS, strict=True)
        self.compared: dict[tuple[str, str], int] = {}
        self.differences: list[Difference] = []
        self.la = self.bar = self.bar_size = self.first = self.iteration = 0
        self.sequence: list[int] = []
        self.frames: dict[int, list[int]] = {}
        self.windows = iter(self._windows())
        self.pages0: int | None = None
        self.command = ""

    def play(self) -> Session:
        """Make every call of the recording."""
        self.compare({"t": "state"}, self.state(), self.recorded_state([r for r in self.facts if r["cmd"] == "dump"]))
        for record in self.facts:
            if record["cmd"] != self.command:
                self.command = record["cmd"] or ""
                if self.command in ("deferred", "reuse"):
                    self.k.blocks.vm_unmap_aliases()
            handler: Callable[[Record], None] | None = getattr(self, f"on_{record['t'].replace('.', '_')}", None)
            if handler is not None:
                handler(record)
        return self

    def compare(self, record: Record, got: object, wanted: object) -> None:
        key = (self.command, record["t"])
        self.compared[key] = self.compared.get(key, 0) + 1
        if got != wanted:
            self.differences.append(Difference(self.command, record, got, wanted))

    # The address space

    def state(self) -> dict[str, list[tuple[int, int]]]:
        nodes = self.k.space.nodes.nodes
        return {
            "free": [(va.va_start, va.va_end) for va in self.k.space.free],
            "busy": sorted((va.va_start, va.va_end) for node in nodes for va in node.busy),
            "lazy": sorted((va.va_start, va.va_end) for node in nodes for va in node.lazy),
        }

    def recorded_state(self, records: list[Record]) -> dict[str, list[tuple[int, int]]]:
        return {kind: areas(records, kind) for kind in ("free", "busy", "lazy")}

    def on_dump_begin(self, record: Record) -> None:
        self.compare(record, self.k.space.vmap_lazy_nr, record["lazy"])
        if self.command == "vmap":
            dump = [r for r in self.facts if r["cmd"] == "vmap"]
            self.compare({"t": "dump"}, self.state(), self.recorded_state(dump))

    # Allocations: an address, its area, its leaves; then it is freed

    def _allocated(self, record: Record, la: int, free: Callable[[int], None]) -> None:
        self.la, self.free = la, free
        self.compare(record, la, number(record["ret"] or "0"))
        vm, wanted = self.k.vmalloc.find_vm_area(la), record.get("vm")
        if la and wanted:
            got = (vm.size, vm.flags, vm.nr_pages, vm.page_order, vm.phys_addr)
            names = ("size", "flags", "nr_pages", "order", "phys")
            self.compare(record, got, tuple(int(str(wanted[name]), 0) for name in names))

    def _release(self) -> None:
        """Free what the last records were about, and let the workers run that were waiting for the CPU."""
        if self.la:
            self.free(self.la)
            self.k.task.run_work()
        self.la = 0

    def on_basic(self, record: Record) -> None:
        self._release()
        self._allocated(record, call(self.k, record), self.k.vmalloc.vfree)

    on_variant = on_huge = on_basic

    def on_vmap(self, record: Record) -> None:
        self._release()
        put = "PUT_PAGES" in record["how"]
        self._allocated(record, call(self.k, record), self.k.vmalloc.vfree if put else self.k.vmap.vunmap)

    on_vmap_pfn = on_vmap

    def on_kvmalloc(self, record: Record) -> None:
        named = {"kvzalloc(4M)": 4 * MIB, "kvmalloc(2G)": 2 << 30, "kvmalloc(0)": 0, "kvmalloc(8192,GFP_ATOMIC)": 8192}
        size = named.get(record["how"], record.get("req"))
        gfp = GFP_ATOMIC if "ATOMIC" in record["how"] else GFP_KERNEL
        self._release()
        la = self.k.slab.kmalloc(size, gfp | Gfp.NOWARN) or 0
        if not la and size <= INT_MAX:
            la = self.k.vmalloc.vmalloc_huge(size, gfp)
        if record.get("isvm"):
            self._allocated(record, la, self.k.vmalloc.kvfree)
        else:
            is_vm = self.k.vmalloc.is_vmalloc_addr(la)
            self.compare(record, (bool(la), is_vm, la == 16), (record["ret"] != "0x0", False, record["ret"] == "0x10"))
            self.k.slab.kfree(la)

    def _windows(self) -> list[tuple[int, int]]:
        """Ranges of the `range` calls that had another than the default one, in their order."""
        layout = self.k.vmalloc.layout
        far = layout.vmalloc_start + (1 << 40)
        modules = (layout.modules_vaddr, layout.modules_end)
        last = layout.vmalloc_end + 1
        return [
            (far, far + 2 * PAGE), (far + PAGE, far + 3 * PAGE), (far, far + 2 * PAGE), (far, far + 2 * PAGE), modules, modules,
            (last - 16 * PAGE, last), (last - PAGE, last), (last - 2 * PAGE, last),
        ]  # fmt: skip

    def on_range(self, record: Record) -> None:
        size, align, prot, flags = re.fullmatch(r"vnr\((\w+),al=(\w+),(\w+),fl=(.*)\)", record["how"]).groups()
        layout = self.k.vmalloc.layout
        self._release()
        window = (layout.vmalloc_start, layout.vmalloc_end)
        if (self.compared.get(("range", "range"), 0) + 1) // 2 >= 16:
            window = next(self.windows)
        prots = prot_of(self.k, prot)
        vm_flags = flags_of(flags)
        la = self.k.vmalloc.vmalloc_node_range(number(size), number(align), *window, GFP_KERNEL, prots, vm_flags, -1)
        self._allocated(record, la, self.k.vmalloc.vfree)

    def on_noguard_seq(self, record: Record) -> None:
        self._release()
        v, layout = self.k.vmalloc, self.k.vmalloc.layout
        made = [
            v.vmalloc_node_range(
                PAGE, 1, layout.vmalloc_start, layout.vmalloc_end, GFP_KERNEL, self.k.mm.prots.kernel, flags, -1
            )
            for flags in (Vm.NO_GUARD, Vm.NO_GUARD, 0, 0)
        ]
        steps = [made[i + 1] - made[i] for i in range(3)]
        self.compare(record, (made[0], steps), (number(record["a"]), [record["b-a"], record["c-b"], record["d-c"]]))
        for la in made:
            v.vfree(la)

    def on_vmap_twice(self, record: Record) -> None:
        self._release()
        frames = self.k.frames(4)
        first, second = (self.k.vmap.vmap(frames, 4, Vm.MAP, self.k.mm.prots.kernel) for _ in range(2))
        self.compare(record, second - first, record["d"])
        self.k.vmap.vunmap(first)
        self.k.vmap.vunmap(second)

    # Walks

    def on_basic_walk(self, record: Record) -> None:
        found, walk = self.k.mm.lookup(self.la), record["first"]
        self.compare(record, LEVELS.get(found.level), walk["end"])
        pat = 0x1000 if walk["end"] != "PTE" else 0
        self.compare(record, [e & ENTRY_FLAGS & ~pat for e in found.entries], [number(e) & ENTRY_FLAGS for e in walk["e"]])
        if "at_reqend" in record:
            behind = self.k.mm.lookup(number(record["at_reqend"]["a"]))
            self.compare(record, behind.present, bool(record["at_reqend"]["present"]))

    on_variant_walk = on_huge_walk = on_range_walk = on_vmap_walk = on_vmap_pfn_walk = on_basic_walk
    on_ioremap_walk = on_kvmalloc_walk = on_basic_walk

    def on_leafscan(self, record: Record) -> None:
        la = number(record["a"])
        self.compare(record, model_runs(self.k, la, record["len"]), present_runs(record["runs"]))
        if record["how"] == "after_set_memory_rw":
            for la in self.sequence:
                self.k.vmalloc.vfree(la)
            self.k.task.run_work()

    def on_before(self, record: Record) -> None:
        self.compare(record, self.k.mm.lookup(self.la - 1).present, bool(record["w"]["present"]))

    def on_touch(self, record: Record) -> None:
        """Four pages: fresh, then written, then the second one read; A and D are set from the start."""
        if record["when"] == "fresh":
            self._release()
            self.la, self.free = self.k.vmalloc.vmalloc(4 * PAGE), self.k.vmalloc.vfree
        la = self.la + (PAGE if record["when"] == "read" else 0)
        self.compare(record, la, number(record["w"]["a"]))
        entry = self.k.mm.lookup(la).entry
        self.compare(record, (entry & ENTRY_FLAGS, entry & ACCESSED_DIRTY), (number(record["w"]["e"][-1]) & ENTRY_FLAGS, 0x60))

    def on_user_pgd_of_vmalloc(self, record: Record) -> None:
        self.compare(record, 0, number(record["e"]))

    def on_after_vfree(self, record: Record) -> None:
        la = self.la
        self._release()
        self.compare(record, self.k.mm.lookup(la).entry, number(record["w"]["e"][-1]))
        self.compare(record, (self.k.vmalloc.find_vm_area(la), self.k.space.vmap_lazy_nr), (None, record["lazy"]))

    # Large leaves and protections

    def on_huge_seq(self, record: Record) -> None:
        self._release()
        self.sequence.append(self.k.vmalloc.vmalloc_huge(2 * MIB, GFP_KERNEL))
        self.compare(record, self.sequence[-1], number(record["a"]))

    def _protect(self, la: int, change: str) -> int:
        err, flush = getattr(set_memory, f"set_memory_{change}")(self.k.mm, la, 1)
        flush.flush(self.k.task, "test")
        return err

    def _entries(self, record: Record, la: int) -> None:
        found = [entry & ENTRY_FLAGS for entry in self.k.mm.lookup(la).entries]
        self.compare(record, found, [number(entry) & ENTRY_FLAGS for entry in record["w"]["e"]])

    def on_split(self, record: Record) -> None:
        la = self.sequence[0] + PAGE
        self.compare(record, (self._protect(la, "ro"), la), (record["set_memory_ro_ret"], number(record["w"]["a"])))
        self._entries(record, la)

    def on_split_direct(self, record: Record) -> None:
        la = self.sequence[0] + PAGE
        self._entries(record, self.k.vmalloc.layout.va(self.k.vmalloc.vmalloc_to_pfn(la) * PAGE))
        self._protect(la, "rw")

    def on_set_memory(self, record: Record) -> None:
        if record["op"] == "ro":
            self.la, self.free = self.k.vmalloc.vmalloc(PAGE), self.k.vmalloc.vfree
            self.compare(record, (self._protect(self.la, "ro"), self.la), (record["r"], number(record["w"]["a"])))
        elif record["op"] == "rw":
            self.compare(record, self._protect(self.la, "rw"), 0)
        la = self.la if "alias" not in record["op"] else self.k.vmalloc.layout.va(self.k.vmalloc.vmalloc_to_pfn(self.la) * PAGE)
        self._entries(record, la)
        if record["op"] == "rw":
            self._release()

    # vm_map_ram

    def _map_ram(self, count: int) -> int:
        frames = self.k.frames(count)
        la = self.k.blocks.vm_map_ram(frames, count)
        self.frames[la] = frames.tolist()
        return la

    def _unmap_ram(self, la: int) -> None:
        frames = self.frames.pop(la)
        self.k.blocks.vm_unmap_ram(la, len(frames))
        for pfn in frames:
            self.k.pages.put_page(pfn)

    def on_vm_map_ram(self, record: Record) -> None:
        self._release()
        la = self._map_ram(record["count"])
        va = self.k.space.nodes.find(la)
        self.compare(record, (la, va.va_start, va.va_end, va.vm), (*map(number, (record["ret"], *record["va"])), None))
        if self.k.space.design.sharded:
            self.compare(record, va.flags & 3, number(record["va_flags"]))
        self.compare(record, self.k.mm.lookup(la).entry & ENTRY_FLAGS, number(record["w"]["e"][-1]) & ENTRY_FLAGS)

    def on_vm_map_ram_next(self, record: Record) -> None:
        self.compare(record, self.k.mm.lookup(number(record["w"]["a"])).present, bool(record["w"]["present"]))

    def on_vm_unmap_ram(self, record: Record) -> None:
        la = number(record["ret"])
        self._unmap_ram(la)
        self.compare(record, (self.k.space.vmap_lazy_nr, self.k.mm.lookup(la).entry), (record["lazy"], 0))

    def on_vm_map_ram_again(self, record: Record) -> None:
        made = [self._map_ram(1), self._map_ram(4)]
        self.compare(record, made, [number(record["r1"]), number(record["r4"])])
        for la in made:
            self._unmap_ram(la)

    def on_vm_map_ram_after_aliases(self, record: Record) -> None:
        self.k.blocks.vm_unmap_aliases()
        self.on_vm_map_ram_again(record)

    # ioremap

    def on_pci_bar(self, record: Record) -> None:
        self._release()
        if self.bar_size >= 2 * MIB:
            # The calls for a large BAR end with a purge.
            self.k.blocks.vm_unmap_aliases()
        self.bar, self.bar_size = number(record["start"]), number(record["len"])

    def on_ioremap(self, record: Record) -> None:
        how, vm = record["how"], record.get("vm")
        phys = self.bar + PAGE if "bar+4096" in how else number(vm["phys"]) if vm else 0
        phys = 0xFED00010 if "0xfed00010" in how else phys
        self._release()
        la = getattr(self.io, re.match(r"\w+", how).group())(phys, record["req"])
        self._allocated(record, la, self.io.iounmap)

    # Deferral and reuse

    def on_vfree_ctx(self, record: Record) -> None:
        self._release()
        la = self.sequence_la = self.k.vmalloc.vmalloc(PAGE)
        self.k.task.in_interrupt = bool(record["in_interrupt"])
        before = self.k.vmalloc.find_vm_area(la) is not None
        self.k.vmalloc.vfree(la)
        self.k.task.in_interrupt = False
        after = self.k.vmalloc.find_vm_area(la) is not None
        got = (before, after, self.k.mm.lookup(la).present)
        self.compare(record, got, tuple(bool(record[name]) for name in ("va_before", "va_after_immediate", "pte")))

    def on_vfree_ctx_later(self, record: Record) -> None:
        self.k.task.run_work()
        la = self.sequence_la
        found = self.k.vmalloc.find_vm_area(la) is not None
        got = (la, found, self.k.space.vmap_lazy_nr, self.k.mm.lookup(la).entry)
        wanted = (number(record["w"]["a"]), bool(record["va_found_after_100ms"]), record["lazy"], number(record["w"]["e"][-1]))
        self.compare(record, got, wanted)

    def on_vfree_atomic(self, record: Record) -> None:
        if "va_after" in record:
            self.sequence_la = self.k.vmalloc.vmalloc(PAGE)
            self.k.vmalloc.vfree_atomic(self.sequence_la)
        else:
            self.k.task.run_work()
        found = self.k.vmalloc.find_vm_area(self.sequence_la) is not None
        self.compare(record, found, bool(record.get("va_after", record.get("va_50ms"))))

    def on_reuse(self, record: Record) -> None:
        v, space = self.k.vmalloc, self.k.space
        if record["step"] == "purged":
            self.compare(record, space.vmap_lazy_nr, record["lazy"])
            return
        if record["step"] == "after_vm_unmap_aliases":
            self.k.blocks.vm_unmap_aliases()
        la = v.vmalloc(PAGE)
        if record["step"] == "after_vm_unmap_aliases":
            self.compare(record, (la, space.vmap_lazy_nr), (number(record["a"]), record["lazy"]))
            v.vfree(la)
            return
        v.vfree(la)
        self.compare(record, (la, space.vmap_lazy_nr), (number(record["a"]), record["lazy"]))

    def _mebibytes(self, until: int) -> tuple[int, int, int]:
        """vmalloc and vfree of 1 MiB up to the iteration `until`: lazy pages before and after it, and its address."""
        la = before = 0
        while self.iteration <= until:
            before = self.k.space.vmap_lazy_nr
            la = self.k.vmalloc.vmalloc(MIB)
            self.first = self.first or la
            self.k.vmalloc.vfree(la)
            self.k.task.run_work()
            self.iteration += 1
        return before, self.k.space.vmap_lazy_nr, la

    def on_lazy(self, record: Record) -> None:
        match record.get("step"):
            case "lazy_dropped" | "drop":
                self.k.blocks.vm_unmap_aliases()
                self.iteration = self.first = 0
                before, after, la = self._mebibytes(record["iter"])
                self.compare(record, (before, after), (record["before"], record["after"]))
                if "a" in record:
                    self.compare(record, la, number(record["a"]))
            case "reused_first":
                _, after, la = self._mebibytes(record["iter"])
                self.compare(record, (la == self.first, after), (True, record["lazy"]))
            case "end":
                got = (self.k.space.vmap_lazy_nr, self.k.space.lazy_max_pages())
                self.compare(record, got, (record["lazy"], record["threshold"]))

    on_lazy2 = on_lazy

    def on_lazy3(self, record: Record) -> None:
        if record["step"] == "freed 96M":
            self.k.vmalloc.vfree(self.k.vmalloc.vmalloc(96 * MIB))
            self.k.task.run_work()
        self.compare(record, self.k.space.vmap_lazy_nr, record["lazy"])

    def on_nr_vmalloc_pages(self, record: Record) -> None:
        v = self.k.vmalloc
        if self.pages0 is None:
            self.pages0 = record["n"] - v.nr_vmalloc_pages
        if record.get("after") == "vmalloc(1M)":
            self.la = v.vmalloc(MIB)
        elif record.get("after") == "vfree":
            v.vfree(self.la)
            self.la = 0
        self.compare(record, v.nr_vmalloc_pages + self.pages0, record["n"])

    # What stays, for /proc/vmallocinfo

    def on_hold(self, record: Record) -> None:
        k = self.k
        caller = self.caller_of(record)
        match record["i"]:
            case 0:
                la = k.vmalloc.vmalloc(PAGE, caller)
            case 1:
                la = k.vmalloc.vmalloc(32 * PAGE, caller)
            case 2:
                la = k.vmalloc.vmalloc_user(2 * PAGE, caller)
            case 3:
                la = k.vmalloc.vmalloc_huge(4 * MIB, GFP_KERNEL, caller)
            case 4:
                la = k.vmap.vmap(k.frames(1), 1, Vm.MAP, k.mm.prots.kernel, caller)
            case 5:
                la = self.io.ioremap(0xFED00000, PAGE, caller)
            case 6:
                la = self._map_ram(3)
            case _:
                la = k.vmalloc.vzalloc(3 * PAGE, caller)
        self.compare(record, la, number(record["a"]))
        if record["i"] == 7:
            # An unpurged row of one page is in the recorded text besides those that earlier commands left.
            k.vmalloc.vfree(k.vmalloc.vmalloc(PAGE))

    def caller_of(self, record: Record) -> int:
        """The return address that a `hold` call leaves in its area."""
        return self.k.vmalloc.layout.modules_vaddr + record["i"]

    def describe(self, la: int, vm: VmStruct) -> None:
        """Give a boot area, which the dump knows by bounds only, what /proc/vmallocinfo says of it."""
        found = self.k.vmalloc.find_vm_area(la)
        assert found is not None and (found.addr, found.size) == (la, vm.size)
        for name in ("flags", "caller", "pages", "nr_pages", "phys_addr", "pages_la", "page_order"):
            setattr(found, name, getattr(vm, name))
