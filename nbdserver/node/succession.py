"""The clients between two programs, as the control process sees them: descriptors with names, which it passes on.

Rules
- What systemd keeps of them is removed from its store, and that is acknowledged, before a client is answered: if it
  gave them to a later start, requests that were done would be done again.
- A copy of a client's socket that stays open here would keep a connection open that the data process has closed: once a
  data process has them, they are closed here (`DataProcess.start` is where it gets them).
"""

from collections.abc import Callable, Sequence
from typing import Any

from nbdserver.node import program, systemd_notify
from nbdserver.node.data_process import DataProcess, DataProcessError
from nbdserver.node.descriptors import CLIENT, LISTENING, STATE
from nbdserver.node.inherited import Inherited

Named = tuple[str, int]


class Succession:
    """From the data process to whoever comes next, and from whoever was before to the data process."""

    def __init__(
        self, inherited: Inherited, say: Callable[[str], None], event: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._inherited = inherited
        self._say = say
        self._event = event

    async def take_from(self, data: DataProcess, handover_id: str, limit: int) -> list[Named]:
        """Let a data process hand over what it has, at most `limit` sockets; it ends after that. DataProcessError."""
        program.raise_descriptor_limit()
        self._say("handing over: clients wait from now on")
        answer = await data.call("hand_over", handover_id=handover_id, limit=limit)
        listening, clients = answer["listening"], answer["clients"]
        received = data.receive_descriptors(1 + listening + clients)
        self._event("clients-handed-over", {"clients": clients, "dropped": answer["dropped"]})
        for problem in answer["problems"]:
            self._say(f"WARNING: not closed cleanly: {problem}")
        self._say(f"handing over: {clients} clients, volumes closed in {answer['closed_s']} s")
        names = [STATE, *[LISTENING] * listening, *[CLIENT] * clients]
        return list(zip(names, received, strict=True))

    def leave_to_systemd(self, descriptors: Sequence[Named]) -> None:
        """Let systemd keep them until it starts the next process. OSError."""
        for name in (STATE, LISTENING, CLIENT):
            systemd_notify.store(name, [descriptor for label, descriptor in descriptors if label == name])
        if not systemd_notify.barrier():
            self._say("systemd does not say whether it keeps the clients; they may have to connect again")

    async def give_to(self, call: Callable[..., Any]) -> dict[str, Any] | None:
        """Let the data process (asked by `call`) go on with what was inherited; None if there was nothing."""
        inherited = self._inherited
        is_ours = inherited.state is None or _systemd_forgets()
        if not is_ours:
            self._say("WARNING: systemd does not say that it has let go of the clients; they have to connect again")
        try:
            taken = await call(
                "take_over",
                state=inherited.state,
                go_on=is_ours,
                clients=inherited.clients,
                listening=inherited.listening,
                activated=inherited.activated,
            )
        except DataProcessError as error:
            taken = None
            self._say(f"WARNING: no client was taken over: {error}")
        inherited.state, inherited.clients, inherited.listening = None, [], []
        if taken is None:
            return None
        self._event("clients-taken-over", taken)
        self._say(f"{taken['clients']} clients taken over; they waited {taken['pause_s']} s")
        return {"failure": "", **taken}


def _systemd_forgets() -> bool:
    """Whether systemd has no copy of the clients (any more)."""
    if not systemd_notify.store_size():
        return True
    for name in (STATE, LISTENING, CLIENT):
        systemd_notify.remove(name)
    return systemd_notify.barrier()
