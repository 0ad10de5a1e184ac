"""Traces for Perfetto: valid in the documented format, and what is counted in them is what the machine counted.

The trace processor of the perfetto package (PyPI) is asked the same where it can be had; VMEMU_TRACE_PROCESSOR names its binary.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chrome_trace import BadTrace, Trace

from emu.cli import main
from emu.debug import perfetto
from emu.debug.perfetto import PerfettoWriter
from emu.debug.records import (
    AnyRecord,
    CallBegun,
    CallDone,
    CallEnded,
    Delivered,
    Executed,
    FlushAsked,
    Flushed,
    IpiSent,
    IpiTaken,
    Logged,
    Returned,
    Sampled,
    Switched,
    Vmalloc,
)
from emu.debug.text import vector_name
from emu.debug.tracer import traced_run
from emu.guest.directives import MachineOptions
from emu.guest.load import load
from emu.machine import Machine
from emu.run import configure

ROOT = Path(__file__).resolve().parents[2]
GUEST, DOCUMENT = ROOT / "guest", ROOT / "docs" / "perfetto.md"
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: .c and .S guests cannot be compiled")
PROGRAMS = [
    pytest.param(path, marks=NEEDS_GCC if path.suffix != ".asm" else (), id=path.name)
    for path in sorted(GUEST.iterdir()) if path.suffix in (".asm", ".c", ".S")
]
BUSY = [
    "stale_read_other_cpu.asm", "purge_then_fault.asm", "demand_fault.asm", "debug_pagealloc_flush.asm", "vmalloc_fault_in_nmi.asm",
]
TRACK = "select track.id from thread_track track join thread using (utid) join process using (upid)"
ARROWS = "flow join slice one on slice_out = one.id join slice other on slice_in = other.id"

Query = Callable[[str], list[tuple[Any, ...]]]


class Run:
    """A traced run, its records, and the file."""

    def __init__(self, path: Path, *, limit: int = 20_000, instructions: bool = False) -> None:
        program = load(str(path))
        config, _ = configure(program.directives.machine, MachineOptions())
        self.records: list[AnyRecord] = []
        parts: list[str] = []
        writer = PerfettoWriter(parts.append, instructions=instructions)

        def observe(record: AnyRecord) -> None:
            self.records.append(record)
            writer(record)

        self.machine: Machine = traced_run(program, config, limit, observe, memory=False)[0]
        writer.close()
        self.text = "".join(parts)

    def of(self, kind: type[Any]) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]


def written(records: list[AnyRecord], *, instructions: bool = False) -> Trace:
    parts: list[str] = []
    writer = PerfettoWriter(parts.append, instructions=instructions)
    for record in records:
        writer(record)
    writer.close()
    return Trace("".join(parts))


def check_counts(run: Run, query: Query) -> None:
    """What queries over a run's file count is what the machine and the records count."""
    machine = run.machine
    assert dict(query("select name, count(*) from slice where category = 'call' group by name")) == Counter(
        record.name for record in run.of(CallBegun)
    ) == machine.statistics.kernel_calls
    on_threads = f"track_id in ({TRACK} where process.name = 'threads')"
    handlers = query(f"select count(*) from slice where category = 'handler' and {on_threads}")
    assert handlers == [(len(run.of(Delivered)),)]
    exceptions = query("select name, count(*) from slice where category = 'handler' and name glob '#*' group by name")
    assert dict(exceptions) == {
        vector_name(vector): count for vector, count in machine.statistics.exceptions.items() if vector < 32 and vector != 2
    }
    assert query("select count(*) from slice where category = 'flush'") == [(len(run.of(FlushAsked)),)]
    assert len(run.of(FlushAsked)) == machine.counts()["flush"] + machine.counts()["full-flush"]
    assert query("select count(*) from slice where category = 'flushed'") == [(len(run.of(Flushed)),)]
    assert query("select count(*) from slice where category = 'printk'") == [(len(run.of(Logged)),)]
    assert dict(query("select name, count(*) from slice where category = 'tracepoint' group by name")) == Counter(
        record.name for record in run.of(Vmalloc)
    )
    check_cpus(run, query)
    check_counters(run, query)


