"""Alert rules and dashboard: well-formed, explained, and about metrics that the program has a help text for."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from nbdserver.cli.main import run

DIRECTORY = files("nbdserver.node").joinpath("monitoring")
RULES: dict[str, Any] = yaml.safe_load(DIRECTORY.joinpath("alerts.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads(DIRECTORY.joinpath("dashboard.json").read_text())
ALERTS = RULES["groups"][0]["rules"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

NAME = re.compile(r"\b(?:nbdserver_\w+|up)\b")


def expressions() -> dict[str, str]:
    """Every expression of both files, by where it stands."""
    found = {rule["alert"]: rule["expr"] for rule in ALERTS}
    for panel in PANELS:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found[variable["name"]] = variable["query"]["query"]
    return found


def metrics() -> set[str]:
    """The names of our metrics in all expressions, as they stand in /metrics."""
    return {name for text in expressions().values() for name in NAME.findall(text) if name != "up"}


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_every_rule_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Nbdserver[A-Z]\w+", rule["alert"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))
    assert "$labels.instance" in rule["annotations"]["summary"]
    for variable in re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())):
        assert variable in ("instance", "volume")


def test_the_guide_says_what_every_alarm_means_and_of_no_other() -> None:
    guide = Path(__file__).parents[2].joinpath("docs/operations.md").read_text()
    rows = [line.split(" | ")[0] for line in guide.splitlines() if line.startswith("| `Nbdserver")]
    assert sorted(re.findall(r"`(Nbdserver\w+)`", " ".join(rows))) == sorted(rule["alert"] for rule in ALERTS)


def test_no_alert_has_the_name_of_another() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS) > 10
    assert list(RULES) == ["groups"]


@pytest.mark.parametrize(("where", "text"), expressions().items(), ids=list(expressions()))
def test_every_expression_is_balanced_and_about_a_metric(where: str, text: str) -> None:
    for opening, closing in ("()", "[]", "{}"):
        assert text.count(opening) == text.count(closing), where
    assert text.count('"') % 2 == 0
    assert NAME.search(text), where


def test_panels_lie_side_by_side_and_each_has_a_number_of_its_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert place["x"] + place["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_asks_the_data_source_that_was_chosen_about_what_was_chosen() -> None:
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance", "volume"}
    for panel in PANELS:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            for selector in re.findall(r"nbdserver_\w+(.)", target["expr"]):
                assert selector == "{", panel["title"]


def test_the_commands_print_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["monitoring", "rules"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == RULES
    assert run(["monitoring", "rules", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RULES
    assert run(["monitoring", "dashboard"]) == 0
    assert json.loads(capsys.readouterr().out) == DASHBOARD
