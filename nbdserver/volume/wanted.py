"""How a client wants a volume of the cluster that is not served where it is."""

from enum import StrEnum


class Wanted(StrEnum):
    """Said by the process that has the client to its control process, which finds who serves the volume."""

    ANEW = "anew"
    """It comes: the volume may be served by this node from now on, if nobody uses it where it is."""
    AGAIN = "again"
    """It goes on, wherever the volume is served. If it is nowhere, whoever can takes it over."""
    SOON = "soon"
    """The same, but who has served it until now answers, and may be moving it: nobody takes it over as yet."""