def check_cpus(run: Run, query: Query) -> None:
    """Tracks of CPUs: threads and IPIs."""
    for cpu in {record.cpu for record in run.records}:
        on_cpu = f"track_id in ({TRACK} where process.name = 'CPUs' and thread.name = 'CPU {cpu}')"
        assert query(f"select count(*) from slice where category = 'thread' and {on_cpu}") == [
            (1 + sum(record.cpu == cpu for record in run.of(Switched)),)
        ]
        assert query(f"select count(*) from slice where name glob 'send IPI *' and {on_cpu}") == [
            (sum(record.cpu == cpu for record in run.of(IpiSent)),)
        ]
        assert query(f"select count(*) from slice where name glob 'take IPI *' and {on_cpu}") == [
            (sum(len(record.numbers) for record in run.of(IpiTaken) if record.cpu == cpu),)
        ]
    arrows = query(f"select count(*) from {ARROWS} where one.name glob 'send IPI *' and other.name glob 'take IPI *'")
    assert arrows == [(sum(len(record.numbers) for record in run.of(IpiTaken)),)]
    answers = query(f"select count(*) from {ARROWS} where one.name glob 'take IPI *' and other.name glob '* done for CPU *'")
    answered = sum(record.vector in perfetto.CALLS for record in run.of(IpiTaken))
    assert answers == [(answered,)]


def check_counters(run: Run, query: Query) -> None:
    """The counters end where the last sample says."""
    last = run.of(Sampled)[-1]
    value = "select value from counter join process_counter_track track on track_id = track.id where track.name = '{}' " \
        "order by ts desc limit 1"
    assert query(value.format("lazy pages")) == [(last.lazy_pages,)]
    assert query(value.format("free frames")) == [(last.free_frames,)]
    for cpu, entries in enumerate(last.tlb_entries):
        assert query(value.format(f"TLB entries of CPU {cpu}")) == [(entries,)]


@pytest.fixture(scope="module", params=BUSY)
def run(request: pytest.FixtureRequest) -> Run:
    return Run(GUEST / request.param)


def test_a_run_without_records_is_a_valid_file() -> None:
    assert [event["ph"] for event in written([]).events] == ["M", "M"]


@pytest.mark.parametrize("path", PROGRAMS)
def test_the_trace_of_every_guest_is_valid(path: Path) -> None:
    if load(str(path)).directives.machine.native:
        pytest.skip("a native machine cannot be traced")
    made = Run(path, limit=3000, instructions=True)
    trace = Trace(made.text)
    assert trace.query("select count(*) from slice where category = 'instruction'") == [(len(made.of(Executed)),)]


def test_what_a_query_counts_is_what_the_machine_counted(run: Run) -> None:
    check_counts(run, Trace(run.text).query)


def test_instructions_have_slices_only_if_asked(run: Run) -> None:
    assert Trace(run.text).query("select count(*) from slice where category = 'instruction'") == [(0,)]


def test_the_same_run_writes_the_same_bytes() -> None:
    path = GUEST / "stale_read_other_cpu.asm"
    assert Run(path).text == Run(path).text


def test_the_last_counters_are_what_the_machine_holds() -> None:
    made = Run(GUEST / "percpu_every_cpu.asm")
    space, pages = made.machine.kernel.vmalloc.space, made.machine.kernel.pages
    last = made.of(Sampled)[-1]
    assert (last.lazy_pages, last.free_frames) == (
        space.vmap_lazy_nr, sum(zone.nr_free for zones in pages.zones for zone in zones),
    )


def test_the_command_writes_a_valid_file_of_the_run_or_of_what_was_chosen_of_it(tmp_path: Path) -> None:
    guest, file = str(GUEST / "purge_then_fault.asm"), tmp_path / "trace.json"
    for chosen in ([], ["--slices"], ["--cpu", "1"], ["--steps", "40..60"], ["--only", "events"], ["--last", "5"],
                   ["--start-at", "call:vfree", "--stop-at", "fault"]):
        assert main(["trace", "--format", "perfetto", "-o", str(file), *chosen, guest]) == 0
        trace = Trace(file.read_text())
        assert trace.query("select count(*) > 0 from slice where category = 'instruction'") == [(chosen == ["--slices"],)]
        assert trace.query("select count(*) > 0 from slice where category = 'thread'") == [(1,)]


# ---- the trace processor


def trace_processor(text: str) -> Any:
    """The public trace processor with a trace loaded; skips where there is none."""
    api = pytest.importorskip("perfetto.trace_processor", reason="the perfetto package (PyPI) is not installed")
    binary = os.environ.get("VMEMU_TRACE_PROCESSOR")
    cached = Path.home() / ".local/share/perfetto/prebuilts"
    if binary is None and not any(cached.glob("trace_processor_shell*")):
        try:
            socket.create_connection(("commondatastorage.googleapis.com", 443), timeout=5).close()
        except OSError as error:
            pytest.skip(f"the perfetto package cannot fetch its trace_processor_shell: {error}")
    config = api.TraceProcessorConfig(bin_path=binary)
    try:
        return api.TraceProcessor(trace=io.BytesIO(text.encode()), config=config)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the perfetto package cannot fetch its trace_processor_shell: {error}")


@pytest.fixture
def processor(run: Run) -> Iterator[Any]:
    opened = trace_processor(run.text)
    yield opened
    opened.close()


