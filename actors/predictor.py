"""Upriver's models as `kserve.Model`: what a KServe model server serves. The only place that knows both.

`actors.predictor_server` serves them with Upriver's own routes. They work as well in a plain `kserve.ModelServer`,
within the limits of its REST endpoints (docs/predictor.md): hand it `UpriverModel` instances.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actors.errors import ActorsError
from actors.inference import Call, Inference, Result
from actors.oip import INPUTS, OUTPUTS, VERSION, Tensor, bad
from actors.oip_rest import elements_of, packed_elements
from actors.predictor_backend import Caller

# At import, the package parses the command line of the process it is in, and takes or refuses our options. So it is
# imported here alone, and other modules take from here what they need of it.
_arguments, sys.argv = sys.argv, sys.argv[:1]
try:
    import kserve
    from kserve import InferOutput, InferRequest, InferResponse
    from kserve.model_repository import ModelRepository
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
    from kserve.protocol.grpc.servicer import InferenceServicer
    from kserve.protocol.infer_type import to_http_parameters
    from kserve.protocol.rest.server import RESTServer
except ImportError as error:
    raise ActorsError(
        "The predictor needs the package kserve, which is not installed.",
        code="kserve-missing",
        remedy="Install it: pip install 'upriver[kserve]'.",
    ) from error
finally:
    sys.argv = _arguments

if TYPE_CHECKING:
    from actors.predictor_backend import Backend

__all__ = [
    "CallerHeaders", "InferenceServicer", "RESTServer", "UpriverModel", "UpriverRepository", "kserve", "messages",
]  # fmt: skip


class CallerHeaders(dict[str, str]):
    """Headers of a request as the `kserve` package hands them on, with whom they are of."""

    def __init__(self, caller: Caller) -> None:
        super().__init__(caller.headers)
        self.caller = caller


class UpriverModel(kserve.Model):
    """One model of a predictor; all of them share one `Inference`, which does the work."""

    def __init__(self, name: str, inference: Inference) -> None:
        super().__init__(name)
        self.inference = inference
        self.ready = True

    def load(self) -> bool:
        """Nothing: models are loaded by the backend. The base class would say that it is ready now."""
        return self.ready

    async def healthy(self) -> bool:
        """Whether a request would be served now."""
        return await self.inference.is_ready(self.name)

    def get_input_types(self) -> list[dict[str, Any]]:
        """See `actors.oip`."""
        return [dict(each) for each in INPUTS]

    def get_output_types(self) -> list[dict[str, Any]]:
        """See `actors.oip`."""
        return [dict(each) for each in OUTPUTS]

    def validate(self, payload: Any) -> Any:
        """Take requests of the Open Inference Protocol.

        Raises:
            BadMessage: it is one of KServe's first protocol, which has no tensors.
        """
        if not isinstance(payload, Call | InferRequest):
            raise bad(
                "This model does not speak KServe's V1 protocol.",
                f"Send an Open Inference Protocol request to /v2/models/{self.name}/infer.",
                code="v1-protocol",
            )
        return payload

    async def predict(
        self,
        payload: Any,
        headers: Mapping[str, str] | None = None,
        response_headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Restore the frames of a request.

        Args:
            payload: a `Call`, answered by a `Result`; or an `InferRequest`, answered by an `InferResponse`.

        Raises:
            Refusal: it is refused.
        """
        caller = headers.caller if isinstance(headers, CallerHeaders) else Caller.of(headers or {}, None, is_web=False)
        if isinstance(payload, Call):
            return await self.inference.infer(payload, caller)
        with self.inference.place():
            return _response(await self.inference.infer(_call(self.name, payload), caller), payload)


class UpriverRepository(ModelRepository):
    """The models that the backend has, each as an `UpriverModel`."""

    def __init__(self, backend: Backend, inference: Inference) -> None:
        super().__init__()
        self._backend, self._inference = backend, inference

    def get_models(self) -> dict[str, UpriverModel]:
        names = self._backend.models()
        for name in [name for name in self.models if name not in names]:
            del self.models[name]
        for name in names:
            if name not in self.models:
                self.models[name] = UpriverModel(name, self._inference)
        return self.models

    def get_model(self, name: str) -> UpriverModel | None:
        return self.get_models().get(name)

    async def load(self, name: str) -> bool:  # its caller awaits it where it is a coroutine
        await self._backend.load(name)
        return True


def _call(model: str, request: InferRequest) -> Call:
    inputs = []
    for each in request.inputs:
        data = each._raw_data
        if data is None:
            data = [_as_bytes(value) for value in each.data] if each.datatype == "BYTES" else each.as_numpy().tobytes()
        elif each.datatype == "BYTES":
            data = elements_of(data, each.name)
        inputs.append(Tensor(each.name, each.datatype, tuple(each.shape), data))
    return Call(
        model=model,
        version=request.model_version or "",
        id=request.id or "",
        parameters=to_http_parameters(request.parameters or {}),
        inputs=inputs,
        outputs=tuple(each.name for each in request.request_outputs or ()),
        transport="grpc" if request.from_grpc else "rest",
    )


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _response(result: Result, request: InferRequest) -> InferResponse:
    outputs = []
    for tensor in result.outputs:
        output = InferOutput(tensor.name, list(tensor.shape), tensor.datatype)
        data = b"".join(packed_elements(tensor.data)) if isinstance(tensor.data, list) else bytes(tensor.data)
        output._raw_data = data
        output.parameters = {"binary_data_size": len(data)}
        outputs.append(output)
    return InferResponse(
        result.id,
        result.model,
        outputs,
        model_version=VERSION,
        parameters=dict(result.parameters),
        use_binary_outputs=True,
        requested_outputs=request.request_outputs,
    )
