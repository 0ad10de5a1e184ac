"""`vmemu history FILE ADDRESS`, `vmemu diff FILE STEP1 STEP2`, and `--at STEP` of the commands that show a state."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from emu.guest.address import evaluate, parse_address
from emu.guest.directives import MachineOptions
from emu.guest.error import GuestError
from emu.guest.expect import Unreadable
from emu.guest.load import load

if TYPE_CHECKING:
    from emu.debug.address_history import AddressEvent
    from emu.debug.recording import Recording
    from emu.machine import Machine

OK, FINDING, WRONG_USE = 0, 1, 2
FORMS = (
    "a number, SYMBOL, SYMBOL+OFFSET, [ADDRESS] for the number that is stored there, or an area as vmallocinfo names it: START-END "
    "or the one that made it"
)
_RANGE = re.compile(r"(0x[0-9a-f]+)-(0x[0-9a-f]+)")
_SIZES = {1 << 12: "4 KiB", 1 << 21: "2 MiB", 1 << 30: "1 GiB"}
_HIDDEN = frozenset(("table cached", "table dropped"))
_RW, _US, _XD, _PHYSICAL = 2, 4, 1 << 63, (1 << 40) - (1 << 12)


class BadAddress(ValueError):
    """An address that cannot be told."""

    def __init__(self, text: str, why: object) -> None:
        super().__init__(f"address {text!r}: {why}; it must be {FORMS}")


@dataclass(frozen=True, slots=True)
class Known:
    """What an address may be made of: symbols, registers, memory, and areas as (start, end, who made it)."""

    symbol: Callable[[str], int | None]
    register: Callable[[str], int | None]
    read_u64: Callable[[int], int]
    areas: Iterable[tuple[int, int, str]]

    def address(self, text: str) -> int:
        """The number that an ADDRESS stands for. Raises BadAddress, which names the forms."""
        area = _RANGE.fullmatch(text.strip().lower())
        if area is not None and int(area[1], 0) < int(area[2], 0):
            return int(area[1], 0)
        named = [start for start, _, caller in self.areas if text in (caller, caller.partition(" ")[0])]
        if len(named) > 1:
            raise BadAddress(text, f"{len(named)} areas have it, at {', '.join(f'{start:#x}' for start in named[:8])}")
        if named:
            return named[0]
        try:
            return evaluate(parse_address(text), self.symbol, self.register, self.read_u64)
        except (ValueError, LookupError, Unreadable) as error:
            raise BadAddress(text, error.args[0] if error.args else error) from None


def _step(text: str) -> int:
    try:
        step = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= step < 1 << 61:
        raise argparse.ArgumentTypeError(f"{text} is out of range: 0 to {(1 << 61) - 1}")
    return step


def _records(text: str) -> int:
    try:
        count = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 2 <= count <= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text} is out of range: 2 to {1 << 32}")
    return count


def add_at(command: argparse.ArgumentParser) -> None:
    """Give a command that shows a state `--at STEP`."""
    command.add_argument("--at", type=_step, metavar="STEP",
                         help="the state when STEP instructions of all CPUs are complete since the guest's call (default: the end)")


def add_history(commands: Any, add_machine_options: Callable[[argparse.ArgumentParser], None]) -> list[argparse.ArgumentParser]:
    """Add both commands to an argument parser's `commands`; the caller sets their functions."""
    history = commands.add_parser(
        "history", help="tell when an address became mapped, writable, cached, stale, unmapped, and by whom",
        description="Run a guest, recording every store to page tables and every fill and flush of TLBs, and tell what happened to "
        "an address. docs/history.md explains the output.",
        epilog="exit status: 0 the guest ended as expected, 1 it did not, 2 wrong use or bad input",
    )
    history.add_argument("file", metavar="FILE", help="guest program, or a recording that --record wrote")
    history.add_argument("address", metavar="ADDRESS", help=FORMS)
    history.add_argument("--tables", action="store_true", help="tell what paging-structure caches take in and give up, too")
    kept = history.add_mutually_exclusive_group()
    kept.add_argument("--ring", type=_records, metavar="N", help="keep the last N records (default 524288)")
    kept.add_argument("--record", metavar="OUTPUT", help="keep all records, in a file that appears when it is whole")
    kept.add_argument("--at", type=_step, metavar="STEP", help="show walk, TLBs and area as they were at that step instead")
    history.add_argument("--json", action="store_true", help="print one JSON object")
    add_machine_options(history)
    diff = commands.add_parser(
        "diff", help="tell what changed in areas, page tables and TLBs between two steps of a guest's run",
        description="Run a guest up to two steps and tell what differs: areas, page tables, TLBs, paging-structure caches.",
        epilog="exit status: 0 both steps were reached, 2 wrong use or bad input",
    )
    diff.add_argument("file", metavar="FILE", help="guest program")
    diff.add_argument("step1", type=_step, metavar="STEP1", help="instructions of all CPUs since the guest's call")
    diff.add_argument("step2", type=_step, metavar="STEP2")
    diff.add_argument("--json", action="store_true", help="print one JSON object")
    add_machine_options(diff)
    return [history, diff]


