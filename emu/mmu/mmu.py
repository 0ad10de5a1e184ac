"""The MMU of one CPU: control registers, TLB and walker together (SDM vol. 3A chapter 4).

`fill` is the hot path, called once for each page that the soft cache above (Unicorn's) does not know. Rights are
judged at each access against the current registers, so RFLAGS.AC, PKRU, CR0.WP, CR4.SMAP and CR4.PKE need no
invalidation here; only the soft cache has to be dropped (`on_drop`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from emu.memory import BusError, Memory
from emu.mmu.entry import (
    ENTRY_BITS,
    PAGE_MASK,
    PAGE_SHIFT,
    PHYSICAL_MASK,
    PS,
    XD,
    D,
    G,
    Level,
    P,
    is_canonical,
)
from emu.mmu.fault import Access, GeneralProtection, NonCanonical, PageFault
from emu.mmu.grants import Grant, fill_tests
from emu.mmu.registers import (
    CR3_NO_INVALIDATE,
    CR3_PCID,
    RESET_CR0,
    RESET_CR4,
    RESET_EFER,
    Cr0,
    Cr4,
    Efer,
    Features,
    check_cr0,
    check_cr3,
    check_cr4,
    check_efer,
)
from emu.mmu.staleness import Cached, Stale, listing, lookup, stale
from emu.mmu.tlb import Context, MakeDict, Tlb, TlbMode
from emu.mmu.walk import PagingRegisters, Step, ac_reader, descend, root, violation
from emu.mmu.watch import Watch

__all__ = ["Grant", "Mmu"]


_READ, _WRITE = int(Access.READ), int(Access.WRITE)
_PAGE_BASE = ENTRY_BITS & ~PAGE_MASK
# The 4K slice of a large leaf keeps its flags, loses PS (and PAT_LARGE with the frame bits below the leaf's size).
_SLICE_FLAGS = {level: ENTRY_BITS & ~PS & ~((1 << 9 * level + 3) - (1 << PAGE_SHIFT)) for level in (2, 3)}
_SLICE_OFFSET = {level: (1 << 9 * level + 3) - (1 << PAGE_SHIFT) for level in (2, 3)}


def _nothing() -> None:
    return None


def _no_ac() -> bool:
    return False


class Mmu:
    """Paging of one CPU over `memory`.

    cr0, cr3, cr4, efer, pkru hold the architectural values (cr3 without bit 63); change them by the load_ methods.
    `read_ac` returns RFLAGS.AC and is called only where SMAP asks for it; `on_drop` is called whenever the soft cache
    above must be dropped whole. `cpl` is the CPU's to keep. `hits` and `misses` count what reaches this TLB: a soft
    cache above answers most hits itself, so `hits` says nothing about the guest.
    """

    def __init__(
        self, memory: Memory, tlb: Tlb | TlbMode | str = TlbMode.INFINITE, features: Features | None = None, levels: int = 4
    ) -> None:
        if levels not in (4, 5):
            raise ValueError(f"paging levels is {levels}; it must be 4 or 5")
        if levels == 5 and features is not None and not features.la57:
            raise ValueError("5 paging levels need a CPU with LA57")
        self.memory = memory
        self.tlb = tlb if isinstance(tlb, Tlb) else Tlb(tlb)
        self.features = features or Features(la57=levels == 5)
        self.cpl = 0
        self.read_ac: Callable[[], bool] = _no_ac
        self.on_drop: Callable[[], None] = _nothing
        # Set by whoever wants to see uses of stale translations; None costs nothing.
        self.watch: Watch | None = None
        self.hits = 0
        self.misses = 0
        # CR3 as last loaded for each PCID: what a stale entry of another address space is compared with.
        self.roots: dict[int, int] = {}
        self._u64 = memory.u64
        self._size = memory.size
        self._bounded = self.tlb.mode is TlbMode.FINITE
        self._global_pages = self.tlb.shared.pages[1]
        self._boot_cr4 = RESET_CR4 | (int(Cr4.LA57) if levels == 5 else 0)
        self.reset()

    # ---------------------------------------------------------------- registers

    def reset(
        self, cr0: int = RESET_CR0, cr3: int = 0, cr4: int | None = None, efer: int = RESET_EFER, pkru: int = 0
    ) -> None:
        """Install a whole register state unchecked, as reset or a boot loader would, and forget all translations.

        Without `cr4` it is plain long mode with as many levels as at construction.
        """
        self.cr0, self.cr3, self.efer, self.pkru = cr0, cr3, efer, pkru
        self.cr4 = self._boot_cr4 if cr4 is None else cr4
        self.tlb.flush_all()
        self.roots.clear()
        self._enter_address_space()
        self._registers_changed()

    def _registers_changed(self) -> None:
        """Derive the walker's registers and the hot path's masks; the soft cache no longer holds."""
        self.regs = PagingRegisters(
            cr3=self.cr3,
            levels=5 if self.cr4 & Cr4.LA57 else 4,
            wp=bool(self.cr0 & Cr0.WP),
            smep=bool(self.cr4 & Cr4.SMEP),
            smap=bool(self.cr4 & Cr4.SMAP),
            pke=bool(self.cr4 & Cr4.PKE),
            nxe=bool(self.efer & Efer.NXE),
            gbpages=self.features.gbpages,
            pkru=self.pkru,
        )
        self._global_bit = G if self.cr4 & Cr4.PGE else 0
        self._kernel_tests = fill_tests(self.regs, user=False)
        self._user_tests = fill_tests(self.regs, user=True)
        self.on_drop()

    def _enter_address_space(self) -> None:
        pcid = self.pcid
        self.roots[pcid] = self.cr3
        context: Context = self.tlb.context(pcid)
        self._context = context
        self._pages = context.pages[1]
        self._pde_cache = context.tables[2]
        # One flat tuple: which dict may hold a large page, and how far to shift.
        shared = self.tlb.shared
        self._large = (
            (2, 21, shared.pages[2]),
            (2, 21, context.pages[2]),
            (3, 30, shared.pages[3]),
            (3, 30, context.pages[3]),
        )

    def keep_translations_in(self, make_dict: MakeDict) -> None:
        """Keep what is cached in dicts of another kind, which may tell of what is put in and taken out, from now on."""
        self.tlb.keep_in(make_dict)
        self._global_pages = self.tlb.shared.pages[1]
        self._enter_address_space()

    @property
    def pcid(self) -> int:
        """The current PCID: CR3[11:0] with CR4.PCIDE, else 0 (SDM 4.10.1)."""
        return self.cr3 & CR3_PCID if self.cr4 & Cr4.PCIDE else 0

    def load_cr0(self, value: int) -> None:
        """MOV to CR0. Paging cannot be turned off in 64-bit mode, so nothing is ever invalidated. Raises
        GeneralProtection.
        """
        self.cr0 = check_cr0(value)
        self._registers_changed()

    def load_cr3(self, value: int) -> None:
        """MOV to CR3 (SDM 4.10.4.1): the new PCID's entries go, globals stay; with bit 63 set, nothing has to go.

        Raises GeneralProtection.
        """
        check_cr3(value, self.cr4)
        self.cr3 = value & ~CR3_NO_INVALIDATE
        before = self.roots.get(self.pcid, self.cr3)
        self._enter_address_space()
        self.regs = replace(self.regs, cr3=self.cr3)
        if not value & CR3_NO_INVALIDATE:
            self._context.clear()
            self._invalidated(self.pcid)
        elif before != self.cr3 and self.watch is not None:
            self.watch.root_changed(self.pcid, before)
        self.on_drop()

    def load_cr4(self, value: int) -> None:
        """MOV to CR4 (SDM 4.10.4.1). Raises GeneralProtection.

        A change of PGE, or PCIDE from 1 to 0, invalidates everything; SMEP from 0 to 1 the current PCID's entries and
        the global ones. SMAP and PKE invalidate nothing.
        """
        check_cr4(value, self.cr4, self.cr3, self.features)
        changed = value ^ self.cr4
        everything = changed & Cr4.PGE or changed & self.cr4 & Cr4.PCIDE
        current = changed & value & Cr4.SMEP
        self.cr4 = value
        if everything:
            self.tlb.flush_all()
            self._invalidated()
        elif current:
            self.tlb.shared.clear()
            self._context.clear()
            self._invalidated(self.pcid, shared=True)
        self._enter_address_space()
        self._registers_changed()

    def load_efer(self, value: int) -> None:
        """WRMSR to IA32_EFER: invalidates nothing (SDM 4.10.4.1 does not name it). Raises GeneralProtection."""
        self.efer = check_efer(value, self.efer, self.features)
        self._registers_changed()

    def load_pkru(self, value: int) -> None:
        """WRPKRU: invalidates nothing. Raises ValueError beyond 32 bits."""
        if value >> 32:
            raise ValueError(f"PKRU {value:#x} has more than 32 bits")
        self.pkru = value
        self._registers_changed()

    # ---------------------------------------------------------------- invalidation

    def invlpg(self, la: int) -> None:
        """INVLPG (SDM 4.10.4.1): the page of `la` in the current PCID, global or not, and the current PCID's whole
        paging-structure caches. A large page goes whole. A non-canonical address does nothing.
        """
        if not is_canonical(la, self.regs.levels):
            return
        self._context.drop_page(la)
        self.tlb.shared.drop_page(la)
        self._context.clear_tables()
        self._invalidated(self.pcid, la, shared=True)
        self.on_drop()

    def invpcid(self, kind: int, pcid: int, la: int) -> None:
        """INVPCID (SDM 4.10.4.1, vol. 2A): 0 one address of a PCID, 1 a PCID, 2 everything, 3 everything but globals.

        Raises GeneralProtection for an unknown type, a PCID beyond 12 bits, a PCID other than 0 with CR4.PCIDE clear,
        or a non-canonical address with type 0.
        """
        if kind not in (0, 1, 2, 3):
            raise GeneralProtection(f"INVPCID type {kind}")
        if pcid > CR3_PCID:
            raise GeneralProtection(f"INVPCID descriptor sets reserved bits {pcid & ~CR3_PCID:#x}")
        if kind < 2 and pcid and not self.cr4 & Cr4.PCIDE:
            raise GeneralProtection(f"INVPCID of PCID {pcid:#x} while CR4.PCIDE is 0")
        if kind == 0:
            if not is_canonical(la, self.regs.levels):
                raise GeneralProtection(f"INVPCID of the non-canonical address {la:#x}")
            self.tlb.context(pcid).drop_page(la)
            self.tlb.context(pcid).drop_path(la)
            self._invalidated(pcid, la)
        elif kind == 1:
            self.tlb.context(pcid).clear()
            self._invalidated(pcid)
        elif kind == 2:
            self.tlb.flush_all()
            self._invalidated()
        else:
            self.tlb.flush_all_but_global()
            self._invalidated(shared=False)
        self.on_drop()

    def _invalidated(self, pcid: int | None = None, la: int | None = None, *, shared: bool | None = None) -> None:
        """Tell whoever watches what has just been removed: a PCID's entries or all, of one page or all; `shared`: globals too."""
        if self.watch is not None:
            self.watch.on_invalidate(pcid, la, pcid is None if shared is None else shared)

    # ---------------------------------------------------------------- translation

    def fill(self, page_la: int, access: int, user: bool, implicit: bool = False) -> int:
        """Translate the page at `page_la` for an access that the soft cache above could not serve.

        Returns the pa of the 4 KiB frame plus Grant bits, valid for this privilege until `on_drop`. A fetch never
        grants W, a data access never X; a write right is granted only once D is set. `user` is False for an implicit
        supervisor access. Raises PageFault (its `la` is `page_la`), NonCanonical, BusError.
        """
        # Measured: 0.3 us for a hit, 0.8 us for a miss with the PDE cached, A and D set or not; the general walk in _resolve
        # costs 3 to 5 us.
        number = page_la >> 12
        packed = self._global_pages.get(number) or self._pages.get(number) or self._large_slice(page_la)
        tests = self._user_tests if user else self._kernel_tests
        mask, want, grant, more_mask, more_want, more, flags = tests[access]
        if packed:
            if packed & mask == want:
                self.hits += 1
            else:
                packed = self._resolve(page_la, access, user, self.read_ac, implicit, packed)
        else:
            table = self._pde_cache.get(number >> 9)
            if table:
                slot = table[0] + (number & 511)
                packed = (self._u64[slot] ^ XD) & table[1]
            if (packed | flags) & mask == want and packed & PHYSICAL_MASK < self._size:
                if packed & flags != flags:
                    self._u64[slot] |= flags
                    packed |= flags
                self.misses += 1
                pages = self._global_pages if packed & self._global_bit else self._pages
                pages[number] = packed
                self.tlb.fills += 1
                if self._bounded and self.tlb.place(1, pages, number):
                    self.on_drop()
            else:
                packed = self._resolve(page_la, access, user, self.read_ac, implicit, 0)
        if packed & more_mask == more_want:
            return packed & PHYSICAL_MASK | more
        return packed & PHYSICAL_MASK | grant

    def _large_slice(self, la: int) -> int:
        """The packed 4K slice of a cached large page that holds `la`, or 0."""
        for level, shift, pages in self._large:
            if pages:
                packed = pages.get(la >> shift)
                if packed:
                    packed = packed & _SLICE_FLAGS[level] | la & _SLICE_OFFSET[level]
                    if packed & PHYSICAL_MASK >= self._size:
                        self._check_frame(packed & PHYSICAL_MASK)
                    return packed
        return 0

    def _resolve(
        self, la: int, access: int, user: bool, read_ac: Callable[[], bool], implicit: bool, packed: int
    ) -> int:
        """Settle a hit that the hot path refuses (`packed`) or a miss (0); return the packed 4K slice."""
        if packed:
            watched = not packed & P
            packed |= P
            error = violation(self.regs, packed ^ XD, access, user, read_ac, implicit)
            if error is not None:
                # A cached right may refuse what memory now permits; the fault drops the entry, a retry walks (SDM 4.10.4.3).
                self.hits += 1
                cached = self.query(la)
                level = cached.level if cached else Level.PTE
                self._drop_faulting(la)
                raise PageFault(la, error, level, packed ^ XD)
            if access != _WRITE or packed & D:
                self.hits += 1
                if watched and self.watch is not None:
                    self.watch.entry_used(la, access, user, read_ac, implicit, packed & PHYSICAL_MASK)
                    # Without P it grants this access alone: the next kind of access is judged by itself.
                    return packed & ~P
                return packed
        elif not is_canonical(la, self.regs.levels):
            raise NonCanonical(la)
        self.misses += 1
        steps: list[Step] = []
        at, table, rights = self.walk_start(la)
        watch = self.watch
        used = None if rights & P or watch is None else watch.table_used(la, at + 1)
        start = at, table, rights | P
        try:
            leaf = descend(self.memory, self.regs, la, access, user, read_ac, implicit, True, start, steps)
        except PageFault as fault:
            if used is not None and watch is not None:
                watch.walk_faulted(used, la, access, user, read_ac, implicit, fault)
            self._drop_faulting(la)
            raise
        packed = self._insert(la, leaf, steps, packed)
        if used is None or watch is None:
            return packed
        stale = watch.walked(used, la, access, user, read_ac, implicit, packed & PHYSICAL_MASK)
        return packed & ~P if stale else packed

    def walk_start(self, la: int) -> tuple[int, int, int]:
        """Where the walk of `la` begins: below the deepest cached table, else at CR3 (SDM 4.10.3.2). Rights without P: watched."""
        tables = self._context.tables
        for level in range(2, self.regs.levels + 1):
            cached = tables[level].get(la >> (9 * level + 3))
            if cached:
                return level - 1, cached[0] << 3, cached[1]
        return root(self.regs)

    def _insert(self, la: int, leaf: int, steps: list[Step], replaced: int) -> int:
        """Cache a completed walk and return the packed 4K slice of `la`. `replaced` is the slice that a rewalk makes old."""
        level = steps[-1][0]
        packed = leaf
        if level > 1:
            packed = leaf & _SLICE_FLAGS[level] | la & _SLICE_OFFSET[level]
        if packed & PHYSICAL_MASK >= self._size:
            self._check_frame(packed & PHYSICAL_MASK)
        tlb = self.tlb
        if tlb.mode is TlbMode.INFINITE:
            tables = self._context.tables
            for at, _, entry, rights in steps[:-1]:
                tables[at][la >> (9 * at + 3)] = (entry & PHYSICAL_MASK) >> 3, rights
        else:
            for at, _, entry, rights in steps[:-1]:
                tlb.insert_table(self._context, at, la, entry & PHYSICAL_MASK, rights)
        if replaced:
            self._context.drop_page(la)
            tlb.shared.drop_page(la)
        evicted = tlb.insert(tlb.shared if leaf & self._global_bit else self._context, level, la, leaf)
        if evicted or (replaced and replaced | D != packed):
            self.on_drop()
        if self.watch is not None:
            self.watch.filled(la, level, steps)
        return packed

    def _check_frame(self, frame: int) -> None:
        """Raise BusError unless RAM or a device answers at `frame`."""
        if frame + PAGE_MASK < self._size:
            return
        for region in self.memory.mmio:
            if region.start <= frame < region.start + region.size:
                return
        raise BusError(frame, PAGE_MASK + 1)

    def _drop_faulting(self, la: int) -> None:
        """A #PF invalidates the translations and tables cached for its address (SDM 4.10.4.1)."""
        dropped = self._context.drop_page(la)
        dropped = self.tlb.shared.drop_page(la) or dropped
        self._context.drop_path(la)
        if dropped:
            self.on_drop()

    def translate(self, la: int, access: int, *, user: bool = False, ac: bool = False, implicit: bool = False) -> int:
        """The pa of the byte at `la`, through the TLB, with A and D set as the CPU's own access would.

        Raises PageFault with the exact `la`, NonCanonical, BusError.
        """
        user = user and not implicit
        number = la >> 12
        packed = self._global_pages.get(number) or self._pages.get(number) or self._large_slice(la)
        mask, want, *_ = (self._user_tests if user else self._kernel_tests)[access]
        if packed & mask == want:
            self.hits += 1
        else:
            packed = self._resolve(la, access, user, ac_reader(ac), implicit, packed)
        return packed & PHYSICAL_MASK | la & PAGE_MASK

    def pieces(
        self, la: int, size: int, access: int, *, user: bool = False, ac: bool = False, implicit: bool = False
    ) -> list[tuple[int, int]]:
        """[la, la + size) as (pa, size) runs within pages, every page checked before any is returned.

        An access may not wrap at 2^64. A fault reports the first byte of the page that fails. Raises as translate.
        """
        runs = []
        end = la + size
        while la < end:
            step = min(end, (la & _PAGE_BASE) + PAGE_MASK + 1) - la
            if la > ENTRY_BITS:
                raise NonCanonical(la & ENTRY_BITS)
            runs.append((self.translate(la, access, user=user, ac=ac, implicit=implicit), step))
            la += step
        return runs

    def read(self, la: int, size: int, *, user: bool = False, ac: bool = False, implicit: bool = False) -> bytes:
        """`size` bytes at linear address `la`. Raises as pieces."""
        memory = self.memory
        if 0 < size <= PAGE_MASK + 1 - (la & PAGE_MASK) and la <= ENTRY_BITS:
            return memory.read(self.translate(la, _READ, user=user, ac=ac, implicit=implicit), size)
        return b"".join(
            memory.read(pa, step) for pa, step in self.pieces(la, size, _READ, user=user, ac=ac, implicit=implicit)
        )

    def write(self, la: int, data: bytes, *, user: bool = False, ac: bool = False, implicit: bool = False) -> None:
        """Store `data` at linear address `la`; a fault leaves all of memory as it was. Raises as pieces."""
        if 0 < len(data) <= PAGE_MASK + 1 - (la & PAGE_MASK) and la <= ENTRY_BITS:
            self._store(self.translate(la, _WRITE, user=user, ac=ac, implicit=implicit), data)
            return
        offset = 0
        for pa, step in self.pieces(la, len(data), _WRITE, user=user, ac=ac, implicit=implicit):
            self._store(pa, data[offset : offset + step])
            offset += step

    def _store(self, pa: int, data: bytes) -> None:
        if self.watch is not None and self.watch.tables.is_table_frame(pa >> PAGE_SHIFT):
            self.watch.store_to_table(pa, data)
        else:
            self.memory.write(pa, data)

    def is_table_frame(self, frame: int) -> bool:
        """Whether a store to `frame` may change what a CPU has cached: then it must be told to `watch`. False when none watches."""
        return self.watch is not None and self.watch.tables.is_table_frame(frame)

    # ---------------------------------------------------------------- inspection

    def query(self, la: int) -> Cached | None:
        """The TLB entry by which this CPU may still translate `la` (`.pa(la)` tells where to), or None: it would walk."""
        return lookup(self.tlb, self._context, la)

    def listing(self) -> list[Cached]:
        """Every TLB entry: global ones first, then by PCID, page size and address."""
        return listing(self.tlb)

    def stale(self, la: int | None = None, tables: bool = False) -> list[Stale]:
        """The TLB entries (of the page at `la`, or all; with `tables` the paging-structure caches too) that memory no
        longer says. Each PCID is compared with the CR3 last loaded for it, global entries with the current one.
        """
        return stale(self.memory, self.regs, self.tlb, self.roots, la, tables)

    def counters(self) -> dict[str, int]:
        """Hits and misses of this TLB, entries filled, and entries that a finite geometry had to evict."""
        return {"hits": self.hits, "misses": self.misses, "fills": self.tlb.fills, "evictions": self.tlb.evictions}

    def validate(self) -> None:
        """Assert that the TLB is sound and that the hot path looks at the current context of the current PCID."""
        self.tlb.validate()
        assert self._context is self.tlb.context(self.pcid), f"the context in use is not that of PCID {self.pcid:#x}"
        assert self._pages is self._context.pages[1], "the hot path holds another context's pages"
        assert self._pde_cache is self._context.tables[2], "the hot path holds another context's PDE cache"
        assert self.regs.cr3 == self.cr3, "the walker's registers are out of date"
        assert self.cr4 & Cr4.PGE or not any(self.tlb.shared.pages.values()), "global entries without CR4.PGE"
        assert self.cr4 & Cr4.PCIDE or self.pcid == 0, "a PCID without CR4.PCIDE"
