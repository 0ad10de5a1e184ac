"""Red-black trees that take the same shape and colours as Linux's (v6.12 lib/rbtree.c, include/linux/rbtree_augmented.h).

The placement of an aligned vmalloc area depends on the shape of the free tree, so any other balanced tree would give other
addresses. Nodes are intrusive: what is stored inherits RbNode. The caller finds the place of a new node and links it with
rb_link_node; rb_insert_color and rb_erase rebalance. An augmented tree passes an RbAugment, whose callbacks run at the same
moments as in Linux: intermediate values that they leave behind stay until the caller propagates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

RB_RED = 0
RB_BLACK = 1
# A node that is in no tree (Linux: RB_EMPTY_NODE, a node that is its own parent).
RB_EMPTY = 2


class RbNode:
    """Links and colour of one node; rb_color is RB_RED, RB_BLACK or RB_EMPTY."""

    __slots__ = ("rb_color", "rb_left", "rb_parent", "rb_right")

    rb_parent: RbNode | None
    rb_left: RbNode | None
    rb_right: RbNode | None
    rb_color: int

    def __init__(self) -> None:
        self.rb_parent = self.rb_left = self.rb_right = None
        self.rb_color = RB_EMPTY


class RbRoot:
    """A tree: its top node, or None."""

    __slots__ = ("rb_node",)

    rb_node: RbNode | None

    def __init__(self) -> None:
        self.rb_node = None


class RbAugment(Protocol):
    """Callbacks that keep a value per node computed from its subtree (Linux: struct rb_augment_callbacks)."""

    def copy(self, old: RbNode, new: RbNode) -> None:
        """`new` takes the place of `old`: give it old's subtree value."""

    def propagate(self, node: RbNode | None, stop: RbNode | None) -> None:
        """Recompute from `node` towards the root, up to `stop` exclusive or until a value does not change."""

    def rotate(self, old: RbNode, new: RbNode) -> None:
        """`new` has become the parent of `old`: it takes old's value, old's is recomputed."""


def rb_link_node(node: RbNode, parent: RbNode | None, left: bool, root: RbRoot) -> None:
    """Hang `node`, red, under `parent` on the given side, which must be vacant; under the root if `parent` is None."""
    node.rb_parent = parent
    node.rb_color = RB_RED
    node.rb_left = node.rb_right = None
    if parent is None:
        root.rb_node = node
    elif left:
        parent.rb_left = node
    else:
        parent.rb_right = node


def _rotate_left(top: RbNode, root: RbRoot) -> RbNode:
    """The right child of `top` takes its place; returns that child. Colours are the caller's."""
    new = top.rb_right
    assert new is not None
    inner = new.rb_left
    top.rb_right = inner
    if inner is not None:
        inner.rb_parent = top
    parent = top.rb_parent
    new.rb_parent = parent
    if parent is None:
        root.rb_node = new
    elif parent.rb_left is top:
        parent.rb_left = new
    else:
        parent.rb_right = new
    new.rb_left = top
    top.rb_parent = new
    return new


def _rotate_right(top: RbNode, root: RbRoot) -> RbNode:
    """The left child of `top` takes its place; returns that child. Colours are the caller's."""
    new = top.rb_left
    assert new is not None
    inner = new.rb_right
    top.rb_left = inner
    if inner is not None:
        inner.rb_parent = top
    parent = top.rb_parent
    new.rb_parent = parent
    if parent is None:
        root.rb_node = new
    elif parent.rb_left is top:
        parent.rb_left = new
    else:
        parent.rb_right = new
    new.rb_right = top
    top.rb_parent = new
    return new


def rb_insert_color(node: RbNode, root: RbRoot, augment: RbAugment | None = None) -> None:
    """Rebalance after rb_link_node(node). Source: v6.12 lib/rbtree.c, __rb_insert."""
    while True:
        parent = node.rb_parent
        if parent is None:
            node.rb_color = RB_BLACK
            return
        if parent.rb_color == RB_BLACK:
            return
        # A red node is never the root, so it has a parent.
        gparent = parent.rb_parent
        assert gparent is not None
        on_left = gparent.rb_left is parent
        uncle = gparent.rb_right if on_left else gparent.rb_left
        if uncle is not None and uncle.rb_color == RB_RED:
            uncle.rb_color = parent.rb_color = RB_BLACK
            gparent.rb_color = RB_RED
            node = gparent
            continue
        if on_left:
            if parent.rb_right is node:
                _rotate_left(parent, root)
                if augment is not None:
                    augment.rotate(parent, node)
                parent = node
            _rotate_right(gparent, root)
        else:
            if parent.rb_left is node:
                _rotate_right(parent, root)
                if augment is not None:
                    augment.rotate(parent, node)
                parent = node
            _rotate_left(gparent, root)
        parent.rb_color = RB_BLACK
        gparent.rb_color = RB_RED
        if augment is not None:
            augment.rotate(gparent, parent)
        return


