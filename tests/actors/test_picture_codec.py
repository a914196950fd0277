"""JPEG, WebP and PNG: kinds of pictures, what their files may contain, and files made to be expensive."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actors.errors import Undecodable
from actors.frame_codec import open_decoder
from actors.picture_header import PictureFormat, read_picture
from infra.protocol import Codec
from infra.refusals import FrameTooLarge
from tests.coded_frames import Frame, bar_colours, colour_bars, psnr, walk

BARS = colour_bars(320, 176)
GREY = np.repeat(BARS.mean(2).astype(np.uint8)[..., None], 3, axis=2)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(codec: Codec, payload: bytes, width: int = 320, height: int = 180) -> Frame:
    (frame,) = open_decoder(codec, width, height, max_pixels=1920 * 1080).decode(memoryview(payload), 0, True)
    return frame.rgb_HWC


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes, *extra: bytes, depth: int = 8, colour_type: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", data), chunk(b"IEND")])


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


# -- kinds of pictures ------------------------------------------------------------------------------------------------


def test_every_kind_of_jpeg_has_its_colours() -> None:
    image = Image.fromarray(BARS)
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"keep_rgb": True}):
        back = decoded("jpeg", saved(image, "JPEG", quality=95, **options))
        assert np.abs(bar_colours(back) - bar_colours(BARS)).max() < 2, options
    assert psnr(GREY, decoded("jpeg", saved(Image.fromarray(GREY[..., 0]), "JPEG", quality=98))) > 40
    four = decoded("jpeg", saved(image.convert("CMYK"), "JPEG", quality=98))
    assert np.abs(bar_colours(four) - bar_colours(BARS)).max() < 3


def test_every_kind_of_png_has_its_colours() -> None:
    image = Image.fromarray(BARS)
    same = {"palette": image.quantize(16), "alpha": image.convert("RGBA"), "plain": image}
    for kind, picture in same.items():
        assert np.array_equal(decoded("png", saved(picture, "PNG")), BARS), kind
    assert np.array_equal(decoded("png", saved(Image.fromarray(GREY[..., 0]), "PNG")), GREY)
    assert np.array_equal(decoded("png", saved(Image.fromarray(GREY[..., 0]).convert("LA"), "PNG")), GREY)
    two_levels = np.where(GREY > 100, np.uint8(255), np.uint8(0))
    assert np.array_equal(decoded("png", saved(Image.fromarray(two_levels[..., 0]).convert("1"), "PNG")), two_levels)


def test_sixteen_bits_are_rounded_to_eight() -> None:
    deep = np.linspace(0, 65535, 320 * 176).astype(np.uint16).reshape(176, 320)
    grey = decoded("png", saved(Image.fromarray(deep), "PNG"))
    assert np.array_equal(grey[..., 0], np.round(deep / 257).astype(np.uint8))
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in deep)
    colour = decoded("png", png(320, 176, zlib.compress(rows), depth=16))
    assert np.abs(colour[..., 1].astype(int) - deep / 257).max() < 1


def test_what_is_transparent_lies_over_black() -> None:
    rgba = np.dstack([BARS, np.full((176, 320), 255, np.uint8)])
    rgba[:88, :, 3] = 128
    rgba[:44, :, 3] = 0
    for codec, format, options in (("png", "PNG", {}), ("webp", "WEBP", {"lossless": True, "exact": True})):
        back = decoded(codec, saved(Image.fromarray(rgba), format, **options))  # type: ignore[arg-type]
        assert not back[:44].any()
        assert np.abs(back[44:88].astype(int) - BARS[44:88] * (128 / 255)).max() <= 1
        assert np.array_equal(back[88:], BARS[88:])
    keyed = saved(Image.fromarray(BARS), "PNG", transparency=(191, 0, 0))
    assert not decoded("png", keyed)[(BARS == (191, 0, 0)).all(2)].any()
    lossy = decoded("webp", saved(Image.fromarray(rgba), "WEBP", quality=95, exact=True))
    assert not lossy[:43].any() and psnr(lossy[88:], BARS[88:]) > 28


def test_every_kind_of_webp_has_its_colours() -> None:
    image = Image.fromarray(BARS)
    assert np.array_equal(decoded("webp", saved(image, "WEBP", lossless=True)), BARS)
    for picture, options in ((image, {"quality": 95}), (image.convert("RGBA"), {"quality": 95, "xmp": b"x" * 500})):
        back = decoded("webp", saved(picture, "WEBP", **options))
        assert np.abs(bar_colours(back) - bar_colours(BARS)).max() < 3


def test_orientation_and_profiles_are_ignored() -> None:
    image = Image.fromarray(walk(1)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it
    for codec, format in (("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")):
        plain = saved(image, format, quality=95)
        tagged = saved(image, format, quality=95, exif=exif, icc_profile=b"no profile at all" * 99)
        assert len(tagged) > len(plain)
        assert np.array_equal(decoded(codec, tagged), decoded(codec, plain))  # type: ignore[arg-type]


# -- what does not reach a decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["jpeg", "png", "webp"])
def test_metadata_is_taken_out(codec: PictureFormat) -> None:
    format = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[codec]
    exif = Image.Exif()
    exif[0x010E] = "SECRET " * 50
    file = saved(
        Image.fromarray(BARS), format, exif=exif, icc_profile=b"SECRET " * 50, xmp=b"SECRET " * 50, comment=b"SECRET"
    )
    assert b"SECRET" in file
    bare = read_picture(codec, memoryview(file))
    assert (bare.width, bare.height) == (320, 176)
    assert b"SECRET" not in bare.data and b"ICC" not in bare.data and b"xif" not in bare.data.lower()
    assert np.array_equal(decoded(codec, bare.data), decoded(codec, file))


def test_compressed_text_of_many_megabytes_is_not_inflated() -> None:
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000), 9))
    file = png(320, 176, zlib.compress(b"".join(b"\0" + row.tobytes() for row in BARS)), *[bomb] * 60)
    start = time.perf_counter()
    assert np.array_equal(decoded("png", file), BARS)
    assert time.perf_counter() - start < 0.1


def test_second_pictures_are_left_out() -> None:
    first, second = Image.fromarray(BARS), Image.fromarray(BARS[::-1].copy())
    stereo = saved(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert b"MPF" in stereo
    assert np.abs(bar_colours(decoded("jpeg", stereo)) - bar_colours(BARS)).max() < 3


def test_animations_are_refused() -> None:
    frames = [Image.fromarray(picture[:96, :96]) for picture in walk(3)]
    for codec, format in (("png", "PNG"), ("webp", "WEBP")):
        with pytest.raises(Undecodable, match="animation"):
            decoded(codec, saved(frames[0], format, save_all=True, append_images=frames[1:]))  # type: ignore[arg-type]


# -- files made to be expensive ---------------------------------------------------------------------------------------


def test_a_declared_size_is_compared_before_anything_else() -> None:
    vp8 = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)
    vp8l = b"\x2f" + struct.pack("<I", 16382 | 16382 << 14)
    vp8x = bytes(4) + (16382).to_bytes(3, "little") * 2
    jpeg = b"\xff\xd8" + segment(0xC0, b"\x08\xc3\x50\xc3\x50\x01\x01\x11\0") + segment(0xDA, b"\0") + b"\xff\xd9"
    for codec, file in (
        ("png", png(50_000, 50_000, zlib.compress(bytes(900)))),
        ("png", png(2**31 - 1, 2**31 - 1, b"")),
        ("jpeg", jpeg),
        ("webp", riff((b"VP8 ", vp8))),
        ("webp", riff((b"VP8L", vp8l))),
        ("webp", riff((b"VP8X", vp8x), (b"VP8 ", vp8))),
    ):
        assert len(file) < 1100
        with pytest.raises(FrameTooLarge):
            decoded(codec, file)  # type: ignore[arg-type]


def test_headers_that_contradict_each_other_are_refused() -> None:
    good = saved(Image.fromarray(BARS), "JPEG")
    at = good.index(b"\xff\xc0")
    large = segment(0xC0, b"\x08\xff\xff\xff\xff\x03\x01\x22\0\x02\x11\1\x03\x11\1")
    lossy = saved(Image.fromarray(BARS), "WEBP")[20:]
    second = png(320, 176, b"", chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)))
    canvas = bytes(4) + (319).to_bytes(3, "little") + (16382).to_bytes(3, "little")
    for codec, file in (
        ("jpeg", good[:at] + large + good[at:]),
        ("jpeg", good[: at + 19] + large + good[at + 19 :]),
        ("jpeg", good[:at] + b"junk" + large + good[at:]),
        ("png", second),
        ("webp", riff((b"VP8X", canvas), (b"VP8 ", lossy))),
        ("webp", riff((b"VP8 ", lossy), (b"VP8 ", lossy))),
    ):
        with pytest.raises(Undecodable):
            decoded(codec, file)  # type: ignore[arg-type]


def test_jpeg_kinds_that_nobody_sends_are_refused() -> None:
    good = saved(Image.fromarray(BARS), "JPEG")
    at = good.index(b"\xff\xc0")
    for marker in (0xC3, 0xC5, 0xC9, 0xCA, 0xCF):
        with pytest.raises(Undecodable, match="kind"):
            decoded("jpeg", good[:at] + bytes([0xFF, marker]) + good[at + 2 :])


def test_interlaced_png_is_refused() -> None:
    file = bytearray(saved(Image.fromarray(BARS), "PNG"))
    file[28] = 1
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    with pytest.raises(Undecodable, match="kind"):
        decoded("png", bytes(file))


def test_a_picture_gone_over_again_and_again_is_refused() -> None:
    good = saved(Image.fromarray(BARS), "JPEG", progressive=True)
    last = good.rindex(b"\xff\xda")
    assert decoded("jpeg", good).shape == BARS.shape
    with pytest.raises(Undecodable, match="scans"):
        decoded("jpeg", good[:-2] + good[last:-2] * 100 + b"\xff\xd9")


def test_files_of_empty_pieces_are_refused_at_once() -> None:
    jpeg = b"\xff\xd8" + segment(0xFE, b"") * 50_000
    fill = b"\xff\xd8" + b"\xff" * 200_000
    webp = riff(*[(b"JUNK", b"")] * 20_000)
    start = time.perf_counter()
    for codec, file in (("jpeg", jpeg), ("jpeg", fill), ("png", png(320, 176, b"", *[chunk(b"tIME")] * 15_000))):
        with pytest.raises(Undecodable):
            decoded(codec, file)  # type: ignore[arg-type]
    with pytest.raises(Undecodable):
        decoded("webp", webp)
    assert time.perf_counter() - start < 0.2


def test_pixels_that_end_too_early_are_not_filled_up() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in BARS)
    assert np.array_equal(decoded("png", png(320, 176, zlib.compress(rows))), BARS)
    for part in (rows[:-1], rows[: len(rows) // 2], b""):
        with pytest.raises(Undecodable):
            decoded("png", png(320, 176, zlib.compress(part)))
    with pytest.raises(Undecodable):
        decoded("png", png(320, 176, zlib.compress(rows)[:-40]))
    # More than the picture needs is left alone: 100 MB in 100 kB.
    assert np.array_equal(decoded("png", png(320, 176, zlib.compress(rows + bytes(100_000_000), 9))), BARS)
    file = saved(Image.fromarray(walk(1)[0]), "WEBP", quality=90)
    body = file[20:]
    for part in (body[: len(body) // 2], body[: len(body) * 9 // 10], body[:40]):
        with pytest.raises(Undecodable):
            decoded("webp", riff((b"VP8 ", part)))


def test_a_changed_byte_in_a_png_is_noticed() -> None:
    file = bytearray(saved(Image.fromarray(walk(1)[0]), "PNG"))
    for at in range(8, len(file), len(file) // 50):
        changed = file.copy()
        changed[at] ^= 0x10
        with pytest.raises((Undecodable, FrameTooLarge)):
            decoded("png", bytes(changed))
