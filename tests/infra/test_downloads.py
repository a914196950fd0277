"""Downloads from real servers on loopback: what evil ones gain, and that good ones are read right."""

from __future__ import annotations

import gzip
import logging
import random
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.downloads import Download, RangedSource, fetch, fetch_whole
from infra.errors import FetchFailed, NetworkError, UrlRefused
from infra.network import FetchLimits, FetchPolicy
from infra.urls import SafeUrl
from tests.web_server import Authority, Names, Page, WebServer, endless_page, raw, redirect, send, send_ranges

SECRET = "hunter2"
CONTENT = random.Random(1).randbytes(300_000)


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as running:
        running.pages["/film.mp4"] = CONTENT
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def policy(*servers: WebServer, **changes: Any) -> FetchPolicy:
    """Allows the addresses and ports of these servers, by http, and no other special ones."""
    limits = FetchLimits(**{"seconds": 5.0, **changes.pop("limits", {})})
    return FetchPolicy(
        schemes=changes.pop("schemes", {"http"}),
        networks=tuple(f"{one.address}/32" for one in servers),
        ports={one.port for one in servers},
        limits=limits,
        **changes,
    )


def read(url: str, rules: FetchPolicy, **options: Any) -> bytes:
    with fetch(url, rules, **options) as download:
        return download.readall()


def code_of(url: str, rules: FetchPolicy, **options: Any) -> str:
    with pytest.raises(NetworkError) as caught:
        read(url, rules, **options)
    assert caught.value.remedy
    return caught.value.code


def test_a_file_comes_as_it_is(server: WebServer) -> None:
    with fetch(server.url(), policy(server)) as download:
        assert isinstance(download, Download) and download.size == download.total == len(CONTENT)
        first = download.read(1000)
        assert first == CONTENT[:1000] and download.received_bytes == 1000
        assert first + download.readall() == CONTENT
        assert download.read(10) == b""
    with pytest.raises(ValueError, match="closed"):
        download.read(1)
    headers = server.seen[0][1]
    assert headers["Accept-Encoding"] == "identity" and "Cookie" not in headers and "Authorization" not in headers


def test_chunks_and_bodies_without_a_length_come_whole(server: WebServer) -> None:
    server.pages["/chunked"] = raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n5\r\ndefgh\r\n0\r\n\r\n"
    )
    server.pages["/until-closed"] = raw(b"HTTP/1.0 200 OK\r\n\r\nabcdefgh")
    for path in ("/chunked", "/until-closed"):
        with fetch(server.url(path), policy(server)) as download:
            assert download.size is None and download.readall() == b"abcdefgh"


def test_the_connection_goes_to_the_checked_address_and_no_name_is_asked_twice(server: WebServer) -> None:
    """DNS rebinding: the second answer leads to a server inside, which gets no visitor."""
    with WebServer("127.0.0.2", server.port) as inside:
        inside.pages["/film.mp4"] = b"internal"
        names = Names({"films.test": [["127.0.0.1"], ["127.0.0.2"]]})
        assert read(server.url(host="films.test"), policy(server), resolver=names) == CONTENT
        assert names.asked == ["films.test"] and inside.seen == []
        assert server.seen[0][1]["Host"] == f"films.test:{server.port}"
        with pytest.raises(UrlRefused):
            read(server.url(host="films.test"), policy(server), resolver=names)
        assert inside.seen == []


def test_rebinding_between_two_steps_of_a_redirection(server: WebServer) -> None:
    server.pages["/start"] = redirect("/film.mp4")
    with WebServer("127.0.0.2", server.port) as inside:
        names = Names({"films.test": [["127.0.0.1"], ["127.0.0.2"]]})
        assert code_of(server.url("/start", "films.test"), policy(server), resolver=names) == "url-address"
        assert inside.seen == [] and server.paths == ["/start"]


