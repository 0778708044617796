"""Whose `protocol` and `metadata` would be imported? There are foreign projects of these names.

Rule: all three packages lie side by side, or the program names the stranger and ends before it runs a line of it.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import nbdserver

PACKAGES = ("metadata", "protocol")


def stranger(search_path: list[str] | None = None) -> str:
    """Return one line that names a package that is not ours or is missing, or "" when all is well."""
    home = Path(nbdserver.__file__).resolve().parents[1]
    for name in PACKAGES:
        # find_spec asks every finder: an editable install has one of its own.
        found = find_spec(name) if search_path is None else PathFinder.find_spec(name, search_path)
        origin = Path(found.origin).resolve() if found and found.origin else None
        if origin is None:
            return f"the package `{name}` is missing beside {home / 'nbdserver'}; install nbdserver afresh"
        if origin.parents[1] != home:
            return (
                f"`import {name}` finds {origin.parent}, which is not ours ({home / name} is); "
                "install nbdserver into an environment of its own"
            )
    return ""


def refuse_strangers() -> None:
    """End the program with exit code 1 if a package is not ours."""
    problem = stranger()
    if problem:
        print(f"nbdserver: {problem}", file=sys.stderr)
        sys.exit(1)
