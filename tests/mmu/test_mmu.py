"""The MMU as the CPU uses it: fills, Python-side accesses, registers."""

import contextlib
import random
import sys
from pathlib import Path

import pytest
from paging_tables import OPEN, ROOT, Tables

from emu.memory import BusError, MmioRegion
from emu.mmu.entry import PHYSICAL_MASK, PKEY_SHIFT, RW, US, XD, A, D, G, P
from emu.mmu.fault import Access, GeneralProtection, NonCanonical, PageFault, PfError
from emu.mmu.mmu import Grant, Mmu
from emu.mmu.registers import CR3_NO_INVALIDATE, RESET_CR0, RESET_CR4, RESET_EFER, Cr0, Cr4, Efer, Features
from emu.mmu.walk import walk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import permissions

LA = 0x7F00_0000_0000
PA = 0x30_0000
R, W, X = Access.READ, Access.WRITE, Access.FETCH


def machine(flags: int = OPEN, level: int = 1, mode: str = "infinite", cr4: int = RESET_CR4 | Cr4.PGE) -> tuple[Mmu, Tables]:
    tables = Tables()
    tables.map(LA, PA if level == 1 else 0, flags, level)
    mmu = Mmu(tables.memory, mode)
    mmu.reset(cr3=ROOT, cr4=int(cr4))
    return mmu, tables


# ---------------------------------------------------------------------------------------------------- fill


@pytest.mark.parametrize("mode", ["infinite", "finite", "none"])
def test_a_fill_grants_write_only_when_dirty_and_never_write_with_execute(mode: str) -> None:
    mmu, tables = machine(mode=mode)
    for _ in range(2):  # a miss, then a hit
        assert mmu.fill(LA, R, True) == PA | Grant.R | Grant.W
        assert mmu.fill(LA, W, True) == PA | Grant.R | Grant.W
        assert mmu.fill(LA, X, True) == PA | Grant.R | Grant.X
    mmu, tables = machine(OPEN & ~(A | D), mode=mode)
    assert mmu.fill(LA, R, True) == PA | Grant.R
    assert tables.entry(LA, 1) & (A | D) == A
    assert mmu.fill(LA, W, True) == PA | Grant.R | Grant.W
    assert tables.entry(LA, 1) & (A | D) == A | D
    assert mmu.fill(LA, R, True) == PA | Grant.R | Grant.W


def test_a_fill_of_a_large_page_is_its_4k_slice() -> None:
    for level in (2, 3):
        mmu, _ = machine(level=level)
        for page in (0, 0x3000, 0x1F_F000):
            assert mmu.fill(LA + page, R, True) & PHYSICAL_MASK == page
        mmu.validate()


def test_a_fill_reads_ac_only_for_a_supervisor_data_access_to_a_user_page_under_smap() -> None:
    calls: list[int] = []

    def read_ac() -> bool:
        calls.append(1)
        return True

    for flags, access, user, smap, expected in (
        (OPEN, R, False, True, 1), (OPEN, W, False, True, 1), (OPEN, X, False, True, 0), (OPEN, R, True, True, 0),
        (OPEN, R, False, False, 0), (OPEN & ~US, R, False, True, 0),
    ):
        mmu, _ = machine(flags, cr4=RESET_CR4 | (Cr4.SMAP if smap else 0))
        mmu.read_ac = read_ac
        calls.clear()
        mmu.fill(LA, access, user)
        assert len(calls) == expected, (flags, access, user, smap)


def test_a_fill_under_smap_grants_no_more_than_this_access_asked_for() -> None:
    mmu, _ = machine(cr4=RESET_CR4 | Cr4.SMAP)
    mmu.read_ac = lambda: True
    assert mmu.fill(LA, R, False) == PA | Grant.R
    assert mmu.fill(LA, X, False) == PA | Grant.X
    mmu.read_ac = lambda: False
    with pytest.raises(PageFault):
        mmu.fill(LA, R, False)


def test_an_implicit_fill_ignores_ac() -> None:
    mmu, _ = machine(cr4=RESET_CR4 | Cr4.SMAP)
    mmu.read_ac = lambda: True
    with pytest.raises(PageFault) as fault:
        mmu.fill(LA, R, False, implicit=True)
    assert fault.value.error == PfError.P


