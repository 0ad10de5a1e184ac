"""Which node a page comes from when the caller names none (v6.12 mm/mempolicy.c).

A task's policy decides: without one, the node of the CPU that asks, then the others in the order of its zonelist. Interrupts and
requests with __GFP_THISNODE know no policy but the default. Not modelled: policies of VMAs, cpusets, weights set by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from emu.kernel.gfp import Gfp
from emu.kernel.page_alloc import NodeChoice

_THISNODE = int(Gfp.THISNODE)


class Mpol(IntEnum):
    """MPOL_* (v6.12 include/uapi/linux/mempolicy.h)."""

    DEFAULT = 0
    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3
    LOCAL = 4
    PREFERRED_MANY = 5


@dataclass(slots=True)
class Mempolicy:
    """A task's policy: its mode, its nodes ascending, and where interleaving stands (current->il_prev)."""

    mode: Mpol = Mpol.DEFAULT
    nodes: tuple[int, ...] = ()
    il_prev: int = field(default=-1)

    def __post_init__(self) -> None:
        if self.mode in (Mpol.DEFAULT, Mpol.LOCAL):
            if self.nodes:
                raise ValueError(f"policy {self.mode.name} has no nodes, not {self.nodes}")
        elif not self.nodes or sorted(set(self.nodes)) != list(self.nodes):
            raise ValueError(f"policy {self.mode.name} needs nodes in ascending order, not {self.nodes}")
        if self.il_prev < 0:
            # As do_set_mempolicy leaves it: the first page is of the first node.
            self.il_prev = 1 << 10

    def interleave_nodes(self) -> int:
        """The next node of an interleaved run."""
        node = next((nid for nid in self.nodes if nid > self.il_prev), self.nodes[0])
        self.il_prev = node
        return node


DEFAULT_POLICY = Mempolicy()


class TaskMempolicy:
    """Asks the current task's policy. `numa_node_id` is the current CPU's node; `policy` the current task's policy or None."""

    def __init__(
        self, nr_nodes: int, numa_node_id: Callable[[], int], policy: Callable[[], Mempolicy | None],
        in_interrupt: Callable[[], bool] = lambda: False,
    ) -> None:
        self.nr_nodes = nr_nodes
        self.numa_node_id = numa_node_id
        self._policy = policy
        self._in_interrupt = in_interrupt

    def _pol(self, gfp: int) -> Mempolicy:
        if gfp & _THISNODE or self._in_interrupt():
            return DEFAULT_POLICY
        return self._policy() or DEFAULT_POLICY

    def choose(self, gfp: int) -> NodeChoice:
        """Node to begin with, and the nodes that a request is bound to (policy_nodemask, alloc_pages_mpol)."""
        return self._choice(self._pol(gfp))

    def _choice(self, pol: Mempolicy) -> NodeChoice:
        local = self.numa_node_id()
        match pol.mode:
            case Mpol.PREFERRED:
                return NodeChoice(pol.nodes[0])
            case Mpol.INTERLEAVE:
                return NodeChoice(pol.interleave_nodes())
            case Mpol.BIND:
                return NodeChoice(local, frozenset(pol.nodes))
            case Mpol.PREFERRED_MANY:
                return NodeChoice(local, preferred=frozenset(pol.nodes))
        return NodeChoice(local)

    def choose_bulk(self, gfp: int, nr_pages: int) -> list[tuple[NodeChoice, int]]:
        """How a bulk request is shared out (alloc_pages_bulk_array_mempolicy): interleaving gives each node its share at once."""
        pol = self._pol(gfp)
        if pol.mode is not Mpol.INTERLEAVE:
            return [(self._choice(pol), nr_pages)]
        per_node, delta = divmod(nr_pages, len(pol.nodes))
        shares = []
        for i in range(len(pol.nodes)):
            share = per_node + (1 if i < delta else 0)
            shares.append((NodeChoice(pol.interleave_nodes()), share))
        return [(choice, share) for choice, share in shares if share]