def history_command(arguments: argparse.Namespace, overrides: MachineOptions) -> int:
    """Run `vmemu history` or `vmemu diff`; the exit status."""
    from emu.debug.recording import RecordingError

    try:
        if arguments.command == "diff":
            return _diff(arguments, overrides)
        return _at(arguments, overrides) if arguments.at is not None else _history(arguments, overrides)
    except (GuestError, RecordingError) as error:
        print(f"vmemu: {error}", file=sys.stderr)
    except (ValueError, MemoryError) as error:
        print(f"vmemu: {arguments.file}: {error}", file=sys.stderr)
    return WRONG_USE


# ---------------------------------------------------------------- vmemu history


def _history(arguments: argparse.Namespace, overrides: MachineOptions) -> int:
    from emu.debug.history import RING
    from emu.debug.recording import is_recording, load_recording, record

    place = None
    if is_recording(arguments.file):
        if overrides != MachineOptions() or arguments.record is not None or arguments.ring is not None:
            raise ValueError("this is a recording: it takes neither machine options nor --ring nor --record")
        recording = load_recording(arguments.file)
        known = Known(recording.tail.symbols.get, lambda name: None, _not_recorded, recording.tail.areas)
        la = known.address(arguments.address)
    else:
        recording, result, machine = record(load(arguments.file), overrides, ring=arguments.ring or RING, path=arguments.record)
        outcome = result.outcome
        la = Known(outcome.symbol, outcome.registers.get, outcome.read_u64, recording.tail.areas).address(arguments.address)
        place = machine.place_of(la)
    events = recording.address(la)
    if arguments.json:
        print(json.dumps(_history_json(recording, la, place, events), indent=2))
    else:
        shown = [event for event in events if arguments.tables or event.what not in _HIDDEN]
        print("\n".join(_history_lines(recording, la, place, shown)))
    if not recording.tail.ok:
        print(f"vmemu: {recording.head.file}: the run did not end as its header says: {recording.tail.ended}", file=sys.stderr)
    return OK if recording.tail.ok else FINDING


def _not_recorded(la: int) -> int:
    raise Unreadable(f"a recording has no memory to read at {la:#x}")


def _history_json(recording: Recording, la: int, place: str | None, events: list[AddressEvent]) -> dict[str, Any]:
    head, tail = recording.head, recording.tail
    return {
        "file": head.file, "ok": tail.ok, "machine": head.machine, "ended": tail.ended, "address": la, "place": place,
        "steps": tail.steps, "records": tail.records, "forgotten": recording.forgotten, "since": recording.since,
        "events": [asdict(event) | {"cpus": list(event.cpus), "differs": list(event.differs)} for event in events],
    }


def _history_lines(recording: Recording, la: int, place: str | None, events: list[AddressEvent]) -> list[str]:
    tail = recording.tail
    lines = [f"{la:#018x}" + (f": {place}" if place else "")]
    if recording.forgotten:
        lines.append(
            f"the first {recording.forgotten} records, up to step {recording.since}, are forgotten: --ring N or --record keeps more"
        )
    for event in events:
        thread = f"{event.comm}-{event.pid}" if event.place != "boot" else "-"
        lines.append(f"{event.step:>10}  cpu{event.cpu} {thread:<20} {event_text(event)}")
    if not events:
        lines.append("nothing happened to it")
    return [*lines, f"{tail.records} records, {tail.steps} steps"]


def event_text(event: AddressEvent) -> str:
    """What happened and who did it, in words."""
    who = "CPU " if len(event.cpus) == 1 else "CPUs "
    cpus = who + ", ".join(map(str, event.cpus))
    if event.what in ("cached", "table cached", "dropped", "table dropped"):
        text = f"{event.what} by {cpus}"
    elif event.what == "stale":
        text = f"stale on {cpus} ({' '.join(event.differs)})"
    elif event.what == "fresh":
        text = f"fresh again on {cpus}"
    else:
        text = event.what
    if event.page_size:
        rights = " ".join((
            "RW" if event.entry & _RW else "ro", "US" if event.entry & _US else "supervisor", "XD" if event.entry & _XD else "X",
        ))
        text += f" {rights}, {_SIZES[event.page_size]} page at {event.entry & _PHYSICAL & -event.page_size:#x}"
    by = f"{event.function} in {event.call}" if event.function and event.call else event.function or event.call
    where = f"from {event.place}" if event.call and event.place else event.place
    return text + "".join(f", {part}" for part in (by, where) if part)