def test_a_fill_of_a_non_canonical_page_is_not_a_page_fault() -> None:
    mmu, _ = machine()
    with pytest.raises(NonCanonical):
        mmu.fill(0x8000_0000_0000, R, False)


@pytest.mark.parametrize("level", [1, 3])
def test_a_frame_outside_ram_is_a_bus_error_on_every_access(level: int) -> None:
    mmu, tables = machine(level=level)
    outside = tables.memory.size
    if level == 1:
        tables.map(LA, outside)
        la = LA
    else:
        mmu.fill(LA, R, True)
        la = LA + outside  # inside the 1G leaf, which is larger than RAM
    for _ in range(2):
        with pytest.raises(BusError) as error:
            mmu.fill(la, R, True)
        assert error.value.pa == outside
    tables.map(LA + 0x1000, PA)


def test_a_hot_fill_of_a_frame_outside_ram_is_a_bus_error() -> None:
    mmu, tables = machine()
    tables.map(LA + 0x1000, tables.memory.size)
    mmu.fill(LA, R, True)  # the PDE is cached now
    with pytest.raises(BusError):
        mmu.fill(LA + 0x1000, R, True)


def test_a_translation_may_end_in_a_device() -> None:
    mmu, tables = machine()
    beyond = tables.memory.size + 0x10_0000
    tables.memory.overlay_mmio(MmioRegion(beyond, 0x1000, lambda *_: 0, lambda *_: None))
    tables.map(LA, beyond)
    assert mmu.fill(LA, R, True) & PHYSICAL_MASK == beyond
    assert mmu.fill(LA, R, True) & PHYSICAL_MASK == beyond


# ---------------------------------------------------------------------------------------------------- agreement with the walker


def walked(mmu: Mmu, case: permissions.Case, la: int, access: int) -> int | str:
    """A walk without side effects: pa, or the error code."""
    setting = case.setting
    try:
        return walk(
            mmu.memory, mmu.regs, la, access, setting.cpl == 3, setting.ac, setting.kind == permissions.IMPLICIT, set_ad=False
        ).pa
    except PageFault as fault:
        return f"error {fault.error:#x}"


def filled(mmu: Mmu, case: permissions.Case, la: int, access: int) -> int | str:
    implicit = case.setting.kind == permissions.IMPLICIT
    try:
        return mmu.fill(la, access, case.setting.cpl == 3 and not implicit, implicit)
    except PageFault as fault:
        return f"error {fault.error:#x}"


@pytest.mark.parametrize("mode", ["infinite", "finite", "none"])
def test_fills_agree_with_the_walker_over_the_product_of_rights_and_registers(mode: str) -> None:
    memory = permissions.build_memory()
    mmu = Mmu(memory, mode, Features())
    rng = random.Random(7)
    for _ in range(2500):
        case = permissions.draw(rng)
        setting = case.setting
        for slot, entry in zip(permissions.slots(setting.levels), case.entries, strict=False):
            memory.write_u64(slot, entry)
        cr4 = Cr4.PAE | Cr4.PGE | (Cr4.LA57 if setting.levels == 5 else 0)
        for on, bit in ((setting.smep, Cr4.SMEP), (setting.smap, Cr4.SMAP), (setting.pkru is not None, Cr4.PKE)):
            cr4 |= bit if on else Cr4(0)
        mmu.reset(
            RESET_CR0 if setting.wp else RESET_CR0 & ~int(Cr0.WP), permissions.ROOT[setting.levels], int(cr4),
            RESET_EFER if setting.nxe else RESET_EFER & ~int(Efer.NXE), setting.pkru or 0,
        )
        mmu.read_ac = lambda ac=setting.ac: ac
        la = permissions.LA[setting.levels]
        if case.leaf == 1 and rng.getrandbits(1):
            # The neighbour's walk caches the tables, so that the page itself is looked up by the hot path.
            memory.write_u64(permissions.slots(setting.levels)[-1] + 8, permissions.FRAME + 0x1000 | OPEN)
            with contextlib.suppress(PageFault):
                mmu.translate(la + 0x1000, X)
        accesses = [R, W] if setting.kind == permissions.IMPLICIT else [R, W, X]
        rng.shuffle(accesses)
        for access in accesses * 2:  # what a fault drops and a hit serves must agree too
            expected = walked(mmu, case, la, access)
            got = filled(mmu, case, la, access)
            if isinstance(expected, str) or isinstance(got, str):
                assert got == expected, (permissions.describe_difference(
                    case, permissions.Outcome(None, case.entries), permissions.Outcome(None, case.entries)), Access(access))
                continue
            assert got & PHYSICAL_MASK == expected
            right = {R: Grant.R, W: Grant.W, X: Grant.X}
            assert got & right[access], "the right asked for is granted"
            assert not (got & Grant.W and got & Grant.X)
            for other in (R, W, X):
                if got & right[other] and not (other is X and setting.kind == permissions.IMPLICIT):
                    assert walked(mmu, case, la, other) == expected, "no right is granted that the walker refuses"
            leaf = memory.read_u64(permissions.slots(setting.levels)[len(case.entries) - 1])
            assert leaf & A
            assert leaf & D or not got & Grant.W, "no write right is granted while D is clear"
        mmu.validate()
        assert mmu.stale(tables=True) == []


