"""`nbdserver monitoring ...`: prints the files that come with the program for Prometheus and Grafana."""

from importlib.resources import files
from typing import Annotated

import typer

from nbdserver.cli.options import JsonOption, print_json, wants_json

app = typer.Typer(no_args_is_help=True, help="Print alert rules for Prometheus and a dashboard for Grafana.")


def _text(name: str) -> str:
    return files("nbdserver.node").joinpath("monitoring", name).read_text()


@app.command("rules")
def rules(
    context: typer.Context,
    json_output: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Print alert rules for Prometheus (YAML). The head of the file says where to name it.

    Example:

      nbdserver monitoring rules > /etc/prometheus/nbdserver.yaml
    """
    if wants_json(context, json_output):
        import yaml

        print_json(yaml.safe_load(_text("alerts.yaml")))
    else:
        print(_text("alerts.yaml"), end="")


@app.command("dashboard")
def dashboard(context: typer.Context, json_output: JsonOption = False) -> None:
    """Print a dashboard for Grafana (JSON), to be imported there.

    Example:

      nbdserver monitoring dashboard > nbdserver.json
    """
    print(_text("dashboard.json"), end="")
