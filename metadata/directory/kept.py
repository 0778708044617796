"""Updates published with `confirm=REGISTRY`: into the registry first, then to everybody.

Theory: a key that is in the registry is changed there before anywhere else, for ever after, so what the registry has is
the truth about it. One swap at a time; each checks that this node is still the master of this epoch and moves the one
number of all kept changes on, so that no swap that is still under way can be made after a later one.

Rules
- UNKNOWN is settled by the same swap again. What LOST means is read: it was made before, or another master has come,
  or the voters changed meanwhile and the swap is made again.
- A swap that was not done because the registry is away is tried again every RETRY_S, until the term ends. What waits
  then was not done, except the one under way, which is unknown.
- Bounds: WAITING_LIMIT changes wait, KEPT_LIMIT keys are kept.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from metadata.directory.registry_keys import KEPT, KEPT_PREFIX, STATE_KEY, MasterState
from metadata.registry_calls import Change, Outcome, Reading, Swap, Unavailable
from metadata.seams import Clock, Registry
from protocol.directory import Action, MalformedError, Update

RETRY_S = 1.0
WAITING_LIMIT = 256
KEPT_LIMIT = 1000
NUMBER_BYTES = 12


@dataclass
class _Waiting:
    update: Update
    taken: Callable[[], None]
    """The registry has it."""
    failed: Callable[[bool], None]
    """It was not done (False) or nobody knows (True)."""


class Kept:
    """The kept keys, as one master sees them."""

    def __init__(
        self, clock: Clock, registry: Registry, epoch: int, state: Callable[[], bytes], lost: Callable[[], None]
    ) -> None:
        """`state()` is the master's own value of the registry's state; `lost` is called when there is another."""
        self._epoch = epoch
        self._clock = clock
        self._registry = registry
        self._state = state
        self._lost = lost
        self._values: dict[str, bytes] = {}
        self._number: bytes | None = None
        self._waiting: deque[_Waiting] = deque()
        self._is_swapping = False
        self._is_unknown = False
        self._has_ended = False

    def load(self, reading: Reading) -> dict[str, Update]:
        """Take the range of KEPT; the updates by key. MalformedError."""
        self._number = None
        self._values = {}
        updates: dict[str, Update] = {}
        for key, value in reading.items:
            if key == KEPT:
                self._number = value
            elif key.startswith(KEPT_PREFIX):
                name = key.removeprefix(KEPT_PREFIX)
                self._values[name] = value
                updates[name] = replace_kept(Update.decode(value[NUMBER_BYTES:]))
                if updates[name].key != name:
                    raise MalformedError(f"{key} has an update of another key")
        return updates

    def has(self, key: str) -> bool:
        """True if the registry has this key, or is about to."""
        return key in self._values or any(waiting.update.key == key for waiting in self._waiting)

    def takes(self, key: str) -> bool:
        """False if too many changes wait, or a new key would be one too many."""
        has_room = key in self._values or len(self._values) < KEPT_LIMIT
        return has_room and len(self._waiting) < WAITING_LIMIT

    def change(self, update: Update, taken: Callable[[], None], failed: Callable[[bool], None]) -> None:
        self._waiting.append(_Waiting(replace_kept(update), taken, failed))
        self._go_on()

    def end(self) -> None:
        """The term is over."""
        self._has_ended = True
        is_unknown = self._is_swapping or self._is_unknown
        waiting, self._waiting = self._waiting, deque()
        for index, item in enumerate(waiting):
            item.failed(index == 0 and is_unknown)

    def _go_on(self) -> None:
        if self._is_swapping or self._has_ended or not self._waiting:
            return
        update = self._waiting[0].update
        state = self._state()
        number = _next_number(self._number, self._epoch)
        value = None if update.action is Action.DELETE else number + update.encode()
        changes = [
            Change(STATE_KEY, state, state),
            Change(KEPT, self._number, number),
            Change(KEPT_PREFIX + update.key, self._values.get(update.key), value),
        ]
        self._is_swapping = True
        self._registry.swap_later(changes, lambda swap: self._swapped(swap, number, value))

    def _swapped(self, swap: Swap, number: bytes, value: bytes | None) -> None:
        if self._has_ended:
            return
        if swap.outcome is Outcome.SWAPPED:
            self._taken(number, value)
        elif swap.outcome is Outcome.LOST:
            # An earlier attempt whose answer was lost, a change of voters meanwhile, or another master.
            self._registry.range_later(KEPT, lambda reading: self._settled(reading, number, value))
        else:
            self._is_unknown |= swap.outcome is Outcome.UNKNOWN
            self._clock.call_later(RETRY_S, self._retry)

    def _settled(self, reading: Reading | Unavailable, number: bytes, value: bytes | None) -> None:
        if self._has_ended:
            return
        if isinstance(reading, Unavailable):
            self._clock.call_later(RETRY_S, self._retry)
        elif dict(reading.items).get(KEPT) == number:
            self._taken(number, value)
        else:
            self._registry.get_later(STATE_KEY, self._read_state)

    def _read_state(self, reading: Reading | Unavailable) -> None:
        if self._has_ended:
            return
        if isinstance(reading, Reading) and (
            not reading.items or MasterState.decode(reading.items[0][1]).epoch != self._epoch
        ):
            self._lost()
        else:
            self._clock.call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._is_swapping = False
        self._go_on()

    def _taken(self, number: bytes, value: bytes | None) -> None:
        self._is_swapping = self._is_unknown = False
        self._number = number
        waiting = self._waiting.popleft()
        if value is None:
            self._values.pop(waiting.update.key, None)
        else:
            self._values[waiting.update.key] = value
        waiting.taken()
        self._go_on()


def _next_number(number: bytes | None, epoch: int) -> bytes:
    """Epoch and count: no two masters give the same."""
    count = int.from_bytes((number or b"")[4:], "big") + 1
    return epoch.to_bytes(4, "big") + count.to_bytes(8, "big")


def replace_kept(update: Update) -> Update:
    return update._replace(is_kept=True)
