"""Blocks of docs/operations.md that tests do: "```sh full-backup" opens the one of the mark full-backup."""

import re

from tests.conftest import ROOT


def recipe(mark: str) -> str:
    """The block of a mark."""
    page = (ROOT / "docs/operations.md").read_text()
    (found,) = re.findall(rf"^```\w+ {re.escape(mark)}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return str(found)
