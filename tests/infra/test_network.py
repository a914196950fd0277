"""What may be fetched: the policy, URLs checked against it, and where a server may lead. Nothing is sent here."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from infra.errors import NetworkError, UrlRefused
from infra.network import FetchPolicy, approve, follow
from infra.urls import SafeUrl
from tests.web_server import Names

PUBLIC = "93.184.215.14"
DEFAULT = FetchPolicy()
OPEN = FetchPolicy(schemes={"https", "http"}, ports={80, 443, 8443}, user_info=True)


def names() -> Names:
    return Names(
        {name: [[PUBLIC]] for name in ("films.example", "cdn.films.example", "evilfilms.example", "other.example")}
    )


def code_of(url: str, policy: FetchPolicy = DEFAULT) -> str:
    with pytest.raises(NetworkError) as caught:
        approve(url, policy, resolver=names())
    assert caught.value.remedy
    return caught.value.code


@pytest.mark.parametrize(
    "url",
    [
        "http://films.example/a",
        "file:///etc/passwd",
        "ftp://films.example/a",
        "gopher://films.example/_a",
        "rtsp://films.example/a",
        "concat://films.example/a",
        "data://text/plain,a",
        "HTTP://films.example/a",
    ],
)
def test_schemes_that_are_not_allowed(url: str) -> None:
    assert code_of(url) == "url-scheme"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "films.example/a",
        "//films.example/a",
        "/etc/passwd",
        "https:films.example",
        "https:/films.example",
        "concat:https://films.example/a|file:///etc/passwd",
        "subfile,,start,0,end,9,,:/etc/passwd",
        "data:text/plain,a",
        "https://films.example/a\r\nX-Injected: 1",
        "https://films.example/a\nb",
        "https://films.example\t/a",
        "https://films.example/\0",
        " https://films.example/a",
        "https://films.example/a ",
        "https://films.example\\@169.254.169.254/",
        "https://a@b@films.example/",
        "https://films.example:port/",
        "https://films.example:443:80/",
        "https://[::1]x/",
        "https://films.example/" + "a" * 9000,
        "https://films.example/\ud800",
    ],
)
def test_what_is_no_url(url: str) -> None:
    assert code_of(url) == "url-syntax"


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::1]/",
        "https://[::ffff:7f00:1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::127.0.0.1]/",
        "https://[2002:7f00:1::]/",
        "https://0.0.0.0/",
    ],
)
def test_addresses_that_are_not_public(url: str) -> None:
    assert code_of(url) == "url-address"


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "localhost.", "１２７.0.0.1", "[::1%25lo]", ""]
)
def test_hosts_in_unusual_spellings(host: str) -> None:
    assert code_of(f"https://{host}/") == "url-host"


def test_ports() -> None:
    assert code_of("https://films.example:22/") == "url-port"
    assert code_of("https://films.example:0/") == "url-port"
    assert code_of("https://films.example:99999/") == "url-port"
    assert code_of("http://films.example/", FetchPolicy(schemes={"http"}, ports={8080})) == "url-port"
    assert code_of("srt://films.example/", FetchPolicy(schemes={"srt"})) == "url-port"
    assert approve("https://films.example:8443/", OPEN, resolver=names()).authority == "films.example:8443"


def test_only_listed_hosts() -> None:
    policy = FetchPolicy(hosts=("*.Films.Example", "other.example", "8.8.8.8"))
    for host in ("cdn.films.example", "other.example", "8.8.8.8"):
        assert approve(f"https://{host}/", policy, resolver=names()).host == host
    for host in ("films.example", "evilfilms.example", "cdn.films.example.evil", "1.1.1.1", "x.other.example"):
        assert code_of(f"https://{host}/", policy) == "url-host"
    inside = Names({"other.example": [["10.0.0.1"]]})
    with pytest.raises(UrlRefused) as caught:
        approve("https://other.example/", policy, resolver=inside)
    assert caught.value.code == "url-address", "a listed name does not make its addresses public"


@pytest.mark.parametrize(
    "setting",
    [
        {"hosts": ["127.1"]},
        {"hosts": ["*"]},
        {"hosts": ["a/b"]},
        {"schemes": ["file"]},
        {"ports": [0]},
        {"networks": ["10.0.0.1/8"]},
        {"limits": {"seconds": 0}},
        {"hots": []},
    ],
)
def test_policies_that_make_no_sense(setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        FetchPolicy.model_validate(setting)


def test_user_info_needs_to_be_allowed() -> None:
    assert code_of("https://user:secret@films.example/") == "url-credentials"
    assert code_of("https://@films.example/") == "url-credentials"
    assert code_of("https://films.example@169.254.169.254/", OPEN) == "url-address"
    found = approve("https://us%65r:se%3Acret@films.example/a", OPEN, resolver=names())
    assert found.authorization == "Basic dXNlcjpzZTpjcmV0" and found.url.reveal() == "https://films.example/a"
    assert "secret" not in repr(found) and "dXNl" not in repr(found)
    for value in ("a\r\nb: c", "ü"):
        with pytest.raises(UrlRefused) as caught:
            approve("https://films.example/", OPEN, resolver=names(), authorization=value)
        assert caught.value.code == "url-credentials" and value not in str(caught.value)


def test_what_is_approved_is_written_in_one_way() -> None:
    found = approve('HTTPS://Films.EXAMPLE:443/a b/ü%20?q="x"&r={1}#part', OPEN, resolver=names())
    assert found.url.reveal() == "https://films.example/a%20b/%C3%BC%20?q=%22x%22&r=%7B1%7D"
    assert found.target == "/a%20b/%C3%BC%20?q=%22x%22&r=%7B1%7D"
    assert found.addresses == (PUBLIC,) and found.authority == "films.example"
    assert approve("https://films.example", OPEN, resolver=names()).target == "/"


def test_a_camera_gets_its_address_pinned() -> None:
    lan = FetchPolicy(schemes={"rtsp"}, networks=("192.168.20.0/24", "fd00::/16"), user_info=True)
    resolver = Names({"cam1": [["192.168.20.7"], ["127.0.0.1"]], "cam2": [["fd00::7"]]})
    found = approve("rtsp://admin:secret@cam1/h264?channel=1", lan, resolver=resolver)
    assert found.pinned_url.reveal() == "rtsp://admin:secret@192.168.20.7/h264?channel=1"
    assert "secret" not in str(found.pinned_url) + repr(found)
    assert resolver.asked == ["cam1"]
    assert approve("rtsp://cam2/", lan, resolver=resolver).pinned_url.reveal() == "rtsp://[fd00::7]/"
    with pytest.raises(UrlRefused):
        approve("rtsp://cam1/h264", lan, resolver=resolver)


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("http://films.example/a", "url-scheme"),
        ("HTTP://films.example/a", "url-scheme"),
        ("file:///etc/passwd", "url-scheme"),
        ("file:/etc/passwd", "url-scheme"),
        ("concat:https://films.example/a|file:///etc/passwd", "url-scheme"),
        ("concat:/etc/passwd", "url-scheme"),
        ("subfile,,start,0,end,9,,:/etc/passwd", "url-scheme"),
        ("crypto+https://films.example/a", "url-scheme"),
        ("data:text/plain;base64,AAAA", "url-scheme"),
        ("data://x/", "url-scheme"),
        ("//169.254.169.254/latest", "url-address"),
        ("https://127.0.0.1/", "url-address"),
        ("https://user:x@films.example/", "url-credentials"),
        ("https://films.example:22/", "url-port"),
        ("a\r\nX: y", "url-syntax"),
        ("..\\..\\a", "url-syntax"),
        ("", "url-syntax"),
        ("//[::1/", "url-syntax"),
    ],
)
def test_where_a_server_may_not_lead(reference: str, code: str) -> None:
    base = approve("https://user:secret@films.example/dir/list.m3u8?k=secret", OPEN, resolver=names())
    with pytest.raises(UrlRefused) as caught:
        follow(base, reference, OPEN, resolver=names())
    assert caught.value.code == code
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("seg 1.ts", "https://films.example/dir/seg%201.ts"),
        ("../other/a.ts?x=1", "https://films.example/other/a.ts?x=1"),
        ("../../../etc/passwd", "https://films.example/etc/passwd"),
        ("/a:b.ts", "https://films.example/a:b.ts"),
        ("?k=1", "https://films.example/dir/list.m3u8?k=1"),
        ("//other.example/a", "https://other.example/a"),
        ("https://other.example/a", "https://other.example/a"),
    ],
)
def test_where_a_server_may_lead(reference: str, url: str) -> None:
    base = approve("https://user:secret@films.example/dir/list.m3u8", OPEN, resolver=names())
    found = follow(base, reference, OPEN, resolver=names())
    assert found.url == SafeUrl(url)
    assert (found.authorization is not None) is (found.host == "films.example")


def test_credentials_stay_with_their_port() -> None:
    base = approve("https://films.example/", OPEN, resolver=names(), authorization="Bearer secret")
    assert follow(base, "https://films.example/a", OPEN, resolver=names()).authorization == "Bearer secret"
    assert follow(base, "https://films.example:8443/a", OPEN, resolver=names()).authorization is None