@pytest.mark.parametrize("mode", ["infinite", "finite", "none"])
def test_after_a_correct_invalidation_every_access_agrees_with_memory(mode: str) -> None:
    """Random edits of leaves and tables, each followed by the INVLPG that the SDM asks for, in random company."""
    rng = random.Random(11)
    tables = Tables()
    pages = [LA + (rng.randrange(4) << 30) + (rng.randrange(3) << 21) + (rng.randrange(4) << 12) for _ in range(24)]
    for page in pages:
        tables.map(page, PA, OPEN)
    mmu = Mmu(tables.memory, mode)
    mmu.reset(cr3=ROOT, cr4=RESET_CR4 | int(Cr4.PGE))
    for step in range(3000):
        page = rng.choice(pages)
        what = rng.randrange(10)
        if what == 0:
            flags = OPEN & ~rng.choice((0, RW, US, P, A | D, D)) | rng.choice((0, XD, G))
            tables.map(page, rng.randrange(16) << 12 | PA, flags)
            mmu.invlpg(page)
        elif what == 1:
            # A table entry's rights: the TLB entries below it go one by one, and with any of them the cached tables.
            level = rng.choice((2, 3, 4))
            bit = rng.choice((RW, US))
            current = tables.entry(page, level)
            tables.change(page, level, set_=bit & ~current, clear=bit & current)
            for other in pages:
                if other >> (9 * level + 3) == page >> (9 * level + 3):
                    mmu.invlpg(other)
        elif what == 2:
            mmu.load_cr3(ROOT)
        else:
            access, user = rng.choice((R, W, X)), bool(rng.getrandbits(1))
            try:
                expected: int | str = walk(tables.memory, mmu.regs, page, access, user, set_ad=False).pa
            except PageFault as fault:
                expected = f"error {fault.error:#x}"
            try:
                got: int | str = mmu.fill(page, access, user) & PHYSICAL_MASK
            except PageFault as fault:
                got = f"error {fault.error:#x}"
            assert got == expected, (step, hex(page))
        if step % 100 == 0:
            mmu.validate()
            assert mmu.stale(tables=True) == []


# ---------------------------------------------------------------------------------------------------- Python-side accesses


def test_an_access_across_pages_uses_both_frames() -> None:
    mmu, tables = machine()
    tables.map(LA + 0x1000, PA + 0x8000)
    mmu.write(LA + 0xFFC, b"abcdefgh")
    assert tables.memory.read(PA + 0xFFC, 4) == b"abcd"
    assert tables.memory.read(PA + 0x8000, 4) == b"efgh"
    assert mmu.read(LA + 0xFFC, 8) == b"abcdefgh"


def test_a_crossing_write_that_faults_reports_the_second_page_and_stores_nothing() -> None:
    mmu, tables = machine()
    with pytest.raises(PageFault) as fault:
        mmu.write(LA + 0xFFC, b"abcdefgh", user=True)
    assert (fault.value.la, fault.value.error) == (LA + 0x1000, PfError.W | PfError.U)
    assert tables.memory.read(PA + 0xFFC, 4) == bytes(4)


def test_a_fault_of_translate_has_the_exact_address() -> None:
    mmu, _ = machine(OPEN & ~US)
    for _ in range(2):
        with pytest.raises(PageFault) as fault:
            mmu.translate(LA + 0x123, R, user=True)
        assert fault.value.la == LA + 0x123
        mmu.translate(LA, R)


