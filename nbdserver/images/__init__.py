"""Images of volumes, saved and loaded through the node as an NBD client."""
