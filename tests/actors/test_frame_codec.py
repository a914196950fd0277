"""What every codec of a live stream promises, and that no bytes break it."""

from __future__ import annotations

import io
import os
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from actors.errors import Undecodable
from actors.frame_codec import (
    LARGEST_ENCODED_SIDE,
    EncodedFrame,
    FrameDecoder,
    largest_message_bytes,
    open_decoder,
    open_encoder,
)
from infra.protocol import Codec
from infra.refusals import FrameTooLarge
from tests.coded_frames import Frame, bar_colours, colour_bars, psnr, walk

CODECS: tuple[Codec, ...] = ("jpeg", "webp", "png", "raw", "h264")
COMPRESSED: tuple[Codec, ...] = ("jpeg", "webp", "png", "h264")
STILLS: tuple[Codec, ...] = ("jpeg", "webp", "png")


def decoder_of(codec: Codec, width: int = 320, height: int = 180) -> FrameDecoder:
    return open_decoder(codec, width, height, max_pixels=1920 * 1080)


def encoded(codec: Codec, rgb_HWC: Frame, *, quality: int = 90) -> EncodedFrame:
    (frame,) = open_encoder(codec, quality=quality, fps=25).encode(rgb_HWC, 7, force_key=False)
    return frame


def decoded(codec: Codec, payload: bytes | memoryview, width: int = 320, height: int = 180) -> Frame:
    (frame,) = decoder_of(codec, width, height).decode(memoryview(payload), 7, True)
    assert frame.id == 7
    return frame.rgb_HWC


@pytest.mark.parametrize(("codec", "least"), [("jpeg", 35), ("webp", 35), ("png", 200), ("raw", 200), ("h264", 35)])
def test_a_real_picture_comes_back(codec: Codec, least: float) -> None:
    picture = walk(1)[0]
    frame = encoded(codec, picture)
    back = decoded(codec, frame.payload)
    assert frame.key
    assert back.shape == picture.shape and back.dtype == np.uint8
    assert psnr(picture, back) > least


@pytest.mark.parametrize("quality", [50, 100])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [(320, 176), (1280, 720)])
def test_saturated_colours_do_not_shift(codec: Codec, size: tuple[int, int], quality: int) -> None:
    bars = colour_bars(*size)
    back = decoded(codec, encoded(codec, bars, quality=quality).payload, *size)
    assert np.abs(bar_colours(back) - bar_colours(bars)).max() < (2.0 if quality == 100 else 4.0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [(16, 16), (17, 16), (31, 63), (321, 181), (8192, 16)])
def test_every_size_comes_back(codec: Codec, size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.linspace(0, 255, width * height).astype(np.uint8).reshape(height, width)
    picture = np.stack([ramp, ramp[::-1], np.full_like(ramp, 90)], axis=2)
    assert psnr(picture, decoded(codec, encoded(codec, picture, quality=95).payload, width, height)) > 30


@pytest.mark.parametrize("codec", COMPRESSED)
def test_quality_is_worth_its_bytes(codec: Codec) -> None:
    picture = walk(1)[0]
    sizes, quality_db = [], []
    for quality in (1, 25, 50, 75, 100):
        payload = encoded(codec, picture, quality=quality).payload
        sizes.append(len(payload))
        quality_db.append(psnr(picture, decoded(codec, payload)))
    if codec == "png":
        assert len(set(sizes)) == 1
    else:
        assert sizes == sorted(set(sizes)) and quality_db == sorted(set(quality_db))


def test_raw_pixels_are_never_copied() -> None:
    picture = walk(1)[0].copy()
    frame = encoded("raw", picture)
    assert np.shares_memory(np.frombuffer(frame.payload, np.uint8), picture)
    assert len(frame.payload) == picture.nbytes == largest_message_bytes("raw", 320, 180)
    message = memoryview(bytearray(64 + picture.nbytes))
    assert np.shares_memory(decoded("raw", message[64:]), np.frombuffer(message, np.uint8))
    not_contiguous = picture[:, ::-1]
    assert np.array_equal(decoded("raw", encoded("raw", not_contiguous).payload), not_contiguous)


@pytest.mark.parametrize("codec", COMPRESSED)
def test_noise_is_within_the_bound(codec: Codec) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (180, 320, 3), np.uint8)
    assert len(encoded(codec, noise).payload) <= largest_message_bytes(codec, 320, 180)
    assert largest_message_bytes(codec, 16, 16) >= 64 * 1024


