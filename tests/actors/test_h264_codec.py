"""H.264 as a live codec: no delay, right colours, and nothing shown that was made up."""

from __future__ import annotations

import re
from typing import Any

import av
import numpy as np
import pytest

from actors.errors import Undecodable
from actors.frame_codec import DecodedFrame, FrameDecoder, open_decoder, open_encoder
from actors.h264_syntax import Inspector
from infra.refusals import FrameTooLarge
from tests.coded_frames import access_units, bar_colours, colour_bars, parameter_set, psnr, unit_kinds, walk

SLICE, IDR, SEI, SPS, PPS = 1, 5, 6, 7, 8


def decoder_of(width: int = 320, height: int = 180) -> FrameDecoder:
    return open_decoder("h264", width, height, max_pixels=1920 * 1080)


def feed(decoder: FrameDecoder, units: list[bytes], first_id: int = 0) -> tuple[list[DecodedFrame], list[int]]:
    """What comes out, and the ids that were refused on the spot."""
    frames, refused = [], []
    for id, unit in enumerate(units, first_id):
        try:
            frames += decoder.decode(memoryview(unit), id, False)
        except Undecodable:
            refused.append(id)
    return frames, refused


def sent(count: int) -> list[bytes]:
    """A stream from our own encoder."""
    encoder = open_encoder("h264", quality=90, fps=25)
    return [bytes(encoder.encode(picture, 0, force_key=False)[0].payload) for picture in walk(count)]


# -- no delay ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refs", ["1", "4"])
def test_each_picture_comes_out_before_the_next_goes_in(refs: str) -> None:
    pictures = walk(12)
    decoder = decoder_of()
    for id, unit in enumerate(access_units(pictures, bf="0", refs=refs, tune="zerolatency")):
        (frame,) = decoder.decode(memoryview(unit), id, False)
        assert frame.id == id and psnr(pictures[id], frame.rgb_HWC) > 34
    encoder = open_encoder("h264", quality=90, fps=None)
    for id, picture in enumerate(pictures):
        (made,) = encoder.encode(picture, id, force_key=False)
        assert made.id == id and made.key == (id == 0)
    assert encoder.flush() == []


def test_an_encoder_that_does_not_promise_its_order_is_not_waited_for() -> None:
    # Without such a promise in the parameter set a decoder may wait for pictures to reorder; hardware often makes none.
    units = access_units(walk(6), bf="0", refs="1", profile="baseline")
    (sequence,) = Inspector().inspect(units[0]).sequences
    start = units[0].index(b"\0\0\1\x67")
    stop = units[0].index(b"\0\0\1", start + 3)
    units[0] = parameter_set(320, 180, sequence.references, sequence.frame_num_bits) + units[0][stop:]
    decoder = decoder_of()
    for id, unit in enumerate(units):
        assert [frame.id for frame in decoder.decode(memoryview(unit), id, False)] == [id]


def test_ids_are_the_clients_own() -> None:
    units, decoder = sent(3), decoder_of()
    for unit, id in zip(units, (2**64 - 1, 0, 2**63), strict=True):
        assert [frame.id for frame in decoder.decode(memoryview(unit), id, True)] == [id]


def test_b_frames_come_in_the_order_of_presentation() -> None:
    pictures = walk(16)
    units = access_units(pictures, bf="2", x264="b-adapt=0:b-pyramid=none")
    decoder = decoder_of()
    frames, refused = feed(decoder, units)
    assert refused == [] and len(frames) >= 13
    frames += decoder.flush()
    # The id of a picture is that of the access unit that made it: 0, 3, 1, 2, 6, 4, 5, ... were sent as 0, 1, 2, ...
    assert sorted(frame.id for frame in frames) == list(range(16)) != [frame.id for frame in frames]
    assert decoder.lost() == []
    for shown, frame in zip(pictures, frames, strict=True):
        assert psnr(shown, frame.rgb_HWC) > 34
    assert [frame.id for frame in decoder.decode(memoryview(units[0]), 16, True)] + [
        frame.id for frame in decoder.flush()
    ] == [16]


# -- what is encoded --------------------------------------------------------------------------------------------------


