"""`vmemu trace FILE`: run a guest and print what happened, instruction by instruction."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emu.debug.filters import ONLY, BadTrigger, Filter, Last, Selection, Trigger, Triggered
from emu.debug.trace_output import Output, OutputError
from emu.guest.error import GuestError
from emu.guest.load import load

if TYPE_CHECKING:
    from emu.debug.filters import Take
    from emu.guest.directives import MachineOptions

OK, FINDING, WRONG_USE = 0, 1, 2
FORMATS = ("text", "json", "perfetto", "ftrace")
_HIGHEST = 1 << 64


class _BadOption(ValueError):
    """A value of an option that will not do."""


def add_trace(commands: Any, add_machine_options: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    """Add the command to an argument parser's `commands`; the caller sets its function."""
    trace: argparse.ArgumentParser = commands.add_parser(
        "trace", help="run a guest and print each instruction, access, walk, call, flush and interrupt",
        description="Run a guest program and print what happened, instruction by instruction. The traced run is the one that "
        "`vmemu run` makes, to the byte. docs/trace.md explains the output.",
        epilog="exit status: 0 the guest ended as expected, 1 it did not, 2 wrong use or bad input",
    )
    trace.add_argument("file", metavar="FILE", nargs="?", help="guest program")
    trace.add_argument("-o", "--output", metavar="FILE", help="write to a file, which appears when the trace is whole")
    trace.add_argument("--format", choices=FORMATS, default="text", help="output format (default text)")
    trace.add_argument("--schema", action="store_true", help="print the JSON Schema of --format json and do nothing else")
    trace.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                       help="colour the text: auto does on a terminal unless NO_COLOR is set (default auto)")
    trace.add_argument("--no-memory", action="store_true", help="instructions and events only: four times as fast")
    trace.add_argument("--counters", action="store_true", help="text: TLB entries, lazy pages and free frames as they change")
    trace.add_argument("--slices", action="store_true", help="perfetto: a slice for each instruction too")
    chosen = trace.add_argument_group("what to show", "everything without these; what several of them hold, with several")
    chosen.add_argument("--only", choices=ONLY, help="instructions, those with memory accesses, with TLB misses or stale entries "
                        "(and these accesses alone), or the events between instructions")
    chosen.add_argument("--cpu", type=_cpu, action="append", default=[], metavar="N", help="this CPU alone; may be repeated")
    chosen.add_argument("--steps", type=_steps, default=(0, None), metavar="A..B",
                        help="from A to B instructions of all CPUs after the guest's call; either may be missing")
    chosen.add_argument("--range", type=_range, action="append", default=[], metavar="A-B",
                        help="instructions at addresses from A up to B; may be repeated")
    chosen.add_argument("--symbol", action="append", default=[], metavar="NAME",
                        help="instructions of this function, a shell pattern; may be repeated")
    chosen.add_argument("--area", action="append", default=[], metavar="TEXT",
                        help="accesses whose place or frame's owner is described with this text; may be repeated")
    chosen.add_argument("--start-at", type=_trigger, metavar="WHEN",
                        help="begin at step:N, 0xADDRESS, SYMBOL, call:NAME, access:ADDRESS, log:TEXT or fault")
    chosen.add_argument("--stop-at", type=_trigger, metavar="WHEN", help="end there")
    chosen.add_argument("--last", type=_count, metavar="N", help="the last N instructions before the first finding, or the end")
    add_machine_options(trace)
    return trace


def trace_command(arguments: argparse.Namespace, overrides: MachineOptions) -> int:
    """Run the command; the exit status."""
    if arguments.schema:
        from emu.debug.json_lines import schema

        print(schema())
        return OK
    if arguments.file is None:
        print("vmemu trace: the following arguments are required: FILE", file=sys.stderr)
        return WRONG_USE
    try:
        return _trace(arguments, overrides)
    except (GuestError, OutputError) as error:
        print(f"vmemu: {error}", file=sys.stderr)
    except (ValueError, MemoryError) as error:
        print(f"vmemu: {arguments.file}: {error}", file=sys.stderr)
    return WRONG_USE


def _trace(arguments: argparse.Namespace, overrides: MachineOptions) -> int:
    from emu.debug.tracer import trace_program
    from emu.report import verdict

    program = load(arguments.file)
    with Output(arguments.output) as output:
        writer = _writer(arguments, output)
        take: Take = writer
        if arguments.last is not None:
            take = Last(arguments.last, take)
        selection = _selection(arguments)
        if not selection.everything:
            take = Filter(selection, take)
        triggered: Triggered | None = None
        if arguments.start_at is not None or arguments.stop_at is not None:
            take = triggered = Triggered(arguments.start_at, arguments.stop_at, take)
        result, _ = trace_program(program, overrides, take, memory=not arguments.no_memory)
        missing = () if triggered is None else triggered.never_fired()
        if missing:
            raise _BadOption(f"the run ended before {' and '.join(missing)} came")
        writer.close()
    if not result.ok or arguments.output is not None:
        print(f"vmemu: {verdict(result)}", file=sys.stderr)
    return OK if result.ok else FINDING


def _writer(arguments: argparse.Namespace, output: Output) -> Any:
    """A writer of the chosen format: called with each record, then closed."""
    if arguments.format == "json":
        from emu.debug.json_lines import JsonWriter

        return JsonWriter(output.write)
    if arguments.format == "perfetto":
        from emu.debug.perfetto import PerfettoWriter

        return PerfettoWriter(output.write, instructions=arguments.slices)
    if arguments.format == "ftrace":
        from emu.debug.ftrace import FtraceWriter

        return FtraceWriter(output.write)
    from emu.debug.text import TextWriter

    color = arguments.color == "always"
    if arguments.color == "auto":
        color = arguments.output is None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return TextWriter(output.write, color=color, counters=arguments.counters)


def _selection(arguments: argparse.Namespace) -> Selection:
    return Selection(
        frozenset(arguments.cpu), arguments.steps, tuple(arguments.range), tuple(arguments.symbol), tuple(arguments.area),
        arguments.only or "",
    )


# ---- values of options


def _number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < _HIGHEST:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^64-1")
    return value


def _cpu(text: str) -> int:
    value = _number(text)
    if value > 63:
        raise argparse.ArgumentTypeError(f"CPU is {text}; it must be 0 to 63")
    return value


def _count(text: str) -> int:
    value = _number(text)
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 1000000")
    return value


def _steps(text: str) -> tuple[int, int | None]:
    first, dots, last = text.partition("..")
    if not dots:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A..B")
    steps = _number(first) if first else 0, _number(last) if last else None
    if steps[1] is not None and steps[1] < steps[0]:
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins")
    return steps


def _range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not dash:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A-B")
    start, end = _number(first), _number(last)
    if end <= start:
        raise argparse.ArgumentTypeError(f"{text!r} holds no address")
    return start, end


def _trigger(text: str) -> Trigger:
    try:
        return Trigger(text)
    except BadTrigger as error:
        raise argparse.ArgumentTypeError(str(error)) from None