def rb_erase(node: RbNode, root: RbRoot, augment: RbAugment | None = None) -> None:
    """Take `node` out and rebalance. Source: v6.12 include/linux/rbtree_augmented.h, __rb_erase_augmented."""
    left = node.rb_left
    right = node.rb_right
    parent = node.rb_parent
    rebalance: RbNode | None = None
    changed: RbNode | None
    if left is None or right is None:
        # At most one child: it is red and the node black, so the child takes the node's colour and nothing is to repair.
        child = right if left is None else left
        if child is not None:
            child.rb_parent = parent
            child.rb_color = node.rb_color
        elif node.rb_color == RB_BLACK:
            rebalance = parent
        replacement = child
        changed = parent
    else:
        successor = right
        below = successor.rb_left
        if below is None:
            hole_parent = successor
            orphan = successor.rb_right
            if augment is not None:
                augment.copy(node, successor)
        else:
            hole_parent = successor
            while below is not None:
                hole_parent = successor
                successor = below
                below = successor.rb_left
            orphan = successor.rb_right
            hole_parent.rb_left = orphan
            successor.rb_right = right
            right.rb_parent = successor
            if augment is not None:
                augment.copy(node, successor)
                augment.propagate(hole_parent, successor)
        successor.rb_left = left
        left.rb_parent = successor
        if orphan is not None:
            orphan.rb_parent = hole_parent
            orphan.rb_color = RB_BLACK
        elif successor.rb_color == RB_BLACK:
            rebalance = hole_parent
        successor.rb_parent = parent
        successor.rb_color = node.rb_color
        replacement = successor
        changed = successor
    if parent is None:
        root.rb_node = replacement
    elif parent.rb_left is node:
        parent.rb_left = replacement
    else:
        parent.rb_right = replacement
    node.rb_parent = node.rb_left = node.rb_right = None
    node.rb_color = RB_EMPTY
    if augment is not None:
        augment.propagate(changed, None)
    if rebalance is not None:
        _erase_color(rebalance, root, augment)


def _erase_color(parent: RbNode, root: RbRoot, augment: RbAugment | None) -> None:
    """Give the side of `parent` that lost a black node its black height back (v6.12 lib/rbtree.c, ____rb_erase_color)."""
    node: RbNode | None = None
    while True:
        sibling = parent.rb_right
        on_left = sibling is not node
        if not on_left:
            sibling = parent.rb_left
        assert sibling is not None
        if sibling.rb_color == RB_RED:
            near = sibling.rb_left if on_left else sibling.rb_right
            if on_left:
                _rotate_left(parent, root)
            else:
                _rotate_right(parent, root)
            sibling.rb_color = parent.rb_color
            parent.rb_color = RB_RED
            if augment is not None:
                augment.rotate(parent, sibling)
            assert near is not None
            sibling = near
        if on_left:
            far, near = sibling.rb_right, sibling.rb_left
        else:
            far, near = sibling.rb_left, sibling.rb_right
        if far is None or far.rb_color == RB_BLACK:
            if near is None or near.rb_color == RB_BLACK:
                sibling.rb_color = RB_RED
                if parent.rb_color == RB_RED:
                    parent.rb_color = RB_BLACK
                    return
                node = parent
                above = parent.rb_parent
                if above is None:
                    return
                parent = above
                continue
            if on_left:
                _rotate_right(sibling, root)
            else:
                _rotate_left(sibling, root)
            if augment is not None:
                augment.rotate(sibling, near)
            far = sibling
            sibling = near
        if on_left:
            _rotate_left(parent, root)
        else:
            _rotate_right(parent, root)
        far.rb_color = RB_BLACK
        sibling.rb_color = parent.rb_color
        parent.rb_color = RB_BLACK
        if augment is not None:
            augment.rotate(parent, sibling)
        return


def rb_first(root: RbRoot) -> RbNode | None:
    """The leftmost node, or None."""
    node = root.rb_node
    while node is not None and node.rb_left is not None:
        node = node.rb_left
    return node


def rb_last(root: RbRoot) -> RbNode | None:
    """The rightmost node, or None."""
    node = root.rb_node
    while node is not None and node.rb_right is not None:
        node = node.rb_right
    return node


def rb_next(node: RbNode) -> RbNode | None:
    """The in-order successor, or None."""
    below = node.rb_right
    if below is not None:
        while below.rb_left is not None:
            below = below.rb_left
        return below
    parent = node.rb_parent
    while parent is not None and parent.rb_right is node:
        node, parent = parent, parent.rb_parent
    return parent


def rb_nodes(root: RbRoot) -> Iterator[RbNode]:
    """Every node in order."""
    node = rb_first(root)
    while node is not None:
        yield node
        node = rb_next(node)


def validate(root: RbRoot) -> int:
    """Assert that `root` is a red-black tree; returns its number of nodes.

    The top node is black and has no parent; every child names its parent; no node is both red and child of a red one;
    every path from the top to a vacant place passes the same number of black nodes.
    """
    top = root.rb_node
    if top is None:
        return 0
    assert top.rb_parent is None, "the top node has a parent"
    assert top.rb_color == RB_BLACK, "the top node is not black"
    heights: set[int] = set()
    count = 0
    stack: list[tuple[RbNode, int]] = [(top, 0)]
    while stack:
        node, height = stack.pop()
        count += 1
        assert node.rb_color in (RB_RED, RB_BLACK), "a node in the tree has no colour"
        height += node.rb_color
        for child in (node.rb_left, node.rb_right):
            if child is None:
                heights.add(height)
                continue
            assert child.rb_parent is node, "a child names another parent"
            assert node.rb_color == RB_BLACK or child.rb_color == RB_BLACK, "a red node has a red child"
            stack.append((child, height))
    assert len(heights) == 1, f"black heights differ: {sorted(heights)}"
    return count