def test_the_next_address_is_tried_where_nobody_answers(server: WebServer) -> None:
    names = Names({"films.test": [["127.0.0.9", "127.0.0.1"]]})
    both = FetchPolicy(schemes={"http"}, networks=("127.0.0.1/32", "127.0.0.9/32"), ports={server.port})
    assert read(server.url(host="films.test"), both, resolver=names) == CONTENT
    names = Names({"films.test": [["127.0.0.1", "127.0.0.9"]]})
    assert read(server.url(host="films.test"), both, resolver=names) == CONTENT


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("http://169.254.169.254/latest/meta-data/", "url-port"),
        ("http://169.254.169.254:{port}/latest/meta-data/", "url-address"),
        ("http://127.0.0.2:{port}/", "url-address"),
        ("http://[::1]:{port}/", "url-address"),
        ("http://[::ffff:127.0.0.1]:{port}/", "url-address"),
        ("http://2130706433:{port}/", "url-host"),
        ("http://0x7f.1:{port}/", "url-host"),
        ("http://inside.test:{port}/", "url-address"),
        ("//inside.test:{port}/", "url-address"),
        ("file:///etc/passwd", "url-scheme"),
        ("gopher://127.0.0.1:{port}/_x", "url-scheme"),
        ("http://user:pw@127.0.0.1:{port}/film.mp4", "url-credentials"),
        ("http://127.0.0.1:22/", "url-port"),
        ("", "url-redirect"),
    ],
)
@pytest.mark.parametrize("status", [301, 307])
def test_redirections_are_checked(server: WebServer, target: str, code: str, status: int) -> None:
    server.pages["/start"] = redirect(target.format(port=server.port), status)
    names = Names({"inside.test": [["10.0.0.5"]]})
    with WebServer("127.0.0.2", server.port) as inside:
        assert code_of(server.url("/start"), policy(server), resolver=names) == code
        assert inside.seen == [] and server.paths == ["/start"]


def test_redirections_end(server: WebServer) -> None:
    server.pages["/loop"] = redirect("/loop")
    assert code_of(server.url("/loop"), policy(server)) == "url-redirect"
    assert len(server.paths) == 4, "the first request and three redirections"
    server.pages["/a"], server.pages["/b"] = redirect("/b"), redirect("/film.mp4")
    with fetch(server.url("/a"), policy(server)) as download:
        assert download.readall() == CONTENT
        assert download.source.url == SafeUrl(server.url("/film.mp4"))


