"""The HTTP API: FastAPI over the node's control process, and the metrics."""
