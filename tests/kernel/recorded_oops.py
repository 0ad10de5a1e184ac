"""Reads recorded kernel logs back into the facts an oops was printed from, so that it can be printed again.

A symbolised address has lost its number: each such text gets an address of its own, and `symbolize` gives the text back.
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from emu.kernel.oops import CUT_HERE, KERNEL_TEXT, Controls, KernelBuild, OopsSource, OopsState, Task
from emu.kernel.ptrace import PtRegs
from emu.kernel.taint import TAINT_FLAGS, Taint
from emu.kernel.unwind import StackSection, StackType, TraceLine
from emu.mmu.fault import PageFault

ORACLE = Path(os.environ.get("VMEMU_ORACLE", Path(__file__).parents[3] / "shared" / "oracle"))
HEX = "([0-9a-f]+)"
_CPU = re.compile(r"CPU: (\d+) (?:UID: (\d+) )?PID: (\d+) Comm: (\S+) (Not tainted|Tainted: .{19}) (\S+) (.*)$")
_PAIR = re.compile(rf"\b(R[A-Z0-9]{{2}}|EFLAGS|ORIG_RAX|CR[0-4]|CS|DS|ES): +(?:[0-9a-f]{{4}}:)?{HEX}(?![:+\w])")
_SEGMENT_BASES = re.compile(rf"FS:  {HEX}\({HEX}\) GS:{HEX}\({HEX}\) knlGS:{HEX}$")


def messages(version: str, log: str = "faults") -> list[str]:
    path = ORACLE / "messages" / f"{log}-{version}-4l.txt.gz"
    if not path.exists():
        pytest.skip(f"no recorded messages at {path}")
    # The serial console ended its lines with CR LF.
    return gzip.decompress(path.read_bytes()).decode().replace("\r", "").split("\n")


@dataclass
class Symbols:
    """Addresses for symbol texts, and the bytes recorded at them."""

    texts: dict[int, str] = field(default_factory=dict)
    code: dict[int, bytes | PageFault] = field(default_factory=dict)

    def symbolize(self, la: int) -> str | None:
        return self.texts.get(la)

    def read(self, la: int, size: int) -> bytes:
        data = self.code[la]
        if isinstance(data, PageFault):
            raise data
        assert len(data) == size
        return data

    def _fresh(self) -> int:
        return 0xFFFFFFFF_81000000 + 0x1000 * (len(self.texts) + 1)

    def instruction(self, text: str, code_line: str, cr2: int) -> int:
        """The address of a RIP: line, with the bytes (or the failure) of the Code: line below it remembered."""
        failed = re.fullmatch(rf"Code: Unable to access opcode bytes at 0x{HEX}\.", code_line)
        if failed:
            prologue = int(failed[1], 16)
            la = prologue + 42
            self.code[prologue] = PageFault(cr2, 0, 1, 0)
        else:
            la = int(text, 16) if text.startswith("0x") else self._fresh()
            self.code[la - 42] = bytes.fromhex(re.sub("[<>]|Code: ", "", code_line))
        if not text.startswith("0x"):
            self.texts[la] = text
        return la

    def return_address(self, text: str) -> int:
        if text.startswith("0x"):
            return int(text, 16)
        la = self._fresh()
        self.texts[la - 1] = re.sub(rf"\+0x{HEX}/", lambda found: f"+0x{int(found[1], 16) - 1:x}/", text, count=1)
        return la


@dataclass
class Recorded:
    """One printed report: its own lines, and what they say."""

    lines: list[str]
    symbols: Symbols

    def index(self, start: str, after: int = 0) -> int:
        return next(i for i in range(after, len(self.lines)) if self.lines[i].startswith(start))

    def cpu_line(self) -> re.Match[str]:
        found = next(match for line in self.lines if (match := _CPU.match(line)))
        return found

    def task(self) -> Task:
        found = self.cpu_line()
        return Task(found[4], int(found[3]), int(found[1]), int(found[2] or 0))

    def tainted(self) -> Taint:
        letters = self.cpu_line()[5].removeprefix("Tainted: ")
        tainted = Taint(0)
        for row, letter in zip(TAINT_FLAGS, letters, strict=False):
            if letter == row.c_true:
                tainted |= row.flag
        return tainted

    def build(self) -> KernelBuild:
        found = self.cpu_line()
        hardware = self.lines[self.index("Hardware name: ")].removeprefix("Hardware name: ")
        # The machine that was recorded restarts at once after a panic.
        return KernelBuild(found[6], found[7], hardware, panic_timeout=-1)

    def modules(self) -> list[str]:
        return self.lines[self.index("Modules linked in:")].split()[3:]

    def regs(self, at: int) -> PtRegs:
        """The frame printed from line `at`, which begins with RIP:."""
        values: dict[str, int] = {}
        for line in self.lines[at + 2 : at + 8]:
            values.update({name: int(value, 16) for name, value in _PAIR.findall(line)})
        rip = re.match(rf"RIP: {HEX}:(.*)$", self.lines[at])
        ss = re.match(rf"RSP: {HEX}:", self.lines[at + 2])
        assert rip and ss
        cr2 = self.controls(at).cr2 if self.lines[at + 8].startswith("FS: ") else 0
        general = {name: values["R" + name.upper()] for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")}
        general |= {f"r{n}": values[f"R{n:02}" if n < 10 else f"R{n}"] for n in range(8, 16)}
        return PtRegs(
            **general,
            ip=self.symbols.instruction(rip[2], self.lines[at + 1], cr2),
            cs=int(rip[1], 16),
            ss=int(ss[1], 16),
            flags=values["EFLAGS"],
            orig_ax=values.get("ORIG_RAX", (1 << 64) - 1),
        )

    def controls(self, at: int) -> Controls:
        bases = _SEGMENT_BASES.match(self.lines[at + 8])
        assert bases
        values = {name: int(value, 16) for line in self.lines[at + 9 : at + 11] for name, value in _PAIR.findall(line)}
        pkru = int(self.lines[at + 11].removeprefix("PKRU: "), 16)
        fs, fs_sel, gs, gs_sel, kernel_gs = (int(value, 16) for value in bases.groups())
        return Controls(
            values["CR0"], values["CR2"], values["CR3"], values["CR4"], fs, gs, kernel_gs, fs_sel, gs_sel,
            values["DS"], values["ES"], pkru,
        )  # fmt: skip

    def trace(self) -> Sequence[StackSection]:
        at = self.index("Call Trace:") + 2
        assert self.lines[at - 1] == " <TASK>"
        items: list[TraceLine | PtRegs] = []
        while self.lines[at] != " </TASK>":
            if self.lines[at].startswith("RIP: "):
                items.append(self.regs(at))
                at += 8
                continue
            text = self.lines[at][1:]
            reliable = not text.startswith("? ")
            items.append(TraceLine(self.symbols.return_address(text.removeprefix("? ")), reliable))
            at += 1
        return [StackSection(StackType.TASK, tuple(items))]


_OOPS_STARTS = ("BUG: ", "Oops: ", "kernel tried", "general protection", "stack guard page", "invalid opcode")


def reports(lines: list[str]) -> Iterator[Recorded]:
    """Every WARN, oops and plain stack dump of a log, in order, with all lines from first to last."""
    symbols, at = Symbols(), 0
    while at < len(lines):
        line = lines[at]
        is_dump = _CPU.match(line) is not None
        if line != CUT_HERE and not line.startswith(_OOPS_STARTS) and not is_dump:
            at += 1
            continue
        end = at + 1
        if is_dump:
            while not lines[end].startswith(" </TASK>"):
                end += 1
        else:
            while not lines[end].startswith("---[ end trace"):
                end += 1
            if any(" [#" in text for text in lines[at:end]):
                while not lines[end].startswith("PKRU: "):
                    end += 1
                while lines[end + 1].startswith(("note: ", "Kernel panic", "Kernel Offset")):
                    end += 1
        yield Recorded(lines[at : end + 1], symbols)
        at = end + 1


def source(version: str, recorded: Recorded, registers_at: list[int]) -> OopsSource:
    """Facts of a recorded report; controls() answers from each register block in turn."""
    blocks = iter(registers_at)
    trace = recorded.trace()
    return OopsSource(
        text=KERNEL_TEXT[version],
        build=recorded.build(),
        task=recorded.task(),
        read=recorded.symbols.read,
        controls=lambda: recorded.controls(next(blocks)),
        symbolize=recorded.symbols.symbolize,
        trace=lambda regs: trace,
        modules=recorded.modules() if any(line.startswith("Modules") for line in recorded.lines) else (),
    )


def prepare_oops(version: str, recorded: Recorded, state: OopsState) -> tuple[OopsSource, PtRegs]:
    """The facts and registers of a recorded oops, ready to be printed as the next one of the log that `state` is at."""
    first = recorded.index("RIP: ")
    end = recorded.index("---[ end trace")
    summary = recorded.index("RIP: ", end)
    regs = recorded.regs(first)
    summary_regs = recorded.regs(summary)
    if state.exec_summary_regs is None:
        recorded.symbols.texts[regs.ip] = recorded.symbols.texts[summary_regs.ip]
    else:
        # The summary's registers must be those of the first oops of the log, not what this block says.
        remembered = state.exec_summary_regs
        recorded.symbols.texts[remembered.ip] = recorded.symbols.texts[summary_regs.ip]
        recorded.symbols.code[remembered.ip - 42] = recorded.symbols.code[summary_regs.ip - 42]
    return source(version, recorded, [first, summary]), regs
