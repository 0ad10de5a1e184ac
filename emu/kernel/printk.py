"""The kernel log (v6.12 kernel/printk/printk.c).

A printk call makes a record; a record of several lines is stored as several LogLines. Levels come as KERN_SOH and a digit
at the start of the text, 'c' continues the line before. Formats are emu.kernel.vsprintf's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

KERN_SOH = "\x01"
# Longest text of a record; the rest is cut.
PRINTKRB_RECORD_MAX = 1024


class LogLevel(IntEnum):
    """KERN_EMERG to KERN_DEBUG."""

    EMERG = 0
    ALERT = 1
    CRIT = 2
    ERR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7


MESSAGE_LOGLEVEL_DEFAULT = LogLevel.WARNING


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of the log, without newline; `time` in nanoseconds of the machine's clock."""

    level: LogLevel
    time: int
    text: str

    def stamped(self) -> str:
        """The line as dmesg prints it, with its time stamp."""
        seconds, rest = divmod(self.time, 1_000_000_000)
        return f"[{seconds:5d}.{rest // 1000:06d}] {self.text}"


class KernelLog:
    """The log of one machine. `now` gives its time in nanoseconds; `on_line` is told of each line as it is stored.

    A line that KERN_CONT makes longer is told of again, whole.
    """

    def __init__(
        self,
        *,
        now: Callable[[], int] = lambda: 0,
        on_line: Callable[[LogLine], None] | None = None,
    ) -> None:
        self.now = now
        self.on_line = on_line
        self.lines: list[LogLine] = []
        self._open = False

    def printk(self, text: str) -> int:
        """Store a text that may begin with a level; returns its length without the level, as printk does."""
        level, cont, body = _split_level(text)
        length = len(body)
        body = body[:PRINTKRB_RECORD_MAX]
        newline = body.endswith("\n")
        parts = body.removesuffix("\n").split("\n")
        if cont and self._open and self.lines:
            self.lines[-1] = replace(self.lines[-1], text=self.lines[-1].text + parts.pop(0))
            self._tell(self.lines[-1])
        for part in parts:
            line = LogLine(level, self.now(), part)
            self.lines.append(line)
            self._tell(line)
        self._open = not newline
        return length

    def _tell(self, line: LogLine) -> None:
        if self.on_line is not None:
            self.on_line(line)

    def print_lines(self, lines: Iterable[str], level: LogLevel = MESSAGE_LOGLEVEL_DEFAULT) -> None:
        """Store whole lines, such as those of an oops."""
        for line in lines:
            self.log(level, line)

    def log(self, level: LogLevel, text: str) -> None:
        """Store a text of the kernel's own at `level`."""
        self.printk(f"{KERN_SOH}{int(level)}{text}\n")

    def text(self, *, timestamps: bool = False) -> str:
        """The whole log, a newline after each line."""
        return "".join((line.stamped() if timestamps else line.text) + "\n" for line in self.lines)


def _split_level(text: str) -> tuple[LogLevel, bool, str]:
    """Level, whether the text continues a line, and the text without its prefixes (printk_parse_prefix)."""
    level = MESSAGE_LOGLEVEL_DEFAULT
    cont = False
    while len(text) >= 2 and text[0] == KERN_SOH and (text[1] in "01234567c"):
        if text[1] == "c":
            cont = True
        else:
            level = LogLevel(int(text[1]))
        text = text[2:]
    return level, cont, text
