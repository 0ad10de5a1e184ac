"""Tracepoints as ftrace text, against a file that a kernel printed and against what its readers expect."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest

from emu.debug.ftrace import FtraceWriter
from emu.debug.records import AnyRecord, Logged, Vmalloc
from emu.debug.tracer import traced_run
from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.guest.load import load
from emu.kernel.vmap_events import tracepoint_text
from emu.run import configure

ROOT = Path(__file__).resolve().parents[2]
ORACLE = Path(os.environ.get("VMEMU_ORACLE", ROOT.parent / "shared" / "oracle"))
RECORDED = ORACLE / "messages" / "stale-6.12-4l.txt.gz"
# What readers of systrace text look for in a line: task, pid, tgid, CPU, flags, time, event, the rest.
LINE = re.compile(r"^\s*(.+)-(\d+)\s+(\(\s*[\d-]+\)\s+)?\[(\d+)\]\s+([a-zA-Z0-9.]{5})\s+(\d+\.\d+):\s+(\w+):\s(.*)$")
NUMBER = re.compile(r"0x([0-9a-f]+)|(\d+)")
HEADER = """\
# tracer: nop
#
# entries-in-buffer/entries-written: 0/0   #P:1
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""


def written(records: list[AnyRecord]) -> str:
    parts: list[str] = []
    writer = FtraceWriter(parts.append)
    for record in records:
        writer(record)
    writer.close()
    return "".join(parts)


def traced(path: Path, options: MachineOptions) -> str:
    program = load(str(path))
    parts: list[str] = []
    writer = FtraceWriter(parts.append)
    traced_run(program, configure(program.directives.machine, options)[0], 100_000, writer, memory=False)
    writer.close()
    return "".join(parts)


def test_a_run_without_tracepoints_is_the_header_of_the_kernel() -> None:
    assert written([]) == written([Logged(3, 0, 100, "init", "text")]) == HEADER


@pytest.mark.skipif(not RECORDED.exists(), reason="no recorded kernel messages (VMEMU_ORACLE names the folder)")
def test_the_file_that_a_6_12_kernel_printed_comes_out_of_its_events_to_the_byte() -> None:
    messages = gzip.decompress(RECORDED.read_bytes()).decode().replace("\r", "")
    file = messages.partition("@@@ traceout\n")[2].partition("@@@ end traceout")[0]
    records: list[AnyRecord] = []
    for line in file.splitlines():
        if not line.startswith("#"):
            found = LINE.match(line)
            assert found is not None, line
            comm, pid, _, cpu, flags, time, name, fields = found.groups()
            values = tuple(int(a, 16) if a else int(b) for a, b in NUMBER.findall(fields))
            step = int(time.replace(".", ""))
            records.append(Vmalloc(step, int(cpu), int(pid), comm, name, tracepoint_text(name, values), flags))
    assert len(records) == 156
    assert {record.name for record in records if isinstance(record, Vmalloc)} == {
        "alloc_vmap_area", "free_vmap_area_noflush", "purge_vmap_area_lazy",
    }
    assert written(records) == file


def test_every_line_of_a_run_is_one_that_readers_take_and_the_header_counts_them() -> None:
    text = traced(ROOT / "guest" / "use_after_free.asm", MachineOptions(cpus=2))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines
    assert all(LINE.match(line) for line in lines)
    assert f"# entries-in-buffer/entries-written: {len(lines)}/{len(lines)}   #P:2\n" in text


def test_the_idle_task_has_the_name_that_the_kernel_gives_it() -> None:
    line = written([Vmalloc(15, 3, 0, "swapper/3", "purge_vmap_area_lazy", "start=0x0 end=0x0 num_purged=0", "d..2.")])
    assert line.endswith(
        "\n          <idle>-0       [003] d..2.     0.000015: purge_vmap_area_lazy: start=0x0 end=0x0 num_purged=0\n"
    )
    assert "#P:4\n" in line


def test_a_vfree_in_a_guest_prints_the_fields_of_the_areas_it_frees() -> None:
    program = assemble("mov edi, 0x3000\ncall vmalloc\nmov rdi, rax\ncall vfree\nxor eax, eax\nret\n", "guest.asm")
    records: list[AnyRecord] = []
    _, outcome = traced_run(program, configure(program.directives.machine, MachineOptions())[0], 1000, records.append)
    assert outcome.returned == 0
    ours = [line for line in written(records).splitlines() if "guest" in line]
    start = int(ours[0].partition("va_start: ")[2].split()[0])
    assert ours[0].partition(": ")[2].startswith(f"alloc_vmap_area: va_start: {start} size=16384 align=1 vstart=0xffffc9")
    assert ours[1].partition(": ")[2] == f"free_vmap_area_noflush: va_start={start:#x} nr_lazy=4 nr_lazy_max=8192"
