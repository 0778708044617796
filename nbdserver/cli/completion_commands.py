"""`nbdserver completion`: prints the scripts for the shells; and `nbdserver complete`, which they call."""

from importlib.resources import files
from typing import Annotated

import typer

from nbdserver.cli.options import JsonOption, print_json, wants_json
from nbdserver.node.errors import WrongInputError

SCRIPTS = {"bash": "nbdserver.bash", "zsh": "_nbdserver", "fish": "nbdserver.fish"}


def add_to(app: typer.Typer) -> None:
    app.command("completion")(completion)
    app.command("complete", hidden=True, context_settings={"ignore_unknown_options": True})(complete)


def script(shell: str) -> str:
    """Return the script of a shell."""
    return files("nbdserver.cli").joinpath("completion", SCRIPTS[shell]).read_text()


def completion(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="For which shell.", show_default=False)],
    json_output: JsonOption = False,
) -> None:
    """Print a script that completes commands, options and the names of volumes and snapshots at the press of Tab.

    Examples:

      nbdserver completion bash > /etc/bash_completion.d/nbdserver

      nbdserver completion zsh > "${fpath[1]}/_nbdserver"

      nbdserver completion fish > ~/.config/fish/completions/nbdserver.fish
    """
    if shell not in SCRIPTS:
        raise WrongInputError(f"there is no completion for {shell!r:.40}; there is for {', '.join(SCRIPTS)}")
    if wants_json(context, json_output):
        print_json({"shell": shell, "script": script(shell)})
    else:
        print(script(shell), end="")


def complete(words: Annotated[list[str] | None, typer.Argument(show_default=False)] = None) -> None:
    """Print what may stand for the last word; for the scripts."""
    from nbdserver.cli.completing import lines

    for line in lines(words or []):
        print(line)
