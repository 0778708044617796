"""A lease, as its holder sees it: when to renew it, until when to trust it, when it is lost.

Theory: the registry counts a lease from when a renewal *arrived*; the holder counts from when it was *sent*, less what
its clock may be slow. So the holder always stops believing before the registry lets another in, however long the answer
took, and however long this machine slept.

Rules
- Time is asked for when a timer fires and when an answer comes; a timer alone proves nothing (it may fire late).
- A renewal that was answered after the lease had ended here does not bring it back.
- One renewal is under way at a time. It is sent again a third of the lease's time after the last one that was answered
  was sent, and earlier when there was no answer.

Known weakness: a clock that is slower than the registry's by more than `DRIFT` is not covered.
"""

from collections.abc import Callable

from metadata.seams import Clock, Timer

DRIFT = 0.01
"""The part of a lease's time that is given up for clocks that do not run alike."""
_RENEWALS_PER_TTL = 3
_RETRIES_PER_TTL = 12

Renew = Callable[[Callable[[float | None], None]], None]
"""Sends one renewal; answered once with the seconds it is good for from now, 0 if the lease is gone, None if no answer
came."""


class KeptLease:
    """`Lease`: renewed by itself until it is released or lost."""

    def __init__(
        self,
        clock: Clock,
        lease_id: int,
        ttl_s: float,
        sent_s: float,
        renew: Renew,
        ended: Callable[[bool], None],
    ) -> None:
        """Keep a lease that was granted for `ttl_s` by a request sent at `sent_s`.

        `ended(was_lost)` is called once, never from in here: its keys have to go.
        """
        self.id = lease_id
        self._clock = clock
        self._ttl_s = ttl_s
        self._renew = renew
        self._ended = ended
        self._until_s = sent_s + ttl_s * (1 - DRIFT)
        self._has_ended = False
        self._renewal: Timer | None = None
        self._expiry: Timer | None = None
        self._schedule(sent_s + ttl_s / _RENEWALS_PER_TTL)

    @property
    def valid_until_s(self) -> float:
        """On the Clock; 0 when it was lost or released."""
        return 0.0 if self._has_ended else self._until_s

    def release(self) -> None:
        """Give it up. Idempotent."""
        self._end(was_lost=False)

    def drop(self) -> None:
        """Forget it without a word: the registry is being closed."""
        self._has_ended = True
        self._cancel_timers()

    def _schedule(self, renew_at_s: float) -> None:
        self._cancel_timers()
        now_s = self._clock.now()
        self._renewal = self._clock.call_later(max(0.0, renew_at_s - now_s), self._renew_now)
        self._expiry = self._clock.call_later(max(0.0, self._until_s - now_s), self._expire)

    def _renew_now(self) -> None:
        self._renewal = None
        sent_s = self._clock.now()
        if sent_s >= self._until_s:
            self._end(was_lost=True)
            return
        self._renew(lambda good_for_s: self._renewed(sent_s, good_for_s))

    def _renewed(self, sent_s: float, good_for_s: float | None) -> None:
        if self._has_ended:
            return
        now_s = self._clock.now()
        if good_for_s == 0 or now_s >= self._until_s:
            self._end(was_lost=True)
        elif good_for_s is None:
            self._schedule(now_s + self._ttl_s / _RETRIES_PER_TTL)
        else:
            self._until_s = sent_s + min(good_for_s, self._ttl_s) * (1 - DRIFT)
            self._schedule(sent_s + self._ttl_s / _RENEWALS_PER_TTL)

    def _expire(self) -> None:
        if self._clock.now() >= self._until_s:
            self._end(was_lost=True)
        else:
            self._expiry = self._clock.call_later(self._until_s - self._clock.now(), self._expire)

    def _end(self, was_lost: bool) -> None:
        if self._has_ended:
            return
        self.drop()
        self._clock.call_soon(lambda: self._ended(was_lost))

    def _cancel_timers(self) -> None:
        for timer in (self._renewal, self._expiry):
            if timer:
                timer.cancel()
        self._renewal = self._expiry = None
