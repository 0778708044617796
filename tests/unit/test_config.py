"""Node settings: what is accepted, and that every refusal names the file, the line, the key and what would be right."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nbdserver.node.config import ConfigError, NodeSettings, load_settings, parse_settings, put_over

CLUSTER = """cluster:
  name: prod
  node: n1
  address: 10.0.0.5:10810
  key_file: /k
  tls: {ca: c, certificate: d, key: k}
  registry:
    {endpoints: [e1:2379]}"""

WRONG: list[tuple[str, str]] = [
    ("lisen: 127.0.0.1:1", r"node.yaml:1: lisen: unknown key; did you mean listen\?"),
    ("zzz: 1", r"node.yaml:1: zzz: unknown key; known here: data, listen"),
    ("http:\n  lissten: x", r"node.yaml:2: http.lissten: unknown key; did you mean listen\?"),
    ("listen: 10809", r"node.yaml:1: listen.0: 10809 is not HOST:PORT; write for example"),
    ("listen: [127.0.0.1:1, bad]", r"listen.1: 'bad' is not HOST:PORT"),
    ("data: /x\nlisten:\n  - 127.0.0.1:1\n  - ::1:2", r"node.yaml:4: listen.1: '::1:2' needs brackets"),
    ("listen: 127.0.0.1:99999", r"has port 99999; a port is 1 to 65535"),
    ("listen: ':10809'", r"names no host; write 0.0.0.0:10809"),
    ("listen: 300.1.1.1:1", r"has no host that could be meant"),
    ("cache: 10GB", r"cache: '10GB' is ambiguous; write 10G"),
    ("cache: 1M", r"cache: 1M is outside 16M to 1T"),
    ("cache: true", r"cache: is not a size; write for example 512M"),
    ("segment: 48M", r"segment: 48M is not a power of two; write for example 32M"),
    ("max_connections: 0", r"max_connections: 0 is wrong: input should be greater than or equal to 1"),
    ("workers: 0", r"workers: 0 is wrong: input should be greater than or equal to 1"),
    ("workers: 65", r"workers: 65 is wrong: input should be less than or equal to 64"),
    ("workers: two", r"workers: 'two' is wrong: input should be a valid integer"),
    ("max_connections: many", r"max_connections: 'many' is wrong"),
    ("max_data: 1M", r"max_data: 1M is outside 64M to 1024T"),
    ("overcommit: lots", r"overcommit: 'lots' is not a ratio from 0.1 to 1000; write for example 2.5, or none"),
    ("overcommit: 0", r"overcommit: 0 is not a ratio"),
    ("scrub: {interval: monthly}", r"scrub.interval: 'monthly' is not 1h to 3650d; write for example 30d, 12h or none"),
    ("scrub: {interval: 30}", r"scrub.interval: 30 is not 1h to 3650d"),
    ("scrub: {rat: 1M}", r"scrub.rat: unknown key; did you mean rate\?"),
    ("scrub: {rate: 5}", r"scrub.rate: 5 is outside 1M to 1T"),
    ("http: 9809", r"http: needs keys of its own below it: listen, public_read, token_file"),
    ("http: {public_read: 'yes'}", r"http.public_read: 'yes' is not true or false"),
    ("tls: {mode: require}", r"tls.mode: 'require' is not off, allowed or required"),
    ("tls: {mode: true}", r"tls.mode: True is not off, allowed or required"),
    ("data: /x\ntls:\n  mode: required", r"node.yaml:2: tls: certificate and key are missing; nbdserver cert node"),
    ("tls: {mode: allowed, certificate: /c}", r"tls: certificate and key are needed both"),
    ("tls: {certificate: /c, key: /k, client_ca: /a}", r"tls: mode is missing; write allowed or required"),
    (
        "tls: {mode: allowed, certificate: /c, key: /k}",
        r"client_ca is missing; name it, or write verify_clients: false",
    ),
    ("tls: {mod: allowed}", r"tls.mod: unknown key; did you mean mode\?"),
    ("cluster: {}", r"node.yaml:1: cluster.name: is missing: the cluster's name"),
    (f"{CLUSTER}\n  nod: x", r"node.yaml:9: cluster.nod: unknown key; did you mean node\?"),
    (f"{CLUSTER}\n  subscribe: a/", r"cluster: subscribe is for nodes with across_wan: true"),
    (
        f"{CLUSTER}\n  across_wan: true\n  subscribe: [{', '.join(f'p{n}/' for n in range(80))}]",
        r"cluster: subscribe has 80 beginnings; name at most 57, shorter ones",
    ),
    (f"{CLUSTER}\n  across_wan: true\n  subscribe: {'x' * 481}", r"cluster.subscribe.0: .* is not a text of 1 to 480"),
    (CLUSTER.replace("10.0.0.5:", "storage1:"), r"cluster.address: 'storage1:10810' has a host name; write the number"),
    (
        CLUSTER.replace("10.0.0.5:", "0.0.0.0:"),
        r"cluster.address: '0.0.0.0:10810' is nothing that other nodes can reach",
    ),
    (
        f"{CLUSTER}\n  repair_delay: 1s",
        r"cluster.repair_delay: '1s' is not 5s to 30d; write for example 30m, 6h",
    ),
    (f"{CLUSTER}\n  data_address: 10.0.0.5", r"cluster.data_address: '10.0.0.5' is not HOST:PORT"),
    (CLUSTER.replace("node: n1", "node: a b"), r"cluster.node: 'a b' is not a name; use 1 to 63 of"),
    (CLUSTER.replace("ca: c, ", ""), r"node.yaml:6: cluster.tls.ca: is missing: the cluster's CA"),
    (
        CLUSTER.replace("[e1:2379]", "[]"),
        r"cluster.registry.endpoints: \[\] is wrong: value should have at least 1 item",
    ),
    (CLUSTER.replace("2379]}", "2379], user: u}"), r"cluster.registry: user and password_file are needed both"),
    (
        CLUSTER.replace("2379]}", "2379], tls: {ca: c, key: k}}"),
        r"registry.tls: certificate and key are needed both, or none",
    ),
    (CLUSTER.replace("2379]}", "2379], tls: {caa: c}}"), r"registry.tls.caa: unknown key; did you mean ca\?"),
    ("data: 5", r"data: 5 is not a path"),
    ("socket: /" + "x" * 200, r"socket: the socket path /x+ has 201 bytes; Linux takes at most 107"),
    ("cache: 64M\ncache: 32M", r"node.yaml:2: cache: is given twice \(first in line 1\); keep one"),
    ("listen: [", r"node.yaml:1: is not YAML: "),
    ("just text", r"node.yaml: holds 'just text', not settings"),
    ("- 1", r"node.yaml: holds \[1\], not settings"),
    ("data: !!python/object:os.system x", r"node.yaml:1: is not YAML"),
    ("\x00", r"node.yaml.*is not YAML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[text[:20] for text, _ in WRONG])
def test_a_wrong_file_is_refused_in_one_line_that_says_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_settings(text.encode(), "node.yaml")
    assert all("\n" not in problem for problem in caught.value.problems)


@given(st.text())
@example("a: &a [*a]")
@example("&a {b: *a}")
def test_any_text_is_accepted_or_refused_clearly(text: str) -> None:
    refusal = ""
    try:
        parse_settings(text.encode(errors="surrogatepass"), "node.yaml")
    except ConfigError as error:
        refusal = str(error)
    assert not refusal or (refusal.startswith("node.yaml") and "\n" not in refusal)


def test_aliases_that_multiply_are_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError):
        parse_settings("\n".join(lines).encode(), "node.yaml")


def test_every_problem_is_kept_and_the_first_one_is_told() -> None:
    with pytest.raises(ConfigError, match=r"unknown key.* \(and 1 more\)$") as caught:
        parse_settings(b"zzz: 1\ncache: 1M\n", "node.yaml")
    assert len(caught.value.problems) == 2


def test_an_empty_file_gives_the_defaults() -> None:
    assert parse_settings(b"", "node.yaml") == NodeSettings()
    assert NodeSettings().listen == ["127.0.0.1:10809"]


def test_all_keys_are_taken() -> None:
    text = (
        b"data: /d\nlisten: ['[::1]:1', localhost:2]\nsocket: /s\ncache: 1G\nsegment: 32M\nmax_connections: 7\n"
        b"max_data: 2T\novercommit: 2.5\nscrub: {interval: 12h, rate: 4M}\n"
        b"http: {listen: 127.0.0.1:3, public_read: true, token_file: /t}\n"
    )
    settings = parse_settings(text, "node.yaml")
    assert settings.listen == ["[::1]:1", "localhost:2"]
    assert (settings.cache, settings.segment, settings.max_connections) == (1 << 30, 32 << 20, 7)
    assert settings.http.public_read
    assert (settings.max_data, settings.overcommit) == (2 << 40, 2.5)
    assert (settings.scrub.interval, settings.scrub.rate) == (12 * 3600.0, 4 << 20)


@pytest.mark.parametrize("text", ["max_data: none", "max_data: 0", "overcommit: none", ""])
def test_none_is_no_limit(text: str) -> None:
    settings = parse_settings(text.encode(), "node.yaml")
    assert (settings.max_data, settings.overcommit) == (0, 0.0)


@pytest.mark.parametrize("word", ["off", "'off'", "allowed", "required"])
def test_the_modes_of_tls_are_words_also_the_one_that_yaml_takes_for_a_truth_value(word: str) -> None:
    text = f"tls: {{mode: {word}, certificate: /c, key: /k, client_ca: /a}}"
    settings = parse_settings(text.encode(), "node.yaml").tls
    assert settings.mode == word.strip("'")
    assert settings.verify_clients


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_settings(tmp_path / "node.yaml")


def test_the_example_that_is_installed_is_good() -> None:
    import nbdserver.node

    assert nbdserver.node.__file__ is not None
    settings = load_settings(Path(nbdserver.node.__file__).parent / "systemd" / "node.yaml")
    assert settings.data == Path("/var/lib/nbdserver")


def test_what_the_command_line_gives_is_put_over_the_file_by_key() -> None:
    settings = parse_settings(b"http: {listen: '127.0.0.1:1', public_read: true}\ncache: 1G\n", "node.yaml")
    changed = put_over(settings, {"listen": ["127.0.0.1:2"], "http.listen": "127.0.0.1:3"})
    assert (changed.listen, changed.http.listen, changed.http.public_read) == (["127.0.0.1:2"], "127.0.0.1:3", True)
    assert changed.cache == settings.cache
    assert put_over(settings, {}) == settings


def test_data_processes_listen_to_their_peers_above_the_nodes_address_or_where_it_is_said() -> None:
    cluster = parse_settings(CLUSTER.encode(), "node.yaml").cluster
    assert cluster is not None
    assert cluster.data_addresses(2) == ["10.0.0.5:10811", "10.0.0.5:10812"]
    assert (cluster.data_tls, cluster.repair_delay) == (True, 1800.0)
    other = f"{CLUSTER}\n  data_address: '[fd00::5]:20000'\n  repair_delay: none"
    cluster = parse_settings(other.encode(), "node.yaml").cluster
    assert cluster is not None
    assert (cluster.data_addresses(1), cluster.repair_delay) == (["[fd00::5]:20000"], 0.0)
