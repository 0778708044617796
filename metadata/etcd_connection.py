"""One connection to an etcd cluster: the endpoint in use, the login, and what takes its place when it fails.

Theory: at any time there is at most one *link*: a channel to one endpoint, logged in, over which etcd has answered a
question. One task makes links, one after the other, and alone decides when one is broken. Calls wait for a link, use
it, and say what is known when it breaks under them: the request was not sent, was refused, or may have been carried
out.

    connect ─► log in ─► ask for the registry's version ─► link ─ asked every second, answers within one ─► broken
       ▲                                                                                                      │
       └──────────────── next endpoint, at once; after all of them a pause that doubles, with jitter ◄────────┘

Rules
- The keepalive is a question that only a member with a leader and a majority can answer. HTTP/2 pings are not used: an
  etcd with usual settings hangs up on who pings more often than every 5 s, and a member cut off from the others answers
  pings for ever.
- Every request asks for a leader (`hasleader`): without one, streams end instead of staying silent.
- One channel is one endpoint: TLS checks its name, and what is in use can be told.
- A token that is refused is asked for anew, once for all calls that it was refused to.
- Another etcd cluster behind one of the endpoints is refused: its revisions mean something else. So is one that is not
  as far as this node has seen it; its guard (registry_guard.py) also knows what was seen before a restart of ours.

Known weakness: deadlines of calls count CLOCK_MONOTONIC, so a call that waits during a suspend is answered late by that
long. Leases are not concerned: they count by the Clock.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

from metadata.etcd_grpc import Channel, EtcdError, explain, grpc, make_channel, rpc, translated
from metadata.etcd_settings import EtcdSettings
from metadata.registry_calls import (
    HOME_KEY,
    LIFE_KEY,
    OWN_PREFIX,
    READABLE_VERSIONS,
    REGISTRY_VERSION,
    VERSION_KEY,
    Health,
    end_of_prefix,
)
from metadata.registry_guard import RegistryGuard, RegistryPast
from metadata.seams import Clock

_LEADER = ("hasleader", "true")
_REPEAT_MIN_S = 0.05
_REPEAT_MAX_S = 0.5
_MAX_LOGINS_PER_CALL = 2


class Link:
    """A channel to one endpoint that answers."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.kv: Any = rpc.KVStub(channel)
        self.lease: Any = rpc.LeaseStub(channel)
        self.watch: Any = rpc.WatchStub(channel)
        self.auth: Any = rpc.AuthStub(channel)
        self.metadata: tuple[tuple[str, str], ...] = (_LEADER,)
        self.login = asyncio.Lock()


