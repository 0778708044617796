"""How a benchmark begins and ends: a scratch directory, one line instead of a traceback, a result that says where it
comes from."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType

from . import machine
from .processes import BenchmarkError, end_in_order_when_told

T = TypeVar("T")

DirectoryOption = Annotated[Path | None, typer.Option(help="Where the disks lie.  [default: in --results, removed]")]
ResultsOption = Annotated[Path, typer.Option(help="Where results go.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
RESULTS = Path("bench-results")

# A pipe has no width of its own: tables would be folded to 80 columns.
console = Console(width=None if sys.stdout.isatty() else 160)


class Run:
    """One run: its `place` for disks, and what its result is kept under."""

    def __init__(self, name: str, place: Path, results: Path) -> None:
        self.place = place
        self._stem = results / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._conditions = {
            "date": time.strftime("%Y-%m-%d %H:%M %z"),
            "commit": machine.commit(),
            "machine": machine.describe(place),
            "command": program_command(),
        }

    def keep(self, figures: dict[str, Any], told: bool = True) -> dict[str, Any]:
        """Write the figures as JSON, with the conditions as they were when the run began; returns both together."""
        result = {**self._conditions, **figures}
        path = self._stem.with_suffix(".json")
        path.write_text(json.dumps(result, indent=1) + "\n")
        if told:
            console.print(path, highlight=False, soft_wrap=True)
        return result

    @property
    def picture(self) -> Path:
        """Where a plot goes."""
        return self._stem.with_suffix(".png")


@contextmanager
def run_of(name: str, results: Path, directory: Path | None = None, stays: bool = False) -> Iterator[Run]:
    """A run whose disks lie in a new directory, removed afterwards, below `directory` or else the results'; or, if it
    `stays`, in `directory` itself."""
    end_in_order_when_told()
    with told_in_one_line():
        results.mkdir(parents=True, exist_ok=True)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            if stays:
                yield Run(name, directory.resolve(), results)
                return
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=directory or results) as scratch:
            yield Run(name, Path(scratch).resolve(), results)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """A BenchmarkError becomes its sentence and exit code 2."""
    try:
        yield
    except BenchmarkError as error:
        Console(stderr=True).print(f"benchmark: {error}", style="red", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


def show(result: dict[str, Any], as_json: bool, *told: RenderableType) -> None:
    """A result on the terminal: as JSON, or what is `told` of it."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    for part in told:
        console.print(part, highlight=False)


def chosen(names: str, what: str, there: Mapping[str, T]) -> list[T]:
    """Those with the comma-separated names; BenchmarkError that says which there are if one of them is unknown."""
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise BenchmarkError(f"no {what} is called {unknown[0]}; {what}s are {', '.join(there)}")
    return [there[name] for name in wanted]


def program_command() -> str:
    """What this program was started by."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
    return " ".join(["python -m", name, *sys.argv[1:]])