@pytest.mark.parametrize("codec", CODECS)
def test_a_stream_has_no_size_beyond_the_limits(codec: Codec) -> None:
    for width, height in ((1921, 1080), (8193, 16), (16, 8193)):
        with pytest.raises(FrameTooLarge):
            open_decoder(codec, width, height, max_pixels=1920 * 1080)
    decoder = decoder_of(codec)
    with pytest.raises(FrameTooLarge):
        decoder.resize(1921, 1080)
    assert decoder.decode(memoryview(encoded(codec, walk(1)[0]).payload), 1, True)


@pytest.mark.parametrize("codec", COMPRESSED)
def test_more_pixels_than_agreed_are_refused_until_they_are_agreed(codec: Codec) -> None:
    large = memoryview(encoded(codec, colour_bars(640, 360)).payload)
    decoder = decoder_of(codec)
    with pytest.raises(FrameTooLarge):
        decoder.decode(large, 1, True)
    decoder.resize(640, 360)
    assert decoder.decode(large, 2, True)[0].rgb_HWC.shape == (360, 640, 3)
    # A smaller picture, and one on its side, need no agreement.
    upright = memoryview(encoded(codec, colour_bars(360, 640)).payload)
    small = memoryview(encoded(codec, colour_bars(64, 32)).payload)
    assert decoder.decode(upright, 3, True)[0].rgb_HWC.shape == (640, 360, 3)
    assert decoder.decode(small, 4, True)[0].rgb_HWC.shape == (32, 64, 3)


@pytest.mark.parametrize("codec", COMPRESSED)
def test_a_picture_too_small_to_restore_costs_its_frame_only(codec: Codec) -> None:
    decoder = decoder_of(codec)
    with pytest.raises(Undecodable, match="16"):
        decoder.decode(memoryview(encoded(codec, np.zeros((8, 320, 3), np.uint8)).payload), 1, True)
    assert decoder.decode(memoryview(encoded(codec, walk(1)[0]).payload), 2, True)


def test_raw_pixels_change_size_when_told() -> None:
    decoder = decoder_of("raw")
    small = np.zeros((16, 32, 3), np.uint8)
    for wrong in (small.nbytes, 320 * 180 * 3 - 1, 320 * 180 * 3 + 1):
        with pytest.raises(Undecodable, match="172800"):
            decoder.decode(memoryview(bytes(wrong)), 1, True)
    decoder.resize(32, 16)
    assert decoder.decode(memoryview(small).cast("B"), 2, True)[0].rgb_HWC.shape == (16, 32, 3)


@pytest.mark.parametrize("codec", COMPRESSED)
def test_a_message_far_too_long_is_refused(codec: Codec) -> None:
    payload = bytes(encoded(codec, walk(1)[0]).payload)
    with pytest.raises(FrameTooLarge, match="bytes"):
        decoder_of(codec).decode(memoryview(payload.ljust(largest_message_bytes(codec, 320, 180) + 1, b"\0")), 1, True)


@pytest.mark.parametrize("codec", CODECS)
def test_an_empty_message_costs_its_frame_only(codec: Codec) -> None:
    decoder = decoder_of(codec)
    with pytest.raises(Undecodable):
        decoder.decode(memoryview(b""), 1, True)
    assert decoder.decode(memoryview(encoded(codec, walk(1)[0]).payload), 2, True)[0].id == 2


@pytest.mark.parametrize("codec", COMPRESSED)
def test_only_the_codec_agreed_on_is_tried(codec: Codec) -> None:
    picture = walk(1)[0]
    others = [bytes(encoded(other, picture).payload) for other in CODECS if other != codec]
    for format in ("TIFF", "GIF", "BMP", "EPS", "ICO", "PPM", "TGA", "JPEG2000", "PCX"):
        file = io.BytesIO()
        Image.fromarray(picture[:128, :128]).save(file, format)
        others.append(file.getvalue())
    others.append(b"8BPS\x00\x01" + bytes(40))
    for payload in others:
        with pytest.raises(Undecodable):
            decoder_of(codec).decode(memoryview(payload), 1, True)


