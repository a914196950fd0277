from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from infra.origins import LOOPBACK_HOSTS, OriginPolicy, parse_origin
from infra.refusals import Forbidden


def client(policy: OriginPolicy) -> TestClient:
    app = Starlette(
        routes=[Route("/", lambda _: PlainTextResponse("here"), methods=["GET", "POST"])],
        middleware=[Middleware(CORSMiddleware, **policy.cors_arguments())],
    )
    return TestClient(app)


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-api-key"}


def test_cors_is_closed_unless_told_otherwise() -> None:
    closed = client(OriginPolicy())
    asked = closed.options("/", headers={"Origin": "https://page.example", **PREFLIGHT})
    assert asked.status_code == 400 and "access-control-allow-origin" not in asked.headers
    assert "access-control-allow-origin" not in closed.get("/", headers={"Origin": "https://page.example"}).headers


def test_cors_opens_to_what_is_listed_and_to_nothing_else() -> None:
    opened = client(OriginPolicy(("https://page.example",)))
    asked = opened.options("/", headers={"Origin": "https://page.example", **PREFLIGHT})
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-credentials" not in asked.headers
    for other in ("https://page.example.evil.example", "http://page.example", "https://page.example:8443", "null"):
        answer = opened.get("/", headers={"Origin": other})
        assert "access-control-allow-origin" not in answer.headers
    assert opened.options(
        "/", headers={"Origin": "https://page.example", "Access-Control-Request-Method": "PUT"}
    ).is_error


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, "service.example"),  # no browser
        ("https://service.example", "service.example"),
        ("https://service.example", "service.example:443"),
        ("http://service.example:8000", "service.example:8000"),
        ("http://SERVICE.example:8000", "service.EXAMPLE:8000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("https://page.example", "service.example"),  # listed
        ("https://page.example:443", "service.example"),
    ],
)
def test_pages_of_the_service_and_listed_ones_may_open_streams(origin: str | None, host: str) -> None:
    OriginPolicy(("https://page.example",)).check(origin=origin, host=host)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("https://evil.example", "service.example"),
        ("http://page.example", "service.example"),
        ("https://page.example:8443", "service.example"),
        ("https://page.example.evil.example", "service.example"),
        ("https://evil.example/https://page.example", "service.example"),
        ("https://page.example@evil.example", "service.example"),
        ("https://evil.example#https://page.example", "service.example"),
        ("http://service.example:9999", "service.example:8000"),
        ("http://service.example", "service.example:8000"),
        ("null", "service.example"),
        ("", "service.example"),
        ("file://", "service.example"),
        ("chrome-extension://abc", "service.example"),
        ("https://", ""),
        ("https://service.example", None),
        ("https://service.example", "service.example/../evil"),
        ("https://sérvice.example", "service.example"),
        ("https://service.example\n", "service.example"),
        ("https://service.example:99999", "service.example"),
        ("https://[::1", "[::1"),
    ],
)
def test_pages_of_others_may_not(origin: str, host: str | None) -> None:
    with pytest.raises(Forbidden) as caught:
        OriginPolicy(("https://page.example",)).check(origin=origin, host=host)
    assert caught.value.http_status == 403
    assert "evil" not in str(caught.value)  # nothing of what was sent comes back


def test_a_page_without_encryption_is_no_page_of_an_encrypted_service() -> None:
    policy = OriginPolicy()
    policy.check(origin="http://service.example", host="service.example")
    policy.check(origin="https://service.example", host="service.example", secure=True)
    with pytest.raises(Forbidden):
        policy.check(origin="http://service.example", host="service.example", secure=True)


def test_any_page_where_the_operator_says_so() -> None:
    OriginPolicy(("*",)).check(origin="https://anything.example", host="service.example")
    OriginPolicy(("*",)).check(origin="null", host="service.example")


def test_a_name_that_was_pointed_at_loopback_is_not_the_service() -> None:
    """DNS rebinding: the page and the request have the same name, which is the attacker's."""
    OriginPolicy().check(origin="http://evil.example:8000", host="evil.example:8000")  # what it would be without hosts
    policy = OriginPolicy(hosts=LOOPBACK_HOSTS)
    with pytest.raises(Forbidden):
        policy.check(origin="http://evil.example:8000", host="evil.example:8000")
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", None, "@localhost", "a b"):
        with pytest.raises(Forbidden):
            policy.check(origin=None, host=host)
    for host in ("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
        policy.check(origin=None, host=host)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("https://a.example", "https://a.example"),
        ("HTTPS://A.Example:443", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("http://a.example:81", "http://a.example:81"),
        ("http://[::1]:80", "http://[::1]"),
        ("https://a.example/", None),
        ("a.example", None),
        ("ftp://a.example", None),
        ("https://*.example", "https://*.example"),  # no pattern: it matches nothing but itself
        ("https://user@a.example", None),
    ],
)
def test_origins_are_written_in_one_way(text: str, normal: str | None) -> None:
    assert parse_origin(text) == normal
