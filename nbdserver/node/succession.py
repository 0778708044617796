"""The clients between two programs, as the control process sees them: descriptors with names, which it passes on.

Theory: each data process hands over its own clients, and they are one handover for whoever comes next: a state, the
listening sockets, the clients' sockets. Whoever takes over may have another number of data processes, so the state is
read here, and each client goes to the process that has its export by then.

Rules
- What systemd keeps of them is removed from its store, and that is acknowledged, before a client is answered: if it
  gave them to a later start, requests that were done would be done again.
- A copy of a client's socket that stays open here would keep a connection open that the data process has closed: once a
  data process has them, they are closed here.
- A data process that fails to hand over costs its own clients, nobody else's, as long as there is another one.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nbdserver.host.listening import descriptor_cookie
from nbdserver.node import handover, program, systemd_notify
from nbdserver.node.data_process import DataProcess, DataProcessError
from nbdserver.node.descriptors import CLIENT, LISTENING, STATE, close_all
from nbdserver.node.inherited import Inherited
from nbdserver.node.listeners import Listeners
from protocol.handover import ClientState, Handover, HandoverError, Listening

Named = tuple[str, int]
Given = tuple[Handover, list[int]]
"""What a data process has handed over: its state, and the sockets of its clients in any order."""


class Succession:
    """From the data processes to whoever comes next, and from whoever was before to the data processes."""

    def __init__(
        self, inherited: Inherited, say: Callable[[str], None], event: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._inherited = inherited
        self._say = say
        self._event = event

    async def take_from(
        self, processes: Sequence[DataProcess], listeners: Listeners, handover_id: str, limit: int
    ) -> list[Named]:
        """Let data processes hand over what they have, at most `limit` sockets; they end after that. DataProcessError
        if none of them can."""
        program.raise_descriptor_limit()
        self._say("handing over: clients wait from now on")
        listeners.close_own()
        asked = [self._take_one(process, handover_id) for process in processes]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        given = [answer for answer in answers if not isinstance(answer, BaseException)]
        for process, failure in zip(processes, answers, strict=True):
            if isinstance(failure, BaseException):
                if not given or not isinstance(failure, DataProcessError):
                    raise failure
                self._say(f"WARNING: the clients of data process {process.worker} are lost: {failure}")
                process.kill()
        listening, sockets = listeners.to_hand_over()
        state, clients = joined(given, listening, max(0, min(limit - len(sockets), handover.CLIENT_LIMIT)))
        self._event("clients-handed-over", {"clients": len(clients), "dropped": state.dropped})
        self._say(f"handing over: {len(clients)} clients")
        named = [(STATE, handover.write_state(state)), *((LISTENING, descriptor) for descriptor in sockets)]
        return [*named, *((CLIENT, descriptor) for descriptor in clients)]

    async def _take_one(self, process: DataProcess, handover_id: str) -> Given:
        answer = await process.call("hand_over", handover_id=handover_id)
        file, *clients = process.receive_descriptors(1 + answer["clients"])
        for problem in answer["problems"]:
            self._say(f"WARNING: not closed cleanly: {problem}")
        self._say(f"handing over: volumes closed in {answer['closed_s']} s")
        try:
            return handover.read_state(file), clients
        except HandoverError as error:
            close_all(clients)
            raise DataProcessError(str(error)) from None

    def leave_to_systemd(self, descriptors: Sequence[Named]) -> None:
        """Let systemd keep them until it starts the next process. OSError."""
        for name in (STATE, LISTENING, CLIENT):
            systemd_notify.store(name, [descriptor for label, descriptor in descriptors if label == name])
        if not systemd_notify.barrier():
            self._say("systemd does not say whether it keeps the clients; they may have to connect again")

    async def give_to(
        self, process_of: Callable[[str], DataProcess | None], listeners: Listeners
    ) -> dict[str, Any] | None:
        """Let the data processes, that of each export, go on with the clients that were inherited, and `listeners` use
        the sockets; None if there was nothing."""
        inherited = self._inherited
        if inherited.state is None:
            return None
        is_ours = _systemd_forgets()
        if not is_ours:
            self._say("WARNING: systemd does not say that it has let go of the clients; they have to connect again")
        file, listening, clients = inherited.state, inherited.listening, inherited.clients
        inherited.state, inherited.clients, inherited.listening = None, [], []
        try:
            before = handover.read_state(file)
        except HandoverError as error:
            close_all([*clients, *listening])
            self._say(f"WARNING: no client was taken over: {error}")
            return None
        _inherit_listening(listeners, before.listening, listening)
        if not is_ours:
            close_all(clients)
            clients = []
        taken = await self._give(before, clients, process_of)
        self._event("clients-taken-over", taken)
        self._say(f"{taken['clients']} clients taken over; they waited {taken['pause_s']} s")
        return {"failure": "", **taken}

    async def _give(
        self, before: Handover, clients: Sequence[int], process_of: Callable[[str], DataProcess | None]
    ) -> dict[str, Any]:
        by_cookie = {descriptor_cookie(descriptor): descriptor for descriptor in clients}
        parts: dict[DataProcess, list[ClientState]] = {}
        for state in before.clients:
            process = process_of(state.agreement.offer.name)
            if process is not None and state.cookie in by_cookie:
                parts.setdefault(process, []).append(state)
        given = [
            self._give_one(process, replace(before, listening=[], clients=states), by_cookie)
            for process, states in parts.items()
        ]
        answers = await asyncio.gather(*given)
        close_all(clients)
        taken = sum(answer["clients"] for answer in answers)
        return {
            "id": before.id,
            "clients": taken,
            "dropped": before.dropped + len(before.clients) - taken,
            "pause_s": max((answer["pause_s"] for answer in answers), default=0.0),
        }

    async def _give_one(self, process: DataProcess, part: Handover, by_cookie: dict[int, int]) -> dict[str, Any]:
        file = handover.write_state(part)
        try:
            process.send_descriptors([file, *(by_cookie[state.cookie] for state in part.clients)])
            answer: dict[str, Any] = await process.call("take_over", clients=len(part.clients))
            return answer
        except DataProcessError as error:
            self._say(f"WARNING: {len(part.clients)} clients were not taken over: {error}")
            return {"clients": 0, "pause_s": 0.0}
        finally:
            close_all([file])


def joined(given: Sequence[Given], listening: Sequence[Listening], room: int) -> Given:
    """One handover of several, with at most `room` clients; the sockets of others are closed."""
    states = [state for each, _ in given for state in each.clients]
    kept = states[:room]
    by_cookie = {descriptor_cookie(descriptor): descriptor for _, clients in given for descriptor in clients}
    sockets = [descriptor for state in kept if (descriptor := by_cookie.pop(state.cookie, None)) is not None]
    close_all(by_cookie.values())
    dropped = sum(each.dropped for each, _ in given) + len(states) - len(kept)
    frozen_s = min(each.frozen_s for each, _ in given)
    return Handover(given[0][0].id, frozen_s, dropped, list(listening), kept), sockets


def _inherit_listening(listeners: Listeners, listening: Sequence[Listening], descriptors: Sequence[int]) -> None:
    """Let the next `listen` use these sockets; one that the handover does not name is closed."""
    addresses = {one.cookie: one.address for one in listening}
    for descriptor in descriptors:
        address = addresses.get(descriptor_cookie(descriptor))
        if address is None:
            close_all([descriptor])
        else:
            listeners.inherit(address, descriptor)


def _systemd_forgets() -> bool:
    """Whether systemd has no copy of the clients (any more)."""
    if not systemd_notify.store_size():
        return True
    for name in (STATE, LISTENING, CLIENT):
        systemd_notify.remove(name)
    return systemd_notify.barrier()