class EtcdConnection:
    """Keeps a link to an etcd cluster, for calls to use."""

    def __init__(
        self,
        settings: EtcdSettings,
        clock: Clock,
        rng: random.Random,
        loop: asyncio.AbstractEventLoop,
        guard: RegistryGuard,
    ) -> None:
        self.settings = settings
        self.life = 0
        """Of the registry in use: in another one revisions mean something else."""
        self._guard = guard
        self._clock = clock
        self._rng = rng
        self._loop = loop
        self._link: Link | None = None
        self._has_link = asyncio.Event()
        self._since_s = clock.now()
        self._endpoint = ""
        self._last_error = ""
        self.version_key = (settings.namespace + VERSION_KEY).encode()
        self._life_key = (settings.namespace + LIFE_KEY).encode()
        self._home_key = (settings.namespace + HOME_KEY).encode()
        self._task = loop.create_task(self._keep_link())

    def health(self, pending_calls: int) -> Health:
        """Return how it fares."""
        is_connected = self._link is not None
        return Health(is_connected, self._since_s, self._endpoint, self._last_error, pending_calls)

    def note(self, error: str) -> None:
        """Remember what went wrong, for `health`."""
        self._last_error = error

    async def pause(self, failures: int) -> None:
        """Wait after so many failures in a row."""
        await asyncio.sleep(self.settings.pause_s(failures, self._rng))

    def deadline(self) -> float:
        """Return when a call that begins now has to be answered, on the loop's time."""
        return self._loop.time() + self.settings.call_timeout_s

    async def close(self) -> None:
        """Give up the link; what uses it fails."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def link(self, deadline: float | None) -> Link:
        """Wait for a link; EtcdError if there is none at `deadline`."""
        while not self._link:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._has_link.wait()
            except TimeoutError:
                raise EtcdError(f"no connection to etcd: {self._last_error or 'not yet'}", False) from None
        return self._link

    async def call(self, service: str, method: str, request: Any, deadline: float, is_repeatable: bool = False) -> Any:
        """Return etcd's response. EtcdError if there is none by `deadline` (the loop's time).

        What changes nothing, or the same if done twice, is repeatable: it is sent again when a link broke under it.
        """
        logins, pause_s = 0, _REPEAT_MIN_S
        while True:
            link = await self.link(deadline)
            metadata = link.metadata
            try:
                with translated():
                    send = getattr(getattr(link, service), method)
                    return await send(request, timeout=deadline - self._loop.time(), metadata=metadata)
            except EtcdError as error:
                if logins < _MAX_LOGINS_PER_CALL and error.is_token_refused:
                    logins += 1
                    await self.log_in_again(link, metadata, deadline)
                elif not self._may_repeat(error, is_repeatable, deadline - pause_s):
                    self.note(str(error))
                    raise
                else:
                    await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1))
                    pause_s = min(2 * pause_s, _REPEAT_MAX_S)

    async def keep_alive(self, lease_id: int, deadline: float) -> float:
        """Renew a lease; return the seconds it is good for from now, 0 if it is gone. EtcdError without an answer."""
        link = await self.link(deadline)
        metadata = link.metadata
        request = rpc.LeaseKeepAliveRequest(ID=lease_id)
        call = link.lease.LeaseKeepAlive([request], timeout=deadline - self._loop.time(), metadata=metadata)
        try:
            with translated():
                async for response in call:
                    return float(response.TTL)
        except EtcdError as error:
            if error.is_token_refused:
                await self.log_in_again(link, metadata, deadline)
            raise
        finally:
            call.cancel()
        raise EtcdError("the stream has ended", False)

    async def log_in_again(
        self, link: Link, refused: tuple[tuple[str, str], ...], deadline: float | None = None
    ) -> None:
        """Get a new token, unless another has done so since `refused` was used. EtcdError if there is none."""
        try:
            async with asyncio.timeout_at(deadline), link.login:
                if link.metadata == refused:
                    await self._log_in(link)
        except TimeoutError:
            raise EtcdError("no new token in time", False) from None

    def _may_repeat(self, error: EtcdError, is_repeatable: bool, latest: float) -> bool:
        may_repeat = error.is_passing and (is_repeatable or not error.may_have_happened)
        return may_repeat and self._loop.time() < latest

    async def _keep_link(self) -> None:
        endpoints = self.settings.endpoints
        index = self._rng.randrange(len(endpoints))
        failures = 0
        while True:
            endpoint = endpoints[index % len(endpoints)]
            index += 1
            self._endpoint = endpoint
            try:
                async with self._opened(endpoint) as link:
                    began_s = self._loop.time()
                    self._set_link(link)
                    try:
                        await self._probe(link)
                    finally:
                        if self._loop.time() - began_s > self.settings.backoff_max_s:
                            failures = 0
                        self._set_link(None)
            except EtcdError as error:
                self.note(f"{endpoint}: {explain(str(error), endpoint, self.settings.tls)}")
            failures += 1
            await self.pause(failures)

    def _set_link(self, link: Link | None) -> None:
        self._link = link
        self._since_s = self._clock.now()
        if link:
            self._has_link.set()
        else:
            self._has_link.clear()

    @contextlib.asynccontextmanager
    async def _opened(self, endpoint: str) -> AsyncIterator[Link]:
        channel = make_channel(endpoint, self.settings.tls)
        try:
            link = Link(channel)
            if self.settings.user is not None:
                await self._log_in(link)
            await self._check_registry(link)
            yield link
        finally:
            await channel.close()

    async def _log_in(self, link: Link) -> None:
        request = rpc.AuthenticateRequest(name=self.settings.user, password=self.settings.password)
        with translated():
            response = await link.auth.Authenticate(request, timeout=self.settings.connect_timeout_s)
        link.metadata = (_LEADER, ("token", response.token))

    async def _check_registry(self, link: Link) -> None:
        """Make the registry if there is none, mark an older one. EtcdError for one that is refused: by a newer program,
        put back to an earlier state, another one, or with nothing of what it had."""
        start = (self.settings.namespace + OWN_PREFIX).encode()
        request = rpc.RangeRequest(key=start, range_end=end_of_prefix(start))
        with translated():
            response = await link.kv.Range(request, timeout=self.settings.connect_timeout_s, metadata=link.metadata)
        found = {item.key: item.value for item in response.kvs}
        cluster_id = response.header.cluster_id
        life, home = int(found.get(self._life_key, b"0")), int(found.get(self._home_key, cluster_id))
        reason = self._guard.admit(RegistryPast(life, cluster_id, response.header.revision), home)
        if reason:
            raise EtcdError(reason, False)
        self.life = life
        version = found.get(self.version_key)
        if version not in (None, *READABLE_VERSIONS):
            raise EtcdError(
                f"the registry has version {version.decode(errors='replace')}, this program knows "
                f"{REGISTRY_VERSION.decode()}; use the nbdserver that wrote it",
                False,
            )
        wanted = {self.version_key: REGISTRY_VERSION, self._home_key: str(home).encode()}
        missing = {key: value for key, value in wanted.items() if found.get(key) != value}
        if missing:
            await self._mark(link, found, missing)

    async def _mark(self, link: Link, found: dict[bytes, bytes], wanted: dict[bytes, bytes]) -> None:
        mark = rpc.TxnRequest(
            compare=[expectation(key, found.get(key)) for key in wanted],
            success=[rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value)) for key, value in wanted.items()],
        )
        with translated():
            response = await link.kv.Txn(mark, timeout=self.settings.connect_timeout_s, metadata=link.metadata)
        if not response.succeeded:
            raise EtcdError("the registry's version is being changed by another", False)

    async def _probe(self, link: Link) -> None:
        """Ask again and again; EtcdError when there is no answer."""
        request = rpc.RangeRequest(key=self.version_key, count_only=True)
        lost = self._loop.create_task(link.channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        try:
            while True:
                done, _ = await asyncio.wait([lost], timeout=self.settings.probe_interval_s)
                if done:
                    raise EtcdError("the connection was lost", True)
                metadata = link.metadata
                try:
                    with translated():
                        response = await link.kv.Range(
                            request, timeout=self.settings.probe_timeout_s, metadata=metadata
                        )
                    self._guard.saw(response.header.revision)
                except EtcdError as error:
                    if not error.is_token_refused:
                        raise
                    await self.log_in_again(link, metadata)
        finally:
            lost.cancel()


def expectation(key: bytes, value: bytes | None) -> Any:
    """Return etcd's condition that `key` has that value; None is absence."""
    if value is None:
        return rpc.Compare(target=rpc.Compare.CREATE, key=key, create_revision=0)
    return rpc.Compare(target=rpc.Compare.VALUE, key=key, value=value)
