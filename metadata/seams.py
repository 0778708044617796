"""The five seams: everything that is not deterministic comes in through one of these, passed to a constructor.

Production passes the classes of `nbdserver/host` and `metadata/leveldb.py`; the simulator passes its own and runs
everything in one thread from one seed. All methods are called on the loop's thread, and every `done` callback is
called there too, never from inside the call that took it. `later` in a name means: the work may wait for a device, so
it is done off the loop.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from metadata.registry_calls import Change, Event, Health, Reading, Swap, Unavailable

Buffer = bytes | bytearray | memoryview
Done = Callable[[int], None]
"""Called with 0 or an errno."""

DATAGRAM_LIMIT_BYTES = 65_507  # what IPv4 can carry; beyond the path's MTU it travels in fragments, lost all together
CONNECT_TIMEOUT_S = 5.0


class Timer(Protocol):
    """A pending call of `Clock.call_later`."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Time that only goes forward, and timers."""

    def now(self) -> float:
        """Seconds on CLOCK_BOOTTIME (it goes on while the machine is suspended)."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer: ...

    def call_soon(self, callback: Callable[[], None]) -> None: ...


class Connection(Protocol):
    """One byte stream to a peer, whose bytes go to the Receiver that the callback of `Network` returned for it."""

    peer_name: str
    spins: bool
    """Whether its next words may be waited for without sleeping, where that pays: for a client that does nothing but
    wait for its reply. True at first."""

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send or queue all of them. A writable buffer is copied if it cannot leave at once: it may be used again."""

    @property
    def unsent_bytes(self) -> int: ...

    def at_round_end(self, callback: Callable[[], None]) -> None:
        """Call it when every connection whose data has arrived by now was given it, before anybody is given more. At
        once when nobody else waits, or when the connection cannot know. To be asked from `Receiver.received` alone."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def has_hung_up(self) -> bool:
        """Whether the peer has closed while reading is paused, so that nobody has been told."""

    def close(self) -> None:
        """Send what is queued, then close; idempotent."""

    def abort(self) -> None:
        """Close at once, dropping what is queued; idempotent."""

    def redirect(self, receiver: "Receiver") -> None:
        """Its bytes go to this receiver from now on."""

    def detach(self) -> tuple[int, int, bytes] | None:
        """Give it up without closing it: (descriptor, cookie, what is queued), for another process to go on with; the
        cookie tells its socket from all others of this boot. None if it is more than a socket (TLS), or closed."""


class Receiver(Protocol):
    """What a connection's bytes go to."""

    def buffer(self) -> memoryview:
        """Room for the next bytes (at least one); the connection reads straight into it."""

    def received(self, size_bytes: int) -> None:
        """`size_bytes` were put into the last `buffer()`."""

    def drained(self) -> None:
        """`unsent_bytes` went back to 0 after a send that could not leave at once."""

    def lost(self, reason: str) -> None:
        """The connection is gone; nothing follows."""


class Datagrams(Protocol):
    """One open datagram address."""

    address: str
    """Where it is reached: what `open_datagrams` was given, with the port that it got if that was 0."""

    def send(self, peer: str, payload: bytes) -> None:
        """Send to `HOST:PORT` or `[V6]:PORT`, numeric hosts only. It may be lost (also because the system has no room
        or knows no way), doubled, delayed or overtaken: nobody is told. At most DATAGRAM_LIMIT_BYTES."""

    def close(self) -> None:
        """Idempotent; nothing is received afterwards."""


