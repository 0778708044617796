"""The benchmark, run for real but tiny: what it writes is complete, what it refuses it refuses in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmark.cluster import absence
from tests.benchmark.cluster.report import markdown
from tests.benchmark.costs import costs
from tests.benchmark.profiler import calls_per_operation, top_functions, top_lines
from tests.benchmark.ratios import ratio_to_best_peer
from tests.benchmark.report import costs_markdown
from tests.benchmark.targets import TARGETS, USUAL_TARGETS

ROOT = Path(__file__).resolve().parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One without the test's name in it: the path of a socket far below must fit into 107 bytes, whoever runs this."""
    return tmp_path_factory.mktemp("b")


def need(*programs: str) -> None:
    """Skip, or fail where everything must run, when a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def bench(*arguments: str, module: str = "tests.benchmark") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def result_of(module: str, results: Path, *arguments: str, fine: tuple[int, ...] = (0,)) -> tuple[dict, Path]:
    """Run another benchmark of the package; what it keeps, and where. `fine` are the exit codes that it may have."""
    done = bench(*arguments, "--results", str(results), module=f"tests.benchmark.{module}")
    assert done.returncode in fine, done.stderr[-2000:]
    (path,) = results.glob(f"{module.replace('_', '-')}-*.json")
    return json.loads(path.read_text()), path


def quick_run(tmp_path: Path, targets: str, rows: str) -> tuple[dict, Path]:
    place = ["--directory", str(tmp_path), "--results", str(tmp_path / "results")]
    done = bench("--quick", "--json", "--targets", targets, "--rows", rows, *place)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "results").glob("bench-*.json")
    result = json.loads(path.read_text())
    assert result == json.loads(done.stdout)
    return result, path


def test_a_quick_run_measures_every_server_in_turn_and_writes_json_and_a_plot(tmp_path: Path) -> None:
    need("fio", *(target.program for target in TARGETS.values()))
    result, path = quick_run(tmp_path, ",".join(USUAL_TARGETS), "randread-4k-d16,fsync-4k-j16")
    for row in result["rows"]:
        assert set(row["samples"]) == set(USUAL_TARGETS)
        for samples in row["samples"].values():
            assert len(samples["operations_per_s"]) == 2
            assert min(samples["operations_per_s"]) > 0
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
        assert row["ratio"]["best_peer"] != "nbdserver"
    assert all(target["version"] and target["commands"] for target in result["targets"].values())
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)
    assert not list(tmp_path.glob("bench-*")), "the disks are removed"

    table = bench(str(path), module="tests.benchmark.report")
    assert table.returncode == 0, table.stderr
    assert "| 4k random read, depth 16 | **" in table.stdout


def test_the_server_pays_cpu_for_what_it_does(tmp_path: Path) -> None:
    need("fio", "nbdkit")
    result, _ = quick_run(tmp_path, "nbdkit", "randread-4k-d16")
    cpu_s_per_1000 = max(result["rows"][0]["samples"]["nbdkit"]["server_cpu_s_per_1000"])
    assert 0.0005 < cpu_s_per_1000 < 1.0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--rows", "randread"), "rows are randread-4k-d16"),
        (("--targets", "nginx"), "targets are nbdserver"),
        (("--size", "1GB"), "'1GB' is ambiguous"),
        (("--directory", "/dev/shm", "--targets", "nbdkit"), "choose a --directory on a local disk"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line_that_says_what_is_right(
    arguments: tuple[str, ...], hint: str, tmp_path: Path
) -> None:
    need("fio", "nbdkit")
    done = bench("--results", str(tmp_path), *arguments)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("benchmark: ")]) == 1
    assert hint in done.stderr


def test_without_a_fast_checksum_the_benchmark_refuses_to_run(tmp_path: Path) -> None:
    program = (
        "import protocol.checksum as checksum, sys, runpy\n"
        "checksum.CHECKSUM_IS_FAST = False\n"
        f"sys.argv = ['benchmark', '--results', {str(tmp_path)!r}]\n"
        "runpy.run_module('tests.benchmark', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "install --force-reinstall google-crc32c" in done.stderr


def test_the_ratio_is_against_the_best_peer_of_the_row() -> None:
    rates = {"nbdserver": [20.0, 22.0, 18.0], "slow": [5.0, 5.0, 5.0], "fast": [10.0, 11.0, 9.0]}
    ratio = ratio_to_best_peer(rates, "nbdserver")
    assert ratio is not None
    assert (ratio.best_peer, ratio.value) == ("fast", 2.0)
    # Each round's ratio is 2, and rounds are drawn together: what disturbed both cancels out.
    assert ratio.low > 1.6
    assert ratio.high < 2.5
    assert ratio.best_round == pytest.approx(2.0)


def test_there_is_no_ratio_without_a_peer() -> None:
    assert ratio_to_best_peer({"nbdserver": [1.0]}, "nbdserver") is None


def test_system_calls_are_read_from_the_table_of_strace() -> None:
    table = (
        "% time     seconds  usecs/call     calls    errors syscall\n"
        "------ ----------- ----------- --------- --------- ----------------\n"
        " 60.00    0.000600           6       100        25 preadv2\n"
        " 40.00    0.000400           8        50           sendmsg\n"
        "------ ----------- ----------- --------- --------- ----------------\n"
        "100.00    0.001000           6       150        25 total\n"
    )
    assert calls_per_operation(table, 100) == [("preadv2", 1.0), ("sendmsg", 0.5)]


def test_the_profile_names_the_functions_that_cost_most_by_themselves() -> None:
    folded = "main (a.py:1);read (b.py:10) 30\nmain (a.py:1);read (b.py:11) 30\nmain (a.py:2) 40\n"
    assert top_functions(folded) == [("read (b.py)", 60.0, 60.0), ("main (a.py)", 40.0, 100.0)]
    assert top_lines(folded)[0] == ("main (a.py:2)", 40.0)


def test_maps_open_and_recovery_are_measured_and_plotted(tmp_path: Path) -> None:
    result, path = result_of(
        "scale", tmp_path / "results",
        "--sizes", "1G,16T", "--blocks", "20000", "--overwrites", "1600", "--directory", str(tmp_path),
    )  # fmt: skip
    small, large = result["rows"]
    assert (small["size_bytes"], large["size_bytes"]) == (1 << 30, 16 << 40)
    for row in (small, large):
        assert row["mapped_blocks"] == 20000
        assert row["lookups_cold"] > 0
        assert 0 < row["lookup_warm_p50_us"] < row["lookup_cold_p50_us"]
        assert row["recovery_s"] > 0
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)


def test_changes_of_layers_are_measured_and_plotted(tmp_path: Path) -> None:
    result, path = result_of(
        "layers", tmp_path / "results",
        "--sizes", "1G,16T", "--counts", "0,3", "--rounds", "2", "--written", "1M", "--directory", str(tmp_path),
    )  # fmt: skip
    series = result["series"]
    assert {what: [step["at"] for step in steps] for what, steps in series.items()} == {
        "size_bytes": [1 << 30, 16 << 40],
        "snapshots": [0, 3],
        "clones": [0, 3],
    }
    for step in (step for steps in series.values() for step in steps):
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in step["seconds"].values())
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)


def test_starts_after_kill_9_are_measured(tmp_path: Path) -> None:
    need("fio")
    result, _ = result_of("restart", tmp_path, "--sizes", "32M", "--rounds", "1", "--load-s", "0.5")
    (row,) = result["rows"]
    assert row["rounds"][0]["blocks"] > 0
    assert 0 < row["rounds"][0]["seconds"] < 30


@pytest.mark.parametrize("over", [[], ["--tls"]], ids=["in clear text", "over TLS"])
def test_images_are_copied_into_all_and_out_of_them(tmp_path: Path, over: list[str]) -> None:
    need("fio", "nbdkit", "nbdcopy")
    result, _ = result_of("copying", tmp_path, "--size", "16M", "--rounds", "1", "--targets", "nbdserver,nbdkit", *over)
    samples = result["samples"]
    assert set(samples) == {"in", "out"}
    assert all(set(of_way) == {"nbdkit", "nbdserver"} for of_way in samples.values())


def test_what_snapshots_cost_is_measured_beside_a_volume_without(tmp_path: Path) -> None:
    need("fio")
    result, _ = result_of(
        "snapshot_cost", tmp_path,
        "--size", "32M", "--rounds", "2", "--seconds", "0.2", "--rows", "randread-4k-d16", "--snapshots", "2",
        fine=(0, 1),  # 1: too slow, which a busy machine may make of it
    )  # fmt: skip
    row = result["rows"]["randread-4k-d16"]
    assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
    assert {name: len(taken["operations"]) for name, taken in row["samples"].items()} == {"with": 2, "without": 2}


def test_several_volumes_are_measured_on_several_workers_beside_one(tmp_path: Path) -> None:
    need("fio")
    result, _ = result_of(
        "workers", tmp_path, "--size", "16M", "--rounds", "2", "--seconds", "0.2", "--rows", "randread-4k-d16"
    )
    row = result["rows"]["randread-4k-d16"]
    assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
    assert all(len(taken["operations"]) == 2 for taken in row["samples"].values())
    assert row["at_most"] > 0


def test_memory_and_metadata_of_scattered_writes_are_counted(tmp_path: Path) -> None:
    for _ in range(2):
        done = bench("metadata", "--writes", "1600", "--rest-s", "0", "--directory", str(tmp_path / "volume"),
                     "--results", str(tmp_path), module="tests.benchmark.scattered")  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    tally = json.loads((tmp_path / "volume" / "tally.json").read_text())
    assert tally["writes"] == 3200
    assert tally["to_disk_bytes"] > 0
    assert tally["headers_bytes"] / 3200 < 512


def test_memory_with_a_full_cache_is_watched(tmp_path: Path) -> None:
    result, _ = result_of("scattered", tmp_path, "full-cache", "--size", "64M", "--minutes", "0.01")
    assert 0 < result["peak_bytes"] < result["limit_bytes"]
    assert result["samples"][-1]["writes"] > 0


def test_what_a_client_notices_of_disturbances_is_measured(tmp_path: Path) -> None:
    need("fio")
    result, _ = result_of(
        "disturbance", tmp_path, "--size", "16M", "--volumes", "2", "--rounds", "1", "--seconds", "0.2"
    )
    rows = result["rows"]
    assert len({row["title"] for row in rows}) == 6
    assert all(row["p99_us"] > 0 for row in rows)
    assert all(row["shown"] for row in rows if row["title"] == "a scrub"), "it went on meanwhile"
    assert all(row["longest_ms"] > 5 and row["where"] for row in result["places"])


def test_memory_is_limited_or_refused_in_one_line(tmp_path: Path) -> None:
    need("fio", "nbdkit")
    place = ["--directory", str(tmp_path), "--results", str(tmp_path / "results")]
    row = ["--quick", "--targets", "nbdkit", "--rows", "randread-4k-d16", "--memory", "256M"]
    done = bench(*row, *place)
    if done.returncode:
        assert re.search("no memory cgroup|run it as root", done.stderr), done.stderr[-2000:]
        return
    (path,) = (tmp_path / "results").glob("bench-*.json")
    assert json.loads(path.read_text())["options"]["memory_bytes"] == 256 << 20


def test_costs_are_told_by_the_system_call_or_else_by_the_library() -> None:
    script = """python