def test_the_public_trace_processor_loads_the_file_without_errors_and_counts_the_same(run: Run, processor: Any) -> None:
    def query(sql: str) -> list[tuple[Any, ...]]:
        result = processor.query(sql)
        return [tuple(getattr(row, name) for name in result.column_names) for row in result]

    assert query("select name, value from stats where severity in ('error', 'data_loss') and value > 0") == []
    check_counts(run, query)


def test_the_documented_query_finds_each_ipi_and_its_acknowledgement() -> None:
    sql = DOCUMENT.read_text().partition("```sql\n")[2].partition("```")[0]
    rows = Trace(Run(GUEST / "purge_then_fault.asm").text).query(sql)
    assert [(ipi.partition(" (")[0], answer) for ipi, answer, _ in rows] == [
        (f"send IPI {number}", "__purge_vmap_area_lazy done for CPU 0") for number in (2, 3, 4)
    ]
    assert all(steps > 0 for *_, steps in rows)


# ---- records that no guest above makes


CALL = min(perfetto.CALLS)


def names(trace: Trace, arrow: str = "") -> list[Any]:
    if arrow:
        return [event["id"] for event in trace.events if event["ph"] == arrow]
    return [event["name"] for event in trace.events if event["ph"] != "M"]


def test_an_arrow_goes_from_the_ipi_over_its_taking_to_the_answer() -> None:
    trace = written([
        IpiSent(10, 0, 100, "a", 1, CALL, 1), IpiTaken(15, 1, 101, "b", CALL, (1,)), CallDone(16, 1, 101, "b", 0, "do_flush"),
    ])
    assert [names(trace, kind) for kind in "stf"] == [[1], [1], [1]]
    ends = trace.query(f"select one.name, other.name from {ARROWS}")
    sent, taken = "send IPI 1 (call function single) to CPU 1", "take IPI 1 (call function single)"
    assert ends == [(sent, taken), (taken, "do_flush done for CPU 0")]


def test_a_reschedule_has_no_answer_and_its_arrow_ends_where_it_is_taken() -> None:
    trace = written([
        IpiSent(10, 0, 100, "a", 1, 0xFD, 1), IpiTaken(15, 1, 101, "b", 0xFD, (1,)), CallDone(16, 1, 101, "b", 0, "do_flush"),
    ])
    assert [names(trace, kind) for kind in "stf"] == [[1], [], [1]]


def test_a_number_is_forgotten_once_its_ipi_is_taken() -> None:
    writer = PerfettoWriter(lambda text: None)
    writer(IpiSent(1, 0, 100, "a", 1, CALL, 1))
    assert writer._senders == {1: 0}
    writer(IpiTaken(2, 1, 101, "b", CALL, (1,)))
    assert writer._senders == {}


def test_ipis_of_two_cpus_that_merged_are_each_answered_and_a_second_call_of_one_has_no_arrow() -> None:
    trace = written([
        IpiSent(1, 0, 100, "a", 2, CALL, 1), IpiSent(2, 1, 101, "b", 2, CALL, 2), IpiTaken(3, 2, 102, "c", CALL, (1, 2)),
        CallDone(3, 2, 102, "c", 1, "f"), CallDone(3, 2, 102, "c", 0, "f"), CallDone(3, 2, 102, "c", 0, "g"),
    ])
    assert [names(trace, kind) for kind in "stf"] == [[1, 2], [1, 2], [2, 1]]
    assert [name for name in names(trace) if "done" in name] == ["f done for CPU 1", "f done for CPU 0", "g done for CPU 0"]


def test_an_ipi_whose_sending_was_filtered_out_has_no_arrow() -> None:
    trace = written([IpiTaken(15, 1, 101, "b", CALL, (1,)), CallDone(16, 1, 101, "b", 0, "do_flush")])
    assert [names(trace, kind) for kind in "stf"] == [[], [], []]


def test_an_iret_ends_the_innermost_handler_and_what_is_open_in_it() -> None:
    trace = written([
        CallBegun(1, 0, 100, "a", "vmalloc", (4096,), 0), Delivered(2, 0, 100, "a", 0xEC, None, 0x1000, None, ""),
        CallBegun(3, 0, 100, "a", "vfree", (0,), 0), Returned(4, 0, 100, "a", 0x1000),
        CallEnded(5, 0, 100, "a", "vmalloc", 0x2000, 0), Returned(6, 0, 100, "a", 0x1000),
    ])
    slices = trace.query("select name, depth, ts / 1000, (ts + dur) / 1000 from slice where category != 'thread' order by ts")
    assert slices == [("vmalloc", 0, 1, 5), ("vector 0xec", 1, 2, 4), ("vfree", 2, 3, 4)]


