"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node.sizes import MAX_VOLUME_BYTES, SizeError, format_size, parse_size, parse_volume_size, round_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1024),
        ("1KiB", 1024),
        ("512m", 512 << 20),
        ("10G", 10 << 30),
        ("10 GiB", 10 << 30),
        ("1.5T", 3 << 39),
        ("0.1K", None),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_a_size_means_powers_of_1024(text: str, size_bytes: int | None) -> None:
    if size_bytes is None:
        with pytest.raises(SizeError, match="whole number"):
            parse_size(text)
    else:
        assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["10GB", "10gb", "1KB", "3MB", "1TB"])
def test_a_unit_that_could_mean_powers_of_1000_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(SizeError, match=r"ambiguous; write [0-9]+[KMGT] \("):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e3", "ten", "1P", "1KiBs", "1G2", "0x10", "１G", "nan", "1,5G"])
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@given(st.integers(0, MAX_VOLUME_BYTES))
def test_the_shortest_form_is_read_back_exactly(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@pytest.mark.parametrize("text", ["0", "512", "4097", "17T", "16.1T"])
def test_a_volume_has_whole_blocks_and_at_most_16_tib(text: str) -> None:
    with pytest.raises(SizeError):
        parse_volume_size(text)


def test_the_largest_and_the_smallest_volume_are_accepted() -> None:
    assert parse_volume_size("16T") == MAX_VOLUME_BYTES
    assert parse_volume_size("4K") == 4096


def test_a_size_that_is_no_multiple_says_which_one_is_next() -> None:
    with pytest.raises(SizeError, match="the next one is 8192"):
        parse_volume_size("4097")


def test_sizes_for_people_are_rounded() -> None:
    assert (round_size(0), round_size(1536), round_size(5 << 40)) == ("0 B", "1.5 KiB", "5.0 TiB")
