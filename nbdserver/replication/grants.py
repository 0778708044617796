"""How long a grant lasts, on both sides of it.

A grant is a replica's word that it obeys no one else for GRANT_S. The owner counts from when it sent what was answered,
the replica from when it answered, which is later; each adds what its clock may be wrong. So the owner always stops
first. Time is CLOCK_BOOTTIME, which goes on while a machine sleeps.
"""

GRANT_S = 1.0
BEAT_S = 0.25
CANDIDATE_S = 3.0
"""So much longer than a silent member is one kept that says that it is a candidate: it will win, or go on granting."""
FORWARD_S = 3.0
"""So long may a node that forwards clients and the one that serves them not hear from each other. Longer than a grant:
one that runs out makes clients wait, this costs them their connections."""
DRIFT = 0.02
"""By so much two clocks may differ in their rates, together."""

OWNER_COUNTS_S = GRANT_S * (1 - DRIFT)
REPLICA_COUNTS_S = GRANT_S * (1 + DRIFT)
FORWARDER_COUNTS_S = FORWARD_S * (1 - DRIFT)
SERVER_COUNTS_S = FORWARD_S * (1 + DRIFT)
