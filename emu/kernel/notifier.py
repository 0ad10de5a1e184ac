"""A chain of guest functions that the kernel asks in turn (v6.12 kernel/notifier.c).

The links stand in guest memory: struct notifier_block is notifier_call at 0, next at 8, priority (an int) at 16.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emu.kernel.kernel import Kernel

NOTIFY_STOP_MASK = 0x8000
_NEXT, _PRIORITY = 8, 16
# struct blocking_notifier_head: a rw_semaphore, then the pointer.
_HEAD_SIZE, _HEAD = 48, 40
# Room on the caller's stack for the word that the functions are given.
_RED_ZONE = 128


class BlockingNotifierHead:
    """The chain whose head is kernel symbol `name`. Raises PageFault, as the kernel does, where a block cannot be read."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.head = kernel.symbols.add_data(name, _HEAD_SIZE) + _HEAD

    def register(self, block: int) -> int:
        """Put a block behind all that have at least its priority: 0, or -EEXIST with a WARN when it is in the chain."""
        kernel = self.kernel
        priority = self._priority(block)
        link = self.head
        while following := kernel.load(link):
            if following == block:
                callback = kernel.symbol_text(kernel.load(block))
                kernel.warn("notifier_chain_register", f"notifier callback {callback.partition('+')[0]} already registered")
                return -errno.EEXIST
            if priority > self._priority(following):
                break
            link = following + _NEXT
        kernel.store(block + _NEXT, kernel.load(link))
        kernel.store(link, block)
        return 0

    def unregister(self, block: int) -> int:
        """Take a block off the chain: 0, or -ENOENT."""
        kernel = self.kernel
        link = self.head
        while following := kernel.load(link):
            if following == block:
                kernel.store(link, kernel.load(block + _NEXT))
                return 0
            link = following + _NEXT
        return -errno.ENOENT

    def call(self, action: int) -> int:
        """Call each function with its block, `action` and a pointer to an unsigned long that is 0 at first; its last value."""
        kernel = self.kernel
        block = kernel.load(self.head)
        if not block:
            return 0
        rsp = kernel.cpu.reg("rsp")
        word = (rsp & -16) - _RED_ZONE
        kernel.store(word, 0)
        while block:
            following = kernel.load(block + _NEXT)
            function = kernel.load(block)
            result = kernel.sched.call_guest(function, block, action, word, site="notifier_call_chain", stack=word - _RED_ZONE)
            if result & NOTIFY_STOP_MASK:
                break
            block = following
        return kernel.load(word)

    def _priority(self, block: int) -> int:
        value = int.from_bytes(self.kernel.cpu.read(block + _PRIORITY, 4), "little")
        return value - ((value & 1 << 31) << 1)
