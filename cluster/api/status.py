"""Errors as gRPC statuses: the code, one line, and for bad input a machine-readable BadRequest detail."""

from __future__ import annotations

import logging

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.errors import ExpertMeshError, InternalError, InvalidArgument

log = logging.getLogger(__name__)

Metadata = tuple[tuple[str, bytes | str], ...]


def as_known(error: BaseException) -> ExpertMeshError:
    """The error itself, or InternalError in place of one that has no business outside (it is logged)."""
    if isinstance(error, ExpertMeshError):
        return error
    log.error("request failed", exc_info=error)
    return InternalError("the request failed; see the router's log")


def grpc_status(error: ExpertMeshError) -> tuple[grpc.StatusCode, str, Metadata]:
    """(code, details, trailing metadata)."""
    code = grpc.StatusCode[error.code]
    if not isinstance(error, InvalidArgument):
        return code, str(error), ()
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=str(error))
    detail = error_details_pb2.BadRequest()
    detail.field_violations.add(field=error.field, description=str(error))
    status.details.add().Pack(detail)
    metadata: Metadata = tuple(rpc_status.to_status(status).trailing_metadata)
    return code, str(error), metadata
