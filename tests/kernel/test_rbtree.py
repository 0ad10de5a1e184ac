"""Red-black trees with Linux's shapes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from emu.kernel.rbtree import (
    RB_BLACK,
    RB_EMPTY,
    RB_RED,
    RbNode,
    RbRoot,
    rb_erase,
    rb_first,
    rb_insert_color,
    rb_last,
    rb_link_node,
    rb_next,
    rb_nodes,
    validate,
)


class Keyed(RbNode):
    __slots__ = ("key",)

    def __init__(self, key: int) -> None:
        super().__init__()
        self.key = key


def insert(root: RbRoot, node: Keyed) -> None:
    parent, left = None, False
    place = root.rb_node
    while place is not None:
        parent = place
        left = node.key < place.key
        place = place.rb_left if left else place.rb_right
    rb_link_node(node, parent, left, root)
    rb_insert_color(node, root)


def tree(*keys: int) -> tuple[RbRoot, dict[int, Keyed]]:
    root = RbRoot()
    nodes = {key: Keyed(key) for key in keys}
    for node in nodes.values():
        insert(root, node)
    return root, nodes


def shape(node: RbNode | None) -> object:
    """(colour, key, left, right), black in capitals."""
    if node is None:
        return None
    colour = "B" if node.rb_color == RB_BLACK else "r"
    return (colour, node.key, shape(node.rb_left), shape(node.rb_right))


def test_the_first_node_is_a_black_root():
    root, nodes = tree(1)
    assert shape(root.rb_node) == ("B", 1, None, None)
    assert nodes[1].rb_parent is None


def test_a_red_uncle_flips_colours_without_rotation():
    root, _ = tree(2, 1, 3, 4)
    assert shape(root.rb_node) == ("B", 2, ("B", 1, None, None), ("B", 3, None, ("r", 4, None, None)))


def test_three_ascending_keys_rotate_left_once():
    root, _ = tree(1, 2, 3)
    assert shape(root.rb_node) == ("B", 2, ("r", 1, None, None), ("r", 3, None, None))


def test_an_inner_grandchild_rotates_twice():
    root, _ = tree(1, 3, 2)
    assert shape(root.rb_node) == ("B", 2, ("r", 1, None, None), ("r", 3, None, None))


def test_erasing_a_node_with_two_children_puts_its_successor_in_its_place_and_colour():
    root, nodes = tree(2, 1, 4, 3, 5)
    rb_erase(nodes[2], root)
    assert shape(root.rb_node) == ("B", 3, ("B", 1, None, None), ("B", 4, None, ("r", 5, None, None)))


def test_erasing_under_a_red_sibling_rotates_it_up():
    root, nodes = tree(2, 1, 4, 3, 5, 6)
    assert shape(root.rb_node)[3][0] == "r"
    rb_erase(nodes[1], root)
    assert shape(root.rb_node) == (
        "B", 4, ("B", 2, None, ("r", 3, None, None)), ("B", 5, None, ("r", 6, None, None)),
    )  # fmt: skip


def test_an_erased_node_keeps_no_links():
    root, nodes = tree(2, 1, 3)
    rb_erase(nodes[2], root)
    assert (nodes[2].rb_parent, nodes[2].rb_left, nodes[2].rb_right) == (None, None, None)
    assert nodes[2].rb_color == RB_EMPTY


def test_rb_next_walks_in_order_from_first_to_last():
    root, nodes = tree(*range(20))
    assert rb_first(root) is nodes[0]
    assert rb_last(root) is nodes[19]
    assert rb_next(nodes[7]) is nodes[8]
    assert rb_next(nodes[19]) is None
    assert [node.key for node in rb_nodes(root)] == list(range(20))


def test_validate_rejects_two_red_nodes_in_a_row():
    root, nodes = tree(2, 1, 3, 4)
    nodes[3].rb_color = RB_RED
    try:
        validate(root)
    except AssertionError:
        return
    raise AssertionError("accepted")


class CountAugment:
    """Number of nodes in the subtree, kept through the callbacks as the kernel's templates keep theirs."""

    def __init__(self) -> None:
        self.count: dict[int, int] = {}

    def compute(self, node: Keyed) -> int:
        return 1 + sum(self.count[child.key] for child in (node.rb_left, node.rb_right) if child is not None)

    def copy(self, old: Keyed, new: Keyed) -> None:
        self.count[new.key] = self.count[old.key]

    def propagate(self, node: Keyed | None, stop: Keyed | None) -> None:
        while node is not stop:
            value = self.compute(node)
            if self.count[node.key] == value:
                return
            self.count[node.key] = value
            node = node.rb_parent

    def rotate(self, old: Keyed, new: Keyed) -> None:
        self.count[new.key] = self.count[old.key]
        self.count[old.key] = self.compute(old)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=120))
def test_toggling_random_keys_keeps_a_red_black_tree_in_order_and_its_augmented_values(keys):
    root = RbRoot()
    live: dict[int, Keyed] = {}
    augment = CountAugment()
    for key in keys:
        if key in live:
            rb_erase(live.pop(key), root, augment)
        else:
            node = live[key] = Keyed(key)
            parent, left, place = None, False, root.rb_node
            while place is not None:
                parent, left = place, key < place.key
                place = place.rb_left if left else place.rb_right
            augment.count[key] = 1
            rb_link_node(node, parent, left, root)
            augment.count[key] = 0
            augment.propagate(node, None)
            rb_insert_color(node, root, augment)
        assert validate(root) == len(live)
        assert [node.key for node in rb_nodes(root)] == sorted(live)
        assert all(augment.count[node.key] == augment.compute(node) for node in live.values())
