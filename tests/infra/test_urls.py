"""URLs can be shown everywhere without what is secret in them."""

from __future__ import annotations

import pickle

import pytest
from pydantic import BaseModel

from infra.urls import SafeUrl, redact_text, redact_url

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@films.example/a.mp4",
        f"https://{SECRET}@films.example/a.mp4",
        f"https://films.example/a.mp4?token={SECRET}",
        f"https://films.example/a.mp4?width=4&X-Amz-Signature={SECRET}&height=2",
        f"https://films.example/a.mp4?some_new_name={SECRET}",
        f"https://films.example/a.mp4?{SECRET}",
        f"https://films.example/a.mp4?width={SECRET}withmore",
        f"https://films.example/a.mp4#access_token={SECRET}",
        f"https://films.example/a.mp4;jsessionid={SECRET}",
        f"https://films.example/hdnts=exp=1~hmac={SECRET}/a.m3u8",
        f"https://user:{SECRET}/with/slashes@films.example/a.mp4",
        f"https://user:12/{SECRET}@films.example/a.mp4",
        f"https://user:{SECRET}?and@films.example/a.mp4",
        f"https://user:{SECRET}#and@films.example/a.mp4",
        f"rtmp://live.example/app/{SECRET}",
        f"rtsp://admin:{SECRET}@192.168.1.9:554/h264",
        f"srt://live.example:9000?passphrase={SECRET}",
        f"user:{SECRET}@films.example",
        f"https://[{SECRET}/a",
        f"HTTPS://U:{SECRET}@films.example",
    ],
)
def test_secrets_are_not_shown(url: str) -> None:
    assert SECRET not in redact_url(url)
    assert SECRET not in str(SafeUrl(url)) + repr(SafeUrl(url)) + f"{SafeUrl(url)}"
    if "://" in url:
        assert SECRET not in redact_text(f"[hls] cannot open '{url}' (timed out)")


def test_what_helps_is_shown() -> None:
    shown = redact_url("https://u:p@films.example:8443/a/b.mp4?width=640&sig=abc&expires=9#x")
    assert shown == "https://films.example:8443/a/b.mp4?width=640&sig=***&expires=***"
    assert redact_url("rtsp://[fd00::7]:554/stream1") == "rtsp://[fd00::7]:554/stream1"
    assert redact_url("rtmp://live.example/app") == "rtmp://live.example/app"
    assert redact_text("see 'https://a.example/x?k=1' and go on") == "see 'https://a.example/x?k=***' and go on"


def test_a_url_stays_on_its_line_and_short() -> None:
    shown = redact_url("https://films.example/a\r\nWARNING forged\x1b[31m" + "x" * 9000)
    assert "\n" not in shown and "\r" not in shown and "\x1b" not in shown and len(shown) <= 300


@pytest.mark.parametrize("text", ["", "://", "?", "@", "https://", "a b", "//[", "https://:@:@/", "\ud800"])
def test_nothing_makes_it_fail(text: str) -> None:
    assert isinstance(redact_url(text), str)


def test_a_safe_url_travels_and_stays_safe() -> None:
    class Wanted(BaseModel):
        source: SafeUrl

    url = f"https://films.example/a?key={SECRET}"
    wanted = Wanted.model_validate_json(f'{{"source": "{url}"}}')
    assert wanted.source.reveal() == url and wanted.source == SafeUrl(url) == pickle.loads(pickle.dumps(SafeUrl(url)))
    assert SECRET not in wanted.model_dump_json() + repr(wanted) + str(wanted.model_dump(mode="json"))
    assert Wanted.model_json_schema()["properties"]["source"]["format"] == "uri"
    with pytest.raises(ValueError):
        Wanted(source="x" * 9000)  # type: ignore[arg-type]
