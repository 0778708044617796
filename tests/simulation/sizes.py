"""How large things are in a run: small enough that cleaning, checkpoints, eviction and recycling happen within seconds.

A seed draws its sizes as it draws its faults; a test that is after one rare thing *bends* the draw towards it.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from nbdserver.logdisk.disk import DiskSettings
from tests.simulation.registers import BLOCK_BYTES


@dataclass(frozen=True)
class Sizes:
    """What a seed draws beside its faults."""

    segment_bytes: int
    size_bytes: int
    areas: tuple[tuple[int, int], ...]  # (first block, blocks) that operations go to
    settings: DiskSettings
    lives: int
    wakes: int
    snapshots: float  # chance of a change of the snapshots, a wake
    weights: tuple[float, ...]  # of write, partial write, discard, large discard, read, extents, cache, flush


def draw_sizes(rng: random.Random) -> Sizes:
    """Small enough that everything happens, in every proportion."""
    if rng.random() < 0.25:
        return draw_hot_sizes(rng)
    blocks = rng.choice([64, 256, 1024, 1 << 18, 1 << 32])
    if blocks <= 1024:
        areas: tuple[tuple[int, int], ...] = ((0, blocks),)
    else:
        count = rng.choice([3, 150])
        areas = tuple((rng.randrange(blocks - 8), 1 + rng.randrange(8)) for _ in range(count))
    return Sizes(
        segment_bytes=rng.choice([64, 64, 128, 256, 1024]) << 10,
        size_bytes=blocks * BLOCK_BYTES,
        areas=areas,
        settings=DiskSettings(
            cache_bytes=rng.choice([0, 0, 4 << 20]),
            checkpoint_bytes=rng.choice([128, 512, 4096]) << 10,
            checkpoint_interval_s=rng.choice([0.05, 1.0, 30.0]),
        ),
        lives=rng.randrange(2, 6),
        wakes=rng.choice([10, 50, 150]),
        snapshots=rng.choice([0.0, 0.05, 0.3]),
        weights=(
            *(rng.choice([0.0, 1.0, 4.0]) for _ in range(3)),
            rng.choice([0.0, 0.3]),
            2.0,
            0.5,
            0.3,
            rng.choice([0.2, 2.0]),
        ),
    )


def draw_hot_sizes(rng: random.Random) -> Sizes:
    """Few blocks are written over and over: segments die within one checkpoint's time and are soon written again."""
    blocks = rng.choice([8, 24, 64])
    return Sizes(
        segment_bytes=64 << 10,
        size_bytes=blocks * BLOCK_BYTES,
        areas=((0, blocks),),
        settings=DiskSettings(
            cache_bytes=0, checkpoint_bytes=rng.choice([128, 512, 1024]) << 10, checkpoint_interval_s=30.0
        ),
        lives=4,
        wakes=rng.choice([50, 200]),
        snapshots=rng.choice([0.0, 0.02]),
        weights=(8.0, rng.choice([0.0, 1.0]), rng.choice([0.0, 1.0]), 0.0, rng.choice([1.0, 4.0]), 0.0, 0.0, 1.0),
    )


@dataclass(frozen=True)
class Bend:
    """What a test wants of a run that is otherwise drawn: it makes a rare thing frequent."""

    mix: Mapping[str, float] = field(default_factory=dict)
    hot: bool = False
    snapshots: float = 0.0  # chance of a change of the snapshots, a wake; 0: as drawn
    scrubs: float = 0.0  # chance that a scrub begins, a wake
    crash_at: str = ""  # a crash point at which every life ends that comes to it
