"""Who a group is, and who may have a link to it: the check of every handshake, whatever carries the link."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from cluster.core import GroupId
from cluster.rpc.v1 import links_pb2
from cluster.transport.codec import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Identity:
    """What a router must know to be let in, and what it is told."""

    group: GroupId
    incarnation: str
    fingerprint: str
    dtype: str
    secret: str

    def refusal(self, hello: links_pb2.Hello | None) -> str:
        """Why this router gets no link; empty if it does."""
        if hello is None:
            return "the first message must be the handshake"
        if not hmac.compare_digest(hello.secret.encode(), self.secret.encode()):
            return "the cluster secret differs"
        if hello.protocol != PROTOCOL_VERSION:
            return f"protocol version {hello.protocol} differs from {PROTOCOL_VERSION}"
        if hello.fingerprint != self.fingerprint:
            return f"model {hello.fingerprint} differs from {self.fingerprint}"
        if hello.dtype != self.dtype:
            return f"dtype {hello.dtype} differs from {self.dtype}"
        return ""
