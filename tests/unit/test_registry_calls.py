"""What no registry takes is refused at once, by one rule for all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metadata.registry_calls import (
    MAX_CHANGES,
    MAX_KEY_BYTES,
    MAX_SWAP_BYTES,
    Change,
    check_changes,
    check_ttl,
    end_of_prefix,
)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ([], "not 0"),
        ([Change(f"k{number}", None, b"") for number in range(MAX_CHANGES + 1)], f"not {MAX_CHANGES + 1}"),
        ([Change("k", None, b"1"), Change("k", b"1", b"2")], "twice"),
        ([Change("", None, b"1")], "0 bytes"),
        ([Change("a\0b", None, b"1")], "no NUL"),
        ([Change("\udc80", None, b"1")], "surrogate"),
        ([Change("é" * (MAX_KEY_BYTES // 2 + 1), None, b"1")], f"{MAX_KEY_BYTES + 2} bytes"),
        ([Change("k", None, bytes(MAX_SWAP_BYTES))], f"not {MAX_SWAP_BYTES + 1}"),
        ([Change("k", bytes(MAX_SWAP_BYTES // 2), bytes(MAX_SWAP_BYTES // 2))], f"not {MAX_SWAP_BYTES + 1}"),
        ([Change("k", b"1", None, lease_id=7)], "nothing to bind"),
    ],
)
def test_a_swap_that_no_registry_takes_is_refused_with_the_reason(changes: list[Change], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_changes(changes)


def test_a_swap_at_its_bounds_is_taken() -> None:
    check_changes([Change("k", None, bytes(MAX_SWAP_BYTES - 1))])
    check_changes([Change(f"{number:0{MAX_KEY_BYTES}}", None, None) for number in range(MAX_CHANGES)])


@pytest.mark.parametrize("ttl_s", [0, 1.9, 3601, float("nan"), float("inf")])
def test_a_lease_that_no_registry_gives_is_refused(ttl_s: float) -> None:
    with pytest.raises(ValueError, match="a lease lasts 2 to 3600 seconds"):
        check_ttl(ttl_s)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_the_end_of_a_prefix_is_above_exactly_what_begins_with_it(prefix: str, other: str) -> None:
    start, name = prefix.encode(), other.encode()
    assert start <= (prefix + other).encode() < end_of_prefix(start)
    assert (start <= name < end_of_prefix(start)) == other.startswith(prefix)
