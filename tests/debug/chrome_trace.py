"""What the documented Chrome trace-event format asks of a file, and a database of it with the tables of Perfetto's trace processor.

Format: "Trace Event Format", the document of Chrome's trace viewer. Times are read as the trace processor reads them: microseconds
times 1000, the fraction cut off; it takes no \\u escapes in the keys and none of the control characters.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any

PHASES = "BEXistfCM"
METADATA = ("process_name", "thread_name", "process_sort_index", "thread_sort_index", "process_labels")
UINT32 = 1 << 32
# Perfetto drops what is deeper.
DEEPEST = 512

SCHEMA = """
create table process(upid integer primary key, pid, name);
create table thread(utid integer primary key, tid, name, upid);
create table thread_track(id integer primary key, utid);
create table process_counter_track(id integer primary key, name, upid);
create table slice(id integer primary key, ts, dur, track_id, category, name, depth);
create table counter(id integer primary key, ts, track_id, value);
create table flow(slice_out, slice_in);
"""


class BadTrace(ValueError):
    """A file that the format does not allow, or that the viewer would not show whole."""


class Trace:
    """A checked file. Raises BadTrace with the number of the event and what is wrong with it."""

    def __init__(self, text: str) -> None:
        self.database = sqlite3.connect(":memory:")
        self.database.executescript(SCHEMA)
        self._open: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._now: dict[tuple[int, int], int] = {}
        self._flows: dict[tuple[str, str, int], int] = {}
        self._owner_of_tid: dict[int, int] = {}
        self._slices = 0
        whole = json.loads(text)
        if not isinstance(whole, dict) or not isinstance(whole.get("traceEvents"), list):
            raise BadTrace("no object with an array traceEvents")
        if whole.get("displayTimeUnit", "ms") not in ("ms", "ns"):
            raise BadTrace(f"displayTimeUnit is {whole['displayTimeUnit']!r}")
        if "\\u" in text:
            raise BadTrace("a \\u escape")
        self.events: list[dict[str, Any]] = whole["traceEvents"]
        for number, event in enumerate(self.events):
            try:
                self._take(event)
            except (BadTrace, KeyError, TypeError) as error:
                raise BadTrace(f"event {number} {event}: {error!r}") from error
        for where, slices in self._open.items():
            if any(event["ph"] == "B" for event in slices):
                raise BadTrace(f"track {where} has slices without an end")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of a query over the tables."""
        return self.database.execute(sql).fetchall()

    def _take(self, event: dict[str, Any]) -> None:
        kind, name, process, tid = event["ph"], event["name"], event["pid"], event["tid"]
        _ask(isinstance(kind, str) and len(kind) == 1 and kind in PHASES, f"phase {kind!r}")
        _ask(isinstance(name, str) and name != "" and name.isprintable(), f"name {name!r}")
        for number in (process, tid):
            _ask(type(number) is int and 0 < number < UINT32, f"pid or tid {number!r}")
        _ask(self._owner_of_tid.setdefault(tid, process) == process, f"tid {tid} in two processes")
        if kind == "M":
            self._metadata(name, process, tid, event["args"])
            return
        _ask(type(event["ts"]) in (int, float) and event["ts"] >= 0, "ts")
        _ask(isinstance(event.get("args", {}), dict), "args")
        ts, where = int(event["ts"] * 1000), (process, tid)
        _ask(ts >= self._now.get(where, 0), "ts goes back on its track")
        self._now[where] = ts
        if kind == "C":
            self._counter(event, ts)
            return
        slices = self._open.setdefault(where, [])
        if kind != "E":
            while slices and slices[-1]["ph"] == "X" and slices[-1]["end"] <= ts and kind not in "stf":
                slices.pop()
        getattr(self, f"_phase_{kind}")(event, ts, where, slices)

    def _metadata(self, name: str, process: int, tid: int, args: dict[str, Any]) -> None:
        _ask(name in METADATA, f"metadata {name}")
        run = self.database.execute
        if name == "process_name":
            run("insert into process(upid, pid, name) values (?, ?, ?)", (process, process, args["name"]))
        elif name == "thread_name":
            run("insert into thread(utid, tid, name, upid) values (?, ?, ?, ?)", (tid, tid, args["name"], process))
            run("insert into thread_track(id, utid) values (?, ?)", (tid, tid))

    def _counter(self, event: dict[str, Any], ts: int) -> None:
        _ask(event["args"] != {}, "a counter without values")
        for key, value in event["args"].items():
            _ask(type(value) in (int, float), f"counter value {value!r}")
            name, run = f"{event['name']} {key}", self.database.execute
            row = run("select id from process_counter_track where name = ?", (name,)).fetchone()
            track = row[0] if row else run(
                "insert into process_counter_track(name, upid) values (?, ?)", (name, event["pid"])
            ).lastrowid
            run("insert into counter(ts, track_id, value) values (?, ?, ?)", (ts, track, value))

    # ---- slices

    def _slice(self, event: dict[str, Any], ts: int, dur: int, where: tuple[int, int]) -> None:
        known = self.database.execute("select count(*) from thread_track where id = ?", where[1:]).fetchone()[0]
        _ask(known == 1, "a track without a name")
        depth = len(self._open[where])
        _ask(depth < DEEPEST, "too deep")
        self._slices += 1
        event["slice"] = self._slices
        self.database.execute(
            "insert into slice(id, ts, dur, track_id, category, name, depth) values (?, ?, ?, ?, ?, ?, ?)",
            (self._slices, ts, dur, where[1], event.get("cat"), event["name"], depth),
        )

    def _phase_B(self, event: dict[str, Any], ts: int, where: tuple[int, int], slices: list[dict[str, Any]]) -> None:
        _ask(not slices or slices[-1]["ph"] == "B", "begins in a slice of known length")
        self._slice(event, ts, -1, where)
        slices.append(event)

    def _phase_E(self, event: dict[str, Any], ts: int, where: tuple[int, int], slices: list[dict[str, Any]]) -> None:
        while slices and slices[-1]["ph"] == "X":
            _ask(slices.pop()["end"] <= ts, "a slice ends before one in it")
        _ask(bool(slices), "ends what did not begin")
        begun = slices.pop()
        _ask((begun["name"], begun.get("cat")) == (event["name"], event.get("cat")), f"ends {begun['name']}")
        self.database.execute("update slice set dur = ? - ts where id = ?", (ts, begun["slice"]))

    def _phase_X(self, event: dict[str, Any], ts: int, where: tuple[int, int], slices: list[dict[str, Any]]) -> None:
        _ask(event["dur"] >= 0, "dur")
        event["end"] = ts + int(event["dur"] * 1000)
        _ask(not slices or slices[-1]["ph"] == "B" or event["end"] <= slices[-1]["end"], "two slices overlap")
        self._slice(event, ts, event["end"] - ts, where)
        slices.append(event)

    def _phase_i(self, event: dict[str, Any], ts: int, where: tuple[int, int], slices: list[dict[str, Any]]) -> None:
        _ask(event.get("s", "t") in ("g", "p", "t"), "scope")
        self._slice(event, ts, 0, where)

    # ---- flows: they bind to the slice that encloses them

    def _flow(self, event: dict[str, Any], ts: int, slices: list[dict[str, Any]], *, begins: bool) -> None:
        _ask(bool(slices) and slices[-1]["ph"] == "X" and ts <= slices[-1]["end"], "a flow event outside a slice")
        flow = event["cat"], event["name"], event["id"]
        _ask(begins != (flow in self._flows), "a flow begins twice, or goes on without a beginning")
        here = slices[-1]["slice"]
        if not begins:
            self.database.execute("insert into flow values (?, ?)", (self._flows[flow], here))
        self._flows[flow] = here

    def _phase_s(self, event: dict[str, Any], ts: int, where: tuple[int, int], slices: list[dict[str, Any]]) -> None:
        self._flow(event, ts, slices, begins=True)

    def _phase_t(self, event: dict[str, Any], ts: int, where: tuple[int, int], slices: list[dict[str, Any]]) -> None:
        self._flow(event, ts, slices, begins=False)

    def _phase_f(self, event: dict[str, Any], ts: int, where: tuple[int, int], slices: list[dict[str, Any]]) -> None:
        _ask(event.get("bp") == "e", "bp")
        self._flow(event, ts, slices, begins=False)


def _ask(holds: bool, what: str) -> None:
    if not holds:
        raise BadTrace(what)
