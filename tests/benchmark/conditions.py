"""What all servers of a run are put under: a size, and if wanted a limit of memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .memory_group import LEAST_BYTES, MemoryGroup
from .processes import BenchmarkError
from .targets import Target


@dataclass(frozen=True)
class Conditions:
    """Settings that a search found hold for the conditions it was made under."""

    size_bytes: int
    memory_bytes: int = 0
    """Of each server and its page cache; 0 is no limit."""

    def __post_init__(self) -> None:
        if self.memory_bytes and self.memory_bytes < LEAST_BYTES:
            raise BenchmarkError(f"a server needs a --memory of at least {LEAST_BYTES >> 20}M")

    @property
    def settings_file(self) -> str:
        """Where settings found under such conditions are kept."""
        return "peer-settings-limited.json" if self.memory_bytes else "peer-settings.json"

    @contextmanager
    def put_on(self, servers: list[Target]) -> Iterator[None]:
        """Have the servers start under them; end them before this ends."""
        try:
            for server in servers:
                if self.memory_bytes:
                    server.memory = MemoryGroup(server.name, self.memory_bytes)
            yield
        finally:
            for server in servers:
                if server.memory:
                    server.memory.remove()
