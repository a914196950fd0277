"""Video in and out: the public face of reading, describing and writing video files.

info = probe("in.mkv")
with VideoReader("in.mkv") as reader, VideoWriter(
    "out.mkv", info, width=info.width * 4, height=info.height * 4, source_path="in.mkv"
) as writer:
    for frame in reader:
        writer.write(replace(frame, rgb_HWC=restore(frame.rgb_HWC)))
"""

from __future__ import annotations

from pipeline.colour import ColourTags
from pipeline.encoder_options import CONTAINERS, EncoderOptions, container_for
from pipeline.video_container import Limits, ReceivedVideo, RemoteVideo, VideoSource
from pipeline.video_errors import (
    DestinationError,
    EncodeError,
    FrameTooLarge,
    FrameTooSmall,
    NoVideoStream,
    UnreadableVideo,
    UnsupportedOutput,
    VideoError,
    VideoNotFound,
)
from pipeline.video_output import WriteReport
from pipeline.video_probe import ContentLight, MasteringDisplay, StreamInfo, VideoInfo, probe
from pipeline.video_reader import Deinterlace, VideoFrame, VideoReader, presented
from pipeline.video_writer import VideoWriter, check_destination

__all__ = [
    "CONTAINERS",
    "ColourTags",
    "ContentLight",
    "Deinterlace",
    "DestinationError",
    "EncodeError",
    "EncoderOptions",
    "FrameTooLarge",
    "FrameTooSmall",
    "Limits",
    "MasteringDisplay",
    "NoVideoStream",
    "ReceivedVideo",
    "RemoteVideo",
    "StreamInfo",
    "UnreadableVideo",
    "UnsupportedOutput",
    "VideoError",
    "VideoFrame",
    "VideoInfo",
    "VideoNotFound",
    "VideoReader",
    "VideoSource",
    "VideoWriter",
    "WriteReport",
    "check_destination",
    "container_for",
    "presented",
    "probe",
]
