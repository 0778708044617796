"""What the parts of the directory need from the node they run in: a way to say something to another node.

Rule: `send` never fails and never calls back. What cannot be sent is lost, like a datagram; every protocol here asks
again.
"""

from collections.abc import Sequence
from typing import Any, Protocol


class Outbox(Protocol):
    """Sends bodies (of protocol/directory.py and protocol/directory_control.py) to nodes by their id."""

    def send(self, node: int, body: Any) -> None:
        """By datagram in the own site, over its stream to a node across a WAN."""

    def send_all(self, nodes: Sequence[int], body: Any) -> None:
        """The same to many, encoded and sealed once."""
