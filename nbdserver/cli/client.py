"""The node's HTTP API, as the commands use it: over DATA/api.sock, one request at a time.

Rules: whatever goes wrong becomes one line and an exit code. httpx is imported when a request is made, not for
`--help`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nbdserver.host.data_directory import is_locked
from nbdserver.node.addresses import MAX_SOCKET_PATH_BYTES
from nbdserver.node.errors import ConflictError, NodeError, NotFoundError, NotRunningError, WrongInputError

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 600.0
"""Deleting a volume unlinks its segments first: on a slow disk that takes a while."""


class NodeClient:
    """Talks to the node that serves a data directory."""

    def __init__(self, data: Path) -> None:
        import httpx

        self._data = data
        self._socket = data.absolute() / "api.sock"
        if len(str(self._socket).encode()) > MAX_SOCKET_PATH_BYTES:
            raise WrongInputError(f"{self._socket} is longer than a socket path can be ({MAX_SOCKET_PATH_BYTES} bytes)")
        transport = httpx.HTTPTransport(uds=str(self._socket))
        self._http = httpx.Client(transport=transport, base_url="http://node", timeout=TIMEOUT_S, trust_env=False)

    def get(self, path: str, **query: Any) -> Any:
        """Return what the API answers. Raises NodeError (with its exit code)."""
        return self._request("GET", path, params=query)

    def post(self, path: str, content: Any) -> Any:
        return self._request("POST", path, json=content)

    def patch(self, path: str, content: Any) -> Any:
        return self._request("PATCH", path, json=content)

    def delete(self, path: str, **query: Any) -> Any:
        return self._request("DELETE", path, params=query)

    def lines(self, path: str, **query: Any) -> Iterator[str]:
        """What the API answers, line by line, as it comes; empty lines are left out. Raises NodeError."""
        with self._failures("has ended the answer"), self._http.stream("GET", path, params=query) as response:
            if response.status_code >= 400:
                response.read()
                raise _refusal(response)
            yield from filter(None, response.iter_lines())

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        with self._failures("did not answer"):
            response = self._http.request(method, path, **arguments)
        if response.status_code >= 400:
            raise _refusal(response)
        return response.json() if response.content else None

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Raises NodeError for what httpx raises; `what` the node did if it was reached."""
        import httpx

        try:
            yield
        except httpx.ConnectError as error:
            if "Permission" in str(error):
                raise NodeError(f"{self._socket} may not be opened by this user; try with sudo") from None
            raise NotRunningError(self._why_not()) from None
        except httpx.HTTPError as error:
            raise NodeError(f"the node on {self._data} {what}: {error or type(error).__name__}") from None

    def _why_not(self) -> str:
        if is_locked(self._data):
            return f"the node on {self._data} is starting, stopping or being checked; try again in a moment"
        return f"no node is running on {self._data}; start one with: nbdserver serve --data {self._data}"


def _refusal(response: "httpx.Response") -> NodeError:
    """What the node says of a request that it refuses."""
    try:
        message = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = f"the node answered {response.status_code} without a reason; its output says more"
    kinds = {404: NotFoundError, 409: ConflictError}
    return kinds.get(response.status_code, WrongInputError if response.status_code < 500 else NodeError)(message)


def volume_path(name: str) -> str:
    """Return the API's path of a volume; any name can be asked for, also one that cannot exist."""
    return f"/v1/volumes/{quote(name, safe='')}"


def node_path(name: str) -> str:
    """Return the API's path of a node of the cluster, whatever the name."""
    return f"/v1/nodes/{quote(name, safe='')}"
