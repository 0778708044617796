"""What the system does: NBD sessions, volumes, the log-structured disk, the node, its API and command line."""
