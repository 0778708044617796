"""What is held of a registry that others change too: read at once, and swapped until it is known what became of it."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from metadata import registry_mirror
from metadata.registry import RegistryError
from metadata.registry_calls import LIFE_KEY, Change, Event, Outcome, Reading, Swap, Unavailable
from metadata.registry_mirror import RegistryMirror
from nbdserver.host.clock import HostClock


class Etcd:
    """A registry whose next answers are what `script` says: an outcome, or "made" for one that was made without an
    answer. Its watch brings nothing by itself."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.revision = 1
        self.script: list[Outcome | str] = []
        self.reads: list[Reading | Unavailable] = []
        self.tell: Callable[[Event], None] = lambda event: None
        self.swaps = 0

    def watch(self, prefix: str, changed: Callable[[Event], None], after: int | None = None) -> Any:
        assert prefix == ""
        self.tell = changed
        return self

    def cancel(self) -> None:
        self.tell = lambda event: None

    def reset(self) -> None:
        self.tell(Event(self.revision, True, tuple(sorted(self.values.items()))))

    def swap_later(self, changes: Sequence[Change], done: Callable[[Swap], None]) -> None:
        self.swaps += 1
        told = self.script.pop(0) if self.script else Outcome.SWAPPED
        is_lost = any(self.values.get(change.key) != change.expected for change in changes)
        if told in (Outcome.SWAPPED, "made") and not is_lost:
            self.revision += 1
            for change in changes:
                if change.new is None:
                    self.values.pop(change.key, None)
                else:
                    self.values[change.key] = change.new
        outcome = Outcome.UNKNOWN if isinstance(told, str) else told
        if outcome is Outcome.SWAPPED and is_lost:
            outcome = Outcome.LOST
        answer = Swap(outcome, self.revision if outcome is Outcome.SWAPPED else 0, "cut off")
        asyncio.get_running_loop().call_soon(done, answer)

    def get_later(self, key: str, done: Callable[[Reading | Unavailable], None]) -> None:
        items = tuple((key, self.values[key]) for key in (key,) if key in self.values)
        answer = self.reads.pop(0) if self.reads else Reading(self.revision, items)
        asyncio.get_running_loop().call_soon(done, answer)


def with_mirror(work: Callable[[Etcd, RegistryMirror, list[list[str]]], Any]) -> Any:
    """Run `work(etcd, mirror, heard)` on a loop."""

    async def run() -> Any:
        etcd = Etcd()
        heard: list[list[str]] = []
        clock = HostClock(asyncio.get_running_loop())
        mirror = RegistryMirror(etcd, clock, lambda keys: heard.append(sorted(keys)))  # type: ignore[arg-type]
        return await work(etcd, mirror, heard)

    return asyncio.run(run())


def test_nothing_is_known_before_the_watch_has_spoken_and_then_what_it_said() -> None:
    async def work(etcd: Etcd, mirror: RegistryMirror, heard: list[list[str]]) -> None:
        assert (mirror.is_known, mirror.range("")) == (False, [])
        etcd.values = {"family/b": b"2", "family/a": b"1", "volume/x": b"b/1"}
        etcd.reset()
        assert mirror.is_known
        assert mirror.range("family/") == [("family/a", b"1"), ("family/b", b"2")]
        etcd.tell(Event(2, False, (("family/a", None), ("family/c", b"3"))))
        assert (mirror.get("family/a"), mirror.get("family/c")) == (None, b"3")
        etcd.tell(Event(9, True, (("family/c", b"4"),)))
        assert mirror.range("") == [("family/c", b"4")]
        assert heard[1:] == [["family/a", "family/c"], ["family/b", "family/c", "volume/x"]]

    with_mirror(work)


