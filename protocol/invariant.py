"""`invariant()`: a check that stays under `python -O`. Input is checked at the edge; inside, what must hold is
asserted."""


class InvariantError(Exception):
    """A state that the code rules out. Whoever owns the state must stop using it."""


def invariant(holds: bool, message: str) -> None:
    """Raise InvariantError with `message` unless `holds`."""
    if not holds:
        raise InvariantError(message)