def test_an_access_does_not_wrap_at_the_top_of_the_address_space() -> None:
    mmu, tables = machine()
    tables.map(0xFFFF_FFFF_FFFF_F000, PA)
    tables.map(0, PA + 0x1000)
    with pytest.raises(NonCanonical):
        mmu.read(0xFFFF_FFFF_FFFF_FFFC, 8)


# ---------------------------------------------------------------------------------------------------- registers


@pytest.mark.parametrize(
    ("load", "value"),
    [
        ("load_cr0", RESET_CR0 & ~int(Cr0.PG)), ("load_cr0", RESET_CR0 & ~int(Cr0.PE)), ("load_cr0", RESET_CR0 | int(Cr0.NW)),
        ("load_cr0", RESET_CR0 | 1 << 32), ("load_cr3", 1 << 40), ("load_cr3", CR3_NO_INVALIDATE),
        ("load_cr4", 0), ("load_cr4", RESET_CR4 | Cr4.LA57), ("load_cr4", RESET_CR4 | 1 << 24),
        ("load_efer", RESET_EFER | 1 << 1), ("load_efer", RESET_EFER & ~int(Efer.LME)),
    ],
)
def test_a_register_value_that_hardware_refuses_is_gp_and_changes_nothing(load: str, value: int) -> None:
    mmu, _ = machine()
    mmu.fill(LA, R, True)
    before = (mmu.cr0, mmu.cr3, mmu.cr4, mmu.efer, mmu.regs, mmu.listing())
    with pytest.raises(GeneralProtection):
        getattr(mmu, load)(int(value))
    assert (mmu.cr0, mmu.cr3, mmu.cr4, mmu.efer, mmu.regs, mmu.listing()) == before


def test_pcide_cannot_be_set_while_cr3_names_a_pcid() -> None:
    mmu, _ = machine()
    mmu.load_cr3(ROOT | 0x18)  # PWT and PCD while PCIDE is 0
    with pytest.raises(GeneralProtection):
        mmu.load_cr4(mmu.cr4 | int(Cr4.PCIDE))
    mmu.load_cr3(ROOT)
    mmu.load_cr4(mmu.cr4 | int(Cr4.PCIDE))


def test_a_feature_that_cpuid_lacks_makes_its_control_bit_reserved() -> None:
    tables = Tables()
    mmu = Mmu(tables.memory, features=Features(pku=False, nx=False))
    with pytest.raises(GeneralProtection):
        mmu.load_cr4(RESET_CR4 | int(Cr4.PKE))
    with pytest.raises(GeneralProtection):
        mmu.load_efer(RESET_EFER | int(Efer.SCE))
    mmu.load_efer(RESET_EFER & ~int(Efer.NXE))


def test_efer_lma_is_read_only_and_cr0_et_stays_set() -> None:
    mmu, _ = machine()
    mmu.load_efer(int(Efer.LME | Efer.SCE))
    assert mmu.efer == Efer.LME | Efer.LMA | Efer.SCE
    mmu.load_cr0(RESET_CR0 & ~int(Cr0.ET))
    assert mmu.cr0 == RESET_CR0


def test_five_levels_are_chosen_at_construction() -> None:
    tables = Tables(5)
    mmu = Mmu(tables.memory, levels=5)
    mmu.reset(cr3=ROOT)
    tables.map(0x00AB_0000_0000_0000, PA)
    assert mmu.fill(0x00AB_0000_0000_0000, R, True) & PHYSICAL_MASK == PA
    with pytest.raises(ValueError, match="LA57"):
        Mmu(tables.memory, levels=5, features=Features(la57=False))
    with pytest.raises(ValueError, match="levels is 3"):
        Mmu(tables.memory, levels=3)


def test_the_protection_key_of_a_large_page_counts() -> None:
    mmu, _ = machine(OPEN | 2 << PKEY_SHIFT, level=2, cr4=RESET_CR4 | Cr4.PKE)
    mmu.load_pkru(2 << 4)
    assert mmu.fill(LA + 0x4000, R, True) == 0x4000 | Grant.R
    with pytest.raises(PageFault) as fault:
        mmu.fill(LA + 0x4000, W, True)
    assert fault.value.error == PfError.P | PfError.W | PfError.U | PfError.PK