def test_key_frames_carry_their_parameter_sets_and_come_on_demand() -> None:
    encoder = open_encoder("h264", quality=75, fps=25)
    for id, picture in enumerate(walk(8)):
        (frame,) = encoder.encode(picture, id, force_key=id == 5)
        kinds = unit_kinds(frame.payload)
        assert frame.key == (id in (0, 5))
        assert ({SPS, PPS, IDR} <= set(kinds)) == frame.key
        assert bytes(frame.payload[:3]) in (b"\0\0\0", b"\0\0\1")
    encoder.close()


def test_key_frames_come_every_ten_seconds() -> None:
    encoder = open_encoder("h264", quality=10, fps=2)
    picture = walk(1)[0]
    keys = [encoder.encode(picture, id, force_key=False)[0].key for id in range(45)]
    assert [id for id, key in enumerate(keys) if key] == [0, 20, 40]


def test_another_size_begins_with_a_key_frame() -> None:
    encoder, decoder = open_encoder("h264", quality=90, fps=25), decoder_of(640, 360)
    sizes = [(320, 176), (320, 176), (640, 360), (640, 360), (160, 96)]
    for id, size in enumerate(sizes):
        (frame,) = encoder.encode(colour_bars(*size), id, force_key=False)
        assert frame.key == (id in (0, 2, 4))
        (back,) = decoder.decode(memoryview(frame.payload), id, frame.key)
        assert back.id == id and back.rgb_HWC.shape[:2] == size[::-1]
        assert np.abs(bar_colours(back.rgb_HWC) - bar_colours(colour_bars(*size))).max() < 3


def test_another_encoder_on_the_same_stream_is_decoded_without_the_delay_of_the_first() -> None:
    pictures = walk(8)
    slow, quick = access_units(pictures, bf="2", x264="b-adapt=0"), access_units(pictures, bf="0")
    decoder = decoder_of()
    late, _ = feed(decoder, slow)
    assert len(late) < 8
    (*rest, first) = decoder.decode(memoryview(quick[0]), 8, True)
    assert sorted(frame.id for frame in [*late, *rest]) == list(range(8)) and first.id == 8
    for id, unit in enumerate(quick[1:], 9):
        assert [frame.id for frame in decoder.decode(memoryview(unit), id, False)] == [id]


@pytest.mark.parametrize(("size", "matrix"), [((320, 176), 6), ((1280, 720), 1)])
def test_colours_are_written_down(size: tuple[int, int], matrix: int) -> None:
    (frame,) = open_encoder("h264", quality=90, fps=25).encode(colour_bars(*size), 0, force_key=False)
    reader: Any = av.CodecContext.create("h264", "r")
    (picture,) = [*reader.decode(av.Packet(bytes(frame.payload))), *reader.decode(None)]
    tags = picture.colorspace, picture.color_range, picture.color_primaries, picture.color_trc
    assert [int(tag) for tag in tags] == [matrix, 1, 1, 1]


# -- colours of others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(320, 176), (1280, 720)])
@pytest.mark.parametrize(
    ("matrix", "colour_range", "pix_fmt"),
    [(1, 1, "yuv420p"), (6, 1, "yuv420p"), (5, 1, "yuv420p"), (1, 2, "yuv420p"), (6, 2, "yuvj420p"), (9, 1, "yuv420p"),
     (1, 1, "yuv444p"), (1, 1, "yuv422p"), (1, 1, "yuv420p10le"), (1, 2, "yuv420p10le")],
)  # fmt: skip
def test_tags_are_honoured(size: tuple[int, int], matrix: int, colour_range: int, pix_fmt: str) -> None:
    bars = colour_bars(*size)
    (unit,) = access_units([bars], bf="0", matrix=matrix, colour_range=colour_range, pix_fmt=pix_fmt)
    ((frame,), _) = feed(decoder_of(*size), [unit])
    assert frame.rgb_HWC.dtype == np.uint8
    assert np.abs(bar_colours(frame.rgb_HWC) - bar_colours(bars)).max() < 2.5


@pytest.mark.parametrize(("size", "matrix"), [((320, 176), 6), ((1280, 720), 1)])
def test_untold_colours_are_taken_as_players_take_them(size: tuple[int, int], matrix: int) -> None:
    bars = colour_bars(*size)
    (unit,) = access_units([bars], bf="0", matrix=matrix, tagged=False)
    ((frame,), _) = feed(decoder_of(*size), [unit])
    assert np.abs(bar_colours(frame.rgb_HWC) - bar_colours(bars)).max() < 2.5


