"""The program `nbdserver`: checks that it runs its own code, runs one command, and ends with an exit code.

Rules: what a person did wrong is one line on standard error that says what is wrong and what would be right, never
a traceback. Exit codes: 0 done; 1 something broke; 2 wrong input, nothing changed; 3 no node is running. Before a
command runs only typer is imported, and nothing of `protocol` or `metadata` before it is known whose they are.
"""

import os
import sys

from nbdserver.cli.packages import refuse_strangers
from nbdserver.node.errors import EXIT_WRONG_INPUT, NodeError

EXIT_BROKEN = 1
EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit."""
    refuse_strangers()
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    import typer

    from nbdserver.cli.commands import app

    # Releases of typer differ in whether its exceptions are click's or a copy inside it: these are their ancestors.
    usage_error, click_error = typer.BadParameter.__mro__[1:3]
    try:
        result = app(args=arguments, prog_name="nbdserver", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as error:
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except NodeError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone (`nbdserver events | head`); what is still in the buffer has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(str(error), EXIT_BROKEN)
    except Exception as error:
        if not isinstance(error, click_error):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return EXIT_WRONG_INPUT
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "nbdserver"
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        hint = f"; `{command} --help` shows what is right" if isinstance(error, usage_error) else ""
        return _fail(message + hint, EXIT_WRONG_INPUT)


def _fail(message: str, code: int) -> int:
    print("nbdserver: " + " ".join(message.split()), file=sys.stderr)
    return code
