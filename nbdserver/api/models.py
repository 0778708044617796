"""What the HTTP API takes and answers, as `/openapi.json` documents it.

Rule: what is answered is made elsewhere (nbdserver/node) and only described here; fields that are not described are not
answered.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class RequestBody(BaseModel):
    """What a request takes: a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class VolumeRequest(RequestBody):
    """What POST /v1/volumes takes."""

    name: str = Field(description="the volume's name, which clients attach by")
    size_bytes: int = Field(description="a multiple of 4096, at most 16 TiB")
    replicas: int = Field(default=0, description="on how many nodes of the cluster; 0: on this one alone, as its own")
    on: list[str] = Field(default=[], description="nodes that are to have one")


class Settings(BaseModel):
    """What a volume says about its export."""

    read_only: bool
    description: str
    shared: bool
    allowed_clients: list[str] = Field(description="networks, and names in certificates as cert:NAME; empty: everybody")
    tls: str = Field(description="off, allowed, required, or inherit: as the node says")
    iops: int = Field(description="operations a second that clients may do together; 0: without limit")
    iops_burst: int = Field(description="operations at once after a pause; 0: one second's worth")
    bandwidth: int = Field(description="bytes a second, read and written; 0: without limit")
    bandwidth_burst: int = Field(description="bytes at once after a pause; 0: one second's worth")
    max_data: int = Field(description="bytes that the segment files of its family may take; 0: without limit")


class Traffic(BaseModel):
    """What clients have done since the volume was opened."""

    requests: int
    read_bytes: int
    write_bytes: int
    answers: int = Field(description="requests that were answered")
    latency_us: int = Field(description="of all of these together, from a request's arrival to its reply")


class Volume(BaseModel):
    """A volume and how it is doing."""

    name: str
    size_bytes: int
    state: str = Field(
        description="serving, full, failed, starting, or unknown: the data process does not answer; of a volume of the "
        "cluster also elsewhere: another node serves it, or idle: it is taken over by whom it is used at"
    )
    reason: str = Field(description="why it failed")
    base: str = Field(description="the newest snapshot of another volume that it stands on; empty for none")
    snapshots: int = Field(description="how many it has")
    generation: int = Field(description="raised when acknowledged writes may have been lost")
    epoch: int
    family: str = Field(description="a volume and its clones are one family, with one log")
    settings: Settings
    clients: int | None = Field(description="client connections; null for a volume that another node serves")
    traffic: Traffic | None = Field(description="what clients have done so far; null while nothing is known")
    disk: dict[str, Any] = Field(description="what the family's log-structured disk says of itself")
    replicas: "Replicas"


class Replica(BaseModel):
    """A replica of a volume."""

    node: str
    state: str = Field(description="in sync; returning: it is being made complete; silent: its node is not heard")


class Replicas(BaseModel):
    """Where a volume is."""

    wanted: int = Field(description="on how many nodes it shall be; 0: it is one node's own")
    owner: str = Field(description="the node that serves it, or did last; empty if that is not known")
    in_sync: int = Field(description="how many have everything")
    nodes: list[Replica]


class SnapshotRequest(RequestBody):
    """What POST /v1/snapshots takes."""

    volume: str
    name: str = Field(description="the snapshot's name, without the volume's")


class Snapshot(BaseModel):
    """What a volume held at a moment."""

    volume: str
    name: str
    export: str = Field(description="the name that clients attach by, read-only")
    size_bytes: int
    created: str = Field(description="ISO 8601, UTC")
    clients: int | None = Field(description="client connections; null: not known here, another node serves it")
    clones: list[str] | None = Field(description="volumes that were made from it; null as with clients")


class CloneRequest(RequestBody):
    """What POST /v1/clones takes."""

    volume: str
    snapshot: str = Field(description="the snapshot's name, without the volume's")
    name: str = Field(description="the new volume's name")


class RenameRequest(RequestBody):
    """What POST /v1/volumes/NAME/rename takes."""

    name: str = Field(description="the new name")


class ResizeRequest(RequestBody):
    """What POST /v1/volumes/NAME/resize takes."""

    size_bytes: int = Field(description="a multiple of 4096, at most 16 TiB")
    force: bool = Field(default=False, description="make it smaller too: what is cut off is gone")


class Handover(BaseModel):
    """How clients came over from the program before."""

    id: str
    failure: str = Field(description="why the program before goes on; empty when this one has taken over")
    clients: int = Field(description="that were taken over")
    dropped: int = Field(description="that have to connect again")
    pause_s: float = Field(description="how long clients waited")


class Fill(BaseModel):
    """Something that has a limit."""

    subject: str = Field(description="file system, max_data (of the node), or volume NAME")
    used_bytes: int = Field(description="of a limit: live data and the reserve, which cannot be cleaned away")
    size_bytes: int
    percent: float
    alarm: int = Field(description="the threshold that was crossed: 80, 90 or 95; 0: none")


