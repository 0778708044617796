"""The offline check of layers: each kind of damage to rows, parents, cuts and what layers hold over others is found."""

from array import array
from collections.abc import Callable

import pytest

from metadata.layers import Row
from nbdserver.logdisk.check import CheckResult, check_family
from protocol.disk import HEAD, NAMELESS, SNAPSHOT, pack_value, unpack_value
from tests.unit.families import SETTINGS, SimulatedFamily
from tests.unit.test_layers import change, discard, put, snapshot

SIZE_BYTES = 1 << 30


@pytest.fixture
def family() -> SimulatedFamily:
    """Closed. Volume 1 has the snapshots "one" (layer 1) and "two" (layer 2) and its head (4); volume 2 is a clone of
    "one" (layer 3). The head of 1 is cut from LBA 10,000 to 39,999; each holds some entries over those below."""
    family = SimulatedFamily(size_bytes=SIZE_BYTES, segment_bytes=1 << 20, settings=SETTINGS)
    put(family, 1, 0, 1, 600)
    put(family, 1, 20_000, 5000, 10)
    one = snapshot(family, "one")
    put(family, 1, 100, 1000, 20)
    assert change(family, "clone", one, 2) == 0
    snapshot(family, "two")
    put(family, 1, 100, 2000, 5)
    discard(family, 1, 10_000, 30_000)
    discard(family, 1, 300, 10)
    put(family, 2, 50, 3000, 10)
    family.run(60.0)
    family.close()
    family._begin()
    assert sentences(family) == []
    return family


def checked(family: SimulatedFamily) -> CheckResult:
    return check_family(family.files, family.store, quick=True)


def sentences(family: SimulatedFamily) -> list[str]:
    return [f"{finding.kind}: {finding.sentence}" for finding in checked(family).findings]


def write(family: SimulatedFamily, key: bytes, payload: bytes | None) -> None:
    """Give a key another payload, well-formed; None deletes it."""
    batch = family.store.batch()
    if payload is None:
        batch.delete(key)
    else:
        batch.put(key, pack_value(key, payload))
    family.store.write(batch)


def read(family: SimulatedFamily, key: bytes) -> bytes:
    value = family.store.get(key)
    assert value is not None, key
    return unpack_value(key, value)


def row_key(layer: int) -> bytes:
    return b"Y" + layer.to_bytes(4, "big")


def page_key(layer: int, lba: int, kind: int, index: int | None = None) -> bytes:
    """Of the base (0) of a page, or of one of its entries (1)."""
    key = b"L" + layer.to_bytes(4, "big") + (lba >> 8).to_bytes(7, "big") + bytes([kind])
    return key if index is None else key + bytes([index])


def edit_row(layer: int, **values: object) -> Callable[[SimulatedFamily], None]:
    def edit(family: SimulatedFamily) -> None:
        row = Row.unpack(read(family, row_key(layer)))
        write(family, row_key(layer), row._replace(**values).pack())

    return edit


def lose(key: bytes) -> Callable[[SimulatedFamily], None]:
    return lambda family: write(family, key, None)


def cut(layer: int, *numbers: int) -> Callable[[SimulatedFamily], None]:
    return lambda family: write(family, b"G" + layer.to_bytes(4, "big"), array("Q", numbers).tobytes())


def entry(layer: int, lba: int, mba: Callable[[SimulatedFamily], int]) -> Callable[[SimulatedFamily], None]:
    """Point an LBA of a layer elsewhere."""
    return lambda family: write(family, page_key(layer, lba, 1, lba & 255), mba(family).to_bytes(8, "little"))


def shown(layer: int, lba: int) -> Callable[[SimulatedFamily], int]:
    """The MBA that a layer's own entry has for an LBA."""

    def look(family: SimulatedFamily) -> int:
        value = family.store.get(page_key(layer, lba, 1, lba & 255))
        if value is not None:
            return int.from_bytes(unpack_value(page_key(layer, lba, 1, lba & 255), value), "little")
        return int(array("Q", read(family, page_key(layer, lba, 0)))[lba & 255])

    return look


