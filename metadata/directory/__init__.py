"""The directory: the key-value map that a master publishes to every node (docs/directory.md)."""