# ---------------------------------------------------------------- --at


def _at(arguments: argparse.Namespace, overrides: MachineOptions) -> int:
    from emu.debug.at import machine_at
    from emu.debug.recording import is_recording
    from emu.kernel.vmallocinfo import vmallocinfo
    from emu.kernel.walk_report import walk_lines, walk_report

    if is_recording(arguments.file):
        raise ValueError("--at needs the guest program, whose run is repeated: this is a recording")
    result, machine = machine_at(load(arguments.file), overrides, arguments.at)
    kernel, outcome = machine.kernel, result.outcome
    rows = list(vmallocinfo(kernel.vmalloc, kernel.symbol_text))
    areas = [(row.start, row.end, row.caller or row.kind) for row in rows]
    la = Known(outcome.symbol, outcome.registers.get, outcome.read_u64, areas).address(arguments.address)
    area = next((row.text() for row in rows if row.start <= la < row.end), None)
    walked, place, cached = walk_report(kernel, machine.cpu.reg("cr3"), la), machine.place_of(la), cached_for(machine, la)
    if arguments.json:
        config = asdict(result.config) | {"max_instructions": result.max_instructions}
        print(json.dumps({
            "file": result.path, "machine": config, "ended": outcome.ended, "step": arguments.at, "address": la, "place": place,
            "walk": asdict(walked), "tlb": cached, "area": area,
        }, indent=2))
        return OK
    print("\n".join(walk_lines(walked, place)))
    for one in cached:
        print(_cached_text(one))
    if not cached:
        print("no CPU has it cached")
    print(f"area: {area or 'none'}")
    return OK


def cached_for(machine: Machine, la: int) -> list[dict[str, Any]]:
    """What the TLBs and paging-structure caches of a machine hold for an address, each with what is stale about it."""
    found: list[dict[str, Any]] = []
    for cpu in machine.cpus:
        mmu = cpu.mmu
        stale = {id_of(one.cached): list(one.differs) for one in mmu.stale(la, tables=True)}
        for page in mmu.listing():
            if page.la <= la < page.la + page.size:
                found.append({
                    "cpu": cpu.id, "table": False, "pcid": page.pcid, "level": int(page.level), "la": page.la,
                    "pa": page.pa(la), "entry": page.entry, "stale": stale.get(id_of(page), []),
                })
        for context, level, start, table, rights in mmu.tlb.tables():
            if la >> 9 * level + 3 == start >> 9 * level + 3:
                key = True, context.pcid, level, start
                found.append({
                    "cpu": cpu.id, "table": True, "pcid": context.pcid, "level": int(level), "la": start, "pa": table,
                    "entry": (rights ^ _XD) & (_RW | _US | _XD), "stale": stale.get(key, []),
                })
    return found


def id_of(cached: Any) -> tuple[bool, int | None, int, int]:
    """What tells a cached entry from all others of its CPU."""
    return hasattr(cached, "table"), cached.pcid, int(cached.level), cached.la


def _cached_text(one: Mapping[str, Any]) -> str:
    names = {1: "4 KiB page", 2: "2 MiB page", 3: "1 GiB page"}
    tables = {2: "PDE", 3: "PDPTE", 4: "PML4E", 5: "PML5E"}
    entry = one["entry"]
    rights = " ".join(("RW" if entry & _RW else "ro", "US" if entry & _US else "supervisor", "XD" if entry & _XD else "X"))
    what = f"{tables[one['level']]} names table" if one["table"] else f"{names[one['level']]}, physical"
    pcid = "global" if one["pcid"] is None else f"PCID {one['pcid']:#x}"
    stale = f"; stale: {' '.join(one['stale'])}" if one["stale"] else ""
    return f"CPU {one['cpu']} has cached, {pcid}: {what} {one['pa']:#x} {rights}{stale}"


# ---------------------------------------------------------------- vmemu diff


def _diff(arguments: argparse.Namespace, overrides: MachineOptions) -> int:
    from emu.debug.at import machine_at
    from emu.debug.diff import diff, diff_lines, moment

    program = load(arguments.file)
    moments = []
    for step in (arguments.step1, arguments.step2):
        result, machine = machine_at(program, overrides, step)
        moments.append(moment(machine, step))
    first, second = moments
    if arguments.json:
        changes = [{"name": one.name, "removed": list(one.removed), "added": list(one.added)} for one in diff(first, second)]
        print(json.dumps({
            "file": result.path, "machine": asdict(result.config), "steps": [first.step, second.step], "changes": changes,
        }, indent=2))
    else:
        print("\n".join(diff_lines(first, second)))
    return OK