def test_idle_threads_of_two_cpus_have_tracks_of_their_own() -> None:
    trace = written([Logged(1, 0, 0, "swapper/0", "a"), Logged(2, 1, 0, "swapper/1", "b")])
    marks = trace.query(
        "select thread.name, slice.name from slice join thread_track track on track_id = track.id join thread using (utid) "
        "where category = 'printk'"
    )
    assert marks == [("idle on CPU 0", "a"), ("idle on CPU 1", "b")]


def test_control_characters_of_a_guest_are_spelled_and_other_letters_stay() -> None:
    assert "a\\x00\\x1b[31m\\x0a\u00e9\"\\" in names(written([Logged(1, 0, 100, "a", "a\x00\x1b[31m\n\u00e9\"\\")]))


def test_events_of_one_step_stay_in_order_and_nested_however_far_the_run_has_come() -> None:
    for step in (10**3, 10**6 + 7, 10**9 + 1, 10**12 + 3):
        records: list[AnyRecord] = []
        for number in range(300):
            records += [
                IpiSent(step, 0, 100, "a", 1, CALL, number), IpiTaken(step, 1, 101, "b", CALL, (number,)),
                CallDone(step, 1, 101, "b", 0, "f"), Executed(step, 0, 100, "a", 0x1000, "", "90", "nop"),
            ]
        trace = written(records, instructions=True)
        assert trace.query("select count(*) from flow") == [(600,)]
        assert trace.query("select count(*) from slice where depth = 0 and category = 'ipi'") == [(0,)]


def test_handlers_that_never_return_nest_no_deeper_than_a_viewer_shows_and_the_writer_does_not_grow() -> None:
    parts: list[str] = []
    writer = PerfettoWriter(parts.append)
    for step in range(20_000):
        writer(Delivered(step, 0, 100, "a", 14, 0, 0x1000, 0x2000, ""))
        writer(IpiSent(step, 0, 100, "a", 1, CALL, step))
    track = writer._tracks[perfetto.THREADS, 100]
    assert (len(track.open), track.deeper, len(writer._senders)) == (perfetto.DEEPEST, 19_900, perfetto.MOST_PENDING)
    for _ in range(19_901):
        writer(Returned(20_000, 0, 100, "a", 0))
    assert (len(track.open), track.deeper) == (perfetto.DEEPEST - 1, 0)
    writer.close()
    trace = Trace("".join(parts))
    assert trace.query("select count(*) from slice where category = 'handler'") == [(20_000,)]


# ---- the checker itself

META = '{"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "t"}}'


@pytest.mark.parametrize(("events", "complaint"), [
    ('{"ph": "B", "name": "a", "pid": 1, "tid": 2, "ts": 1}', "without an end"),
    ('{"ph": "E", "name": "a", "pid": 1, "tid": 2, "ts": 1}', "did not begin"),
    ('{"ph": "X", "name": "a", "pid": 1, "tid": -1, "ts": 1, "dur": 1}', "pid or tid"),
    ('{"ph": "X", "name": "a", "pid": 1, "tid": 3, "ts": 1, "dur": 1}', "without a name"),
    ('{"ph": "X", "name": "a", "pid": 2, "tid": 2, "ts": 1, "dur": 1}', "two processes"),
    ('{"ph": "X", "name": "a", "pid": 1, "tid": 2, "ts": 1}', "dur"),
    ('{"ph": "?", "name": "a", "pid": 1, "tid": 2, "ts": 1}', "phase"),
    ('{"ph": "s", "name": "a", "cat": "c", "id": 1, "pid": 1, "tid": 2, "ts": 1}', "outside a slice"),
    ('{"ph": "C", "name": "a", "pid": 1, "tid": 2, "ts": 1, "args": {"v": "1"}}', "counter value"),
    ('{"ph": "i", "name": "a", "pid": 1, "tid": 2, "ts": 2}, {"ph": "i", "name": "b", "pid": 1, "tid": 2, "ts": 1}', "goes back"),
    ('{"ph": "X", "name": "a", "pid": 1, "tid": 2, "ts": 1, "dur": 0.003}, '
     '{"ph": "X", "name": "b", "pid": 1, "tid": 2, "ts": 1.002, "dur": 0.003}', "overlap"),
    ('{"ph": "B", "name": "a", "pid": 1, "tid": 2, "ts": 1}, {"ph": "E", "name": "b", "pid": 1, "tid": 2, "ts": 2}', "ends a"),
    ('{"ph": "X", "name": "a", "pid": 1, "tid": 2, "ts": 1, "dur": 0.003}, '
     '{"ph": "f", "bp": "e", "name": "a", "cat": "c", "id": 1, "pid": 1, "tid": 2, "ts": 1}', "without a beginning"),
])
def test_the_checker_refuses_what_the_format_or_the_viewer_does_not_take(events: str, complaint: str) -> None:
    with pytest.raises(BadTrace, match=complaint):
        Trace(f'{{"traceEvents": [{META}, {events}]}}')