class Capacity(BaseModel):
    """What there is and what is promised, in bytes."""

    size_bytes: int = Field(description="of the file system")
    free_bytes: int
    allocated_bytes: int = Field(description="segment files of all volumes")
    max_data_bytes: int = Field(description="most that they may take; 0: the whole disk")
    room_bytes: int = Field(description="what is free and what they take, at most max_data")
    provisioned_bytes: int = Field(description="sizes of all volumes together")
    overcommit: float = Field(description="most that volumes may have, as a multiple of the room; 0: any")


class Tls(BaseModel):
    """TLS for NBD clients."""

    mode: str = Field(description="off, allowed or required, for volumes that say nothing themselves")
    verify_clients: bool
    certificate: str = Field(description="the file")
    names: list[str] = Field(description="host names and addresses that the certificate is for")
    expires: str = Field(description="ISO 8601, UTC")


class Names(BaseModel):
    """What can be named in commands."""

    volumes: list[str]
    snapshots: list[str] = Field(description="as VOLUME@NAME")
    nodes: list[str] = Field(description="of the cluster")


class Scrub(BaseModel):
    """How far the reading of a family's data is."""

    volume: str = Field(description="the family's oldest volume")
    volumes: list[str] = Field(description="all of the family: they share one log")
    state: str = Field(description="never, waiting, running, done, stopped or failed")
    reason: str = Field(description="why it failed")
    done_bytes: int
    total_bytes: int
    damaged_blocks: int = Field(description="that it found")
    rate_bytes_per_s: int = Field(description="lately; 0: not known")
    left_s: int | None = Field(description="estimate; null: not known")
    completed: str = Field(description="when the last whole one ended: ISO 8601, UTC")
    next: str = Field(description="when the next one is due; empty: it is not, or one is active")


class ScrubRequest(RequestBody):
    """What POST /v1/scrubs takes."""

    volume: str = Field(default="", description="any volume of the family; empty: all")


class RegistryState(BaseModel):
    """Where the truth about owners is kept."""

    kind: str
    is_connected: bool
    for_s: float = Field(description="since when that is so")
    endpoint: str = Field(description="the one in use, or tried last")
    endpoints: list[str]
    last_error: str = Field(description="also after it has passed")


class MoveRequest(RequestBody):
    """What POST /v1/volumes/NAME/move takes."""

    source: str = Field(description="the node that the volume's replica shall leave")
    target: str = Field(default="", description="the node that it shall be on; empty: whichever is best")


class Resync(BaseModel):
    """A replica that is not in sync."""

    volume: str = Field(description="the family's oldest volume")
    node: str = Field(description="where the replica is")
    owner: str = Field(description="the node that it gets from what it lacks")
    state: str = Field(
        description="copying, connecting, waiting (`reason` says for what), silent: its node is not heard, or unknown: "
        "who knows cannot be asked"
    )
    left_bytes: int | None = Field(description="what is left to compare, an estimate; null while that is not known")
    total_bytes: int | None = Field(description="the same of when it came back")
    bytes_per_s: int
    left_s: int | None = Field(description="at this rate; null while that is not known")
    reason: str
    disk: str = Field(description="why it is known that its disk is not what it was: replaced, or put back; else empty")


class RecoverRequest(RequestBody):
    """What POST /v1/cluster/recover takes."""

    without: list[str] = Field([], description="nodes whose word is not waited for; what they alone have is lost")
    is_trial: bool = Field(False, description="only say what would be done")


class RecoveredVolume(BaseModel):
    """A family that the registry has again."""

    name: str
    in_sync: list[str] = Field(description="nodes whose replicas are in sync")
    loss: str = Field(description="what is lost, where nodes were not waited for; else empty")


class LeftOutVolume(BaseModel):
    """A family that the registry does not have again."""

    name: str
    problem: str


class Recovered(BaseModel):
    """What the registry was made from, and what it holds."""

    nodes: list[str] = Field(description="nodes that have told what they know")
    silent: list[str]
    volumes: list[RecoveredVolume]
    left_out: list[LeftOutVolume]


class ClusterNode(BaseModel):
    """A member. What it has not reported lately is null."""

    name: str
    state: str = Field(description="up, or silent: the master does not hear it")
    silent_s: float | None
    is_master: bool
    is_voter: bool
    across_wan: bool
    draining: bool = Field(description="it gets nothing new")
    address: str
    data_addresses: list[str] = Field(description="where its data processes are reached by those of other nodes")
    site: str
    fault_domain: str
    version: str
    started: str = Field(description="ISO 8601, UTC")
    id: str = Field(description="drawn when its data directory was made")
    replicas: int = Field(description="that it has, or shall have, of volumes of the cluster")
    owned: int = Field(description="volumes of the cluster that it serves, with their clones, or did last")
    volumes: int | None
    clients: int | None
    requests_per_s: float | None
    read_bytes_per_s: int | None
    write_bytes_per_s: int | None
    latency_us: int | None
    used_bytes: int | None = Field(description="of its file system")
    size_bytes: int | None
    fill_percent: float | None
    promisable_bytes: int | None = Field(description="that its volumes may grow by together; null: without limit")


