"""A predictor in front of a live service: whom it speaks for, what it does when replicas go, when it must not serve."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.gate import SettingsGate
from actors.inference import Call, Inference, Result
from actors.live_server import LiveConfig
from actors.model_loading import EngineConfig
from actors.oip import Tensor, array_of
from actors.predictor_backend import Caller, GatewayUnsafe, LiveService, OwnEngine, backend_for
from infra.live_settings import LiveSettings
from infra.predictor_settings import PredictorSettings
from infra.refusals import AdmissionRefused, RateExceeded, Refusal, Unauthorized
from tests.actors.test_grpc_channel import grpc_service
from tests.live_service import live_service
from tests.predictor_process import STAND_IN, Keys, enlarged, picture

ANYBODY = Caller.of({}, "127.0.0.1")


def gateway(url: str, **told: Any) -> Inference:
    settings = PredictorSettings(service=url, models=(STAND_IN,), patience_s=0.0, hand_over_s=20.0, **told)
    return Inference(settings, backend_for(settings, LiveSettings(), EngineConfig()))


async def ask(inference: Inference, rgb: np.ndarray[Any, Any], caller: Caller = ANYBODY, **parameters: Any) -> Result:
    frame = Tensor("frame", "UINT8", rgb.shape, rgb.tobytes())
    result = await inference.infer(Call(STAND_IN, "", "", parameters, [frame]), caller)
    found = {tensor.name: tensor for tensor in result.outputs}
    assert (array_of(found["frame"]) == enlarged(rgb)).all()
    return result


def column(result: Result, name: str) -> list[Any]:
    (tensor,) = [tensor for tensor in result.outputs if tensor.name == name]
    return list(array_of(tensor).tolist())


def test_a_sequence_goes_on_when_the_replica_hands_it_over() -> None:
    with live_service(LiveConfig(), STAND_IN) as service:

        async def run() -> None:
            inference = gateway(service.url)
            await inference.start()
            for number in range(6):
                place = {"sequence_start": number == 0, "sequence_end": number == 5}
                result = await ask(inference, picture(number), sequence_id=1, **place)
                assert column(result, "index") == [number] and column(result, "reset") == [number == 0]
                if number in (1, 3):
                    (connection,) = service.server.connections.values()
                    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(connection.drain(), service._loop))
            await inference.stop()

        asyncio.run(asyncio.wait_for(run(), 60))


def test_a_service_by_grpc() -> None:
    async def run() -> None:
        async with grpc_service() as (_, address):
            inference = gateway(f"grpc://{address}")
            await inference.start()
            assert await inference.is_ready()
            assert column(await ask(inference, picture(1)), "index") == [0]
            for number in range(3):
                place = {"sequence_start": number == 0, "sequence_end": number == 2}
                assert column(await ask(inference, picture(number), sequence_id="x", **place), "index") == [number]
            await inference.stop()
        assert not await inference.is_ready()
        with pytest.raises(Refusal) as caught:
            await ask(inference, picture(1))
        assert caught.value.code == "unreachable"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_service_is_told_whom_it_is_for(tmp_path: Path) -> None:
    """One caller's wrong keys do not lock out the others who come through the same gateway."""
    keys = Keys.make(tmp_path)
    live = LiveSettings(keys_file=keys.file, failures_per_minute=1, trusted_proxies=("127.0.0.0/8",))
    with live_service(None, STAND_IN, settings=live) as service:

        async def run() -> None:
            inference = gateway(service.url)
            await inference.start()
            wrong = Caller.of({"x-api-key": "upr_wrong"}, "198.51.100.1")
            kinds = []
            for _ in range(22):
                with pytest.raises((Unauthorized, RateExceeded)) as caught:
                    await ask(inference, picture(1), wrong)
                kinds.append(caught.type)
            assert kinds[0] is Unauthorized and kinds[-1] is RateExceeded
            for headers, peer in (
                ({"x-api-key": keys.live}, "198.51.100.2"),
                ({"authorization": f"Bearer {keys.live}", "x-forwarded-for": "198.51.100.3"}, "127.0.0.1"),
            ):
                await ask(inference, picture(1), Caller.of(headers, peer))
            await inference.stop()

        asyncio.run(asyncio.wait_for(run(), 60))


def test_a_gateway_for_others_wants_a_service_that_asks(tmp_path: Path) -> None:
    keys = Keys.make(tmp_path)

    async def is_safe(service: str, **told: Any) -> bool:
        backend = gateway(service, **told).backend
        assert isinstance(backend, LiveService)
        try:
            await backend.require_safe()
        except GatewayUnsafe:
            assert not await backend.is_ready()
            return False
        return True

    with live_service(None, STAND_IN) as opened:
        assert asyncio.run(is_safe(opened.url, host="127.0.0.1"))
        assert not asyncio.run(is_safe(opened.url, host="0.0.0.0"))
        assert asyncio.run(is_safe(opened.url, host="0.0.0.0", insecure=True))
        gone = opened.url
    with live_service(None, STAND_IN, settings=LiveSettings(keys_file=keys.file)) as asking:
        assert asyncio.run(is_safe(asking.url, host="0.0.0.0"))
    with pytest.raises(AdmissionRefused):
        asyncio.run(is_safe(gone, host="0.0.0.0"))


def test_only_so_many_requests_at_a_time_and_only_one_kind_of_credentials() -> None:
    inference = gateway("ws://127.0.0.1:1", requests=1)
    with inference.place(), pytest.raises(AdmissionRefused) as caught, inference.place():
        pass
    assert caught.value.code == "requests-full" and inference.under_way == 0
    with pytest.raises(Unauthorized):
        Caller.of({"x-api-key": "a", "authorization": "Bearer b"}, None)
    secret = Caller.of({"x-api-key": "upr_secret"}, None)
    assert "upr_secret" not in repr(secret.credentials) and secret.digest != ANYBODY.digest


def test_an_engine_has_room_for_what_the_predictor_admits(tmp_path: Path) -> None:
    async def run() -> None:
        settings = PredictorSettings(sequences=100, requests=10, sequence_idle_s=3600.0)
        own = OwnEngine(settings, LiveSettings(), EngineConfig())
        assert isinstance(own.gate, SettingsGate) and own.gate.settings.limits.sessions == 110
        assert own.server.config.most_sessions == 110 and own.server.config.idle_timeout_s > 3600
        keys = LiveSettings.model_validate({"limits": {"sessions": 3}})
        assert OwnEngine(settings, keys, EngineConfig()).gate.settings.limits.sessions == 3  # as the operator says

    asyncio.run(run())
