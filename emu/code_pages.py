"""Which frames a CPU executes and which it may write unseen: never the same one, on any CPU of a memory.

Unicorn keeps translations of code, and lets a store through its soft TLB go unseen. A frame that any CPU has executed is therefore
writable in no soft TLB: the first store to it comes to the fill callback, which tells here, and every other CPU drops what it
translated before it runs on. A frame that is executed for the first time is taken from those that may write it.
"""

from __future__ import annotations

from collections.abc import Callable

from emu.memory import Memory


class CodePages:
    """One CPU's part. `drop_rights` makes its soft TLB ask again; `drop_code` makes it translate anew before it runs on."""

    def __init__(self, memory: Memory, drop_rights: Callable[[], None], drop_code: Callable[[], None]) -> None:
        self._memory = memory
        self._drop_rights = drop_rights
        self._drop_code = drop_code
        # The linear pages at which a frame of code was searched for candidates.
        self.scanned: dict[int, set[int]] = {}
        # Frames that the soft TLB may let be written.
        self.written: set[int] = set()
        # The frame that was last executed at a linear page.
        self.executed: dict[int, int] = {}
        memory.code_listeners.append(self)

    def close(self) -> None:
        """Hear no more of other CPUs."""
        if self in self._memory.code_listeners:
            self._memory.code_listeners.remove(self)

    def begin_fetch(self, la: int, frame: int) -> None:
        """This CPU is about to execute a frame at a page for the first time since it was last written."""
        self.code_fetched(frame)
        for other in self._memory.code_listeners:
            if other is not self:
                other.code_fetched(frame)
        self._memory.code_frames.add(frame)
        self.scanned.setdefault(frame, set()).add(la)

    def begin_write(self, frame: int) -> None:
        """This CPU stores to a frame of code. Its own translations are Unicorn's to drop, which sees its own stores."""
        self._memory.code_frames.discard(frame)
        self.scanned.pop(frame, None)
        for other in self._memory.code_listeners:
            if other is not self:
                other.code_changed(frame)
        self._drop_rights()
        self.written.add(frame)

    def code_changed(self, frame: int) -> None:
        """The bytes of a frame that was executed change, and not by this CPU."""
        if self.scanned.pop(frame, None) is not None:
            self._drop_code()

    def code_fetched(self, frame: int) -> None:
        """A CPU begins to execute a frame: from now on this one's stores to it must be seen."""
        if frame in self.written:
            self.written.clear()
            self._drop_rights()