class ClusterStatus(BaseModel):
    """The cluster as this node sees it."""

    name: str
    node: str = Field(description="this one")
    is_active: bool = Field(description="it hears the master; otherwise what it shows is old")
    master: str = Field(description="empty: none is known")
    epoch: int = Field(description="number of the master's term")
    voters: list[str] = Field(description="the nodes whose majority makes a master")
    registry: RegistryState
    nodes: list[ClusterNode]


class DrainRequest(RequestBody):
    """What POST /v1/nodes/NAME/drain takes."""

    drain: bool = Field(default=True, description="false ends it")


class DirectoryEntry(BaseModel):
    """A key of the directory."""

    key: str
    value: str
    encoding: str = Field(description="utf-8, or base64 for what is none")


class Finding(BaseModel):
    """Something that somebody should know of."""

    urgency: str = Field(description="now: clients notice it or data is at stake; soon: they will; note: it is over")
    subject: str = Field(description="what it is about; may be empty")
    problem: str = Field(description="what is wrong, to be read after the subject")
    remedy: str = Field(description="what to do about it; may be empty")


class WorkerState(BaseModel):
    """A data process."""

    worker: int
    pid: int | None = Field(description="null while it is being started")
    silent_s: float = Field(description="for how long it has not answered; 0 while it does")


class Worker(WorkerState):
    """A data process and what it serves."""

    volumes: list[str] = Field(description="of its families")


class Node(BaseModel):
    """The node without its volumes."""

    version: str
    host: str
    pid: int
    findings: list[Finding] = Field(description="what is wrong and what to do about it, the most urgent first")
    uptime_s: float
    data: str
    listen: list[str]
    free_bytes: int
    checksum: str
    warnings: list[str]
    capacity: Capacity
    fills: list[Fill] = Field(description="how full what has a limit is")
    tls: Tls | None = Field(description="null without a certificate")
    scrubs: list[Scrub] = Field(description="how far the reading of all data is")
    handover: Handover | None = Field(description="the last one; null if this program was started afresh")
    cluster: ClusterStatus | None = Field(description="null for a node that stands alone")
    resync: list[Resync] = Field(description="replicas that are not in sync; on the page the first of them")


class Status(Node):
    """The node."""

    workers: list[Worker] = Field(description="its data processes")
    volumes: list[Volume]


class TrafficNow(BaseModel):
    """What is done now, and was done lately."""

    requests_per_s: float
    bytes_per_s: int = Field(description="read and written together")
    read_bytes_per_s: int
    write_bytes_per_s: int
    latency_us: int = Field(description="mean, from a request's arrival to its reply; 0: nothing was asked")
    requests_history: list[int] = Field(description="a second, in the last slots of slot_s, oldest first")
    bytes_history: list[int]


class VolumeRow(BaseModel):
    """A volume as the status page shows it; null: of one on another node that is not known here."""

    key: str = Field(description="stays when the volume is renamed")
    name: str
    node: str = Field(description="who serves it; empty: nobody does now, or this node stands alone")
    replicas: int = Field(description="how many it shall have; 0: it is on its node alone")
    in_sync: int = Field(description="how many of them have everything")
    description: str
    state: str
    reason: str
    size_bytes: int
    live_bytes: int | None = Field(description="data of it and of those that it shares it with; null: not known")
    shares_data: bool = Field(description="with clones")
    damaged_blocks: int
    base: str
    snapshots: int
    clients: int | None
    read_only: bool
    requests_per_s: float | None
    bytes_per_s: int | None = Field(description="read and written together")
    read_bytes_per_s: int | None
    write_bytes_per_s: int | None
    latency_us: int | None = Field(description="mean, from a request's arrival to its reply; 0: nothing was asked")
    requests_history: list[int] = Field(description="a second, in the last slots of slot_s, oldest first")
    bytes_history: list[int]


class VolumeRows(BaseModel):
    """The volumes that were asked for, of all nodes of the cluster."""

    total: int
    matching: int
    rows: list[VolumeRow] = Field(description="the first of those that match")


class Overview(Node):
    """What the status page shows."""

    workers: list[WorkerState] = Field(description="its data processes")
    seen_s: float = Field(description="how old it is")
    slot_s: float = Field(description="what a value of a history is the mean of")
    states: dict[str, int] = Field(description="how many volumes are in each state")
    clients: int = Field(description="client connections")
    resync_count: int = Field(description="how many replicas are not in sync")
    scrub_states: dict[str, int] = Field(description="how many scrubs are in each state")
    scrub_next: str = Field(description="when the next one is due; empty: none is")
    traffic: TrafficNow = Field(description="all volumes together")
    volumes: VolumeRows
    events: list[dict[str, Any]] = Field(description="the newest first; what is alike is one, with `times` and `since`")
