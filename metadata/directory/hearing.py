"""Whom each body is for: what a node hears goes to its follower, candidate, joiner, delegate or master from here.

Rules
- A body that is for a master is nothing to a node that is none: whoever sent it asks again, elsewhere.
- A higher epoch, heard or collected, ends this node's own term before anything else is done about it.
- Answers to a node across a WAN go over the stream on which it last asked for something. When that is another one, the
  messages that were on their way over the last one are lost: nothing goes over the new one until it is asked for.
"""

from typing import TYPE_CHECKING, Any

from metadata.directory.master import Master
from metadata.directory.registry_keys import Member
from metadata.directory.streams import FrameStream
from protocol.directory import Kind, MalformedError, NodeKind, Reason

if TYPE_CHECKING:
    from metadata.directory.node import DirectoryNode


class Hearing:
    """Of one node."""

    def __init__(self, node: "DirectoryNode") -> None:
        self._node = node

    def take(self, node: int, body: Any, stream: FrameStream | None, now_s: float) -> None:
        """A node says this, over this stream or by a datagram. MalformedError."""
        follower, master = self._node.follower, self._node.master
        match body.kind:
            case Kind.UPDATES:
                if master is None:
                    try:
                        follower.updates(body, now_s)
                    except MalformedError as error:
                        self._node.fail(f"it does not understand its master: {error}")
            case Kind.HEARTBEAT:
                self._heartbeat(node, body, now_s)
            case Kind.REQUEST:
                (follower if master is None else master).requested(node, body, now_s)
            case Kind.REFUSAL:
                follower.refusal(body, now_s)
            case Kind.COLLECT:
                self._collect(node, body)
            case Kind.PROMISE:
                self._node.election.promised(node, body)
            case Kind.HELD:
                self._node.delegate.held(body)
            case Kind.SNAPSHOT_REQUEST if stream is not None:
                self._node.delegate.requested(stream, body, now_s)
            case Kind.DELEGATE:
                self._node.joiner.delegate(body)
            case Kind.JOIN_REFUSED:
                self._node.joiner.refused(body)
            case Kind.ACTIVE:
                self._node.joiner.active(body)
            case Kind.SUBSCRIBED:
                follower.subscribed(node, body, now_s)
                self._node.heard_master(now_s)
            case Kind.SUBSCRIBE_REFUSED:
                if body.reason is Reason.GONE and body.epoch >= self._node.replica.store.promised:
                    self._node.joiner.need(node, body.epoch, True)
            case _:
                if master is not None:
                    self._take_as_master(master, node, body, stream, now_s)

    def _take_as_master(
        self, master: Master, node: int, body: Any, stream: FrameStream | None, now_s: float
    ) -> None:  # fmt: skip
        match body.kind:
            case Kind.POSITION:
                master.position(node, body, now_s)
            case Kind.REPORT:
                master.reported(node, body)
            case Kind.JOIN:
                if body.node_kind is NodeKind.SECOND and stream is None:
                    return
                self._adopt(node, stream)
                self._node.book.joins(Member(node, body.node_kind, body.name, body.datagrams, body.streams))
                master.join(node, body, now_s)
            case Kind.HOLD:
                master.hold(node, body, now_s)
            case Kind.READY:
                self._adopt(node, stream)
                master.ready(node, body, now_s)
            case Kind.SUBSCRIBE if stream is not None:
                self._adopt(node, stream)
                master.subscribe(node, body, now_s)

    def _adopt(self, node: int, stream: FrameStream | None) -> None:
        """Answers to this node go over this stream from here on."""
        if stream is not None and self._node.routes.streams.get(node) is not stream:
            before = self._node.routes.streams.get(node)
            self._node.routes.streams[node] = stream
            if self._node.master is not None:
                # What was on its way over the other stream is lost: nothing goes over this one until it is asked for.
                self._node.master.unlink(node)
            if before is not None:
                before.close()

    def _heartbeat(self, node: int, body: Any, now_s: float) -> None:
        if self._node.master is not None or self._node.election.epoch:
            if body.epoch <= max(self._node.election.epoch, self._node.replica.store.promised):
                return
            self._node.election.give_up(f"epoch {body.epoch} has a master", 0.0)
        if self._node.follower.heartbeat(node, body, now_s):
            self._node.heard_master(now_s)
            self._node.confirm_reports()

    def _collect(self, node: int, body: Any) -> None:
        if self._node.election.epoch and body.epoch > self._node.election.epoch:
            self._node.election.give_up(f"epoch {body.epoch} is being collected", 0.0)
        if self._node.master is None:
            self._node.follower.collect(node, body)
            if not self._node.follower.epoch:
                self._node.joiner.cancel()
                self._node.delegate.epoch_changed()
