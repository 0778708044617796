"""What `top`, `ps` and who asks for the holder of a port show of a process, however it was started."""

from pathlib import Path

CONTROL, DATA = "nbdserver", "nbdserver-data"
"""Of at most 15 characters."""


def name_process(name: str) -> None:
    """Take this name. It is for people: nothing depends on it, so where there is no /proc there is none."""
    try:
        Path("/proc/self/comm").write_text(name)
    except OSError:
        pass