def test_chroma_does_not_move() -> None:
    # A soft red edge: half a chroma sample of displacement would show as 10 levels and more.
    x = np.arange(320)
    red = (127.5 + 120 * np.tanh((x - 160.5) / 4)).astype(np.uint8)
    picture = np.zeros((176, 320, 3), np.uint8)
    picture[..., 0] = red
    picture[..., 2] = 255 - red
    (frame,) = open_encoder("h264", quality=100, fps=25).encode(picture, 0, force_key=False)
    (back,) = decoder_of().decode(memoryview(frame.payload), 0, True)
    assert np.abs(back.rgb_HWC[88].astype(int) - picture[88]).max() <= 6


# -- what is missing or damaged ---------------------------------------------------------------------------------------


def test_a_stream_that_begins_in_its_middle_waits_for_a_key_frame() -> None:
    pictures = walk(10)
    units = access_units(pictures, bf="0", g="5", keyint_min="5", sc_threshold="0")
    frames, refused = feed(decoder_of(), units[2:], 2)
    assert refused == [2, 3, 4]
    assert [frame.id for frame in frames] == [5, 6, 7, 8, 9]
    assert psnr(pictures[5], frames[0].rgb_HWC) > 34


@pytest.mark.parametrize("missing", [0, 2, 3])
def test_after_a_missing_picture_nothing_is_made_up(missing: int) -> None:
    pictures = walk(12)
    units = access_units(pictures, bf="0", g="8", keyint_min="8", sc_threshold="0")
    decoder = decoder_of()
    before, _ = feed(decoder, units[:missing])
    after, refused = feed(decoder, units[missing + 1 :], missing + 1)
    assert [frame.id for frame in before] == list(range(missing))
    assert refused == list(range(missing + 1, 8))
    assert [frame.id for frame in after] == [8, 9, 10, 11]
    for frame in after:
        assert psnr(pictures[frame.id], frame.rgb_HWC) > 34


def test_a_missing_picture_that_no_other_needs_costs_nothing_else() -> None:
    pictures = walk(10)
    units = access_units(pictures, bf="1", x264="b-adapt=0:b-pyramid=none:weightp=0")
    unneeded = next(at for at, unit in enumerate(units) if at > 2 and re.search(rb"\x00\x00\x01\x01", unit))
    decoder = decoder_of()
    frames, refused = feed(decoder, units[:unneeded] + units[unneeded + 1 :])
    frames += decoder.flush()
    assert refused == [] and len(frames) == 9


def test_a_stream_without_key_frames_recovers_where_it_says() -> None:
    # Periodic intra refresh: after the first there is no key frame, but a recovery point (ITU-T H.264, D.2.8).
    pictures = walk(30)
    units = access_units(pictures, bf="0", g="8", sc_threshold="0", x264="intra-refresh=1")
    assert [at for at, unit in enumerate(units) if IDR in unit_kinds(unit)] == [0]
    frames, refused = feed(decoder_of(), [*units[:3], *units[4:]])
    ids = [frame.id if frame.id < 3 else frame.id + 1 for frame in frames]
    assert refused and refused == list(range(3, 3 + len(refused))) and len(refused) < 17
    for id, frame in zip(ids, frames, strict=True):
        assert psnr(pictures[id], frame.rgb_HWC) > 33, id


