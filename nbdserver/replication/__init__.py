"""Replicated volumes: the owner orders, replicas follow (docs/replication.md)."""
