"""The command line: `vmemu run FILE...`, what it left behind: `vmemu vmallocinfo|ptdump FILE`, `vmemu walk FILE ADDRESS`, and how
it came there: `vmemu trace FILE`.

Exit status: 0 every guest ended as its header says, 1 some did not (a finding), 2 wrong use or bad input, with one line on stderr
that names the value and the place.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from emu import __version__
from emu.debug.history_command import add_at, add_history, history_command
from emu.debug.trace_command import add_trace, trace_command
from emu.guest.directives import MachineOptions
from emu.guest.error import GuestError
from emu.kernel.profile import PROFILES
from emu.mmu.tlb import TlbMode

if TYPE_CHECKING:
    from emu.machine import Machine
    from emu.run import RunResult

OK, FINDING, WRONG_USE = 0, 1, 2
_SIZE = re.compile(r"(\d+)([KMGT]?)", re.ASCII)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_MAX_INTEGER = 1 << 64


class _Parser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(WRONG_USE)


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256M or 4G")
    value = int(match[1]) << _UNITS[match[2]]
    if not 0 < value < _MAX_INTEGER:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range")
    return value


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {low} to {high}")
        return value

    return parse


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine", "each wins over the same option in a guest's header")
    group.add_argument("--levels", type=int, choices=(4, 5), help="paging levels (default 4)")
    group.add_argument("--cpus", type=_integer(1, 64), metavar="N", help="CPUs, 1 to 64 (default 1)")
    group.add_argument("--memory", type=_size, metavar="SIZE", help="RAM, e.g. 256M or 64G; multiple of 4M (default 1G)")
    group.add_argument("--nodes", type=_integer(1, 8), metavar="N", help="NUMA nodes (default 1)")
    group.add_argument("--kernel", choices=tuple(PROFILES), help="kernel version to model (default 6.12)")
    group.add_argument("--tlb", choices=tuple(mode.value for mode in TlbMode), help="TLB model (default infinite)")
    group.add_argument("--native", type=_switch, metavar="on|off", nargs="?", const=True,
                       help="let Unicorn walk the page tables: faster, without our TLB")
    group.add_argument("--kaslr", type=_switch, metavar="on|off", nargs="?", const=True,
                       help="randomise the address map from the seed (default off)")
    group.add_argument("--pti", type=_switch, metavar="on|off", nargs="?", const=True,
                       help="page-table isolation: no kernel mappings in user tables (default off)")
    for name, what in (
        ("pcid", "PCIDs: translations of several address spaces at once (default off)"),
        ("invlpgb", "INVLPGB in place of IPIs (default off)"),
        ("debug-pagealloc", "kernel parameter: flush at every unmapping (default off)"),
        ("tlbsan", "report every use of a translation that memory no longer gives (default on)"),
        ("gbpages", "1 GiB pages in the CPU (default on)"),
        ("nogbpages", "kernel parameter: no 1 GiB pages in the direct map (default off)"),
        ("nohugevmalloc", "kernel parameter: vmalloc in 4 KiB pages only (default off)"),
        ("nohugeiomap", "kernel parameter: ioremap in 4 KiB pages only (default off)"),
    ):
        group.add_argument(f"--{name}", type=_switch, metavar="on|off", nargs="?", const=True, help=what)
    group.add_argument("--quantum", type=_integer(1, _MAX_INTEGER >> 2), metavar="N",
                       help="instructions of a CPU's turn when there are several (default 100000)")
    group.add_argument("--schedule", metavar="STEPS",
                       help="turns of several CPUs: CPU@COUNT>CPU, CPU@COUNT!nmi or CPU@COUNT!VECTOR, comma between")
    group.add_argument("--seed", type=_integer(0, _MAX_INTEGER - 1), metavar="N", help="seed of all randomness (default 0)")
    group.add_argument("--max-instructions", type=_integer(1, _MAX_INTEGER >> 2), metavar="N",
                       help="bound of the guest's run (default 1000000000)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmemu", description="An emulated x86-64 machine for work on Linux's kernel mappings.")
    parser.add_argument("--version", action="version", version=f"vmemu {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    run = commands.add_parser(
        "run", help="run guest programs and judge them by their headers",
        description="Run guest programs (.asm, .c, .S, .o), each on a machine of its own, and judge them by their headers.",
        epilog="exit status: 0 as expected, 1 a finding, 2 wrong use or bad input",
    )
    run.add_argument("files", nargs="+", metavar="FILE", help="guest program")
    run.add_argument("--json", action="store_true", help="print the results as a JSON array")
    run.add_argument("-q", "--quiet", action="store_true", help="print failures and the last line only")
    run.add_argument("-v", "--verbose", action="store_true", help="print exceptions, kernel calls and TLB flushes too")
    _add_machine_options(run)
    run.set_defaults(function=_run)
    _add_explore(commands)
    _add_state_commands(commands)
    add_trace(commands, _add_machine_options).set_defaults(function=lambda given: trace_command(given, _overrides(given)))
    return parser


def _add_explore(commands: argparse._SubParsersAction[_Parser]) -> None:
    explore = commands.add_parser(
        "explore", help="run a guest under many schedules of its CPUs, until one fails",
        description="Run a guest for several CPUs under many schedules, stop at the first that its header does not expect, "
        "and shrink that to the fewest preemptions.",
        epilog="exit status: 0 every schedule ended as expected, 1 one did not, 2 wrong use or bad input",
    )
    explore.add_argument("file", metavar="FILE", help="guest program")
    explore.add_argument("--schedules", type=_integer(1, 1 << 32), default=1000, metavar="N",
                         help="how many at most (default 1000)")
    explore.add_argument("--preemptions", type=_integer(0, 16), default=2, metavar="N",
                         help="try all schedules with up to so many preemptions before random ones (default 2)")
    explore.add_argument("--jobs", type=_integer(1, 256), default=1, metavar="N", help="processes that share the work (default 1)")
    explore.add_argument("--json", action="store_true", help="print one JSON object")
    _add_machine_options(explore)
    explore.set_defaults(function=_explore)


def _add_state_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    """The commands that run a guest without printing its log, and then print the state of the machine."""
    for name, what, function in (
        ("vmallocinfo", "print /proc/vmallocinfo as it is after a guest has run", _vmallocinfo),
        ("ptdump", "print the kernel's page tables as they are after a guest has run", _ptdump),
        ("walk", "walk the page tables for an address, level by level, after a guest has run", _walk),
    ):
        command = commands.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".",
            epilog="exit status: 0 the guest ended as expected, 1 it did not, 2 wrong use or bad input",
        )
        command.add_argument("file", metavar="FILE", help="guest program")
        if name == "vmallocinfo":
            command.add_argument("--meminfo", action="store_true", help="print the vmalloc lines of /proc/meminfo instead")
        elif name == "ptdump":
            command.add_argument("--user", action="store_true", help="the tables in CR3, with --pti their half for user mode")
        else:
            command.add_argument("address", metavar="ADDRESS", help="number, symbol or [symbol], with + and - between")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        add_at(command)
        _add_machine_options(command)
        command.set_defaults(function=_state_command, print_state=function)
    for one in add_history(commands, _add_machine_options):
        one.set_defaults(function=lambda arguments: history_command(arguments, _overrides(arguments)))


def _overrides(arguments: argparse.Namespace) -> MachineOptions:
    return MachineOptions(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(MachineOptions)})


def _run(arguments: argparse.Namespace) -> int:
    from emu import report
    from emu.debug.evidence import evidence
    from emu.guest.load import load
    from emu.progress import Progress
    from emu.run import run_program

    overrides = _overrides(arguments)
    results, found, errors = [], [], 0
    single = len(arguments.files) == 1
    with Progress(len(arguments.files), enabled=not single and not arguments.quiet) as progress:
        for path in arguments.files:
            progress.start(path)
            try:
                program = load(path)
                result = run_program(program, overrides, keep_events=arguments.verbose)
                below = [] if result.ok else evidence(program, overrides, result)
            except GuestError as error:
                progress.print_error(f"vmemu: {error}")
                errors += 1
            except (ValueError, MemoryError) as error:
                progress.print_error(f"vmemu: {path}: {error}")
                errors += 1
            else:
                results.append(result)
                found.append(below)
                if not arguments.json and ((single and not arguments.quiet) or not result.ok or arguments.verbose):
                    progress.print(report.run_text(result, verbose=arguments.verbose, evidence=below))
            progress.done()
    if arguments.json:
        print(report.dump_json([report.run_json(*one) for one in zip(results, found, strict=True)]))
    elif not single:
        if not arguments.quiet:
            progress.table(("guest", "", "ending", "first fault"), report.summary_rows(results))
        print(report.counts_text(results, errors))
    elif arguments.quiet and results and results[0].ok:
        print(report.verdict(results[0]))
    if errors:
        return WRONG_USE
    return OK if all(result.ok for result in results) else FINDING


def _explore(arguments: argparse.Namespace) -> int:
    from emu import report
    from emu.debug.evidence import evidence
    from emu.explore import explore_file
    from emu.guest.load import load

    overrides = _overrides(arguments)
    below: list[str] = []
    try:
        explored = explore_file(arguments.file, overrides, arguments.schedules, arguments.preemptions, arguments.jobs)
        if explored.result is not None:
            below = evidence(load(arguments.file), dataclasses.replace(overrides, schedule=explored.schedule), explored.result)
    except GuestError as error:
        print(f"vmemu: {error}", file=sys.stderr)
        return WRONG_USE
    except (ValueError, MemoryError) as error:
        print(f"vmemu: {arguments.file}: {error}", file=sys.stderr)
        return WRONG_USE
    print(report.dump_json(report.explored_json(explored, below)) if arguments.json else report.explored_text(explored, below))
    return OK if explored.found is None else FINDING


class _BadInput(Exception):
    """What a command cannot work with; the text is the one line that says so."""


def _state_command(arguments: argparse.Namespace) -> int:
    from emu.debug.at import machine_at
    from emu.guest.load import load
    from emu.report import verdict
    from emu.run import run_to_end

    path = arguments.file
    try:
        if arguments.at is None:
            result, machine = run_to_end(load(path), _overrides(arguments))
        else:
            result, machine = machine_at(load(path), _overrides(arguments), arguments.at)
        print(arguments.print_state(arguments, result, machine))
    except GuestError as error:
        print(f"vmemu: {error}", file=sys.stderr)
        return WRONG_USE
    except (ValueError, MemoryError, _BadInput) as error:
        print(f"vmemu: {path}: {error}", file=sys.stderr)
        return WRONG_USE
    if not result.ok:
        print(f"vmemu: {verdict(result)}", file=sys.stderr)
    return OK if result.ok else FINDING


def _vmallocinfo(arguments: argparse.Namespace, result: RunResult, machine: Machine) -> str:
    from emu import report
    from emu.kernel.meminfo import meminfo_lines
    from emu.kernel.vmallocinfo import vmallocinfo_rows

    kernel = machine.kernel
    if arguments.json:
        return report.dump_json(report.vmallocinfo_json(result, kernel))
    return "\n".join(meminfo_lines(kernel) if arguments.meminfo else vmallocinfo_rows(kernel.vmalloc, kernel.symbol_text))


def _ptdump(arguments: argparse.Namespace, result: RunResult, machine: Machine) -> str:
    from emu import report
    from emu.kernel.ptdump import PtDump, row_text
    from emu.memory import BusError

    pgd = machine.user_pgd() if arguments.user else machine.kernel.init_mm.pgd
    dump = PtDump(machine.memory, machine.kernel.layout, pgd)
    try:
        return report.dump_json(report.ptdump_json(result, dump)) if arguments.json else "\n".join(map(row_text, dump.rows()))
    except BusError as error:
        raise _BadInput(f"the page tables lead out of RAM: {error}") from None


def _walk(arguments: argparse.Namespace, result: RunResult, machine: Machine) -> str:
    from emu import report
    from emu.guest.address import evaluate, parse_address
    from emu.guest.expect import Unreadable
    from emu.kernel.walk_report import walk_lines, walk_report

    outcome = result.outcome
    try:
        la = evaluate(parse_address(arguments.address), outcome.symbol, outcome.registers.get, outcome.read_u64)
    except (ValueError, LookupError, Unreadable) as error:
        raise _BadInput(f"address {arguments.address!r}: {error.args[0] if error.args else error}") from None
    walked = walk_report(machine.kernel, machine.cpu.reg("cr3"), la)
    place = machine.place_of(la)
    if arguments.json:
        return report.dump_json(report.walk_json(result, walked, place))
    return "\n".join(walk_lines(walked, place))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.function(arguments)
        return status
    except BrokenPipeError:
        # The reader of our output has gone: nothing is left to say, and the interpreter must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("vmemu: interrupted", file=sys.stderr)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
