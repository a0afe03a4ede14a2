"""The two frames that open every link: protobuf messages, since they grow with the versions of the project."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from cluster.rpc.v1 import links_pb2
from cluster.transport.codec import Kind


def encode_hello(hello: links_pb2.Hello) -> bytes:
    """The router's first frame."""
    return bytes([Kind.HELLO]) + hello.SerializeToString()


def encode_welcome(welcome: links_pb2.Welcome) -> bytes:
    """The group's first frame."""
    return bytes([Kind.WELCOME]) + welcome.SerializeToString()


def decode_hello(frame: bytes) -> links_pb2.Hello | None:
    """The handshake of a frame; None if it is something else."""
    hello: links_pb2.Hello | None = _handshake(frame, Kind.HELLO, links_pb2.Hello)
    return hello


def decode_welcome(frame: bytes) -> links_pb2.Welcome | None:
    """The handshake of a frame; None if it is something else."""
    welcome: links_pb2.Welcome | None = _handshake(frame, Kind.WELCOME, links_pb2.Welcome)
    return welcome


def _handshake(frame: bytes, kind: Kind, message: Any) -> Any:
    if not frame or frame[0] != kind:
        return None
    try:
        return message.FromString(frame[1:])
    except DecodeError:
        return None
