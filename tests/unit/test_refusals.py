"""Refused streams between nodes: told of when they are news."""

from nbdserver.node.refusals import AGAIN_S, KEPT, Refusals
from tests.unit.session_rig import HandClock


def test_the_same_is_told_once_in_a_while_whatever_port_it_came_from() -> None:
    clock, told = HandClock(), list[tuple[str, str]]()
    refusals = Refusals(clock, lambda host, reason: told.append((host, reason)))
    for port in range(40000, 40100):
        refusals.note(f"192.0.2.1:{port}", "TLS: no certificate")
        refusals.note(f"[2001:db8::1]:{port}", "TLS: no certificate")
    refusals.note("192.0.2.1:1", "TLS: another CA")
    news = [("192.0.2.1", "TLS: no certificate"), ("[2001:db8::1]", "TLS: no certificate")]
    assert told == [*news, ("192.0.2.1", "TLS: another CA")]
    clock.advance(AGAIN_S)
    refusals.note("192.0.2.1:1", "TLS: no certificate")
    assert told[3:] == news[:1]
    assert refusals.within(AGAIN_S) == tuple(news[:1])
    assert len(refusals.within(2 * AGAIN_S)) == 4


def test_few_are_kept_of_many() -> None:
    refusals = Refusals(HandClock(), lambda host, reason: None)
    for number in range(2 * KEPT):
        refusals.note(f"192.0.2.{number}:1", "TLS")
    assert len(refusals.within(AGAIN_S)) == KEPT
