"""docs/operations.md and the manual page say what the program does."""

import re
from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel

from nbdserver.cli.manual import commands, page
from nbdserver.node.cluster_settings import ClusterSettings
from nbdserver.node.config import NodeSettings
from nbdserver.node.volume_settings import SETTING_KEYS
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "operations.md").read_text()


def test_the_settings_table_has_every_key_and_no_other() -> None:
    table = TEXT.partition("## Settings")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `([a-z_.]+)` \|", table, re.MULTILINE)
    keys = []
    for key, field in NodeSettings.model_fields.items():
        if isinstance(field.default, BaseModel):
            keys += [f"{key}.{inner}" for inner in type(field.default).model_fields]
        else:
            keys.append(key)
    assert documented == keys


def test_the_table_of_cluster_settings_has_every_key_and_no_other() -> None:
    table = TEXT.partition("## Clusters")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([a-z_.]+)` \|", table, re.MULTILINE) == list(keys_of(ClusterSettings))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        nested = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if nested is None:
            yield prefix + key
        else:
            yield from keys_of(nested, f"{prefix}{key}.")


def test_the_table_of_volume_settings_has_every_key() -> None:
    table = TEXT.partition("## Volumes")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == set(SETTING_KEYS)


def test_every_command_that_is_named_exists() -> None:
    known = {name for name, _ in commands()}
    blocks = "\n".join(re.findall(r"```\n(.*?)```", TEXT, re.DOTALL))
    for words in re.findall(r"^(?:sudo )?nbdserver ([a-z -]+?)(?: -| [A-Z]| disk| build|  |$)", blocks, re.MULTILINE):
        assert words.strip() in known


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_the_manual_page_has_every_command(name: str) -> None:
    assert f'.SS "{name}'.replace("-", "\\-") in page()


def test_the_manual_page_in_the_repository_is_that_of_the_program() -> None:
    assert (ROOT / "docs" / "nbdserver.1").read_text() == page(), "run make man"