\tffffffff81 copy_folio_from_iter_atomic ([kernel.kallsyms])
\tffffffff82 do_pwritev ([kernel.kallsyms])
\tffffffff83 do_syscall_64+0x5f ([kernel.kallsyms])
\t    7f0001 pwritev64v2 (/usr/lib/x86_64-linux-gnu/libc.so.6)

python
\t    7f0002 crc32c::ExtendSse42 (/site-packages/google_crc32c.libs/libcrc32c-7ebc40c5.so.1.1.0)

python
\t    7f0003 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0)
\t    7f0004 [unknown] ([unknown])

python
\t    7f0003 _PyObject_Malloc (/usr/lib/libpython3.11.so.1.0)
"""
    found = costs(script)
    assert found == [("the interpreter", 0.5), ("pwritev()", 0.25), ("checksums", 0.25)]
    told = {"sample": {"server_cpu_s_per_1000": [0.008]}, "costs": dict(found)}
    assert (
        "| 4k random write, depth 16 | 8.0 | the interpreter 4.0 | pwritev() 2.0 | checksums 2.0 |"
        in costs_markdown({"rows": {"randwrite-4k-d16": told}})
    )


def test_each_complication_of_the_hot_path_is_taken_out_by_a_name_that_the_program_has() -> None:
    program = """
