"""What a node wants to be published while another one is the master: asked for until it is seen in the own copy.

Theory: the answer to a report is the published update itself, which carries its reporter and number. So nothing is
acknowledged twice, and a lost answer is brought by the same retransmission as every other message.

Rules
- Numbers rise. A master publishes a node's reports only in the order of their numbers; one that a later one has
  overtaken was not published, and gets a new number.
- A report for a key replaces a waiting one for the same key that nobody waits for.
- Confirmed means: seen, and the master says that its sequence is confirmed, while it is still in this copy's history.
- What nobody waits for is what a node says of itself: it is said again when it has vanished with its master, until the
  node says something else or somebody else has changed the key. SAID_LIMIT keys; the oldest are forgotten.
- WAITING_LIMIT at once; after PATIENCE_S the answer is *unknown*, or *not done* if it was never sent.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from metadata.directory.history import History
from metadata.directory.map import DirectoryMap
from protocol.directory import NOWHERE, Confirm, Position, Report, Update

INFINITY = float("inf")
RETRY_S = 0.2
RETRY_LIMIT_S = 2.0
WAITING_LIMIT = 1024
SAID_LIMIT = 1024
PATIENCE_S = 30.0
SLOW_TRIES = 5  # some seconds: the registry may take so long, and others are published meanwhile
OVERTAKEN_TRIES = 10  # some fifteen seconds: this copy may never have shown what has overtaken it


class Answer(Enum):
    """What became of a publication."""

    CONFIRMED = "confirmed"
    NOT_DONE = "not done"
    UNKNOWN = "unknown"


Done = Callable[[Answer], None]


@dataclass
class Waiting:
    """A publication that is not answered yet."""

    update: Update
    confirm: Confirm
    done: Done | None
    until_s: float
    due_at_s: float
    tries: int = 0
    seen: Position = NOWHERE
    """Where this node's copy has it."""

    @property
    def is_slow(self) -> bool:
        """True if it may be on its way through the registry, while later ones are published."""
        return self.confirm is Confirm.REGISTRY and self.tries < SLOW_TRIES

    def answer(self, answer: Answer) -> None:
        """Tell who waits; what was said to a master may have been done, whatever became of it later."""
        if self.done is not None:
            self.done(Answer.UNKNOWN if answer is Answer.NOT_DONE and self.tries else answer)


