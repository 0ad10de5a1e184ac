"""Results as people and programs read them: text, a table, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from emu.exceptions import HAS_ERROR_CODE
from emu.explore import ExploredFile
from emu.guest.directives import VECTOR_NAMES
from emu.guest.expect import Fault
from emu.kernel.kernel import Kernel
from emu.kernel.meminfo import meminfo_figures
from emu.kernel.ptdump import LEVEL_NAMES as PTDUMP_LEVELS
from emu.kernel.ptdump import Marker, PtDump, Row, row_text
from emu.kernel.vmallocinfo import vmallocinfo
from emu.kernel.walk_report import WalkReport
from emu.run import RunResult
from emu.tlbsan import finding_json
from emu.trace import Delivery, Event, FlushIssued, FunctionCall, TlbFlushed


def vector_name(vector: int) -> str:
    """ "#PF" and its like; "vector 32" for an interrupt."""
    return VECTOR_NAMES.get(vector, f"vector {vector}")


def fault_text(fault: Fault) -> str:
    """One line: vector, error code, address, RIP."""
    error = f" error {fault.error:#06x}" if fault.vector in HAS_ERROR_CODE and fault.error is not None else ""
    address = f" at {fault.address:#x}" if fault.address is not None else ""
    return f"{vector_name(fault.vector)}{error}{address}, RIP {fault.rip:#x}"


def ending_text(result: RunResult) -> str:
    """How the run ended, in a few words."""
    outcome = result.outcome
    if outcome.ended == "returned":
        value = outcome.returned or 0
        low = value & 0xFFFF_FFFF
        return f"returned {low - ((low & 0x8000_0000) << 1)}"
    if outcome.ended == "limit":
        return f"reached its limit of {result.max_instructions} instructions"
    return f"ended by {outcome.ended}"


def verdict(result: RunResult) -> str:
    """The one line that every run ends with."""
    return f"{'PASS' if result.ok else 'FAIL'} {result.path}: {ending_text(result)}"


def run_text(result: RunResult, *, verbose: bool = False, evidence: Sequence[str] = ()) -> str:
    """Log, faults with where their addresses lie, failed expectations, what `evidence` says of them, verdict."""
    lines: list[str] = []
    if verbose:
        lines += [event_text(event) for event in result.events]
        lines.append("")
    lines += result.outcome.log
    if result.outcome.log:
        lines.append("")
    shown = list(result.outcome.faults)[:8]
    places = iter(result.places)
    for fault in shown:
        lines.append(f"vmemu: {fault_text(fault)}")
        if fault.address is not None:
            lines.append(f"       {next(places)}")
    # Interrupts are no faults: the first vector that is one is 32.
    hidden = sum(count for vector, count in result.statistics.exceptions.items() if vector < 32 and vector != 2) - len(shown)
    if hidden > 0:
        lines.append(f"vmemu: {hidden} more")
    lines += [f"vmemu: {failure}" for failure in result.failures]
    if evidence:
        lines += ["", *evidence]
    lines.append(verdict(result))
    return "\n".join(lines)


def event_text(event: Event) -> str:
    """One line for an event of a run."""
    match event:
        case Delivery(cpu=cpu, vector=vector, error=error, rip=rip, cr2=cr2):
            code = "" if error is None else f" error {error:#06x}"
            address = "" if cr2 is None else f" CR2 {cr2:#x}"
            return f"cpu{cpu}: {vector_name(vector)}{code}{address} RIP {rip:#x}"
        case FunctionCall(cpu=cpu, name=name, arguments=arguments, result=result):
            return f"cpu{cpu}: {name}({', '.join(f'{a:#x}' for a in arguments)}) = {result:#x}"
        case FlushIssued(cpu=cpu, start=start, end=end, cause=cause, cpus=cpus):
            return f"cpu{cpu}: {cause} asks CPUs {', '.join(map(str, cpus))} for a TLB flush of {_range_text(start, end)}"
        case TlbFlushed(cpu=cpu, start=start, end=end):
            return f"cpu{cpu}: TLB flush of {_range_text(start, end)}"


def _range_text(start: int, end: int) -> str:
    return "everything" if end - start >> 64 else f"{start:#x}-{end:#x}"


def explored_text(explored: ExploredFile, evidence: Sequence[str] = ()) -> str:
    """What was explored; on a failure the report of the shrunk schedule, and the command that plays it again."""
    ran = f"{explored.schedules} schedule{'s' if explored.schedules != 1 else ''}"
    if explored.found is None:
        rest = ", among them all there are with so few preemptions" if explored.exhausted else ""
        return f"PASS {explored.path}: {ran}{rest}, and each ended as expected"
    lines = [run_text(explored.result, evidence=evidence)] if explored.result is not None else []
    lines.append("")
    lines.append(f"vmemu: schedule {explored.schedules} fails; again, with as few preemptions as can be:")
    lines.append(f"vmemu run {explored.path} --schedule '{explored.schedule}'")
    return "\n".join(lines)


def explored_json(explored: ExploredFile, evidence: Sequence[str] = ()) -> dict[str, Any]:
    """The same as plain data; docs/json.md describes it."""
    return {
        "file": explored.path,
        "ok": explored.found is None,
        "schedules": explored.schedules,
        "exhausted": explored.exhausted,
        "found": explored.found,
        "schedule": explored.schedule,
        "run": None if explored.result is None else run_json(explored.result, evidence),
    }


def run_json(result: RunResult, evidence: Sequence[str] = ()) -> dict[str, Any]:
    """The result and what `evidence` says of a finding, as plain data; docs/json.md describes it."""
    outcome = result.outcome
    places = iter(result.places)
    return {
        "file": result.path,
        "ok": result.ok,
        "machine": dataclasses.asdict(result.config) | {"max_instructions": result.max_instructions},
        "ended": outcome.ended,
        "returned": outcome.returned,
        "failures": list(result.failures),
        "evidence": list(evidence),
        "faults": [
            {
                "vector": int(fault.vector),
                "name": vector_name(fault.vector),
                "error": fault.error,
                "address": fault.address,
                "place": None if fault.address is None else next(places),
                "rip": fault.rip,
            }
            for fault in outcome.faults
        ],
        "exceptions": {vector_name(v): n for v, n in sorted(result.statistics.exceptions.items())},
        "kernel_calls": dict(sorted(result.statistics.kernel_calls.items())),
        "flushes": result.statistics.flushes,
        "full_flushes": result.statistics.full_flushes,
        "counts": dict(outcome.counts),
        "tlbsan": [finding_json(finding) for finding in result.findings],
        "log": list(outcome.log),
    }


def vmallocinfo_json(result: RunResult, kernel: Kernel) -> dict[str, Any]:
    """The rows of /proc/vmallocinfo and the vmalloc lines of /proc/meminfo after a run."""
    rows = []
    for row in vmallocinfo(kernel.vmalloc, kernel.symbol_text):
        fields = dataclasses.asdict(row) | {"size": row.end - row.start, "tags": list(row.tags), "text": row.text()}
        rows.append(fields | {"nodes": {str(nid): count for nid, count in row.nodes}})
    return _state_json(result) | {"areas": rows, "meminfo": meminfo_figures(kernel)}


def ptdump_json(result: RunResult, dump: PtDump) -> dict[str, Any]:
    """The page-table dump after a run: its rows, each with the part of the address space it is in."""
    rows: list[dict[str, Any]] = []
    part = ""
    for row in dump.rows():
        if isinstance(row, Marker):
            part = row.name
        elif isinstance(row, Row):
            rows.append({
                "part": part, "start": row.start, "end": row.end, "level": PTDUMP_LEVELS[row.level], "flags": row.prot,
                "text": row_text(row),
            })
    return _state_json(result) | {"pgd": dump.pgd, "rows": rows}


def walk_json(result: RunResult, report: WalkReport, place: str) -> dict[str, Any]:
    """The walk of one address after a run."""
    fields = dataclasses.asdict(report)
    steps = [dataclasses.asdict(step) | {"bits": list(step.bits)} for step in report.steps]
    return _state_json(result) | fields | {"steps": steps, "rights": list(report.rights), "place": place}


def _state_json(result: RunResult) -> dict[str, Any]:
    machine = dataclasses.asdict(result.config) | {"max_instructions": result.max_instructions}
    return {"file": result.path, "ok": result.ok, "machine": machine, "ended": result.outcome.ended}


def dump_json(results: Sequence[dict[str, Any]] | dict[str, Any]) -> str:
    """One JSON array or object, stable to the byte for the same results."""
    return json.dumps(results if isinstance(results, dict) else list(results), indent=2, ensure_ascii=True)


def summary_rows(results: Sequence[RunResult]) -> list[tuple[str, str, str, str]]:
    """File, verdict, ending and first fault of each run, for a table."""
    rows = []
    for result in results:
        first = fault_text(result.outcome.faults[0]) if result.outcome.faults else "-"
        rows.append((result.path, "PASS" if result.ok else "FAIL", ending_text(result), first))
    return rows


def counts_text(results: Sequence[RunResult], errors: int) -> str:
    """The last line of a run of several files."""
    passed = sum(result.ok for result in results)
    text = f"{passed} passed, {len(results) - passed} failed"
    return text + (f", {errors} could not be run" if errors else "")


