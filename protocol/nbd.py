"""The NBD protocol's constants and frames, each declared once.

Theory: a frame is a `construct` declaration named after the message in the protocol's specification
(NetworkBlockDevice/nbd, doc/proto.md, with the EXTENDED_HEADERS extension). What is parsed or packed once a
connection goes through construct; what is parsed or packed once a request goes through the `struct.Struct` that
`derive` makes of the same declaration, written in capitals: `Request` is the declaration, `REQUEST` its fast twin.

```
server: Greeting            client: ClientFlags
client: OptionHeader data   server: OptionReplyHeader data, ... until ACK or an error
client: Request [payload]   server: SimpleReply [data]            | after EXPORT_NAME or GO; the compact style
client: Request [payload]   server: StructuredReply payload, ...  | structured replies
client: ExtendedRequest ... server: ExtendedReply payload, ...    | extended headers
```

Rules: big-endian everywhere. Lengths that a peer sends are bounded by whoever reads the frame, not here. Members of
the enums are ints; the hot path binds them to plain ints first.
"""

from enum import IntEnum, IntFlag

from construct import (
    Array,
    Const,
    GreedyBytes,
    GreedyRange,
    Int16ub,
    Int32ub,
    Int64ub,
    Prefixed,
    PrefixedArray,
    Struct,
    Terminated,
    this,
)

from protocol.layout import derive, join

GREETING_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

STRING_LIMIT_BYTES = 4096  # the protocol's bound on every string
PADDING_BYTES = 124  # zeroes after the answer to EXPORT_NAME, unless NO_ZEROES was agreed
MINIMUM_BLOCK_BYTES = 1
PREFERRED_BLOCK_BYTES = 4096
MAXIMUM_PAYLOAD_BYTES = 32 << 20  # "any payload not exceeding 2^25 bytes" is what clients rely on


class HandshakeFlag(IntFlag):
    """Server's flags in the greeting and client's in its answer (the same bits)."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client asks for during the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


OPTION_REPLY_IS_ERROR = 1 << 31
"""Set in the types of option replies that are errors."""


class OptionReply(IntEnum):
    """Types of option replies."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = OPTION_REPLY_IS_ERROR + 1
    ERR_POLICY = OPTION_REPLY_IS_ERROR + 2
    ERR_INVALID = OPTION_REPLY_IS_ERROR + 3
    ERR_PLATFORM = OPTION_REPLY_IS_ERROR + 4
    ERR_TLS_REQD = OPTION_REPLY_IS_ERROR + 5
    ERR_UNKNOWN = OPTION_REPLY_IS_ERROR + 6
    ERR_SHUTDOWN = OPTION_REPLY_IS_ERROR + 7
    ERR_BLOCK_SIZE_REQD = OPTION_REPLY_IS_ERROR + 8
    ERR_TOO_BIG = OPTION_REPLY_IS_ERROR + 9
    ERR_EXT_HEADER_REQD = OPTION_REPLY_IS_ERROR + 10


class Info(IntEnum):
    """Types of information items in INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do, as told at the end of the handshake."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """Types of requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    """Flags of a structured or extended reply chunk."""

    DONE = 1 << 0