class Reports:
    """The publications that this node has asked the master for."""

    def __init__(self, me: int, incarnation: int) -> None:
        self._me = me
        self._number = incarnation << 32
        self._waiting: dict[int, Waiting] = {}
        self._due_at_s: float | None = None  # of the earliest that waits; None: something has changed
        self._said: dict[str, Waiting] = {}
        """By key, what nobody waits for and this copy has had."""

    def __len__(self) -> int:
        return len(self._waiting)

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def add(self, update: Update, confirm: Confirm, done: Done | None, now_s: float) -> None:
        """Ask for it from now on."""
        self._said.pop(update.key, None)
        self._due_at_s = None
        if done is None:
            for number, waiting in list(self._waiting.items()):
                if waiting.done is None and waiting.update.key == update.key:
                    del self._waiting[number]
        if len(self._waiting) >= WAITING_LIMIT:
            if done is not None:
                done(Answer.NOT_DONE)
            return
        # What nobody waits for is true until it is replaced: it is asked for for ever.
        until_s = now_s + PATIENCE_S if done is not None else float("inf")
        self._put(Waiting(update, confirm, done, until_s, now_s))

    def _put(self, waiting: Waiting) -> None:
        number = self.next_number()
        waiting.update = waiting.update._replace(origin=self._me, number=number)
        waiting.seen = NOWHERE
        self._waiting[number] = waiting
        self._due_at_s = None

    def _renumber(self, numbers: Iterable[int]) -> None:
        """These were overtaken by one that was published: the master does not take their numbers any more.

        All from the first of them on get new ones, so that the last of two for one key stays the last.
        """
        first = min(numbers, default=0)
        if first:
            for number, waiting in sorted(self._waiting.items()):
                if number >= first and waiting.seen == NOWHERE:
                    del self._waiting[number]
                    waiting.due_at_s = 0.0
                    self._put(waiting)

    def seen(self, position: Position, update: Update, now_s: float) -> None:
        """This node's copy has taken an update that it reported itself."""
        if update.origin != self._me:
            return
        waiting = self._waiting.get(update.number)
        if waiting is not None:
            waiting.seen = position
        self._renumber(self._overtaken(update.number))

    def _overtaken(self, newest: int) -> list[int]:
        """What was not published, because `newest` was."""
        return [
            number
            for number, one in self._waiting.items()
            if number < newest and one.seen == NOWHERE and not one.is_slow
        ]

    def said(self, update: Update, position: Position) -> None:
        """This node has published it itself, as master, and nobody waits for it."""
        self._keep(Waiting(update, Confirm.NONE, None, float("inf"), 0.0, seen=position))

    def _keep(self, waiting: Waiting) -> None:
        update = waiting.update
        self._said.pop(update.key, None)
        if not update.expires_ms:  # what passes is not said again
            self._said[update.key] = waiting
            if len(self._said) > SAID_LIMIT:
                del self._said[next(iter(self._said))]

    def replaced(self, directory: DirectoryMap, history: History) -> None:
        """The copy was replaced by a snapshot, or follows another history: what of ours is in it?"""
        for key, waiting in list(self._said.items()):
            entry = directory.entry(key)
            if entry is not None and (entry.update.origin, entry.update.number) == (self._me, waiting.update.number):
                waiting.seen = entry.position
                continue
            del self._said[key]
            is_superseded = entry is not None and entry.position > waiting.seen
            if not is_superseded and not history.has(waiting.seen):
                self._put(waiting)
        newest = max((one.update.number for one in directory.entries() if one.update.origin == self._me), default=0)
        for number, waiting in sorted(self._waiting.items()):
            entry = directory.entry(waiting.update.key)
            if entry is not None and (entry.update.origin, entry.update.number) == (self._me, number):
                waiting.seen = entry.position
            elif not history.has(waiting.seen):
                waiting.seen = NOWHERE
        self._renumber(self._overtaken(newest))

    def confirm(self, history: History, confirmed: int) -> None:
        """Answer what has been seen and needs no more than that, or is confirmed in this history, the master's."""
        for number, waiting in list(self._waiting.items()):
            is_enough = waiting.confirm is not Confirm.SITE or waiting.seen.sequence <= confirmed
            if is_enough and history.has(waiting.seen):
                del self._waiting[number]
                self._due_at_s = None
                waiting.answer(Answer.CONFIRMED)
                if waiting.done is None:
                    self._keep(waiting)

    @property
    def due_at_s(self) -> float:
        """When `due` has something to do again; infinity if never."""
        if self._due_at_s is None:
            self._due_at_s = min((min(one.until_s, one.due_at_s) for one in self._waiting.values()), default=INFINITY)
        return self._due_at_s

    def due(self, epoch: int, now_s: float) -> list[Report]:
        """What to say to the master of `epoch` (0: there is none) now."""
        if now_s < self.due_at_s:
            return []
        self._due_at_s = None
        for number, waiting in list(self._waiting.items()):
            if waiting.until_s <= now_s:
                del self._waiting[number]
                waiting.answer(Answer.NOT_DONE)
        due = [one for one in self._waiting.values() if one.due_at_s <= now_s]
        if epoch:
            in_vain = [one for one in due if one.seen == NOWHERE and one.tries % OVERTAKEN_TRIES == OVERTAKEN_TRIES - 1]
            self._renumber([one.update.number for one in in_vain])
        reports = []
        for _, waiting in sorted(self._waiting.items()):
            if waiting.due_at_s <= now_s:
                waiting.due_at_s = now_s + min(RETRY_S * (1 << min(waiting.tries, 10)), RETRY_LIMIT_S)
                if epoch and waiting.seen == NOWHERE:
                    waiting.tries += 1
                    reports.append(Report(epoch, waiting.confirm, waiting.update.encode()))
        return reports

    def take_all(self) -> list[Waiting]:
        """This node is the master now: it publishes what its copy does not have itself."""
        waiting, self._waiting, self._due_at_s = self._waiting, {}, None
        return [one for _, one in sorted(waiting.items())]

    def end(self) -> None:
        """The node ends."""
        for waiting in self._waiting.values():
            waiting.answer(Answer.NOT_DONE)
        self._waiting.clear()
        self._due_at_s = None
