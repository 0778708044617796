"""Names and settings of volumes, as the command line writes them."""

import pytest

from metadata.registry import ExportSettings
from nbdserver.node.errors import WrongInputError
from nbdserver.node.volume_settings import change_settings, check_name, parse_max_data

PLAIN = ExportSettings()


@pytest.mark.parametrize("name", ["a", "disk0", "Disk_1.raw-2", "0", "_x", "x" * 128])
def test_a_name_has_letters_digits_and_a_few_signs(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "a b", "ä", "a\n", "x" * 129, "a@b", "..", "a\0"])
def test_any_other_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(WrongInputError, match="cannot be a volume's name") as caught:
        check_name(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("read-only", "true", ExportSettings(read_only=True)),
        ("read_only", "on", ExportSettings(read_only=True)),
        ("shared", "yes", ExportSettings(shared=True)),
        ("shared", "0", PLAIN),
        ("description", "a = b", ExportSettings(description="a = b")),
        ("allowed-clients", "10.0.0.0/8, fd00::/8", ExportSettings(allowed_clients=("10.0.0.0/8", "fd00::/8"))),
        ("iops", "1000", ExportSettings(iops=1000)),
        ("bandwidth", "1M", ExportSettings(bandwidth=1 << 20)),
        ("bandwidth", "none", PLAIN),
        ("allowed-clients", "cert:web1,10.0.0.0/8", ExportSettings(allowed_clients=("cert:web1", "10.0.0.0/8"))),
        ("tls", "required", ExportSettings(tls="required")),
        ("tls", "inherit", PLAIN),
        ("allowed-clients", "192.0.2.7", ExportSettings(allowed_clients=("192.0.2.7/32",))),
        ("allowed-clients", "all", PLAIN),
        ("allowed-clients", "", PLAIN),
    ],
)
def test_a_setting_is_changed_and_the_others_stay(key: str, value: str, expected: ExportSettings) -> None:
    assert change_settings(PLAIN, key, value) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("iops", "1K", "write iops=1000 or none"),
        ("iops", str(1 << 41), "write iops=none"),
        ("iops-burst", "5", "set iops too"),
        ("bandwidth", "1MB", "ambiguous"),
        ("bandwidth-burst", "1M", "set bandwidth too"),
        ("read-only", "maybe", "write read-only=true or read-only=false"),
        ("description", "x" * 4097, "longer than 4096 bytes"),
        ("allowed-clients", "10.0.0.1/8", "write for example 10.0.0.0/8"),
        ("allowed-clients", "example.com", "write for example 10.0.0.0/8,fd00::/8"),
        ("allowed-clients", ",".join(["10.0.0.0/8"] * 257), "at most 256"),
        ("allowed-clients", "cert:", "write for example cert:web1"),
        ("allowed-clients", "cert:a\nb", "write for example cert:web1"),
        ("tls", "require", "not one of inherit, off, allowed, required; write tls=required"),
        ("size", "20G", "volume resize NAME --size SIZE"),
        ("", "x", "known are read-only, description, shared, allowed-clients, tls, iops"),
    ],
)
def test_a_wrong_setting_says_what_would_be_right(key: str, value: str, message: str) -> None:
    with pytest.raises(WrongInputError, match=message):
        change_settings(PLAIN, key, value)


@pytest.mark.parametrize(("value", "expected"), [("none", 0), ("0", 0), ("", 0), ("16M", 16 << 20), ("2T", 2 << 40)])
def test_a_limit_of_what_data_may_take(value: str, expected: int) -> None:
    assert parse_max_data(value, 1 << 20) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lots", "write max-data=100G or none"),
        ("10GB", "ambiguous"),
        ("15M", "less than 16M, which is 16 segments of 1M; write max-data=16M or more"),
        ("5000T", "write max-data=none"),
    ],
)
def test_a_wrong_limit_says_what_would_be_right(value: str, message: str) -> None:
    with pytest.raises(WrongInputError, match=message):
        parse_max_data(value, 1 << 20)