@pytest.mark.parametrize("codec", COMPRESSED)
def test_an_incomplete_picture_is_no_picture(codec: Codec, capfd: pytest.CaptureFixture[str]) -> None:
    payload = bytes(encoded(codec, walk(1)[0]).payload)
    lengths = [*range(1, 40), *range(40, len(payload), len(payload) // 60), len(payload) - 3]
    if codec == "h264":  # whose last bytes are read as something else without notice: it has no checksum and no end
        lengths = [length for length in lengths if length < 0.9 * len(payload)]
    for length in lengths:
        with pytest.raises(Undecodable):
            decoder_of(codec).decode(memoryview(payload[:length]), 1, True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("codec", CODECS)
def test_one_picture_in_one_picture_out(codec: Codec) -> None:
    encoder, decoder = open_encoder(codec, quality=90, fps=25), decoder_of(codec)
    for id, picture in enumerate(walk(8)):
        (frame,) = encoder.encode(picture, id, force_key=False)
        (back,) = decoder.decode(memoryview(frame.payload), frame.id, frame.key)
        assert frame.id == back.id == id
        assert psnr(picture, back.rgb_HWC) > 34
    assert encoder.flush() == [] and decoder.flush() == [] and decoder.lost() == []
    encoder.close(), decoder.close()
    encoder.close(), decoder.close()


@pytest.mark.parametrize("codec", ["jpeg", "webp", "h264"])
def test_a_result_larger_than_its_codec_allows_is_refused(codec: Codec) -> None:
    with pytest.raises(FrameTooLarge, match=str(LARGEST_ENCODED_SIDE[codec])):
        encoded(codec, np.zeros((16, LARGEST_ENCODED_SIDE[codec] + 2, 3), np.uint8))
    largest = LARGEST_ENCODED_SIDE[codec]
    assert encoded(codec, np.zeros((16, largest - largest % 2, 3), np.uint8)).payload


@cache
def samples(codec: Codec) -> tuple[bytes, ...]:
    """Good messages of small pictures; for H.264 those of one stream, key frame first."""
    encoder = open_encoder(codec, quality=80, fps=25)
    pictures = [picture[:64, :96] for picture in walk(3)]
    return tuple(bytes(encoder.encode(picture, 0, force_key=False)[0].payload) for picture in pictures)


@st.composite
def broken(draw: st.DrawFn, codec: Codec) -> bytes:
    """A good message with bytes changed, cut off, repeated or put together from two, or no good message at all."""
    message = bytearray(draw(st.sampled_from(samples(codec))))
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(0, 4))):
        message[draw(st.integers(0, len(message) - 1))] = draw(st.integers(0, 255))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(message))] * 2)))
    kind = draw(st.sampled_from(["", "cut", "remove", "repeat", "join"]))
    if kind == "cut":
        return bytes(message[:stop])
    if kind == "remove":
        return bytes(message[:start] + message[stop:])
    if kind == "repeat":
        return bytes(message[:stop] + message[start:])
    if kind == "join":
        return bytes(message[:stop]) + draw(st.sampled_from(samples(codec)))[start:]
    return bytes(message)


def resident_bytes() -> int:
    """Memory of this process that is in use now, not its peak."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("codec", COMPRESSED)
def test_no_bytes_break_a_decoder(codec: Codec, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = decoder_of(codec, 96, 64)
    examples = 0
    resident_then = 0

    @settings(max_examples=2500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(broken(codec))
    def feed(payload: bytes) -> None:
        nonlocal examples, resident_then
        examples += 1
        if examples == 500:
            resident_then = resident_bytes()
        start = time.perf_counter()
        try:
            for frame in decoder.decode(memoryview(payload), examples, False):
                assert frame.rgb_HWC.dtype == np.uint8 and frame.rgb_HWC.shape[2] == 3
                assert frame.rgb_HWC.shape[0] * frame.rgb_HWC.shape[1] <= 96 * 64
        except (Undecodable, FrameTooLarge):
            pass
        decoder.lost()
        assert time.perf_counter() - start < 2

    feed()
    assert resident_bytes() - resident_then < 24 << 20
    # Whatever happened, a good key frame is decoded by the same decoder.
    assert decoder.decode(memoryview(samples(codec)[0]), 0, True)[0].id == 0
    assert capfd.readouterr().err == ""
