"""A process that serves a MemoryDevice: the NBD front end alone, over real sockets.

`python -m tests.interop.serve_memory SIZE_BYTES inline|deferring ADDRESS...` prints "ready:" when it accepts clients.
"""

import asyncio
import sys

from nbdserver.frontend.server import Server
from nbdserver.host.clock import HostClock
from nbdserver.host.network import SocketNetwork
from nbdserver.volume.export import Export, Exports
from tests.unit.memory_device import MemoryDevice


async def serve(size_bytes: int, deferring: bool, addresses: list[str]) -> None:
    loop = asyncio.get_running_loop()
    clock = HostClock(loop)
    exports = Exports()
    exports.add(Export("disk", MemoryDevice(size_bytes, clock.call_soon, deferring), description="in memory"))
    server = Server(SocketNetwork(loop), clock, exports, lambda kind, fields: None)
    for address in addresses:
        server.listen(address)
    print("ready:", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2] == "deferring", sys.argv[3:]))
