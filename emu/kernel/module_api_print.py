"""Exported functions: printk and its kin, panic, dump_stack, and what fortified string functions end in.

Source: v6.12 kernel/printk/printk.c, kernel/panic.c, lib/vsprintf.c, lib/string_helpers.c.
"""

from __future__ import annotations

from emu.kernel.entry import End, Ending
from emu.kernel.guest_exports import INT_MAX, MASK64, GuestExports
from emu.kernel.kernel import TaskEnded
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.vsprintf import NextArgument

_C_STRING_CHUNK = 256
_MAX_C_STRING = 1 << 16
# v6.12 include/linux/fortify-string.h: EACH_FORTIFY_FUNC.
_FORTIFY_FUNCTIONS = (
    "strncpy", "strnlen", "strlen", "strscpy", "strlcat", "strcat", "strncat", "memset", "memcpy", "memmove", "memscan", "memcmp",
    "memchr", "memchr_inv", "kmemdup", "strcpy", "UNKNOWN",
)  # fmt: skip


class PrintExports:
    """What one kernel prints for modules."""

    def __init__(self, exports: GuestExports) -> None:
        self.kernel = exports.kernel
        export = exports.export
        export("_printk", self._printk, 1, varargs=True)
        self.kernel.symbols.add_alias("printk", "_printk")
        export("snprintf", self._snprintf, 3, varargs=True)
        export("panic", self._panic, 1, varargs=True)
        export("__warn_printk", self._warn_printk, 1, varargs=True)
        export("dump_stack", self._dump_stack, 0)
        if self.kernel.profile.version >= (6, 10):
            export("__fortify_report", self._fortify_report, 3)
            export("__fortify_panic", self._fortify_panic, 3)
        else:
            export("fortify_panic", self._fortify_panic_by_name, 1)

    def _c_string(self, la: int) -> str:
        """A NUL-terminated string of the guest. Raises PageFault where it is not mapped."""
        data = b""
        while len(data) < _MAX_C_STRING:
            step = min(_C_STRING_CHUNK, PAGE_SIZE - (la + len(data) & PAGE_SIZE - 1))
            piece = self.kernel.cpu.read(la + len(data) & MASK64, step)
            data += piece
            if b"\0" in piece:
                break
        return data.partition(b"\0")[0].decode("latin-1")

    def _printk(self, fmt: int, next_argument: NextArgument) -> int:
        return self.kernel.log.printk(self._format(fmt, next_argument))

    def _format(self, fmt: int, next_argument: NextArgument) -> str:
        return self.kernel.formatter.format(self._c_string(fmt), next_argument)

    def _snprintf(self, buffer: int, size: int, fmt: int, next_argument: NextArgument) -> int:
        if size > INT_MAX:
            self.kernel.vmalloc.warn_once("vsnprintf")
            return 0
        text = self._format(fmt, next_argument).encode("latin-1", "replace")
        if size:
            self.kernel.cpu.write(buffer, text[: size - 1] + b"\0")
        return len(text)

    def _warn_printk(self, fmt: int, next_argument: NextArgument) -> None:
        self.kernel.print_lines(("------------[ cut here ]------------",))
        self.kernel.log.printk(self._format(fmt, next_argument))

    def _fortify_report(self, reason: int, avail: int, size: int) -> None:
        """The WARN of a string function that a compiler's checks refuse; `reason` has its number and whether it writes."""
        name = _FORTIFY_FUNCTIONS[min(reason >> 1 & 0x7F, len(_FORTIFY_FUNCTIONS) - 1)]
        what = "write" if reason & 1 else "read"
        self.kernel.warn("__fortify_report", f"{name}: detected buffer overflow: {size} byte {what} of buffer size {avail}")

    def _fortify_panic(self, reason: int, avail: int, size: int) -> None:
        self._fortify_report(reason, avail, size)
        self.kernel.bug("__fortify_panic")

    def _fortify_panic_by_name(self, name: int) -> None:
        self.kernel.printk(f"detected buffer overflow in {self._c_string(name)}")
        self.kernel.bug("fortify_panic")

    def _dump_stack(self) -> None:
        self.kernel.exceptions.dump_stack(self.kernel.cpu)

    def _panic(self, fmt: int, next_argument: NextArgument) -> None:
        message = self._format(fmt, next_argument)
        self.kernel.exceptions.panic(self.kernel.cpu, message)
        raise TaskEnded(Ending(End.PANIC, message))