class Network(Protocol):
    """Connections and datagrams."""

    def listen(self, address: str, accept: Callable[[Connection], Receiver | None]) -> Callable[[], None]:
        """Listen at `HOST:PORT`, `[V6]:PORT` or `unix:PATH`; return what stops listening. OSError if it cannot."""

    def connect(
        self,
        address: str,
        connected: Callable[[Connection], Receiver | None],
        failed: Callable[[str], None],
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Callable[[], None]:
        """Connect to such an address (numeric hosts only) and return what gives it up. `connected` gets the connection
        and returns what its bytes go to (None aborts it), or `failed` gets the reason: one of them, once, and not
        from inside this call; neither after it was given up. ValueError for an address of another form."""

    def open_datagrams(self, address: str, received: Callable[[str, bytes], None]) -> Datagrams:
        """Receive datagrams at `HOST:PORT` or `[V6]:PORT`: `received(peer, payload)` for each, the peer's address in
        the same form, which `send` takes. OSError if it cannot, ValueError for an address of another form."""


class Files(Protocol):
    """Segment files below one directory. A handle is a small integer. Every failure is an OSError or an errno."""

    def create(self, path: str, size_bytes: int) -> int:
        """Make a file of `size_bytes` allocated zeros (fallocate), return its handle; ENOSPC leaves nothing behind."""

    def create_later(self, path: str, size_bytes: int, done: Callable[[int, int], None]) -> None:
        """The same off the loop, and into the page cache; `done(errno, handle)`."""

    def open(self, path: str) -> int: ...

    def close(self, handle: int) -> None: ...

    def size_bytes(self, handle: int) -> int: ...

    def append(self, handle: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers one after the other at `offset` by one `pwritev`; OSError: an unknown part arrived."""

    def read_cached(self, handle: int, length: int, offset: int) -> bytes | None:
        """What the page cache holds (RWF_NOWAIT), or None when any of it would have to come from the device."""

    def read_into(self, handle: int, buffers: Sequence[memoryview], offset: int, flags: int, /) -> int:
        """`os.preadv`, bare: the hottest call of all. With RWF_NOWAIT less than asked for, or OSError, when any of it
        would have to come from the device."""

    def read(self, handle: int, length: int, offset: int) -> bytes:
        """May wait for the device and return less at the end of the file: recovery and offline checks only."""

    @property
    def answers_from_cache(self) -> bool:
        """False where there is no RWF_NOWAIT: then nothing is ever read inline."""

    def fetch_later(self, extents: Sequence[tuple[int, int, int]], done: Callable[[], None]) -> None:
        """Bring (handle, length, offset) extents into the page cache, all at once; `done()` when that is over, whatever
        came of it."""

    def read_later(
        self, handle: int, extents: Sequence[tuple[int, int]], done: Callable[[int, list[bytes]], None]
    ) -> None:
        """Read (length, offset) extents off the loop; `done(errno, data)`, one bytes object an extent."""

    def read_device_later(self, handle: int, length: int, offset: int, done: Callable[[int, Buffer], None]) -> None:
        """Read off the loop what the device itself has, past the page cache, and leave nothing there."""

    def fdatasync_later(self, handles: Sequence[int], done: Done) -> None:
        """fdatasync them in the order given; stops at the first failure."""

    def fdatasync(self, handles: Sequence[int]) -> None:
        """The same at once; waits for the device: starting only."""

    def prepare_later(self, path: str, size_bytes: int, done: Callable[[int, int], None]) -> None:
        """Make a file *written* with zeros and synced, its directory entry too; `done(errno, handle)`."""

    def list(self, directory: str) -> list[str]: ...

    def make_directory(self, path: str) -> None: ...

    def rename(self, path: str, new_path: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def unlink_later(self, path: str, done: Done) -> None: ...

    def sync_directory(self, path: str) -> None: ...

    def sync_directory_later(self, path: str, done: Done) -> None: ...

    def free_bytes(self) -> int:
        """Room left on the file system, as an unprivileged process sees it."""


class Batch(Protocol):
    """Puts and deletes that a Store applies all or none."""

    def put(self, key: bytes, value: bytes) -> None: ...

    def delete(self, key: bytes) -> None: ...


class Store(Protocol):
    """Ordered keys and values: LevelDB, or its twin. OSError(EIO) for what the store reports as damaged."""

    def get(self, key: bytes) -> bytes | None: ...

    def range(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Items with start <= key < stop, in order, as of the call."""

    def ranges(self, ranges: Sequence[tuple[bytes, bytes]]) -> list[list[tuple[bytes, bytes]]]:
        """The items of each range, cheapest in the order of keys; waits for the device: starting only."""

    def range_later(
        self,
        ranges: Sequence[tuple[bytes, bytes]],
        done: Callable[[int, list[list[tuple[bytes, bytes]]]], None],
        limit: int = 0,
    ) -> None:
        """The items of each range, at most `limit` of each (0: all), read off the loop."""

    def batch(self) -> Batch: ...

    def write(self, batch: Batch) -> None:
        """Apply and sync; waits for the device: starting and stopping only."""

    def write_later(self, batch: Batch, done: Done) -> None:
        """Apply and sync off the loop. One at a time; the batch must not change until `done`."""

    def close(self) -> None: ...


class Lease(Protocol):
    """A promise that keys bound to it are there: it is renewed by itself for as long as the registry answers.

    A hint of life, nothing more: who must not act on an old promise looks at `valid_until_s` after each thing it hears.
    """

    @property
    def id(self) -> int:
        """What `Change.lease_id` takes."""

    @property
    def valid_until_s(self) -> float:
        """On the Clock: until then no one else sees it end. Counted from when the renewal was *sent*; 0 when lost."""

    def release(self) -> None:
        """Give it up: its keys go as soon as the registry hears of it, at the latest when it ends. No `lost` then."""


class Watch(Protocol):
    """A range that is watched."""

    def cancel(self) -> None:
        """Stop; no event follows, not even one that is under way. Idempotent."""


class Registry(Protocol):
    """The small consistent store of who owns what, on this node or on several: swaps, leases, watches.

    Every call is answered exactly once, after a bounded time. ValueError at once for what no registry takes (see the
    bounds in metadata/registry_calls.py); all other trouble is part of the answer. The data path never waits for it.
    """

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None:
        """Read one key: a Reading of one item, or of none."""

    def range_later(self, prefix: str, done: Callable[[Reading | Unavailable], None]) -> None:
        """Read every key that begins with `prefix`, all as of one revision."""

    def swap_later(self, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        """Make all changes or none. Durable when it is SWAPPED; what UNKNOWN means is told in registry_calls."""

    def grant_later(self, ttl_s: float, lost: Callable[[], None], done: Callable[[Lease | Unavailable], None]) -> None:
        """Take a lease and keep it. `lost()` follows once if it ends before it was released: no one renewed it in
        time, or the registry has dropped it. The keys bound to it are gone, or will be."""

    def watch(self, prefix: str, changed: Callable[[Event], None], after: int | None = None) -> Watch:
        """Hear of every change below `prefix`, in order, each once, without gaps, until it is cancelled.

        It begins with a reset: the range as it is. With `after` it begins with what changed later than that revision,
        or with a reset where that is not known any more. Another reset follows whenever changes were missed.
        """

    def health(self) -> Health: ...

    def close(self) -> None:
        """Answer what is pending, end watches and leases without a further word (leases run out by themselves)."""


class HeldRegistry(Protocol):
    """A registry whose content is at hand: what is there is read at once, changes are waited for."""

    def get(self, key: str) -> bytes | None: ...

    def range(self, prefix: str) -> list[tuple[str, bytes]]: ...

    async def compare_and_swap(self, changes: Sequence[tuple[str, bytes | None, bytes | None]]) -> bool:
        """All (key, expected, new) or nothing; None is absence. Durable, and read from then on, when it returns True;
        nothing is changed if it returns False."""