def test_credentials_go_to_their_own_host_alone(server: WebServer) -> None:
    with WebServer("127.0.0.2") as other:
        other.pages["/film.mp4"] = CONTENT
        server.pages["/here"] = redirect("/film.mp4")
        server.pages["/there"] = redirect(other.url())
        rules = policy(server, other, user_info=True)
        for path, visited in (("/here", server), ("/there", other)):
            read(f"http://user:{SECRET}@127.0.0.1:{server.port}{path}", rules)
            assert "Authorization" in server.seen[-1 if visited is other else -2][1]
            assert ("Authorization" in visited.seen[-1][1]) is (visited is server)
        read(server.url("/there"), rules, authorization=f"Bearer {SECRET}")
        assert server.seen[-1][1]["Authorization"] == f"Bearer {SECRET}"
        assert "Authorization" not in other.seen[-1][1] and SECRET not in str(other.seen)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_proxies_of_the_environment_are_not_used(server: WebServer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with WebServer() as proxy:
        monkeypatch.setenv(name, proxy.url(""))
        assert read(server.url(), policy(server)) == CONTENT
        assert proxy.seen == []


def test_netrc_is_not_used(server: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    read(server.url(), policy(server))
    assert "Authorization" not in server.seen[0][1]


def test_an_announced_size_is_refused_before_anything_is_read(server: WebServer) -> None:
    server.pages["/large"] = lambda handler: send(handler, b"", length=10**12)
    with pytest.raises(FetchFailed, match="1000000000000 bytes; the limit is 1000 bytes") as caught:
        fetch(server.url("/large"), policy(server, limits={"bytes": 1000}))
    assert caught.value.code == "fetch-too-large"


def test_a_body_of_unknown_length_may_be_as_large_as_the_limit_and_no_larger(server: WebServer) -> None:
    server.pages["/open"] = raw(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(1000))
    assert read(server.url("/open"), policy(server, limits={"bytes": 1000})) == bytes(1000)
    assert code_of(server.url("/open"), policy(server, limits={"bytes": 999})) == "fetch-too-large"


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"y" * 60_000 + b"\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"Trailer: x\r\n" * 4096),
        (b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"x" * 50_000 + b"\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 4096),
        (b"", b"x" * 65536),
    ],
    ids=["no length", "chunks", "extensions", "trailers", "headers", "continue", "no line end"],
)
def test_endless_answers_end(server: WebServer, head: bytes, part: bytes) -> None:
    server.pages["/endless"] = endless_page(head, part)
    code = code_of(server.url("/endless"), policy(server, limits={"bytes": 1 << 20, "seconds": 20}))
    assert code in ("fetch-too-large", "fetch-broken")


@pytest.mark.parametrize("where", ["status", "headers", "body", "chunk size"])
def test_a_server_that_drips_is_left(server: WebServer, where: str) -> None:
    """A byte every 20 ms: no single read ever waits for long."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
    begin, drop = {
        "status": (b"", b"H"),
        "headers": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
        "body": (head, b"x"),
        "chunk size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    }[where]

    def page(handler: Any) -> None:
        handler.wfile.write(begin)
        while not server.stopping.wait(0.02):
            handler.wfile.write(drop)

    server.pages["/slow"] = page
    began = time.monotonic()
    assert code_of(server.url("/slow"), policy(server, limits={"seconds": 0.5})) == "fetch-timeout"
    assert time.monotonic() - began < 3


def test_a_silent_server_is_left(server: WebServer) -> None:
    server.pages["/silent"] = lambda handler: server.stopping.wait(30)
    assert code_of(server.url("/silent"), policy(server, limits={"seconds": 0.3})) == "fetch-timeout"


def test_a_slow_reader_does_not_use_up_the_servers_time(server: WebServer) -> None:
    with fetch(server.url(), policy(server, limits={"seconds": 0.4})) as download:
        first = download.read(10)
        server.stopping.wait(0.6)  # longer than the limit, and nobody waits for the server
        assert first + download.readall() == CONTENT


@pytest.mark.parametrize("coding", ["gzip", "br", "x-gzip, identity"])
def test_a_compressed_answer_is_not_inflated(server: WebServer, coding: str) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    server.pages["/bomb"] = lambda handler: send(handler, bomb, Content_Encoding=coding)
    assert code_of(server.url("/bomb"), policy(server)) == "fetch-encoding"
    server.pages["/te"] = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
    assert code_of(server.url("/te"), policy(server)) == "fetch-encoding"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nab\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
    ],
)
def test_answers_that_are_cut_off_or_not_http(server: WebServer, answer: bytes) -> None:
    server.pages["/bad"] = raw(answer)
    assert code_of(server.url("/bad"), policy(server)) == "fetch-broken"


@pytest.mark.parametrize(
    ("status", "is_transient"),
    [(401, False), (403, False), (404, False), (500, True), (503, True), (206, False), (204, False)],
)
def test_statuses(server: WebServer, status: int, is_transient: bool) -> None:
    server.pages["/status"] = lambda handler: send(handler, b"", status=status)
    with pytest.raises(FetchFailed, match=f"HTTP {status}") as caught:
        fetch(server.url("/status"), policy(server))
    assert (caught.value.code, caught.value.status) == ("fetch-status", status)
    assert caught.value.is_transient is is_transient


def test_nobody_listens() -> None:
    with WebServer() as gone:
        rules, url = policy(gone), gone.url()
    assert code_of(url, rules) == "fetch-connect"


def test_a_passing_failure_is_tried_once_more(server: WebServer) -> None:
    answers = [503, 200]
    server.pages["/moody"] = lambda handler: send(handler, b"abc", status=answers.pop(0))
    assert fetch_whole(server.url("/moody"), policy(server), limit_bytes=10) == b"abc"
    server.pages["/gone"] = lambda handler: send(handler, b"", status=404)
    with pytest.raises(FetchFailed):
        fetch_whole(server.url("/gone"), policy(server), limit_bytes=10)
    assert server.paths == ["/moody", "/moody", "/gone"]


def test_https_is_verified_for_the_name_and_goes_to_the_pinned_address(authority: Authority) -> None:
    names = Names({"films.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"]]})
    with WebServer(tls=authority.context("films.test")) as server:
        server.pages["/film.mp4"] = CONTENT
        trusting = policy(server, schemes={"https"}, ca_file=authority.ca_file)
        assert read(server.url(host="films.test"), trusting, resolver=names) == CONTENT
        for url, rules in (
            (server.url(host="other.test"), trusting),
            (server.url(), trusting),
            (server.url(host="films.test"), policy(server, schemes={"https"})),
        ):
            with pytest.raises(FetchFailed, match="certificate") as caught:
                read(url, rules, resolver=names)
            assert caught.value.code == "fetch-tls"
        assert len(server.seen) == 1, "nothing was sent to a server that is not the right one"


def test_an_expired_certificate_and_plain_http_on_a_tls_port(authority: Authority, server: WebServer) -> None:
    names = Names({"films.test": [["127.0.0.1"]]})
    with WebServer(tls=authority.context("films.test", days=-1)) as expired:
        rules = policy(expired, schemes={"https"}, ca_file=authority.ca_file)
        assert code_of(expired.url(host="films.test"), rules, resolver=names) == "fetch-tls"
    rules = policy(server, schemes={"https"}, ca_file=authority.ca_file)
    assert code_of(f"https://films.test:{server.port}/", rules, resolver=names) == "fetch-tls"


def test_nothing_leads_from_https_to_http(authority: Authority, server: WebServer) -> None:
    names = Names({"films.test": [["127.0.0.1"]]})
    with WebServer(tls=authority.context("films.test")) as secure:
        secure.pages["/start"] = redirect(server.url())
        rules = policy(secure, server, schemes={"https", "http"}, ca_file=authority.ca_file)
        assert code_of(secure.url("/start", "films.test"), rules, resolver=names) == "url-scheme"
        assert server.seen == []


def test_a_server_that_never_finishes_its_tls_handshake(authority: Authority) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        rules = FetchPolicy(networks=("127.0.0.1/32",), ports={port}, limits=FetchLimits(seconds=0.4))
        names = Names({"films.test": [["127.0.0.1"]]})
        assert code_of(f"https://films.test:{port}/", rules, resolver=names) == "fetch-timeout"


def test_credentials_are_in_no_message_and_no_log(server: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong, in the message, in what is chained to it, or in anybody's log at its finest level."""
    caplog.set_level(logging.DEBUG)
    server.pages.update({
        f"/status?sig={SECRET}": lambda handler: send(handler, b"", status=403),
        f"/loop?sig={SECRET}": redirect(f"/loop?sig={SECRET}"),
        f"/cut?sig={SECRET}": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"),
        f"/junk?sig={SECRET}": raw(SECRET.encode() + b"\r\n"),
        f"/large?sig={SECRET}": lambda handler: send(handler, b"", length=10**15),
        f"/evil?sig={SECRET}": redirect(f"http://10.0.0.1/?sig={SECRET}"),
        f"/torn?sig={SECRET}": redirect(f"http://[{SECRET}/"),
    })  # fmt: skip
    rules = policy(server, user_info=True)
    shown = []
    urls = [f"http://user:{SECRET}@127.0.0.1:{server.port}{path}" for path in server.pages if "sig" in path]
    urls += [f"http://user:{SECRET}@{host}/?sig={SECRET}" for host in ("127.0.0.1:1", "10.0.0.1", "0x7f.1")]
    urls += [f"http://user:{SECRET}@{host}:{server.port}/?sig={SECRET}" for host in ("10.0.0.1", "no.test")]
    urls += [f"ftp://user:{SECRET}@films.test/", f"http://user:{SECRET}@x:y/", f"http://u:{SECRET}\r\n@films.test/"]
    for url in urls:
        with pytest.raises(NetworkError) as caught:
            read(url, rules, resolver=Names({"no.test": [[]]}))
        shown.append("".join(traceback.format_exception(caught.value)))
        assert SECRET not in repr(vars(caught.value)), url
    assert len(shown) == 15 and SECRET not in "".join(shown) + caplog.text


def test_ranges_make_a_file_that_can_seek(server: WebServer) -> None:
    large = random.Random(2).randbytes(1 << 20) * 12
    server.pages["/big/Film%20one.mp4"] = large
    source = RangedSource(server.url("/big/Film%20one.mp4"), policy(server))
    assert (source.size, source.name, source.version) == (len(large), "Film one.mp4", '"1"')
    chance = random.Random(3)
    with source.open() as file:
        for _ in range(30):
            at, size = chance.randrange(len(large)), chance.choice([1, 1000, 300_000])
            file.seek(at)
            assert file.read(size) == large[at : at + size]
        file.seek(-4, 2)
        assert file.read() == large[-4:]
    assert len(server.seen) < 70


def test_a_film_is_decoded_by_ranges(server: WebServer, repository: Path) -> None:
    import av

    film = repository / "tests/data/walk_hr.mp4"
    server.pages["/walk.mp4"] = film.read_bytes()
    source = RangedSource(server.url("/walk.mp4"), policy(server))
    with av.open(str(film)) as here, source.open() as file, av.open(file, format="mp4") as there:
        wanted = [frame.pts for frame in here.decode(video=0)]
        assert [frame.pts for frame in there.decode(video=0)] == wanted and wanted


@pytest.mark.parametrize(
    ("page", "code"),
    [
        (lambda handler: send(handler, CONTENT), "fetch-ranges"),
        (lambda handler: send(handler, b"x", status=206), "fetch-ranges"),
        (lambda handler: send(handler, b"x", status=206, Content_Range="bytes 5-5/100"), "fetch-ranges"),
        (lambda handler: send(handler, b"x", status=206, Content_Range="bytes 0-0/*"), "fetch-ranges"),
        (lambda handler: send(handler, b"xy", status=206, Content_Range="bytes 0-0/100"), "fetch-too-large"),
        (lambda handler: send(handler, b"x", status=206, Content_Range=f"bytes 0-0/{10**15}"), "fetch-too-large"),
        (lambda handler: send(handler, b"", status=416), "fetch-status"),
    ],
)
def test_servers_without_proper_ranges(server: WebServer, page: Page, code: str) -> None:
    server.pages["/odd"] = page
    with pytest.raises(FetchFailed) as caught:
        RangedSource(server.url("/odd"), policy(server))
    assert caught.value.code == code


def test_a_file_that_changes_is_noticed(server: WebServer) -> None:
    versions = ['"1"', '"1"', '"2"']
    server.pages["/changing"] = lambda handler: send_ranges(handler, CONTENT, versions.pop(0))
    source = RangedSource(server.url("/changing"), policy(server))
    with source.open() as file:
        assert file.read(10) == CONTENT[:10]
        with pytest.raises(FetchFailed) as caught:
            file.seek(280_000)
            file.read(10)
        assert caught.value.code == "fetch-changed"


def test_every_range_is_checked_again(server: WebServer) -> None:
    names = Names({"films.test": [["127.0.0.1"], ["127.0.0.2"]]})
    source = RangedSource(server.url(host="films.test"), policy(server), resolver=names)
    with source.open() as file, pytest.raises(UrlRefused) as caught:
        file.read(10)
    assert caught.value.code == "url-address"
