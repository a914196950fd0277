"""The picture of a video as a file of its own, in fragments: encoded at another size, or its own packets.

All tracks that belong together have one clock (`Timeline.clock`), so that a player may change from one to another.
Nothing is known here of playlists, or of which sizes there are.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.filter import Graph
from av.video.frame import PictureType

from pipeline.colour import RANGE_FULL, RANGE_LIMITED, effective_matrix, effective_range
from pipeline.encoder_options import Preset
from pipeline.timeline import Timeline, packets_of
from pipeline.video_container import Limits, VideoSource, main_video_stream, open_input, source_name
from pipeline.video_output import BIT_EXACT
from pipeline.video_probe import VideoInfo

CODEC_BIT_EXACT = 1 << 23  # AV_CODEC_FLAG_BITEXACT
_CRF = 20
_BITS_PER_PIXEL = 0.12  # of the highest rate: 1080p at 25 pictures a second needs 6.2 Mbit/s at most
_LEAST_BIT_RATE = 300_000
_MOST_PICTURES_PER_S = 240
_NO_KEY_BY_ITSELF = {"g": str(1 << 30), "sc_threshold": "0", "forced-idr": "1"}
_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 29)


class TrackFile:
    """A fragmented MP4 that is being written; a context manager that closes it, whatever happens.

    Args:
        fragment_s: length of a fragment; None begins one at each key picture.
    """

    def __init__(self, path: Path, *, fragment_s: int | None = None) -> None:
        flags = "empty_moov+default_base_moof+frag_discont+skip_trailer"
        options = {"use_editlist": "0", "avoid_negative_ts": "disabled"}
        if fragment_s is None:
            flags += "+frag_keyframe"
        else:
            options["frag_duration"] = str(1_000_000 * fragment_s)
        self.output = av.open(str(path), "w", format="mp4", container_options={"movflags": flags, **options})
        self.output.flags |= BIT_EXACT

    def __enter__(self) -> TrackFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(kind is None)

    def close(self, whole: bool) -> None:
        """End the file; what goes wrong then matters only if it is to be `whole`."""
        try:
            self.output.close()
        except (av.FFmpegError, ValueError):
            if whole:
                raise


class EncodedPicture:
    """The picture at another size: H.264, 4:2:0, 8 bit, upright, with square pixels; a context manager.

    Args:
        path: to write. info, timeline: of the video whose pictures will be given.
        width, height: as seen, both even. keys: time stamps of the pictures to begin a fragment with; no other does.
        preset: speed of the encoder.
    """

    def __init__(
        self,
        path: Path,
        info: VideoInfo,
        timeline: Timeline,
        *,
        width: int,
        height: int,
        keys: frozenset[int],
        preset: Preset,
        threads: int = 2,
    ) -> None:
        self._info, self._timeline, self._keys = info, timeline, keys
        self._width, self._height = width, height
        self._graph: Graph | None = None
        rate = min(timeline.peak_rate, Fraction(_MOST_PICTURES_PER_S))
        most = max(_LEAST_BIT_RATE, int(_BITS_PER_PIXEL * width * height * rate))
        options = {
            "preset": preset, "crf": str(_CRF), "maxrate": str(most), "bufsize": str(2 * most),
            "threads": str(threads), **_NO_KEY_BY_ITSELF,
        }  # fmt: skip
        self._file = TrackFile(path)
        try:
            stream: Any = self._file.output.add_stream("libx264", rate=rate.limit_denominator(1001), options=options)
            stream.time_base = info.time_base
            context = stream.codec_context
            context.width, context.height, context.pix_fmt = width, height, "yuv420p"
            context.time_base = info.time_base
            context.sample_aspect_ratio = Fraction(1)
            context.flags |= CODEC_BIT_EXACT
            # Said even where the result says nothing: players would guess by the size, which is another one here.
            context.colorspace = effective_matrix(info.colour, info.width, info.height)
            context.color_primaries, context.color_trc = info.colour.primaries, info.colour.transfer
            context.color_range = RANGE_LIMITED
            self._stream = stream
            self._file.output.start_encoding()
        except BaseException:
            self._file.close(whole=False)
            raise

    def __enter__(self) -> EncodedPicture:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        whole = False
        try:
            if kind is None:
                self._mux(self._stream.encode(None))
                whole = True
        finally:
            self._file.close(whole)

    def write(self, picture: av.VideoFrame) -> None:
        """Add one picture as it was decoded."""
        if self._graph is None:
            self._graph = self._make_graph(picture)
        pts = picture.pts
        self._graph.push(picture)
        small: Any = self._graph.pull()
        small.pict_type = PictureType.I if pts in self._keys else PictureType.NONE
        small.pts, small.time_base = self._timeline.clock(pts or 0), self._info.time_base
        self._mux(self._stream.encode(small))

    def _mux(self, packets: list[Any]) -> None:
        origin = self._timeline.clock(0)
        for packet in packets:
            packet.duration = self._timeline.duration(packet.pts - origin)
            self._file.output.mux(packet)

    def _make_graph(self, picture: av.VideoFrame) -> Graph:
        info = self._info
        matrix = {1: "bt709", 4: "fcc", 5: "bt470", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}[
            effective_matrix(info.colour, info.width, info.height)
        ]
        full = effective_range(info.colour, info.pix_fmt) == RANGE_FULL
        turns = upright(info)
        turned = any(name == "transpose" for name, _ in turns)
        width, height = (self._height, self._width) if turned else (self._width, self._height)
        scale = (
            f"w={width}:h={height}:flags=lanczos+accurate_rnd+full_chroma_int:in_color_matrix={matrix}:"
            f"out_color_matrix={matrix}:in_range={'full' if full else 'limited'}:out_range=limited"
        )
        chain = [("scale", scale), ("format", "pix_fmts=yuv420p"), *turns, ("setsar", "sar=1"), ("buffersink", "")]
        graph = Graph()
        last = graph.add_buffer(
            width=picture.width, height=picture.height, format=picture.format, time_base=info.time_base
        )
        for name, options in chain:
            following = graph.add(name, options)
            last.link_to(following)
            last = following
        graph.configure()
        return graph


def upright(info: VideoInfo) -> list[tuple[str, str]]:
    """The filters that turn and mirror pictures as a player would; none for other than quarter turns."""
    if info.display_matrix is None:
        return []
    a, b, _, c, d = info.display_matrix[:5]  # of ISO 14496-12: (x, y) is shown at (ax + cy, bx + dy)
    if a == d == 0 and b and c:
        across = {(True, False): "clock", (False, True): "cclock", (True, True): "cclock_flip"}
        return [("transpose", f"dir={across.get((b > 0, c > 0), 'clock_flip')}")]
    return [(name, "") for name, value in (("hflip", a), ("vflip", d)) if value < 0 and b == c == 0]


def copy_picture(path: Path, source: VideoSource, timeline: Timeline) -> None:
    """Write the picture's own packets, with a fragment at each key picture.

    Raises:
        EncodeError: they do not fit into an MP4.
    """
    delay, shown = timeline.delay, timeline.shown
    with open_input(source, _ANY_SIZE) as container, TrackFile(path) as file:
        stream = main_video_stream(container, source_name(source))
        copy: Any = file.output.add_stream_from_template(stream)
        copy.time_base = timeline.time_base
        for number, packet in enumerate(one for one in packets_of(container, stream) if one.pts is not None):
            # Decoding times are counted anew: not every container has them.
            early = shown[number] - (shown[min(delay, len(shown) - 1)] - shown[0])
            dts = shown[number - delay] if number >= delay else min(early, shown[0])
            packet.duration = timeline.duration(packet.pts)
            packet.pts, packet.dts = timeline.clock(packet.pts), timeline.clock(dts)
            packet.stream = copy
            file.output.mux(packet)
