"""Why an image cannot be saved or loaded."""

from nbdserver.node.errors import NodeError


class ImageError(NodeError):
    """Something broke on the way; the message is one line. Exit code 1."""
