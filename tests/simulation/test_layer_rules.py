"""Each rule about layers is needed: there is a story that goes well with it and goes wrong when it is taken out.

The rules of `Rule` are about the order of steps, and the product asks for each whether it holds. These here are about
what a layer is; each is taken out by putting in its place what one might have written instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from metadata.layers import Layer, Tree
from metadata.pages import PAGE_BLOCKS, PAGE_SHIFT, Page
from metadata.ranges import Ranges
from metadata.seams import Done
from nbdserver.logdisk.changed import Changed
from nbdserver.logdisk.maps import Maps
from nbdserver.logdisk.tree_changes import TreeChanges
from protocol.disk import HEAD, NAMELESS
from tests.unit.families import SimulatedFamily
from tests.unit.test_layers import SMALL_CACHE, change, changes, check, discard, numbers, put, seen, settled, snapshot

Patch = pytest.MonkeyPatch


def family() -> SimulatedFamily:
    return SimulatedFamily(size_bytes=1 << 30, segment_bytes=256 << 10, settings=SMALL_CACHE)


def again(one: SimulatedFamily) -> None:
    """A checkpoint, kill -9, and another life."""
    one.checkpoint()
    one.crash()
    one.open()


# -- stories


def overwritten_over_a_nameless_parent() -> None:
    one = family()
    put(one, 1, 0, 1, 10)
    layer = snapshot(one, "base")
    assert change(one, "clone", layer, 2) == 0
    assert change(one, "delete_snapshot", layer) == 0
    put(one, 1, 0, 101, 10)
    assert numbers(one, one.disk.head(2), 0, 10) == list(range(1, 11))
    put(one, 2, 5, 201, 2)
    assert numbers(one, one.disk.head(1), 0, 10) == list(range(101, 111))


def overwritten_over_a_snapshot() -> None:
    one = family()
    put(one, 1, 0, 1, 10)
    layer = snapshot(one, "base")
    put(one, 1, 0, 101, 10)
    assert seen(one, layer, 0, 10) == list(range(1, 11))


def deleted_under_two_volumes() -> None:
    one = family()
    put(one, 1, 0, 1, 600)
    layer = snapshot(one, "base")
    assert change(one, "clone", layer, 2) == 0
    put(one, 1, 3, 103)
    put(one, 2, 4, 204)
    assert change(one, "delete_snapshot", layer) == 0
    one.run(200.0)
    again(one)
    assert numbers(one, one.disk.head(1), 0, 600) == [1, 2, 3, 103, *range(5, 601)]
    assert numbers(one, one.disk.head(2), 0, 600) == [1, 2, 3, 4, 204, *range(6, 601)]


def deleted_while_looked_at() -> None:
    one = family()
    put(one, 1, 0, 1, 100)
    layer = snapshot(one, "base")
    put(one, 1, 0, 201, 100)
    view = one.disk.view(layer)
    assert change(one, "delete_snapshot", layer) == 0
    one.run(200.0)
    assert numbers(one, view, 0, 100) == list(range(1, 101))
    view.close()
    settled(one)


def merged_and_overwritten() -> None:
    one = family()
    put(one, 1, 0, 1, 100)
    layer = snapshot(one, "base")
    put(one, 1, 0, 201, 10)
    assert change(one, "delete_snapshot", layer) == 0
    settled(one)
    put(one, 1, 50, 301, 10)
    one.run(10.0)
    settled(one)
    check(one)


def discarded_over_a_parent() -> None:
    one = family()
    put(one, 1, 0, 1, 10)
    layer = snapshot(one, "base")
    discard(one, 1, 3, 2)
    again(one)
    assert numbers(one, one.disk.head(1), 0, 6) == [1, 2, 3, 0, 0, 6]
    assert seen(one, layer, 0, 6) == [1, 2, 3, 4, 5, 6]


def discarded_at_length_over_a_parent() -> None:
    one = family()
    for lba in range(0, 20_000, 500):
        put(one, 1, lba, lba + 1)
    layer = snapshot(one, "base")
    discard(one, 1, 400, 15_000)
    one.run(60.0)
    again(one)
    assert not one.disk.maps.holes
    assert numbers(one, one.disk.head(1), 500, 1) == [0]
    assert numbers(one, one.disk.head(1), 15_500, 1) == [15_501]
    assert seen(one, layer, 500, 1) == [501]


def shrunk_and_grown(over_a_snapshot: bool) -> None:
    one = family()
    put(one, 1, 0, 1, 2000)
    if over_a_snapshot:
        snapshot(one, "base")
    assert change(one, "resize", 1, 1000 * 4096) == 0
    again(one)
    assert change(one, "resize", 1, 1 << 30) == 0
    assert numbers(one, one.disk.head(1), 998, 4) == [999, 1000, 0, 0]
    again(one)
    assert numbers(one, one.disk.head(1), 1998, 2) == [0, 0]


def rolled_back_and_written() -> None:
    one = family()
    put(one, 1, 0, 1, 10)
    layer = snapshot(one, "base")
    put(one, 1, 0, 101, 10)
    assert change(one, "rollback", 1, layer) == 0
    put(one, 1, 5, 201)
    assert [row.name for row in one.disk.snapshots()] == ["base"]
    assert seen(one, layer, 0, 10) == list(range(1, 11))
    assert change(one, "rollback", 1, layer) == 0
    assert numbers(one, one.disk.head(1), 0, 10) == list(range(1, 11))


def changed_over_a_rollback() -> None:
    one = family()
    put(one, 1, 0, 1, 10)
    first = snapshot(one, "first")
    put(one, 1, 4, 101)
    second = snapshot(one, "second")
    put(one, 1, 7, 201)
    assert change(one, "rollback", 1, first) == 0
    put(one, 1, 2, 301)
    head = one.disk.head(1)
    assert [lba for lba, is_dirty in enumerate(changes(one, head, second, 0, 10)) if is_dirty] == [2, 4]
    assert [lba for lba, is_dirty in enumerate(changes(one, head, first, 0, 10)) if is_dirty] == [2]


def written_after_what_a_power_cut_took() -> None:
    one = family()
    put(one, 1, 0, 1)
    assert one.flush() == 0
    given = []
    for life in range(3):
        put(one, 1, 10 + life, 100 + life)
        page = one.disk.maps.page(one.disk.head(1).layer << 32)
        assert page is not None
        given.append(page[10 + life])
        one.drive.forget_unsynced()
        one.crash(power=True)
        one.open()
    assert len(set(given)) == 3, "an MBA names one content for ever, also one that was lost"


# -- what one might have written instead


def compare_with_the_newest_named_one(patch: Patch) -> None:
    def first_mba(tree: Tree, layer: int) -> int:
        row = tree.layers[layer].row
        while row.parent and tree.layers[row.parent].row.kind == NAMELESS:
            row = tree.layers[row.parent].row
        return row.first_mba or 1

    patch.setattr(Tree, "first_mba", first_mba)


def begin_where_the_parent_began(patch: Patch) -> None:
    real = TreeChanges._new_head

    def new_head(changes: TreeChanges, parent: int, volume: int, size_bytes: int) -> Any:
        first_mba = changes._tree.layers[parent].row.first_mba
        return real(changes, parent, volume, size_bytes)._replace(first_mba=first_mba)

    patch.setattr(TreeChanges, "_new_head", new_head)


def merge_when(patch: Patch, is_due: Callable[[Layer], bool]) -> None:
    def look(tree: Tree, layer: int) -> None:
        found = tree.layers[layer]
        if found.row.kind == NAMELESS and is_due(found):
            tree.removable.add(layer)
        else:
            tree.removable.discard(layer)

    patch.setattr(Tree, "_look", look)


def merge_into_one_of_several(patch: Patch) -> None:
    def take_over(tree: Tree, layer: int) -> None:
        found = tree.layers[layer]
        child = tree.layers[next(iter(found.children))]
        child.row = child.row._replace(first_mba=found.row.first_mba)

    merge_when(patch, lambda found: not found.views)
    patch.setattr(Tree, "take_over", take_over)


def merge_under_the_eyes_of_a_client(patch: Patch) -> None:
    merge_when(patch, lambda found: len(found.children) <= 1)


def merge_without_taking_over(patch: Patch) -> None:
    patch.setattr(Tree, "take_over", lambda tree, layer: None)


def clear_without_an_entry(patch: Patch) -> None:
    real = Maps._clear_in_page

    def clear(maps: Maps, number: int, page: Page, start: int, stop: int) -> bool:
        complete = real(maps, number, page, start, stop)
        noted = maps.logical.changed[number]
        noted[:] = [index for index in noted if not start <= index < stop] or [(start - 1) % PAGE_BLOCKS]
        return complete

    patch.setattr(Maps, "_clear_in_page", clear)


def keep_no_cut(patch: Patch) -> None:
    def set_cut(tree: Tree, layer: int, ranges: Ranges) -> None:
        pass

    patch.setattr(Tree, "set_cut", set_cut)


def shrink_by_the_size_alone(patch: Patch) -> None:
    def resize(changes: TreeChanges, volume: int, size_bytes: int, done: Done) -> None:
        changes._set_size(volume, size_bytes, 0, done)

    patch.setattr(TreeChanges, "resize", resize)


def roll_back_onto_the_snapshot_itself(patch: Patch) -> None:
    def rollback(changes: TreeChanges, volume: int, layer: int, done: Done) -> None:
        old, row = (changes._tree.layers[each].row for each in (changes._tree.heads[volume], layer))
        changes._change([old._replace(kind=NAMELESS), row._replace(kind=HEAD, name="", created_s=0)], 0, done)

    patch.setattr(TreeChanges, "rollback", rollback)


def changed_is_what_the_head_has_written(patch: Patch) -> None:
    def compare(found: Changed, page: int, one: Page, other: Page) -> None:
        first_mba = found._disk.maps.tree.first_mba(found._device.layer)
        found._compared += 1
        while found._at < min(found._end, (page + 1) << PAGE_SHIFT + 12):
            found._add(found._at + 4096, int(one[(found._at >> 12) % PAGE_BLOCKS] >= first_mba))

    patch.setattr(Changed, "_compare", compare)


def count_mbas_on_from_what_is_there(patch: Patch) -> None:
    real = Maps.begin_epoch

    def begin_epoch(maps: Maps, epoch: int) -> None:
        if epoch == 1:
            real(maps, epoch)
        maps.next_mba = (maps.next_mba + PAGE_BLOCKS - 1) & -PAGE_BLOCKS

    patch.setattr(Maps, "begin_epoch", begin_epoch)


@dataclass(frozen=True)
class LayerRule:
    """What is so, how it shows, and what would be instead."""

    sentence: str
    story: Callable[[], None]
    take_out: Callable[[Patch], None]


RULES = (
    LayerRule(
        "A block may be overwritten in place if its MBA is not below the first MBA of the head's layer, whether or not "
        "the snapshot below still has a name.",
        overwritten_over_a_nameless_parent,
        compare_with_the_newest_named_one,
    ),
    LayerRule(
        "The first MBA of a layer is the next one at the moment when it is made.",
        overwritten_over_a_snapshot,
        begin_where_the_parent_began,
    ),
    LayerRule(
        "A layer is merged into its child only if that is the only one.",
        deleted_under_two_volumes,
        merge_into_one_of_several,
    ),
    LayerRule(
        "A layer is merged or dropped only if no export of it is open.",
        deleted_while_looked_at,
        merge_under_the_eyes_of_a_client,
    ),
    LayerRule(
        "A child into which a layer is merged owns the layer's blocks.",
        merged_and_overwritten,
        merge_without_taking_over,
    ),
    LayerRule(
        "A hole over a parent layer is an entry.",
        discarded_over_a_parent,
        clear_without_an_entry,
    ),
    LayerRule(
        "A range of holes over a parent layer can be one entry.",
        discarded_at_length_over_a_parent,
        keep_no_cut,
    ),
    LayerRule(
        "Shrinking puts a hole over what it cuts off.",
        lambda: shrunk_and_grown(over_a_snapshot=False),
        shrink_by_the_size_alone,
    ),
    LayerRule(
        "Shrinking over a snapshot puts a hole over what it cuts off.",
        lambda: shrunk_and_grown(over_a_snapshot=True),
        shrink_by_the_size_alone,
    ),
    LayerRule(
        "A rollback is a new head on an old layer.",
        rolled_back_and_written,
        roll_back_onto_the_snapshot_itself,
    ),
    LayerRule(
        "Changed since a snapshot means that the MBAs differ, after rollbacks too.",
        changed_over_a_rollback,
        changed_is_what_the_head_has_written,
    ),
    LayerRule(
        "An MBA is never used again.",
        written_after_what_a_power_cut_took,
        count_mbas_on_from_what_is_there,
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.sentence[:60])
def test_with_the_rule_the_story_goes_well_and_without_it_does_not(rule: LayerRule, monkeypatch: Patch) -> None:
    rule.story()
    rule.take_out(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 - a wrong content, a family that fails, a contradiction
        rule.story()
