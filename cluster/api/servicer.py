"""The gRPC services for the router's own server: convert, look up, await, convert."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from google.protobuf import empty_pb2
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.api.frontend import Frontend
from cluster.api.status import as_known, grpc_status
from cluster.errors import ExpertMeshError, InvalidArgument
from cluster.rpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

Reply = TypeVar("Reply")


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """cluster.rpc.v1.Inference over a `Frontend`."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            chunks = self._frontend.generate(parsed(request), _metadata(context), context.time_remaining())
            async with aclosing(chunks):  # a client that leaves frees its request now, not when garbage is collected
                async for chunk in chunks:
                    yield chunk
        except Exception as exc:  # noqa: BLE001 (mapped to a status; the client never sees a stack trace)
            await _abort(context, exc)

    async def GenerateOnce(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(
            context,
            lambda: self._frontend.generate_once(parsed(request), _metadata(context), context.time_remaining()),
        )

    async def ModelInfo(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(context, lambda: _now(self._frontend.model_info))

    async def Tokenize(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(context, lambda: self._tokenize(request))

    async def _tokenize(self, request: Any) -> inference_pb2.TokenizeReply:
        return await self._frontend.tokenize(parsed(request))

    async def Detokenize(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(context, lambda: _now(lambda: self._frontend.detokenize(parsed(request))))


class ControlServicer(control_pb2_grpc.ControlServicer):
    """cluster.rpc.v1.Control over a `Frontend`."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Status(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> control_pb2.StatusReply:
        return await _answer(context, self._frontend.status)

    async def SetTracing(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(context, lambda: _now(lambda: self._frontend.set_tracing(request)))

    async def SetFailOver(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(context, lambda: _now(lambda: self._frontend.set_fail_over(request)))

    async def Loads(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(context, lambda: _now(self._frontend.loads))

    async def ChangePlacement(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(context, lambda: self._frontend.change_placement(request))

    async def Placement(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answer(context, self._frontend.placement)


class Unparsed:
    """A request that is no message of its type, with the error that says why. Stands in for the message."""

    def __init__(self, problem: ExpertMeshError) -> None:
        self.problem = problem


def parsed(request: Any) -> Any:
    """The request, if it is one.

    Raises:
        InvalidArgument: it could not be parsed.
    """
    if isinstance(request, Unparsed):
        raise request.problem
    return request


def _tolerant(message_type: type[Message]) -> Callable[[bytes], Any]:
    """A deserialiser that lets the servicer answer what cannot be parsed; gRPC alone would say INTERNAL."""

    def parse(data: bytes) -> Any:
        try:
            return message_type.FromString(data)
        except DecodeError:
            return Unparsed(_parse_problem(data, message_type))

    return parse


def _parse_problem(data: bytes, message_type: type[Message]) -> InvalidArgument:
    """Why ``data`` cannot be parsed: names the text field that is not UTF-8, if there is one."""
    try:
        fields: Any = UnknownFieldSet(empty_pb2.Empty.FromString(data))
    except DecodeError:
        fields = ()
    for item in fields:
        field = message_type.DESCRIPTOR.fields_by_number.get(item.field_number)
        if field is not None and isinstance(item.data, bytes):
            try:
                item.data.decode("utf-8")
            except UnicodeDecodeError as exc:
                return InvalidArgument(field.name, item.data[:40], f"must be UTF-8: {exc.reason} at byte {exc.start}")
    return InvalidArgument(message_type.DESCRIPTOR.name, f"{len(data)} bytes", "cannot be parsed as this message")


def add_inference_servicer(servicer: Any, server: Any) -> None:
    """As the generated ``add_InferenceServicer_to_server``, with deserialisers that do not fail."""
    requests: dict[str, type[Message]] = {
        "GenerateOnce": inference_pb2.GenerateRequest,
        "ModelInfo": inference_pb2.ModelInfoRequest,
        "Tokenize": inference_pb2.TokenizeRequest,
        "Detokenize": inference_pb2.DetokenizeRequest,
    }
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name), request_deserializer=_tolerant(kind), response_serializer=_serialize
        )
        for name, kind in requests.items()
    }
    handlers["Generate"] = grpc.unary_stream_rpc_method_handler(
        servicer.Generate,
        request_deserializer=_tolerant(inference_pb2.GenerateRequest),
        response_serializer=_serialize,
    )
    name = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


def _serialize(message: Any) -> bytes:
    data: bytes = message if isinstance(message, bytes) else message.SerializeToString()
    return data


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    pairs = context.invocation_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


async def _now(call: Callable[[], Reply]) -> Reply:
    return call()


async def _answer(context: grpc.aio.ServicerContext[Any, Any], call: Callable[[], Awaitable[Reply]]) -> Reply:
    try:
        return await call()
    except Exception as exc:
        await _abort(context, exc)
        raise AssertionError("abort returns never") from exc


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    code, details, metadata = grpc_status(as_known(error))
    await context.abort(code, details, metadata)
