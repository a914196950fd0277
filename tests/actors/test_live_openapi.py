"""The service's OpenAPI document: whether it is complete, and thousands of requests made from it that break nothing."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import BaseRoute

from actors.live_app import make_app
from actors.service_routes import add_service_routes, jobs_settings, upload_settings
from infra.api_keys import changing, make_key
from infra.live_settings import LiveSettings
from infra.protocol import Hello
from infra.refusals import KINDS
from infra.tenants import Scope
from tests.live_service import LiveService, live_service
from tests.object_stores import free_ports

OPERATIONS = {
    ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/restore"),
    ("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/{job_id}"), ("DELETE", "/v1/jobs/{job_id}"),
}  # fmt: skip
REFUSAL = {"type", "kind", "code", "message", "limit", "remedy", "retry_after_s"}
# The operations that take something, and how many requests each gets; the others are the same request each time.
EXAMPLES = {
    "POST /v1/restore": 300,
    "POST /v1/jobs": 500,
    "GET /v1/jobs/{job_id}": 600,
    "DELETE /v1/jobs/{job_id}": 600,
}
CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    made, record = make_key("ann", list(Scope))
    with changing(path) as records:
        records.append(record)
    return made, path


@pytest.fixture(scope="module")
def service(key: tuple[str, Path]) -> Iterator[LiveService]:
    places = ("s3://tapes/{tenant}/",)
    chosen = LiveSettings(keys_file=key[1], failures_per_minute=0, job_sources=places, job_destinations=places)
    (nobody,) = free_ports(1)
    with live_service(settings=chosen, job_server=f"http://127.0.0.1:{nobody}") as running:
        yield running


@pytest.fixture(scope="module")
def document(service: LiveService) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{service.http}/openapi.json").json()
    return found


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """All methods and paths that are answered, but for the page and the document; those of WebSockets as WS."""

    def walk(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
        for route in routes:
            nested = getattr(route, "original_router", None)
            if nested is not None:
                yield from walk(nested.routes)
                continue
            for method in getattr(route, "methods", None) or {"WS"}:
                yield method, route.path  # type: ignore[attr-defined]  # every kind of route here has one

    found = {one for one in walk(app.routes) if one[0] != "HEAD"}
    return {(method, path) for method, path in found if path not in ("/", "/openapi.json") and "/page/" not in path}


def test_every_route_is_described(document: dict[str, Any]) -> None:
    chosen = LiveSettings()
    app = make_app(lambda: None)  # type: ignore[arg-type,return-value]  # nobody asks it
    add_service_routes(
        app,
        lambda: None,  # type: ignore[arg-type,return-value]
        lambda: None,  # type: ignore[arg-type,return-value]
        uploads=upload_settings(chosen),
        jobs=jobs_settings(chosen),
    )
    assert routes_of(app) == OPERATIONS | {("WS", "/v1/streams")}
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == OPERATIONS


def test_every_operation_says_what_it_is_and_how_it_refuses(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            assert any(status.startswith("2") for status in operation["responses"]), where
            assert "422" not in operation["responses"], where  # FastAPI's own shape, which is never sent
            for status in ("4XX", "5XX"):
                content = operation["responses"][status]["content"]["application/json"]
                assert content["schema"]["$ref"].endswith("/Refused"), where
            signed = operation["security"] == [{"bearer": []}, {"key": []}]
            assert signed != (path in ("/healthz", "/readyz")), where
            for parameter in operation.get("parameters", []):
                assert parameter["schema"] and (parameter["in"] == "path" or parameter["description"]), where
    schemas = document["components"]["schemas"]
    assert set(schemas["Refused"]["properties"]) == set(schemas["Refused"]["required"]) | {"type"} == REFUSAL
    assert set(document["components"]["securitySchemes"]) == {"bearer", "key"}


def test_the_websocket_is_described_in_words(document: dict[str, Any]) -> None:
    text = document["info"]["description"]
    for word in (
        "/v1/streams",
        "hello",
        "welcome",
        "refused",
        "credentials",
        "acknowledges",
        "protocol.md",
        "64 bytes",
    ):
        assert word in text
    for name in ("reset", "size", "stats", "delivered", "close"):
        assert f"`{name}`" in text
    assert set(Hello.model_fields) >= {"width", "height"}


def test_each_operation_asks_who_is_there_as_it_says(service: LiveService, document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            body = {"source": "s3://tapes/ann/a", "destination": "s3://tapes/ann/b"} if method == "post" else None
            answer = httpx.request(method, service.http + path.format(job_id="upriver-000000000000"), json=body)
            assert (answer.status_code == 401) == bool(operation["security"]), (method, path)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("PUT", "/v1/jobs", 405)])
def test_what_there_is_not_is_refused_in_the_same_shape(
    service: LiveService, method: str, path: str, status: int
) -> None:
    answer = httpx.request(method, service.http + path)
    assert answer.status_code == status and set(answer.json()) == REFUSAL


@pytest.mark.slow
def test_requests_made_from_the_document(
    service: LiveService, key: tuple[str, Path], document: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    schema = schemathesis.openapi.from_dict(document)
    seen: Counter[tuple[str, int]] = Counter()
    memory: list[float] = []
    process, mood = psutil.Process(), random.Random(7)

    def check(case: Any, name: str) -> None:
        body = case.body
        if name == "POST /v1/jobs" and isinstance(body, dict) and mood.random() < 0.5:
            body |= {"source": "s3://tapes/ann/a.mov", "destination": "s3://tapes/ann/b.mp4"}
        response = case.call(base_url=service.http, headers={"Authorization": f"Bearer {key[0]}"}, timeout=20)
        seen[name, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        text = response.text
        assert "Traceback" not in text and 'File "' not in text and key[0] not in text
        if response.status_code >= 400:
            refusal = response.json()
            assert set(refusal) == REFUSAL and refusal["remedy"]
            assert refusal["kind"] in {*KINDS, "JobUnknown", "HeadTooLarge"} - {"ServiceFailure"}, refusal
        if sum(seen.values()) % 100 == 0:
            memory.append(process.memory_info().rss / 1e6)

    for result in schema.get_all_operations():
        operation = result.ok()
        name = operation.label
        if name not in EXAMPLES:
            run_examples(operation, GenerationMode.POSITIVE, 5, partial(check, name=name))
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            run_examples(operation, mode, EXAMPLES[name] // 2, partial(check, name=name))

    assert sum(seen.values()) >= 2000, seen
    assert {name for name, _ in seen} == {f"{method} {path}" for method, path in OPERATIONS}, seen
    assert {status for _, status in seen} >= {200, 400, 404, 503}, seen
    quarter = len(memory) // 4
    assert memory[-1] - memory[quarter] < 30, memory
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_what_nobody_foresaw_is_told_in_the_same_shape(
    service: LiveService, key: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    engines = dict(service.server.engines)
    service.server.engines["broken"] = None  # type: ignore[assignment]
    try:
        answer = httpx.get(f"{service.http}/v1/models", headers={"X-Api-Key": key[0]})
    finally:
        del service.server.engines["broken"]
    assert service.server.engines == engines
    assert answer.status_code == 500 and answer.json()["kind"] == "ServiceFailure"
    end = time.monotonic() + 10
    while not any(record.exc_info for record in caplog.records):  # its traceback is the operator's, after the answer
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "Attribute" not in answer.text and "Traceback" not in answer.text


def run_examples(operation: Any, mode: GenerationMode, count: int, check: Callable[[Any], None]) -> None:
    """Make `count` requests of an operation, as far as there are so many different ones."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        check(case)

    fuzz()
