"""The machine code that stands in kernel text: entry points, the ends of threads and calls, and the loops that CPUs wait in.

Wherever the model takes over there is a HLT, whose address says what for. The rest is real code: IRETQ, the calls under a new
thread, the string operations.
"""

from __future__ import annotations

from emu.kernel.callers import CALLERS
from emu.kernel.exports import KernelSymbols
from emu.kernel.layout import Layout
from emu.kernel.task import KTHREAD_EXIT, ret_from_fork_code
from emu.kernel.traps import entry_stubs, idt_entries
from emu.memory import Memory

_HLT, _INT3 = 0xF4, 0xCC
_IRETQ = b"\x48\xcf"
# mov rax, -ENOSYS; sysretq: there are no system calls.
_NO_SYSCALL = bytes.fromhex("48 c7 c0 da ff ff ff 48 0f 07")
# The same between two HLTs, at which CR3 is switched to the kernel's PGD and back.
_NO_SYSCALL_PTI = bytes.fromhex("f4 48 c7 c0 da ff ff ff f4 48 0f 07")
_TO_KERNEL, _TO_USER = 0, 8
# hlt; jmp back to it: what a CPU executes while it waits.
_LOOP = bytes.fromhex("f4 eb fd")
# call rax; hlt: a return address that looks like one to the unwinder, and the HLT that ends the call.
_CALL = bytes.fromhex("ff d0 f4")
_CALL_RETURN = 2
IDLE_LOOP = "default_idle"
SPIN_SITES = ("native_queued_spin_lock_slowpath", "smp_call_function_many_cond")
CALL_SITES = (
    "process_one_work", "call_timer_fn", "rcu_do_batch", "__flush_smp_call_function_queue", "notifier_call_chain",
    "tasklet_action_common", "__handle_irq_event_percpu", "nmi_handle", "irq_work_single", "smp_call_function_on_cpu",
    "__wake_up_common",
)


class KernelText:
    """The code of one kernel image, placed when this is made.

    `kthread_exit`: where a thread that returns ends; `idle`: the loop of a CPU that has nothing to do; `syscall_entry` and
    `syscall_exit`: where CR3 is switched with page-table isolation, else nowhere.
    """

    def __init__(self, memory: Memory, layout: Layout, symbols: KernelSymbols, version: str, *, pti: bool = False) -> None:
        self._memory = memory
        self._layout = layout
        self._symbols = symbols
        symbols.add_string_ops()
        self.vectors = self._place_entry_stubs(version)
        symbols.add_code("common_interrupt_return", _IRETQ)
        syscall = symbols.add_code("entry_SYSCALL_64", _NO_SYSCALL_PTI if pti else _NO_SYSCALL)
        self.syscall_entry, self.syscall_exit = (syscall + _TO_KERNEL, syscall + _TO_USER) if pti else (-1, -1)
        for name, caller in CALLERS[version].items():
            symbols.add_code(name, bytes((_INT3,)) * caller.size)
        addresses = [symbols.add_code(name, bytes(16)) for name in ("ret_from_fork_asm", "ret_from_fork", "kthread")]
        for address, code in ret_from_fork_code(*addresses).items():
            memory.write(layout.pa(address), code.ljust(16, bytes((_INT3,))))
        self.kthread_exit = addresses[2] + KTHREAD_EXIT
        self.idle = symbols.add_code(IDLE_LOOP, _LOOP)
        self._spin_sites = {name: symbols.add_code(name, _LOOP) for name in SPIN_SITES}
        self._call_sites = {name: symbols.add_code(name, _CALL) + _CALL_RETURN for name in CALL_SITES}
        self.spins = frozenset(self._spin_sites.values())
        self.returns = frozenset(self._call_sites.values())

    def _place_entry_stubs(self, version: str) -> dict[int, int]:
        """One HLT at every address that a gate points to: the vectors by address."""
        stubs = {name: bytearray([_INT3] * size) for name, size in entry_stubs(version)}
        entries = idt_entries(version)
        for entry in entries:
            stubs[entry.stub][entry.offset] = _HLT
        addresses = {name: self._symbols.add_code(name, bytes(code)) for name, code in stubs.items()}
        return {addresses[entry.stub] + entry.offset: entry.vector for entry in entries}

    def spin_site(self, name: str) -> int:
        """Address of the HLT in the loop of a function of SPIN_SITES. Raises KeyError."""
        return self._spin_sites[name]

    def call_site(self, name: str) -> int:
        """Return address of the call in a function of CALL_SITES; a HLT stands there. Raises KeyError."""
        return self._call_sites[name]

    def is_stop(self, la: int) -> bool:
        """Whether the HLT at `la` is one of these."""
        return (
            la in self.vectors or la in (self.kthread_exit, self.idle, self.syscall_entry, self.syscall_exit)
            or la in self.spins or la in self.returns
        )
