"""A sound track of a video as a file of its own: AAC in fragments, by the clock that the pictures have.

AAC-LC is copied, everything else decoded and encoded anew; what does not decode is silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.filter import Graph

from pipeline.renditions import CODEC_BIT_EXACT, TrackFile
from pipeline.timeline import Timeline, packets_of
from pipeline.video_container import Limits, VideoSource, open_input
from pipeline.video_errors import EncodeError

_AAC_FRAME = 1024
_AAC_LC = 2
_AAC_BITS_PER_CHANNEL = 80_000
_AAC_RATES = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_MOST_AAC_CHANNELS = 6
# Matroska's clock of 1 ms makes sound that has no gap look as if it had.
_SAME_TIME_S = Fraction(3, 2000)
_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 29)


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound track that was written, by the clock of its samples; `codec` is as in RFC 6381."""

    codec: str
    channels: int
    sample_rate: int
    end_s: Fraction


def write_sound(path: Path, source: VideoSource, index: int, timeline: Timeline, fragment_s: int) -> Sound:
    """Write the audio stream `index` of a file as AAC: its own packets if it is AAC-LC already, else encoded.

    Args:
        timeline: of the pictures of the same file.
        fragment_s: length of a fragment in seconds.

    Raises:
        EncodeError: nothing in it decodes, or it cannot be encoded.
    """
    try:
        with open_input(source, _ANY_SIZE) as container, TrackFile(path, fragment_s=fragment_s) as file:
            stream: Any = container.streams[index]
            if _is_aac_lc(stream):
                return _copy_sound(container, stream, file, timeline)
            return _encode_sound(container, stream, file, timeline)
    except (av.FFmpegError, ValueError) as error:
        raise EncodeError(f"Stream {index} cannot become AAC ({error}).", remedy="Use the result itself.") from error


def _is_aac_lc(stream: Any) -> bool:
    context = stream.codec_context
    extradata = context.extradata
    return context.codec.canonical_name == "aac" and bool(extradata) and extradata[0] >> 3 == _AAC_LC


def _copy_sound(container: av.container.InputContainer, stream: Any, file: TrackFile, timeline: Timeline) -> Sound:
    rate, start_s, origin_s = stream.codec_context.sample_rate, timeline.start_s, timeline.seconds(timeline.shown[0])
    copy: Any = file.output.add_stream_from_template(stream)
    copy.time_base = Fraction(1, rate)
    expected: int | None = None
    for packet in packets_of(container, stream):
        if packet.pts is None:
            continue
        at_s = packet.pts * packet.time_base - origin_s
        at = round((at_s + start_s) * rate)
        # One packet more than is heard: AAC decodes each from the one before it.
        if at < start_s * rate - 2 * _AAC_FRAME or (expected is not None and at + _AAC_FRAME <= expected):
            continue
        if expected is not None and abs(at - expected) <= _SAME_TIME_S * rate:
            at = expected
        packet.time_base = Fraction(1, rate)
        packet.pts = packet.dts = max(at, expected or 0)
        packet.duration = _AAC_FRAME
        expected = packet.pts + _AAC_FRAME
        packet.stream = copy
        file.output.mux(packet)
    if expected is None:
        raise ValueError("nothing in it is heard beside the picture")
    return Sound("mp4a.40.2", int(stream.codec_context.channels), rate, Fraction(expected, rate))


def _encode_sound(container: av.container.InputContainer, stream: Any, file: TrackFile, timeline: Timeline) -> Sound:
    context = stream.codec_context
    rate = next((known for known in _AAC_RATES if known <= context.sample_rate), _AAC_RATES[-1])
    channels = context.channels if context.channels in (1, 2, _MOST_AAC_CHANNELS) else 2
    layout = {1: "mono", 2: "stereo"}.get(channels, "5.1")
    encoder: Any = file.output.add_stream("aac", rate=rate)
    encoder.codec_context.layout = layout
    encoder.codec_context.bit_rate = _AAC_BITS_PER_CHANNEL * channels
    encoder.codec_context.flags |= CODEC_BIT_EXACT
    encoder.time_base = Fraction(1, rate)
    file.output.start_encoding()
    graph: Graph | None = None
    origin_s, end = timeline.seconds(timeline.shown[0]), 0

    def mux(packets: list[Any]) -> None:
        nonlocal end
        for packet in packets:
            packet.pts = packet.dts = packet.pts + timeline.start_s * rate
            end = packet.pts + (packet.duration or _AAC_FRAME)
            file.output.mux(packet)

    for frame in _sounds(container, stream):
        at_s = frame.pts * frame.time_base - origin_s
        frame.time_base = Fraction(1, frame.sample_rate)
        frame.pts = round(at_s * frame.sample_rate)
        if graph is None:
            graph = _sound_graph(frame, rate, layout)
        graph.push(frame)
        for piece in _pulled(graph):
            mux(encoder.encode(piece))
    if graph is not None:
        graph.push(None)
        for piece in _pulled(graph):
            mux(encoder.encode(piece))
        mux(encoder.encode(None))
    if not end:
        raise ValueError("nothing in it decodes")
    return Sound("mp4a.40.2", channels, rate, Fraction(end, rate))


def _sounds(container: av.container.InputContainer, stream: Any) -> Iterator[Any]:
    """What decodes of a sound; the rest becomes silence."""
    for packet in packets_of(container, stream, flush=True):
        try:
            yield from (frame for frame in packet.decode() if frame.pts is not None)
        except (av.FFmpegError, EOFError):
            continue


def _sound_graph(frame: Any, rate: int, layout: str) -> Graph:
    """Gaps are filled and overlaps cut, also those between the first picture and the first sound."""
    graph = Graph()
    last = graph.add_abuffer(
        sample_rate=frame.sample_rate, format=frame.format, layout=frame.layout, time_base=frame.time_base
    )
    chain = [
        ("aresample", f"out_sample_rate={rate}:async=1:first_pts=0"),
        ("aformat", f"sample_fmts=fltp:sample_rates={rate}:channel_layouts={layout}"),
        ("asetnsamples", f"n={_AAC_FRAME}:p=0"),
        ("abuffersink", ""),
    ]
    for name, options in chain:
        following = graph.add(name, options)
        last.link_to(following)
        last = following
    graph.configure()
    return graph


def _pulled(graph: Graph) -> Iterator[Any]:
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, EOFError):
            return
