"""The documents say what the code says: formats, keys, rules, crash points, tests that are named, and links."""

import ast
import re
from pathlib import Path

import construct
import pytest

import metadata.registry_calls as calls
import protocol.disk as disk
from metadata import epochs, family_state, pages, replica_state
from metadata.etcd_settings import EtcdSettings
from metadata.family_state import Checkpoint, Family, OpenState, PendingHole
from metadata.kept_lease import DRIFT
from metadata.layers import Row as LayerRow
from metadata.region_table import RegionTable
from metadata.resync_table import ResyncTable
from metadata.segment_table import SegmentTable
from nbdserver.logdisk.maps import Maps
from nbdserver.logdisk.ordering import CRASH_POINTS, Rule
from nbdserver.node.directory import FORMAT_VERSION
from tests.conftest import ROOT
from tests.simulation.cluster.faults import CATALOGUE
from tests.simulation.faults import FaultMix
from tests.simulation.simulated_store import SimulatedStore, SimulatedTable
from tests.simulation.world import SimulatedClock, World

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FORMAT = (DOCS / "disk-format.md").read_text()
FORMATS = {name: value for name, value in vars(disk).items() if isinstance(value, construct.Struct)}

Row = tuple[str, ...]


def rows(heading: str) -> list[Row]:
    """Cells of the first table below a heading of the format's page, without its own heading."""
    section = re.split(r"(?m)^#+ ", FORMAT.split(f" {heading}\n", 1)[1])[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


# --- the disk format ------------------------------------------------------------------------------------------------


def declared(declaration: construct.Struct) -> list[Row]:
    """(offset, bytes, name) of each field; what has as many items as its record says has its items' size."""
    found: list[Row] = []
    offset: int | None = 0
    for field in declaration.subcons:
        array = field.subcon
        if isinstance(array, construct.Array):
            count = next(name for name in ("extents", "blocks") if name in array.count.__code__.co_names)
            found.append(("" if offset is None else str(offset), f"{array.subcon.sizeof()} × {count}", field.name))
            offset = None
            continue
        assert offset is not None
        found.append((str(offset), str(field.sizeof()), field.name))
        offset += field.sizeof()
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_drawn_field_by_field(name: str) -> None:
    declaration = FORMATS[name]
    fields = declared(declaration)
    variable = any("×" in size for _, size, _ in fields)
    heading = name if variable else f"{name} ({declaration.sizeof()} bytes)"
    assert [row[:3] for row in rows(heading)] == fields


def test_constants_are_as_written() -> None:
    assert f"format version {disk.FORMAT_VERSION}." in FORMAT
    assert f"data directory is of version {FORMAT_VERSION}." in FORMAT
    assert f"data directory, version {FORMAT_VERSION}\\n" in FORMAT
    assert f"| block | {disk.BLOCK_BYTES:,} bytes |" in FORMAT
    assert "1 WRITE, 2 MOVE, 3 SEAL, 4 TREE" in FORMAT
    assert (disk.WRITE, disk.MOVE, disk.SEAL, disk.TREE) == (1, 2, 3, 4)
    assert "0 nameless, 1 head, 2 snapshot" in FORMAT
    assert (disk.NAMELESS, disk.HEAD, disk.SNAPSHOT) == (0, 1, 2)
    assert "0 data, 1 hole" in FORMAT
    assert (disk.EXTENT_DATA, disk.EXTENT_HOLE) == (0, 1)
    assert disk.SEGMENT_MAGIC == b"nbdSEG\x00\x01"
    assert disk.RECORD_MAGIC.to_bytes(4, "little") == b"NDL1"
    assert f"{pages.PAGE_BLOCKS} entries" in (DOCS / "architecture.md").read_text()


def test_the_registrys_times_and_bounds_are_as_written() -> None:
    page = " ".join((DOCS / "registry.md").read_text().split())
    settings = EtcdSettings(("etcd1:2379",), "nbdserver/")
    interval_s, timeout_s = settings.probe_interval_s, settings.probe_timeout_s
    for line in (
        f"| a call is answered within | {settings.call_timeout_s:g} s |",
        f"| etcd is asked for a sign of life | every {interval_s:g} s, and has {timeout_s:g} s to answer |",
        f"| connecting to one endpoint takes at most | {settings.connect_timeout_s:g} s |",
        f"| {settings.backoff_min_s:g} s, doubling to {settings.backoff_max_s:g} s, drawn between half and all of it |",
        f"| calls that wait | {calls.MAX_PENDING_CALLS} |",
        f"| watches, leases | {calls.MAX_WATCHES} each |",
        f"| a range | {calls.MAX_RANGE_BYTES >> 20} MiB |",
        f"a key of more than {calls.MAX_KEY_BYTES} bytes,",
        f"a swap of more than {calls.MAX_SWAP_BYTES >> 20} MiB or {calls.MAX_CHANGES} changes",
        f"A lease lasts {calls.MIN_TTL_S:g} s to {calls.MAX_TTL_S / 3600:g} h.",
        f"less {DRIFT * 100:g} % for clocks",
    ):
        assert line in page
    assert calls.MAX_WATCHES == calls.MAX_LEASES


def documented_key(cell: str) -> re.Pattern[bytes]:
    """The keys that a row of the table of keys describes: a letter, then numbers of (n) bytes and 0xNN bytes."""
    pattern = b""
    for part in re.findall(r"`(\w)`|\((\d+)\)|0x([0-9a-f]{2})", cell):
        letter, width, byte = part
        if letter:
            pattern += letter.encode()
        elif width:
            pattern += b".{" + width.encode() + b"}"
        else:
            pattern += re.escape(bytes.fromhex(byte))
    return re.compile(pattern, re.DOTALL)


def keys_written() -> set[bytes]:
    """A key of every kind that the code puts into a family's store, written by the code itself."""
    world = World(1)
    store = SimulatedStore(SimulatedTable(world), SimulatedClock(world), FaultMix(), lambda: False)
    keys: set[bytes] = set()

    class Batch:
        def put(self, key: bytes, value: bytes) -> None:
            disk.unpack_value(key, value)
            keys.add(key)

        def delete(self, key: bytes) -> None:
            keys.add(key)

    batch = Batch()
    family_state.put_family(batch, Family(bytes(16), 1 << 30, 1 << 20))
    family_state.put_open_state(batch, OpenState(1, 1, True, "boot"))
    family_state.put_checkpoint(batch, Checkpoint(0, 0, 0, 1, 0, 0, 1, bytes(8), 0, 1, 0))
    family_state.put_pending_holes(batch, [PendingHole(7, 0, 1, 0)], [6])
    epochs.put_epochs(batch, [(1, 1)])
    replica_state.put_replica_state(batch, replica_state.ReplicaState())
    replica_state.put_splice(batch, replica_state.Splice(5, 3, 2, bytes(8)))
    resync = ResyncTable()
    resync.add([(7, 1)])
    resync.put_changes(batch)
    table = SegmentTable()
    table.begin(3, 1, bytes(8))
    list(table.encode(batch, table.freeze(3, 1 << 60, 1 << 60)))
    regions = RegionTable()
    regions.mark(5, 1, 9)
    regions.freeze()
    list(regions.encode(batch))
    maps = Maps(store, 1 << 20, lambda reason: None)
    maps.tree.apply(LayerRow(1, 0, 0, 1 << 30, 1, disk.HEAD))
    maps.tree.set_cut(1, ((0, 5),))
    maps.tree.freeze()
    list(maps.tree.encode(batch))
    for page_map, stamps in ((maps.logical, {0: 4}), (maps.middle, {})):
        for number, changes in ((1, 1), (2, 200)):
            page = page_map.create(number)
            for index in range(changes):
                (page_map.changed.get(number) or page_map.first_change(number)).append(index)
                page[index] = 1
        page_map.freeze()
        list(page_map.encode(batch, stamps, {}, {}))
    return keys


def test_every_key_is_written_down_and_every_key_written_down_is_used() -> None:
    documented = {row[0]: documented_key(row[0]) for row in rows("Keys")}
    used: set[str] = set()
    for key in keys_written():
        of_this_key = {cell for cell, pattern in documented.items() if pattern.fullmatch(key)}
        assert len(of_this_key) == 1, f"key {key!r} is described by {of_this_key}"
        used |= of_this_key
    assert used == set(documented)


# --- the order of writing -------------------------------------------------------------------------------------------


def test_the_rules_of_ordering_are_quoted_with_their_crash_points() -> None:
    expected = [
        (f"`{rule.name}`", rule.value, ", ".join(f"`{name}`" for name, of in CRASH_POINTS.items() if of is rule))
        for rule in Rule
    ]
    assert rows("Order of writing") == expected


def test_the_drawings_show_crash_points_that_exist() -> None:
    drawn = {
        name
        for block in re.findall(r"(?s)```\n(.*?)```", FORMAT.split(" Order of writing\n", 1)[1])
        for bracket in re.findall(r"\[([a-z, -]+)\]", block)
        for name in bracket.split(", ")
    }
    assert drawn
    assert not drawn - set(CRASH_POINTS)


# --- names and links ------------------------------------------------------------------------------------------------


def names_of_tests(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    }


def test_the_faults_of_the_simulation_are_those_of_its_catalogue() -> None:
    page = (DOCS / "simulation.md").read_text()
    for fault in CATALOGUE:
        assert f"| {fault.name} | {fault.means} |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
    assert named or page.name != "durability.md"
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or name not in names_of_tests(ROOT / path)
    ]
    assert not missing


def test_every_row_of_the_durability_contract_names_a_test() -> None:
    text = (DOCS / "durability.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert lines
    assert not [line for line in lines if "::test_" not in line and "not shown yet" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"`((?:protocol|metadata|nbdserver|tests|docs)/[\w/.-]*)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown renderer gives to the headings of a page."""
    text = re.sub(r"(?s)^```.*?^```", "", page.read_text(), flags=re.MULTILINE)
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    text = re.sub(r"(?s)^```.*?^```", "", page.read_text(), flags=re.MULTILINE)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        is_broken = not linked.is_relative_to(ROOT) or not linked.exists()
        if is_broken or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


def test_nothing_reaches_beyond_the_repository() -> None:
    """No page sends a reader to a path that only its author's machine has."""
    assert not [page.name for page in PAGES if re.search(r"(\.\./\.\./|/home/|file://)", page.read_text())]
