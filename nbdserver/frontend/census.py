"""How many clients a node has, and their numbers: here of a node with one process. `node/shared_figures.py` has that of
several, where each process counts its own and sees the others'.
"""


class Census:
    """The clients of a node."""

    def __init__(self) -> None:
        self._last_id = 0

    def others(self) -> int:
        """How many clients other processes have."""
        return 0

    def note(self, clients: int) -> None:
        """So many are ours."""

    def next_id(self) -> int:
        """A number that no client of this node has had."""
        self._last_id += 1
        return self._last_id

    def used(self, client_id: int) -> None:
        """A client of this number has come from a process before."""
        self._last_id = max(self._last_id, client_id)