def flip_row(family: SimulatedFamily) -> None:
    value = bytearray(family.store.get(row_key(2)) or b"")
    value[-1] ^= 1
    batch = family.store.batch()
    batch.put(row_key(2), bytes(value))
    family.store.write(batch)


def swap_rows(family: SimulatedFamily) -> None:
    one, other = read(family, row_key(2)), read(family, row_key(3))
    write(family, row_key(2), other)
    write(family, row_key(3), one)


def lose_all_rows(family: SimulatedFamily) -> None:
    for key in (*map(row_key, (1, 2, 3, 4)), b"G" + (4).to_bytes(4, "big")):
        write(family, key, None)


DAMAGE: dict[str, tuple[Callable[[SimulatedFamily], None], str]] = {
    "a flipped bit in a row": (flip_row, "key 5900000002"),
    "a lost row of a snapshot": (lose(row_key(2)), "does not stand where it should"),
    "a lost row of a head": (lose(row_key(3)), "is of a layer that is none"),
    "a lost row of a layer with cuts": (lose(row_key(4)), "there is no such layer"),
    "rows that changed places": (swap_rows, "does not stand where it should"),
    "all rows lost": (lose_all_rows, "their rows are missing"),
    "a parent that is none": (edit_row(3, parent=77), "does not stand where it should"),
    "two roots": (edit_row(2, parent=0), "or the root"),
    "a parent that is younger": (edit_row(2, parent=3), "does not stand where it should"),
    "a first MBA that was never given out": (edit_row(4, first_mba=1 << 60), "which was never given out"),
    "a first MBA above its own blocks": (edit_row(4, first_mba=1 << 41), "which no layer below layer 4 shows"),
    "a first MBA below that of its parent": (edit_row(4, first_mba=1), "is older than layer 2"),
    "a kind that is none": (edit_row(4, kind=7), "of no known kind"),
    "two heads": (edit_row(3, volume=1), "same volume's head"),
    "a snapshot that is a head": (edit_row(2, kind=HEAD, name=""), "same volume's head"),
    "a head that others stand on": (edit_row(2, kind=HEAD, volume=9, name=""), "others stand on it"),
    "two snapshots of one name": (edit_row(2, name="one"), "the same snapshot"),
    "a snapshot without a name": (edit_row(2, kind=SNAPSHOT, name=""), "has the name ''"),
    "a head with a name": (edit_row(4, name="four"), "has the name 'four'"),
    "a nameless layer with a name": (edit_row(2, kind=NAMELESS), "has the name 'two'"),
    "a size of nothing": (edit_row(4, size_bytes=0), "has 0 bytes"),
    "a size below what is mapped": (edit_row(3, size_bytes=40 * 4096), "lies behind the end"),
    "a volume of number 0": (edit_row(3, volume=0), "of volume 0"),
    "a number that will be given out again": (
        lambda family: write(family, b"T", (4).to_bytes(4, "little") + bytes(4)),
        "or was never made",
    ),
    "a cut of a layer that is none": (cut(77, 5, 9), "there is no such layer"),
    "a cut that ends before it begins": (cut(4, 40_000, 10_000), "where it cannot be"),
    "cuts that overlap": (cut(4, 10_000, 40_000, 39_000, 50_000), "where it cannot be"),
    "half a cut": (cut(4, 10_000), "cannot be read"),
    "a cut beyond any volume": (cut(4, 10_000, 1 << 50), "where it cannot be"),
    "a cut of the root": (cut(1, 10_000, 40_000), "where it cannot be"),
    "an entry lost": (lose(page_key(2, 110, 1, 110)), "no LBA points to 1 blocks"),
    "an entry that is another's": (entry(3, 55, shown(3, 54)), "as another LBA does"),
    "an entry of a block that the parent does not show there": (
        entry(3, 55, shown(1, 54)),
        "no LBA points to 1 blocks",
    ),
    "an entry of a block that lies nowhere": (entry(3, 55, lambda _: (1 << 40) + 100_000), "which lies nowhere"),
    "a page of a layer that is none": (
        lambda family: write(family, page_key(77, 0, 1, 0), (1 << 40).to_bytes(8, "little")),
        "is of a layer that is none",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(family: SimulatedFamily, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(family)
    found = "\n".join(sentences(family))
    assert expected in found, found or "nothing was found"
