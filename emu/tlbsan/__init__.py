"""TLBSan: every use of a translation that memory no longer gives, found, classified and reported."""

from emu.tlbsan.finding import Counters, Fill, Finding, Flush, Kind, Store, Tracking
from emu.tlbsan.report import finding_json, lines
from emu.tlbsan.sanitizer import NOTHING_TRACKED, TlbSan
from emu.tlbsan.scene import Scene, kernel_scene

__all__ = [
    "NOTHING_TRACKED", "Counters", "Fill", "Finding", "Flush", "Kind", "Scene", "Store", "TlbSan", "Tracking",
    "finding_json", "kernel_scene", "lines",
]
