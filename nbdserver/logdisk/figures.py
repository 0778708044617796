"""What a log disk says of itself: its state for people, counters for metrics. Nothing decides by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.disk import BLOCK_BYTES

if TYPE_CHECKING:
    from nbdserver.logdisk.disk import LogDisk


def status(disk: LogDisk) -> dict[str, object]:
    """What an operator wants to know, in plain values."""
    maps, pool = disk.maps, disk.pool
    in_use = len(maps.segments.in_use)
    return {
        "size_bytes": sum(maps.tree.layers[layer].row.size_bytes for layer in maps.tree.heads.values()),
        "volumes": len(maps.tree.heads),
        "layers": len(maps.tree.layers),
        "state": "failed" if disk.failure else "full" if pool.full else "open",
        "failure": disk.failure,
        "generation": disk.opened.generation,
        "epoch": disk.opened.epoch,
        "txid": disk.log.txid,
        "live_bytes": maps.live_blocks * BLOCK_BYTES,
        "allocated_bytes": pool.budget.used_bytes,
        "filled_bytes": disk.filled_bytes,
        "full": pool.full,
        "segments": in_use,
        "spare_segments": len(pool.spare),
        "segment_bytes": pool.segment_bytes,
        "pending_holes": len(maps.holes),
        "unsynced_records": disk.log.lsn - disk.log.durable_lsn,
        "damaged": disk.damage.listed(),
    }


def counters(disk: LogDisk) -> dict[str, int]:
    """Numbers that only rise, but for those that end in `_now`."""
    maps, log, pool = disk.maps, disk.log, disk.pool
    return {
        "logical_map_updates": maps.logical_updates,
        "middle_map_updates": maps.middle_updates,
        "map_page_loads": maps.logical.loads + maps.middle.loads,
        "map_page_evictions": maps.logical.evictions + maps.middle.evictions,
        "map_pages_now": maps.logical.resident_pages + maps.middle.resident_pages,
        "map_values_written": disk.checkpointer.values_written,
        "checkpoints": disk.checkpointer.count,
        "map_pages_derived": maps.logical.derived,
        "layers_now": len(maps.tree.layers),
        "tree_changes": disk.tree_changes.count,
        "layers_dropped": disk.tree_work.layers_dropped,
        "layers_merged": disk.tree_work.layers_merged,
        "layers_blocks_freed": disk.tree_work.blocks_freed,
        "layers_removable_now": len(maps.tree.removable),
        "batches": disk.appending.batches,
        "batch_blocks": disk.appending.batch_blocks,
        "discards": disk.appending.discards,
        "blocks_read": disk.blocks_read,
        "log_bytes_appended": log.appended_bytes,
        "log_records": log.records,
        "syncs": log.syncs,
        "sync_requests": log.sync_requests,
        "cold_reads": disk.slow_path.cold_reads,
        "slow_operations_now": disk.slow_path.under_way,
        "cleaner_blocks_moved": disk.cleaner.blocks_moved,
        "cleaner_blocks_skipped": disk.cleaner.blocks_skipped,
        "cleaner_segments": disk.cleaner.segments_cleaned,
        "segments_created": pool.created,
        "segments_recycled": pool.recycled,
        "segments_unlinked": pool.unlinked,
        "live_blocks_now": maps.live_blocks,
        "repaired_blocks": disk.repairs.repaired_blocks,
        "damaged_blocks_now": len(disk.damage),
    }