from nbdserver.frontend import inline_reads, transmission
from nbdserver.host import connection, network, syncing
from nbdserver.logdisk import log
from tests.benchmark.taking_out import COMPLICATIONS

places = [inline_reads, transmission, connection, network, syncing, log]
places += [inline_reads.InlineReads, transmission.Transmission, connection.SocketConnection]
for complication in COMPLICATIONS.values():
    before = [dict(vars(place)) for place in places]
    complication.take_out()
    after = [dict(vars(place)) for place in places]
    assert [set(names) for names in after] == [set(names) for names in before], complication.name
    assert after != before, complication.name
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_complication_brings_is_measured_on_a_server_without_it(tmp_path: Path) -> None:
    need("fio")
    arguments = ["--only", "receive-more", "--rounds", "2", "--seconds", "0.2", "--size", "64M", "--json"]
    done = bench(*arguments, "--results", str(tmp_path), module="tests.benchmark.complications")
    assert done.returncode == 0, done.stderr[-2000:]
    (figures,) = json.loads(done.stdout)["complications"]["receive-more"].values()
    assert figures["ratio"]["value"] > 0
    assert set(figures["samples"]) == {"with", "without"}


def test_replicated_volumes_are_measured_with_all_their_daemons(tmp_path: Path) -> None:
    need("fio")
    arguments = ["--quick", "--systems", "data-processes", "--rows", "randwrite-4k-d16,flush-4k-d1"]
    done = bench(*arguments, "--json", "--results", str(tmp_path), module="tests.benchmark.cluster")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["rows"]] == ["randwrite-4k-d16", "flush-4k-d1"]
    for row in result["rows"]:
        taken = row["samples"]["data-processes"]
        assert len(taken["operations_per_s"]) == 2
        assert min(taken["server_cpu_s_per_1000"]) > 0
    assert "| 4k random write, depth 16 | – | 12.0 | – | 0.10 |" in markdown(result)


