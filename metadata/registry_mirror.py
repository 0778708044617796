"""What a registry on several nodes holds, kept in memory: read at once, changed by swaps that are waited for.

Theory: one watch brings everything below a prefix, in the order of its revisions, so what is held is what the registry
was at one moment, and soon what it is. A change is decided on what is held and made only if that is still there: who
decides on something old loses. What this mirror has changed itself is read from then on, also before the watch has
brought it.

Rules
- A swap without an answer is made again until it is known what became of it (registry_calls.py says why that is enough:
  every value that is swapped carries a number that only rises, or is made under a name that is used once).
- Before the first word of the watch nothing is known, which is not the same as empty: `is_known`.
- Revisions are compared within one life of the registry. What was changed here in a life that is over is what the new
  life shows of it, which may be an earlier state.
"""

import asyncio
from collections.abc import Callable, Sequence

from metadata.registry import RegistryError
from metadata.registry_calls import LIFE_KEY, Change, Event, Outcome, Reading, Swap, Unavailable
from metadata.seams import Clock, Registry
from metadata.waiting import answer_of

AGAIN_S = 0.2
SETTLE_S = 20.0
"""So long it is tried to find out what became of a swap."""


class RegistryMirror:
    """`HeldRegistry` over a Registry that others change too."""

    def __init__(self, registry: Registry, clock: Clock, changed: Callable[[Sequence[str]], None]) -> None:
        """`changed(keys)` is called after what is held has changed at the registry; all keys after it was read anew."""
        self.is_known = False
        self._registry = registry
        self._clock = clock
        self._changed = changed
        self._items: dict[str, bytes] = {}
        self._revision = 0
        self._ours: dict[str, tuple[int, bytes | None]] = {}  # (revision, value) that the watch has not brought yet
        self._watch = registry.watch("", self._heard)

    def close(self) -> None:
        """Hear nothing any more; the registry is the caller's."""
        self._watch.cancel()

    def get(self, key: str) -> bytes | None:
        """See `HeldRegistry`; None too if nothing is known."""
        return self._ours[key][1] if key in self._ours else self._items.get(key)

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        """See `HeldRegistry`; empty if nothing is known."""
        held: dict[str, bytes | None] = {**self._items, **{key: value for key, (_, value) in self._ours.items()}}
        return sorted((key, value) for key, value in held.items() if value is not None and key.startswith(prefix))

    async def compare_and_swap(self, changes: Sequence[tuple[str, bytes | None, bytes | None]]) -> bool:
        """See `HeldRegistry`. RegistryError if the registry does not answer: nothing is changed, or (it says so) it is
        not known whether."""
        wanted = [Change(*change) for change in changes]
        is_open = False  # whether an earlier try may have been made, or may yet be
        give_up_s = self._clock.now() + SETTLE_S
        while True:
            answer = await self._swap(wanted)
            if answer.outcome is Outcome.SWAPPED:
                self._wrote(answer.revision, wanted)
                return True
            if answer.outcome is Outcome.LOST:
                return is_open and await self._is_made(wanted, give_up_s)
            is_open |= answer.outcome is Outcome.UNKNOWN
            if not is_open:
                raise RegistryError(f"the cluster's registry cannot be changed now, nothing is: {answer.reason}")
            self._refuse_late(give_up_s, answer.reason)
            await asyncio.sleep(AGAIN_S)

    async def _is_made(self, wanted: Sequence[Change], give_up_s: float) -> bool:
        """Whether a swap without an answer was made, now that it can no longer be."""
        key = next(change.key for change in wanted if not change.is_check)
        new = next(change.new for change in wanted if not change.is_check)
        while True:
            answer = await self._get(key)
            if isinstance(answer, Reading):
                is_made = (answer.items[0][1] if answer.items else None) == new
                if is_made:
                    self._wrote(answer.revision, wanted)
                return is_made
            self._refuse_late(give_up_s, answer.reason)
            await asyncio.sleep(AGAIN_S)

    def _refuse_late(self, give_up_s: float, reason: str) -> None:
        if self._clock.now() > give_up_s:
            raise RegistryError(
                f"it is not known whether the cluster's registry was changed ({reason}); look before you try again"
            )

    async def _swap(self, changes: Sequence[Change]) -> Swap:
        return await answer_of(lambda done: self._registry.swap_later(changes, done))

    async def _get(self, key: str) -> Reading | Unavailable:
        return await answer_of(lambda done: self._registry.get_later(key, done))

    def _wrote(self, revision: int, changes: Sequence[Change]) -> None:
        if revision > self._revision:
            self._ours |= {change.key: (revision, change.new) for change in changes}

    def _heard(self, event: Event) -> None:
        keys = [key for key, _ in event.changes]
        life = self._items.get(LIFE_KEY)
        if event.is_reset:
            keys = list({*keys, *self._items})
            self._items.clear()
        for key, value in event.changes:
            if value is None:
                self._items.pop(key, None)
            else:
                self._items[key] = value
        self._revision = event.revision
        if self.is_known and self._items.get(LIFE_KEY) != life:
            self._ours.clear()
        self._ours = {key: ours for key, ours in self._ours.items() if ours[0] > event.revision}
        self.is_known = True
        self._changed(keys)
