"""The program that takes this one's place: asked whether it could, then executed, with this process's id.

Theory: what was started once is started again, with the same arguments from the same place: whoever installed another
version there wants that one. A child does everything of a start that changes nothing (`serve --check-only`), while this
process goes on serving. After that there is no way back, so all that can be known before is asked before.

Rules
- Signals that arrive while one program turns into the other are noted, and sent again to the new one. They are not
  just blocked: threads of libraries do not block them, and would take them to where nobody looks any more.
- The new program finds the descriptors as systemd would give them (`inherited.py`); everything else is closed.
"""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, NoReturn

from nbdserver.node.errors import ConflictError
from nbdserver.node.inherited import FIRST_DESCRIPTOR, VARIABLES, announce
from protocol.handover import VERSION

CHECK_OPTIONS = ("--check-only", "--json")
CHECK_TIMEOUT_S = 60.0

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def version() -> str:
    """The installed version, or "source" when run from a source tree."""
    try:
        return installed_version("nbdserver")
    except PackageNotFoundError:
        return "source"


def command() -> list[str]:
    """How this process was started."""
    return [sys.executable, *sys.orig_argv[1:]]


def check() -> dict[str, Any]:
    """Ask the program on disk whether it could take this one's place; returns what it says of itself. Waits for it.

    Raises ConflictError: the old one goes on.
    """
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "NOTIFY_SOCKET")}
    try:
        done = subprocess.run(
            [*command(), *CHECK_OPTIONS],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConflictError(f"the program on disk cannot be run, this one goes on: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConflictError(f"the program on disk would not start, this one goes on: {last}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
        readable = answer["handover_versions"]
    except (ValueError, KeyError, TypeError):
        raise ConflictError("the program on disk cannot say what it reads, this one goes on") from None
    if VERSION not in readable:
        raise ConflictError(
            f"the program on disk takes clients over in the versions {readable}, not in {VERSION}, this one goes on; "
            "stop and start it instead"
        )
    return answer


def raise_descriptor_limit() -> None:
    """All clients' sockets pass through this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def note_signals(late: set[signal.Signals]) -> None:
    """Add what arrives from now on to `late`."""
    for number in SIGNALS:
        signal.signal(number, lambda arrived, _frame: late.add(signal.Signals(arrived)))


def unblock_signals() -> None:
    """Take signals; those that were sent again by the program before arrive now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def replace(descriptors: Sequence[tuple[str, int]], late: set[signal.Signals]) -> NoReturn:
    """Become the program on disk, which gets the named descriptors and the signals noted in `late`. To be called on the
    main thread. OSError if it cannot be executed."""
    first_free = FIRST_DESCRIPTOR + len(descriptors)
    # Out of the way first: a number that one of them shall have may be another one's now.
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, first_free) for _, descriptor in descriptors]
    for number, descriptor in enumerate(moved, FIRST_DESCRIPTOR):
        os.dup2(descriptor, number)
    announce(os.environ, [name for name, _ in descriptors])
    sys.stdout.flush()
    arguments = command()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in late:
        signal.pthread_kill(threading.get_ident(), number)  # to this thread, which is the one that stays
    os.execv(arguments[0], arguments)
