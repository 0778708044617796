"""Who may ask what over TCP.

Theory: the unix socket is protected by its file mode, so nothing is asked there. On TCP, /metrics, /healthz and what
the status page shows are open on loopback, because a monitoring agent on the machine, and somebody who looks at the
page through `ssh -L` at night, should need no secret; anything else needs the token, and what changes something needs
it always. `public_read: true` opens reading, never changing. The files of the page say nothing of the node and are
open: a page that could not be loaded could not ask for the token.

Rule: what the page shows is open on loopback only to who calls the machine by a name of loopback. A site on the Web can
let its own name point to 127.0.0.1, and the browser of whoever visits it would then fetch the page for it.

Known weakness: any user of the machine can read what is open on loopback, and so can whatever a reverse proxy on it
lets through.
"""

import hmac
from ipaddress import ip_address

OPEN_PATHS = ("/metrics", "/healthz")

PAGE_DATA = "/v1/overview"

PAGE_FILES = {
    "/": "index.html",
    "/web/page.css": "page.css",
    "/web/page.js": "page.js",
    "/web/tables.js": "tables.js",
    "/web/words.js": "words.js",
    "/web/icon.svg": "icon.svg",
}
"""{path: file of the status page}."""

_READING = ("GET", "HEAD")


def allowed(
    method: str, path: str, from_loopback: bool, authorization: str, token: str, public_read: bool, host: str = ""
) -> bool:
    """True if a request over TCP may go on. `authorization` is its header (`Bearer TOKEN`), `host` the one of that
    name; "" if absent."""
    if method in _READING:
        open_here = path in OPEN_PATHS or (path == PAGE_DATA and _is_loopback_name(host))
        if public_read or path in PAGE_FILES or (from_loopback and open_here):
            return True
    scheme, _, given = authorization.partition(" ")
    return bool(token) and scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _is_loopback_name(host: str) -> bool:
    """Whether a Host header names this machine in a way that nobody else can."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return name.lower() == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