def test_damage_is_not_shown() -> None:
    pictures = walk(12)
    units = access_units(pictures, bf="0", g="6", keyint_min="6", sc_threshold="0")
    shown = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        hit = int(random.integers(0, 6))
        unit = bytearray(units[hit])
        start = random.integers(len(unit) // 4, len(unit) - 30)
        unit[start : start + 12] = random.integers(0, 256, 12, np.uint8).tobytes()
        frames, refused = feed(decoder_of(), [*units[:hit], bytes(unit), *units[hit + 1 :]])
        ids = [frame.id for frame in frames]
        assert ids[-6:] == [6, 7, 8, 9, 10, 11], "the next key frame heals it"
        assert sorted([*ids, *refused]) == list(range(12))
        # Entropy coded data has no checksum: what still parses is shown. Never is it a picture with a hole.
        shown += any(psnr(pictures[frame.id], frame.rgb_HWC) < 25 for frame in frames)
    assert shown <= 4


def test_an_incomplete_unit_is_noticed() -> None:
    units = sent(4)
    for length in range(len(units[2]) // 3, len(units[2]) * 9 // 10, 53):
        frames, refused = feed(decoder_of(), [units[0], units[1], units[2][:length], units[3]])
        assert [frame.id for frame in frames] == [0, 1] and refused == [2, 3]


def test_units_without_a_picture_cost_themselves_only() -> None:
    units, decoder = sent(4), decoder_of()
    parts = units[0].replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
    parameters = b"".join(b"\0\0\1" + part for part in parts if part[0] & 31 in (SPS, PPS))
    information = b"\0\0\1\x06\x05\x10" + bytes(range(1, 17)) + b"\x80"
    assert feed(decoder, [parameters, units[0], information, units[1], parameters, information * 500, units[2]])[1] == [
        0, 2, 4, 5,
    ]  # fmt: skip
    frames, refused = feed(decoder, [units[3]], 9)
    assert [frame.id for frame in frames] == [9] and refused == []


def test_a_flood_of_units_is_refused_at_once() -> None:
    decoder = decoder_of()
    for flood in (b"\0\0\1\x06\x80" * 13_000, b"\0\0\1\x67" * 16_000, b"\0\0\1" * 20_000, b"\0" * 60_000):
        with pytest.raises(Undecodable):
            decoder.decode(memoryview(flood), 0, True)
    assert feed(decoder, sent(1))[1] == []


def test_nothing_is_written_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    units = sent(3)
    feed(decoder_of(), [b"\0\0\1\x65garbage", units[1], units[0][:-200], b"\0\0\1\x67\x64\0\x1f" + bytes(30)])
    assert capfd.readouterr() == ("", "")


def test_lost_pictures_of_a_stream_with_b_frames_are_told() -> None:
    units = access_units(walk(16), bf="2", g="9", keyint_min="9", sc_threshold="0", x264="b-adapt=0")
    decoder = decoder_of()
    damaged = units[4][: len(units[4]) // 2]
    frames, refused = feed(decoder, [*units[:4], damaged, *units[5:]])
    frames += decoder.flush()
    told = [*(frame.id for frame in frames), *refused, *decoder.lost()]
    assert sorted(told) == list(range(16)), "each message is answered exactly once"
    assert decoder.lost() == []


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (18, 34), (176, 144), (320, 180), (322, 182), (1918, 1078), (854, 480)])
@pytest.mark.parametrize(
    ("pix_fmt", "options"),
    [("yuv420p", {}), ("yuv420p", {"profile": "baseline"}), ("yuv422p", {}), ("yuv444p", {}), ("yuv420p10le", {}),
     ("yuv420p", {"x264": "interlaced=1"}), ("yuv420p", {"x264": "cqm=jvt"})],
)  # fmt: skip
def test_the_size_in_a_parameter_set_is_that_of_the_picture(
    size: tuple[int, int], pix_fmt: str, options: dict[str, str]
) -> None:
    if "interlaced" in options.get("x264", "") and size[1] % 4:
        size = size[0], size[1] + 2
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    (unit,) = access_units([picture], pix_fmt=pix_fmt, **options)
    (sequence,) = Inspector().inspect(unit).sequences
    assert (sequence.width, sequence.height) == size


def test_a_size_beyond_what_is_agreed_is_refused_before_decoding() -> None:
    (large,) = access_units([colour_bars(640, 360)])
    at = large.index(b"\0\0\1\x67") + 3
    decoder = decoder_of()
    with pytest.raises(FrameTooLarge, match="640x360"):
        decoder.decode(memoryview(large[: at + 40]), 0, True)
    assert feed(decoder, sent(1))[1] == []


def test_a_stream_may_not_ask_for_more_reference_pictures_than_its_level_has() -> None:
    decoder = open_decoder("h264", 8192, 4320, max_pixels=8192 * 8192)
    with pytest.raises(FrameTooLarge, match="16 reference"):
        decoder.decode(memoryview(parameter_set(8192, 4320, 16, 4)), 0, True)
    with pytest.raises(Undecodable, match="no picture"):
        decoder.decode(memoryview(parameter_set(8192, 4320, 5, 4)), 1, True)
