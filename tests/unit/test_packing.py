"""Parts of a copy: packed when that pays, and never more than they say."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.disk import BLOCK_BYTES
from protocol.packing import Packer, digest, unpack
from protocol.peer import DIGEST_BYTES, PART_BLOCKS, Part
from tests.unit.families import block

NOISE = random.Random(1).randbytes(BLOCK_BYTES)


@given(st.lists(st.sampled_from([block(1), block(2), bytes(BLOCK_BYTES), NOISE]), min_size=1, max_size=PART_BLOCKS))
def test_what_was_packed_comes_out_again(blocks: list[bytes]) -> None:
    part = Packer().pack(blocks)
    assert bytes(unpack(part)) == b"".join(blocks)
    assert part.blocks == len(blocks)
    assert len(part.data) <= len(blocks) * BLOCK_BYTES


def test_what_gets_shorter_is_shorter() -> None:
    assert len(Packer().pack([block(1)] * PART_BLOCKS).data) < BLOCK_BYTES


def test_after_what_does_not_get_shorter_the_next_parts_are_not_tried() -> None:
    packer = Packer()
    assert packer.pack([NOISE]).data == NOISE
    tried = [len(packer.pack([block(1)]).data) < BLOCK_BYTES for _ in range(3)]
    assert tried == [False, True, True]
    for _ in range(60):
        packer.pack([NOISE])
    tries = [len(packer.pack([block(1)]).data) < BLOCK_BYTES for _ in range(17)]
    assert tries.index(True) <= 15
    assert all(tries[tries.index(True) :])


@pytest.mark.parametrize(
    "part",
    [
        Part(1, b"what is nothing of the kind"),
        Part(1, Packer().pack([block(1)] * 2).data),
        Part(3, Packer().pack([block(1)] * 2).data),
        Part(2, bytes(Packer().pack([block(1)] * 2).data) + b"more"),
        Part(1, b""),
    ],
)
def test_a_part_that_is_not_what_it_says_is_refused(part: Part) -> None:
    with pytest.raises(ValueError):
        unpack(part)


def test_a_digest_stands_for_the_content() -> None:
    assert len(digest(block(1))) == DIGEST_BYTES
    assert digest(block(1)) == digest(memoryview(block(1)))
    assert digest(block(1)) != digest(block(2))
