"""Who may ask what over TCP.

Theory: the unix socket is protected by its file mode, so nothing is asked there. On TCP, /metrics and /healthz are
open on loopback, because a monitoring agent on the machine should need no secret; anything else needs the token,
and what changes something needs it always. `public_read: true` opens reading, never changing.

Known weakness: any user of the machine can read the metrics on loopback, and so can whatever a reverse proxy on it
lets through.
"""

import hmac

OPEN_PATHS = ("/metrics", "/healthz")

_READING = ("GET", "HEAD")


def allowed(method: str, path: str, from_loopback: bool, authorization: str, token: str, public_read: bool) -> bool:
    """True if a request over TCP may go on. `authorization` is its header (`Bearer TOKEN`), "" if absent."""
    if method in _READING and (public_read or (from_loopback and path in OPEN_PATHS)):
        return True
    scheme, _, given = authorization.partition(" ")
    return bool(token) and scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
