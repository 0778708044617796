"""Tokens that let a new node into a cluster: what they carry, and which are valid.

    nbdj1.BASE64    JSON: where to ask, the cluster's name, the SHA-256 of its CA's certificate, a secret

Theory: the token is carried by people (a terminal, a password store), so it has all that the new node needs to know
whom it talks to, and it is worth nothing soon. The new node believes the CA that has the token's fingerprint, and
nobody else; the node that is asked believes whoever knows the secret.

Rules
- Of a secret only its hash is kept, with its end; a token may bring in several nodes until then.
- Ends are wall-clock time, as in certificates: a token has to outlive a restart.
"""

import base64
import hashlib
import hmac
import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from nbdserver.host.whole_files import replace_file
from nbdserver.node.errors import NodeError, WrongInputError

PREFIX = "nbdj1."
SECRET_BYTES = 24
MOST_TOKENS = 64


@dataclass(frozen=True)
class Token:
    """What a new node is told."""

    cluster: str
    address: str
    """IP:PORT of the node that has the CA's key."""
    ca_sha256: str
    """Of the CA's certificate, DER, hexadecimal."""
    secret: str

    def encode(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode().rstrip("=")

    @staticmethod
    def decode(text: str) -> "Token":
        """WrongInputError."""
        text = text.strip()
        try:
            if not text.startswith(PREFIX):
                raise ValueError("another beginning")
            body = text.removeprefix(PREFIX)
            content = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            token = Token(**content)
            if not all(isinstance(value, str) for value in content.values()):
                raise TypeError("not texts")
            return token
        except (ValueError, TypeError):
            raise WrongInputError(
                f"this is no whole token; copy all of what `nbdserver cluster token` printed, from {PREFIX} to its end"
            ) from None


class Invitations:
    """The tokens that are valid, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, valid_s: float, now_s: float) -> str:
        """Return a new secret. `now_s` is the wall clock's. NodeError."""
        secret = secrets.token_urlsafe(SECRET_BYTES)
        valid = {known: end_s for known, end_s in self._read().items() if end_s > now_s}
        if len(valid) >= MOST_TOKENS:
            raise NodeError(f"{MOST_TOKENS} tokens are valid already; wait until the first of them have ended")
        valid[_hash(secret)] = now_s + valid_s
        replace_file(self._path, json.dumps(valid, indent=1).encode())
        return secret

    def has(self, secret: str, now_s: float) -> bool:
        """Whether a secret is valid. NodeError."""
        wanted = _hash(secret)
        return any(hmac.compare_digest(known, wanted) and end_s > now_s for known, end_s in self._read().items())

    def _read(self) -> dict[str, float]:
        try:
            content = json.loads(self._path.read_bytes())
            return {str(known): float(end_s) for known, end_s in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise NodeError(f"{self._path} cannot be read ({error}); delete it and make new tokens") from None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