class Chunk(IntEnum):
    """Types of structured and extended reply chunks; errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class ReplyError(IntEnum):
    """The errno values that may stand in a reply."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ExtentFlag(IntFlag):
    """States of an extent in base:allocation."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class BitmapFlag(IntFlag):
    """States of an extent in qemu:dirty-bitmap."""

    DIRTY = 1 << 0


# --- handshake ---

Greeting = Struct(
    "magic" / Const(GREETING_MAGIC, Int64ub),
    "option_magic" / Const(OPTION_MAGIC, Int64ub),
    "flags" / Int16ub,
)
ClientFlags = Struct("flags" / Int32ub)
OptionHeader = Struct("magic" / Const(OPTION_MAGIC, Int64ub), "option" / Int32ub, "length" / Int32ub)
OptionReplyHeader = Struct(
    "magic" / Const(OPTION_REPLY_MAGIC, Int64ub), "option" / Int32ub, "type" / Int32ub, "length" / Int32ub
)
ExportNameReply = Struct("size_bytes" / Int64ub, "flags" / Int16ub)
ExportNameReplyPadded = Struct("size_bytes" / Int64ub, "flags" / Int16ub, "padding" / Const(bytes(PADDING_BYTES)))

_String = Prefixed(Int32ub, GreedyBytes)
ServerReply = Struct("name" / _String, "description" / GreedyBytes)
InfoRequest = Struct("name" / _String, "wanted" / PrefixedArray(Int16ub, Int16ub), Terminated)
InfoExport = Struct("type" / Const(int(Info.EXPORT), Int16ub), "size_bytes" / Int64ub, "flags" / Int16ub)
InfoName = Struct("type" / Const(int(Info.NAME), Int16ub), "name" / GreedyBytes)
InfoDescription = Struct("type" / Const(int(Info.DESCRIPTION), Int16ub), "description" / GreedyBytes)
InfoBlockSize = Struct(
    "type" / Const(int(Info.BLOCK_SIZE), Int16ub),
    "minimum_bytes" / Int32ub,
    "preferred_bytes" / Int32ub,
    "maximum_payload_bytes" / Int32ub,
)
MetaContextRequest = Struct("name" / _String, "queries" / PrefixedArray(Int32ub, _String), Terminated)
MetaContextReplyStart = Struct("context_id" / Int32ub)
MetaContextReply = Struct(*MetaContextReplyStart.subcons, "name" / GreedyBytes)

# --- transmission ---

Request = Struct(
    "magic" / Const(REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "command" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int32ub,
)
ExtendedRequest = Struct(
    "magic" / Const(EXTENDED_REQUEST_MAGIC, Int32ub),
    "flags" / Int16ub,
    "command" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int64ub,
)
SimpleReply = Struct("magic" / Const(SIMPLE_REPLY_MAGIC, Int32ub), "error" / Int32ub, "cookie" / Int64ub)
StructuredReply = Struct(
    "magic" / Const(STRUCTURED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "length" / Int32ub,
)
ExtendedReply = Struct(
    "magic" / Const(EXTENDED_REPLY_MAGIC, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "length" / Int64ub,
)

# A chunk's header and the fixed start of its payload in one, because they are always packed together.
StructuredData = Struct(*StructuredReply.subcons, "data_offset" / Int64ub)
ExtendedData = Struct(*ExtendedReply.subcons, "data_offset" / Int64ub)

OffsetData = Struct("offset" / Int64ub, "data" / GreedyBytes)
OffsetHole = Struct("offset" / Int64ub, "hole_bytes" / Int32ub)
Extent = Struct("length" / Int32ub, "flags" / Int32ub)
ExtentExt = Struct("length" / Int64ub, "flags" / Int64ub)
BlockStatusStart = Struct("context_id" / Int32ub)
BlockStatusExtStart = Struct("context_id" / Int32ub, "count" / Int32ub)
BlockStatus = Struct(*BlockStatusStart.subcons, "extents" / GreedyRange(Extent))
BlockStatusExt = Struct(*BlockStatusExtStart.subcons, "extents" / Array(this.count, ExtentExt), Terminated)
Error = Struct("error" / Int32ub, "message" / Prefixed(Int16ub, GreedyBytes))
ErrorOffset = Struct(*Error.subcons, "offset" / Int64ub)
BlockStatusPayload = Struct("length" / Int64ub, "context_ids" / GreedyRange(Int32ub), Terminated)

# --- derived, for what is parsed or packed once a request ---

OPTION_HEADER = derive(OptionHeader)
OPTION_REPLY_HEADER = derive(OptionReplyHeader)
META_CONTEXT_REPLY_START = derive(MetaContextReplyStart)
CLIENT_FLAGS = derive(ClientFlags)
REQUEST = derive(Request)
EXTENDED_REQUEST = derive(ExtendedRequest)
SIMPLE_REPLY = derive(SimpleReply)
STRUCTURED_REPLY = derive(StructuredReply)
EXTENDED_REPLY = derive(ExtendedReply)
STRUCTURED_DATA = derive(StructuredData)
EXTENDED_DATA = derive(ExtendedData)
OFFSET_HOLE = derive(OffsetHole)
EXTENT = derive(Extent)
EXTENT_EXT = derive(ExtentExt)
BLOCK_STATUS_START = derive(BlockStatusStart)
BLOCK_STATUS_EXT_START = derive(BlockStatusExtStart)

# The same with their first fields as one integer, for runs of requests that differ in cookie and offset alone.

JOINED_REQUEST = derive(Request, joined=3)
JOINED_EXTENDED_REQUEST = derive(ExtendedRequest, joined=3)
JOINED_SIMPLE_REPLY = derive(SimpleReply, joined=2)
JOINED_STRUCTURED_DATA = derive(StructuredData, joined=3)
JOINED_EXTENDED_DATA = derive(ExtendedData, joined=3)
PLAIN_READ = join(Request, 3, REQUEST_MAGIC, 0, Command.READ)
PLAIN_EXTENDED_READ = join(ExtendedRequest, 3, EXTENDED_REQUEST_MAGIC, 0, Command.READ)
SIMPLE_SUCCESS = join(SimpleReply, 2, SIMPLE_REPLY_MAGIC, 0)
STRUCTURED_WHOLE_DATA = join(StructuredData, 3, STRUCTURED_REPLY_MAGIC, ReplyFlag.DONE, Chunk.OFFSET_DATA)
EXTENDED_WHOLE_DATA = join(ExtendedData, 3, EXTENDED_REPLY_MAGIC, ReplyFlag.DONE, Chunk.OFFSET_DATA)
