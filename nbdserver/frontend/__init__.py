"""The NBD side: sessions over connections, and the server that accepts them."""