def test_a_resync_looks_at_what_changed_and_sends_that_however_large_the_volume_is(tmp_path: Path) -> None:
    arguments = ["--changed", "", "--volumes", "16T", "--at-volume", "4M", "--ways", "regions"]
    arguments += ["--patterns", "scattered", "--json", "--results", str(tmp_path)]
    done = bench(*arguments, module="tests.benchmark.cluster.resync")
    assert done.returncode == 0, done.stderr[-2000:]
    (taken,) = json.loads(done.stdout)["resyncs"]
    assert taken["volume_bytes"] == 16 << 40
    assert taken["copied"]["regions"] == 256
    assert taken["copied"]["sent_bytes"] == 4 << 20
    assert taken["received_bytes"] < 1.5 * (4 << 20)
    assert taken["owner"]["read_bytes"] < 3 * (4 << 20)


def test_what_changed_and_what_stalled_while_a_replica_was_away_is_told_from_fios_log(tmp_path: Path) -> None:
    log = tmp_path / "writes_lat.1.log"
    log.write_text(
        "900, 1000000, 1, 4096, 0, 0\n1100, 2000000, 1, 4096, 8192, 0\n1150, 900000000, 1, 4096, 8192, 0\n"
        "1900, 1000000, 1, 4096, 8388608, 0\n2500, 1000000, 1, 4096, 16777216, 0\n"
    )
    writes = absence.writes_of(log)
    assert absence.changed(writes, 1.0, 2.0) == (2 * absence.REGION_BYTES, 2 * absence.BLOCK_BYTES)
    assert absence.rate(writes, 1.0, 2.0) == 3
    assert absence.columns_of(writes) == [(0.9, 1.0), (1.1, 900.0), (1.9, 1.0), (2.5, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "randwrite-4k-d2"], "no row is called randwrite-4k-d2; rows are randwrite-4k-d1"),
        (["--systems", "vitastor"], "no system is called vitastor; systems are nodes, ceph"),
    ],
)
def test_the_cluster_benchmark_says_what_there_is(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = bench(*arguments, "--results", str(tmp_path), module="tests.benchmark.cluster")
    assert done.returncode == 2
    assert words in done.stderr
