"""Clients of the node that owns a volume, when it does not own it any more: they go on at the next owner, in their own
process until then or not. Beside them those of other nodes stay, and the troubles are those of
test_forwarding_again_under_faults.py.

That a client which has gone on can go on again is shown there; here each goes when it has, and another one comes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import pytest

from metadata.seams import Buffer
from nbdserver.frontend import transmission
from nbdserver.frontend.receive_buffer import ReceiveBuffer
from nbdserver.frontend.transmission import Transmission
from nbdserver.frontend.unanswered import asked_again
from tests.simulation.cluster.cluster import Cluster
from tests.simulation.registers import ViolationError
from tests.simulation.test_forwarding_again_under_faults import CLIENTS, LongStage, Talker, World

FOR_S = 20.0
LEAST = 2  # go on in each run
STAYS_S = 0.5  # when it has gone on


class OwnersWorld(World, Protocol):
    """Where clients come to the owner."""

    cluster: Cluster

    @property
    def owner(self) -> str:
        """Its node."""


class Passer:
    """A client at the owner's node, and when that one has lost the volume for a while another one at the next's."""

    def __init__(
        self, stage: OwnersWorld, number: int, talker: Callable[[OwnersWorld, str, int], Talker] = Talker
    ) -> None:
        self.gone_on = 0
        self._stage = stage
        self._number = number
        self._make = talker
        self._talker: Talker | None = None
        self._node = ""
        self._ends_s = 0.0

    @property
    def is_idle(self) -> bool:
        return self._talker is None or self._talker.is_idle

    def step(self, asks: bool = True) -> None:
        stage, talker = self._stage, self._talker
        if talker is None:
            if asks and stage.owner != "node-1":  # which may be killed
                self._node, self._ends_s = stage.owner, 0.0
                self._talker = self._make(stage, stage.owner, self._number)
                self._number += 1
            return
        if not self._ends_s and stage.owner != self._node:
            self._ends_s = stage.cluster.now_s + STAYS_S
        is_over = 0 < self._ends_s < stage.cluster.now_s
        talker.step(asks and not is_over)
        talker.check()
        if is_over and talker.is_idle:
            self.gone_on += 1
            talker.client.hang_up()
            self._talker = None


def run(seed: int) -> int:
    """How many have gone on."""
    stage = LongStage(seed)
    forwarded = [Talker(stage, node, number) for number, node in enumerate(CLIENTS)]
    passer = Passer(stage, len(CLIENTS))
    until_s = stage.cluster.now_s + FOR_S
    while stage.cluster.now_s < until_s + 60.0:
        asks = stage.cluster.now_s < until_s or passer.gone_on < LEAST
        if not asks and passer.is_idle and all(talker.is_idle for talker in forwarded):
            return passer.gone_on
        stage.cluster.run(0.005)
        for talker in (*forwarded, passer):
            talker.step(asks)
        for talker in forwarded:
            talker.check()
    raise ViolationError("a client waits for ever")


@pytest.mark.parametrize("seed", range(4))
def test_clients_of_the_owner_go_on_when_it_is_another_one_and_what_was_answered_stays(seed: int) -> None:
    assert run(seed) >= LEAST


def kept_nowhere(self: ReceiveBuffer, position: int) -> None:
    """In place of `set_aside`."""
    self.used(position)
    self.aside = memoryview(b"")


_leave = Transmission.leave


def _turned(self: Transmission) -> bytes | None:
    rest_bytes = self._buffer.end - self._buffer.start
    left = _leave(self)
    return left and left[len(left) - rest_bytes :] + left[: len(left) - rest_bytes]


def _nothing_that_is_deferred(style: Any, _waiting: object, batch: memoryview, cookies: Any) -> list[Buffer]:
    return asked_again(style, (), batch, cookies)


@pytest.mark.parametrize(
    ("where", "name", "replacement"),
    [
        pytest.param(ReceiveBuffer, "set_aside", kept_nowhere, id="the batch that is in flight is kept"),
        pytest.param(Transmission, "leave", _turned, id="what came behind the batch is asked behind it"),
        pytest.param(transmission, "asked_again", _nothing_that_is_deferred, id="what is deferred is asked again"),
    ],
)
def test_a_missing_rule_is_noticed(
    where: object, name: str, replacement: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, replacement)
    for seed in range(40):
        try:
            run(seed)
        except ViolationError:
            return
    pytest.fail("nobody has noticed")
