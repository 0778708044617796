"""The cyclic garbage of the data process, whose collector never runs by itself (data.py says why)."""

import gc


def collect_garbage() -> None:
    """Free what only refers to itself; what is left is never looked at again."""
    gc.collect()
    gc.freeze()
