"""What a replica holds of a region, in a few bytes, to be compared with what another one holds.

Theory. At one position of the log all replicas show the same MBAs in every layer with a name, with the same checksums,
and have the same txid for the region. Where blocks lie, and how far nameless layers are merged, is each one's own
affair. So the state of a region is its txid and a digest of the MBAs and checksums that its named layers show. Whether
the blocks have these checksums is what a scrub reads for.

Rules
- Nothing is decided from half of it: all pages are in memory together, or they are loaded first.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from metadata.logical_map import pages_of_region
from metadata.pages import PAGE_MASK, PAGE_SHIFT
from nbdserver.logdisk.maps import CHECKSUM, Maps, Need
from protocol.disk import NAMELESS
from protocol.peer import DIGEST_BYTES, RegionState


def region_state(maps: Maps, region: int) -> RegionState | Need:
    """The state of the region, or the pages that are needed for it first."""
    need: Need = []
    digest = blake2b(digest_size=DIGEST_BYTES)
    for number, layer in sorted(maps.tree.layers.items()):
        if layer.row.kind == NAMELESS:
            continue
        for page_number in pages_of_region(number, region):
            page = maps.page(page_number)
            if page is None:
                need.append((maps.logical, page_number))
            elif any(page):
                digest.update(page_number.to_bytes(8, "little") + page.tobytes())
                digest.update(_checksums(maps, page, need).tobytes())
    return list(dict.fromkeys(need)) or RegionState(maps.regions.txid_of(region), digest.digest())


def _checksums(maps: Maps, mbas: array[int], need: Need) -> array[int]:
    """Of the blocks, one after the other; pages that are missing are added to `need`."""
    found = array("I")
    for mba in mbas:
        if mba:
            page = maps.middle.get(mba >> PAGE_SHIFT)
            if page is None:
                need.append((maps.middle, mba >> PAGE_SHIFT))
            else:
                found.append(page[CHECKSUM + (mba & PAGE_MASK)])
    return found
