"""What a person did that cannot be done, and what broke: one line, no traceback, and an exit code."""

from collections.abc import Sequence

EXIT_WRONG_INPUT = 2
EXIT_NOT_RUNNING = 3


class NodeError(Exception):
    """Something broke or is in the way; the message is one line. Exit code 1."""

    exit_code = 1
    http_status = 500


class WrongInputError(NodeError):
    """The request cannot be meant; the message says what is wrong and what would be right. Nothing changed."""

    exit_code = EXIT_WRONG_INPUT
    http_status = 400


class NotFoundError(WrongInputError):
    """What the request names does not exist."""

    http_status = 404


class ConflictError(WrongInputError):
    """What the request asks for does not go with what is there (a name taken, clients attached)."""

    http_status = 409


class NotRunningError(NodeError):
    """No node serves this data directory."""

    exit_code = EXIT_NOT_RUNNING


class NotJoinedError(NodeError):
    """The node does not take part in its cluster yet, or has left it."""

    def __init__(self) -> None:
        super().__init__("this node does not take part in its cluster yet; try again in a moment")


def counted(count: int, what: str) -> str:
    """`1 client connection`, `2 client connections`."""
    return f"{count} {what}{'s' if count != 1 else ''}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names and how many there are more; "" for none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