def test_what_was_swapped_here_is_read_at_once_and_what_came_later_after_it() -> None:
    async def work(etcd: Etcd, mirror: RegistryMirror, heard: list[list[str]]) -> None:
        etcd.values = {"a": b"1", "b": b"1"}
        etcd.reset()
        assert await mirror.compare_and_swap([("a", b"1", b"2"), ("b", b"1", None)])
        assert mirror.range("") == [("a", b"2")]
        etcd.tell(Event(1, False, (("c", b"1"),)))  # older than the swap
        assert mirror.range("") == [("a", b"2"), ("c", b"1")]
        etcd.tell(Event(3, False, (("a", b"3"), ("b", b"9"))))  # another's, after it
        assert mirror.range("") == [("a", b"3"), ("b", b"9"), ("c", b"1")]

    with_mirror(work)


def test_what_was_swapped_in_a_life_of_the_registry_that_is_over_is_not_read_any_more() -> None:
    """It was put back from a backup, where revisions are lower, and made whole without what was swapped last."""

    async def work(etcd: Etcd, mirror: RegistryMirror, heard: list[list[str]]) -> None:
        etcd.values = {"a": b"1"}
        etcd.revision = 1000
        etcd.reset()
        assert await mirror.compare_and_swap([("a", b"1", b"2"), ("b", None, b"1")])
        assert mirror.range("") == [("a", b"2"), ("b", b"1")]
        etcd.values = {"a": b"1", LIFE_KEY: b"1"}
        etcd.revision = 600
        etcd.reset()
        assert mirror.range("") == [("a", b"1"), (LIFE_KEY, b"1")]
        assert await mirror.compare_and_swap([("a", b"1", b"3")])
        etcd.tell(Event(600, True, (("a", b"1"), (LIFE_KEY, b"1"))))  # in the same life: what is ours is newer
        assert mirror.get("a") == b"3"

    with_mirror(work)


def test_a_swap_against_something_old_is_lost() -> None:
    async def work(etcd: Etcd, mirror: RegistryMirror, heard: list[list[str]]) -> None:
        etcd.values = {"a": b"1"}
        etcd.reset()
        etcd.values = {"a": b"2"}
        assert not await mirror.compare_and_swap([("a", b"1", b"3")])
        assert etcd.values == {"a": b"2"}

    with_mirror(work)


@pytest.mark.parametrize(
    ("script", "made"),
    [
        (["made", Outcome.SWAPPED], True),  # the second try finds the first one's value
        ([Outcome.UNKNOWN, Outcome.SWAPPED], True),  # the first one was not made
        (["made", Outcome.NOT_DONE, Outcome.SWAPPED], True),
        ([Outcome.UNKNOWN, Outcome.LOST], False),  # another was faster
    ],
)
def test_a_swap_without_an_answer_is_made_again_until_it_is_known(
    script: list[Outcome | str], made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_mirror, "AGAIN_S", 0.0)
    tries = len(script)

    async def work(etcd: Etcd, mirror: RegistryMirror, heard: list[list[str]]) -> None:
        etcd.values = {"a": b"1"}
        etcd.reset()
        etcd.script = list(script)
        etcd.reads = [Unavailable("no leader")]
        assert await mirror.compare_and_swap([("a", b"1", b"2")]) is made
        assert (mirror.get("a"), etcd.swaps) == (b"2" if made else b"1", tries)

    with_mirror(work)


def test_a_registry_that_does_not_answer_is_an_error_that_says_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_mirror, "AGAIN_S", 0.0)
    monkeypatch.setattr(registry_mirror, "SETTLE_S", 0.01)

    async def work(etcd: Etcd, mirror: RegistryMirror, heard: list[list[str]]) -> None:
        etcd.reset()
        etcd.script = [Outcome.NOT_DONE]
        with pytest.raises(RegistryError, match="cannot be changed now, nothing is: cut off"):
            await mirror.compare_and_swap([("a", None, b"2")])
        etcd.script = [Outcome.UNKNOWN] * 100_000
        with pytest.raises(RegistryError, match="not known whether"):
            await mirror.compare_and_swap([("a", None, b"2")])

    with_mirror(work)
