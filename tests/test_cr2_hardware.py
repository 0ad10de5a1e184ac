"""The real CPU as oracle: emu.operands names the address and the error bits that it reports, for all its instructions.

Model-specific behaviour is compared on the vendor where it was measured, Intel. MASKMOVDQU and MASKMOVQ are compared
nowhere: which bytes they touch first, or at all, depends on the mask and the model (Intel checks the upper half first,
AMD reports the first byte).
"""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hardware.instructions import (
    CODE_BEFORE_ABSENT,
    CODE_BEFORE_NX,
    DATA,
    GPR,
    PAGE,
    RIGHTS,
    Case,
    cases,
    expected,
)

from emu.operands import accesses, decode

SEED = 20250611
CASES = 20_000

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
PROTECTION = {"W": PROT_READ | PROT_WRITE, "R": PROT_READ, "N": 0}
REGIONS = [
    *((DATA + n * PAGE, 1, PROTECTION[right]) for n, right in enumerate(RIGHTS)),
    (CODE_BEFORE_ABSENT, 1, PROT_READ | PROT_WRITE | PROT_EXEC),
    (CODE_BEFORE_ABSENT + PAGE, 1, 0),
    (CODE_BEFORE_NX, 1, PROT_READ | PROT_WRITE | PROT_EXEC),
    (CODE_BEFORE_NX + PAGE, 1, PROT_READ | PROT_WRITE),
]

DB, BP, UD, SS, GP, PF = 1, 3, 6, 12, 13, 14
USER = 4
NON_CANONICAL = 0x0123_4567_89AB_0000

NOWHERE = frozenset(("maskmovdqu", "maskmovq"))
MEASURED_ON_INTEL = frozenset(
    "retf retfq iret iretd iretq cmpsb cmpsw cmpsd cmpsq enter fxsave fxsave64 fxrstor fxrstor64 fnsave frstor "
    "fnstenv fldenv xsave xsave64 xsaveopt xsaveopt64 xsavec xsavec64 xrstor xrstor64 lss lfs lgs movdir64b".split()
)


class Cpu:
    """The program that runs instructions on the CPU under the test."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()

    def run(self, batch: list[Case]) -> list[tuple[int, int, int, int]]:
        """(vector, error code, CR2, RIP) of each."""
        request = [struct.pack("<2I", len(REGIONS), len(batch)), *(struct.pack("<QII", *region) for region in REGIONS)]
        for case in batch:
            registers = case.registers
            request.append(struct.pack("<Q15sB", case.code_la, case.code, len(case.code)))
            request.append(struct.pack("<4Q", case.rflags, registers["fs_base"], registers["gs_base"], case.vectors))
            request.append(struct.pack("<16Q", *(registers[name] for name in GPR)))
        reply = subprocess.run([self.program], input=b"".join(request), capture_output=True, timeout=120, check=True)
        return list(struct.iter_unpack("<2I2Q", reply.stdout))

    def compared(self, case: Case) -> bool:
        """Whether what the CPU does with this instruction is known for this vendor."""
        mnemonic = case.instruction.mnemonic
        if mnemonic in NOWHERE:
            return False
        pops_segment = mnemonic == "pop" and case.accesses[0].size == 2
        near_with_66 = mnemonic in ("call", "ret", "jmp") and b"\x66" in case.code[:4]
        return self.intel or not (mnemonic in MEASURED_ON_INTEL or pops_segment or near_with_66)


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Cpu:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 Linux host")
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("needs gcc")
    program = tmp_path_factory.mktemp("cpu") / "faults"
    source = Path(__file__).parent / "hardware" / "faults.c"
    # Thread-local storage is not ours inside the handler, and a shadow stack would see returns that were never called.
    options = ["-O2", "-fno-stack-protector", "-fcf-protection=none", "-fno-strict-aliasing"]
    subprocess.run([gcc, *options, "-o", program, source], check=True)
    cpu = Cpu(program)
    try:
        outcome = cpu.run([_case(b"\x88\x03", rbx=DATA + 2 * PAGE)])[0]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this host does not let the pages be mapped: exit code {error.returncode}")
    if outcome[:3] != (PF, USER | 2, DATA + 2 * PAGE):
        pytest.skip(f"signal frames here do not carry error code and CR2: {outcome}")
    return cpu


def _case(code: bytes, **registers: int) -> Case:
    values = dict.fromkeys((*GPR, "fs_base", "gs_base"), DATA) | {"fs_base": 0, "gs_base": 0} | registers
    instruction = decode(code, CODE_BEFORE_NX)
    touched = accesses(instruction, CODE_BEFORE_NX, values.__getitem__)
    return Case(code, CODE_BEFORE_NX, values, 2, 0, instruction, touched)


def test_the_real_cpu_reports_the_address_and_error_bits_that_operands_names(cpu: Cpu) -> None:
    batch = list(cases(SEED, CASES, user=True))
    wrong: list[str] = []
    mnemonics: Counter[str] = Counter()
    faults = 0
    for case, (vector, error, cr2, _) in zip(batch, cpu.run(batch), strict=True):
        if vector not in (DB, BP, PF) or not cpu.compared(case):
            continue  # #UD: not in this CPU. #GP: alignment, or a null selector. #DE, #AC, #XM: after the access.
        want = expected(case)
        answer = None if want is None else (want.cr2, want.error | USER)
        measured = (cr2, error) if vector == PF else None
        mnemonics[case.instruction.mnemonic] += 1
        faults += vector == PF
        if measured != answer:
            wrong.append(f"{case}: want {_text(answer)}, the CPU says {_text(measured)}")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])
    assert mnemonics.total() > 0.75 * CASES
    assert faults > 0.3 * CASES
    assert len(mnemonics) > 300


def _text(outcome: tuple[int, int] | None) -> str:
    return "no fault" if outcome is None else f"CR2={outcome[0]:#x} error={outcome[1]:#x}"


def test_a_non_canonical_address_is_a_stack_fault_where_the_operand_is_a_stack_operand(cpu: Cpu) -> None:
    batch = []
    for prefix in (b"", b"\x64", b"\x65", b"\x2e", b"\x36", b"\x3e", b"\x36\x64", b"\x65\x3e"):
        for base in range(16):
            rex = bytes([0x48 | base >> 3])
            sib = b"\x24" if base & 7 == 4 else b""
            for opcode in (b"\x8b", b"\x89", b"\x01"):
                batch.append(_case(prefix + rex + opcode + bytes([0x40 | base & 7]) + sib + b"\x10"))
            as_index = b"\x48" if base < 8 else b"\x4a"
            if base != 4:
                batch.append(_case(prefix + as_index + b"\x8b\x44" + bytes([(base & 7) << 3 | 3]) + b"\x10"))
        for opcode in (
            b"\x50",
            b"\x58",
            b"\xc3",
            b"\x9c",
            b"\x9d",
            b"\xc9",
            b"\xe8\0\0\0\0",
            b"\xa4",
            b"\xaa",
            b"\xac",
            b"\xd7",
        ):
            batch.append(_case(prefix + opcode))
    for n, case in enumerate(batch):
        values = case.registers | dict.fromkeys(GPR, NON_CANONICAL // 2 if b"\x8b\x44" in case.code else NON_CANONICAL)
        touched = accesses(case.instruction, case.code_la, values.__getitem__)
        batch[n] = replace(case, registers=values, accesses=touched)
    wrong = [
        f"{case}: vector {vector}"
        for case, (vector, _, _, _) in zip(batch, cpu.run(batch), strict=True)
        if vector != (SS if case.accesses[0].stack else GP)
    ]
    assert not wrong, "\n".join(wrong)
