"""`nbdserver check`: the offline check, with a progress bar on the terminal and one line for each finding."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from nbdserver.cli.options import DataOption, JsonOption, data_path, print_json, wants_json
from nbdserver.cli.progress import progress_bar

if TYPE_CHECKING:
    from nbdserver.logdisk.check import CheckResult
    from nbdserver.logdisk.contents import Contents

EXIT_PROBLEMS = 1


def add_to(app: typer.Typer) -> None:
    app.command("check")(check)


def check(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Only this volume.", show_default=False)] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Leave out reading all data.")] = False,
    digest: Annotated[
        bool, typer.Option("--digest", help="Say what each volume and snapshot holds, as a digest.")
    ] = False,
    data: DataOption = None,
    json_output: JsonOption = False,
) -> int:
    """Check a data directory whose node is stopped: maps, segment usage, records, checksums. Changes nothing.

    With --digest each volume and snapshot is read as its clients would see it, and told as a digest of what it holds,
    with the end of its log. Replicas of a volume that were in sync when their nodes were stopped have the same ones.

    Exit codes: 0 all is well, 1 problems were found, 2 wrong input.

    Examples:

      nbdserver check

      nbdserver check disk0 --quick --json

      nbdserver check db --quick --digest
    """
    from nbdserver.node.offline_check import check_directory

    as_json = wants_json(context, json_output)
    results: dict[str, CheckResult] = {}
    with progress_bar(not as_json) as show:

        def progress(volume: str, what: str, done: int, total: int) -> None:
            show(f"{volume}: {what}", done, total)

        for volume, result in check_directory(data_path(context, data), name, quick, digest, progress):
            results[volume] = result
    if as_json:
        print_json({"volumes": {volume: asdict(result) for volume, result in results.items()}})
    else:
        for volume, result in results.items():
            _print(volume, result, quick)
        if not results:
            print("no volumes")
    return EXIT_PROBLEMS if any(result.findings for result in results.values()) else 0


def _print(volume: str, result: "CheckResult", quick: bool) -> None:
    for finding in result.findings:
        print(f"{volume}: {finding.kind}: {finding.sentence}")
    if result.findings_left_off:
        print(f"{volume}: and {result.findings_left_off} more")
    if not result.is_complete:
        print(f"{volume}: some comparisons were left out, because what they need is damaged")
    problems = len(result.findings) + result.findings_left_off
    verdict = "good" if not problems else f"{problems} problem{'s' if problems > 1 else ''}"
    data = "data not read (--quick)" if quick else f"data of {result.blocks_verified} read"
    print(
        f"{volume}: {verdict}; {result.live_blocks} live blocks in {result.segments} segments, {data}, "
        f"{result.records_verified} records; the next start replays {result.records_to_replay} records "
        f"({result.blocks_to_replay} blocks)"
    )
    if result.contents is not None:
        _print_contents(volume, result.contents)


def _print_contents(volume: str, contents: "Contents") -> None:
    for export in contents.exports:
        print(f"{export.name}: digest {export.digest or 'none'} of {export.size_bytes} bytes")
    print(f"{volume}: its log ends at epoch {contents.epoch}, txid {contents.txid}")
    if contents.regions_to_fetch:
        print(f"{volume}: {contents.regions_to_fetch} regions are still to be fetched: what it holds there is old")
