"""What the output of a row will be, by the source's description and the row's options, before anything is restored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.errors import ActorsError
from pipeline.encoder_options import resolve
from pipeline.picture_encoder import uncarried
from pipeline.video import CONTAINERS, EncoderOptions, UnsupportedOutput, VideoInfo, container_for

FRAGMENTED = frozenset({"mp4", "mov"})  # containers that can be written in fragments


def output_size(info: VideoInfo, scale: int, height: int | None) -> tuple[int, int]:
    """Return (width, height) of the output as coded.

    Args:
        scale: output size over input size.
        height: height as seen, which for a clip filmed upright is the coded width; replaces `scale`. The other side
            follows in proportion and is made even, because most codecs store colour for two by two pixels.
    """
    if height is None:
        return info.width * scale, info.height * scale
    if info.rotation_deg % 180:
        return height, max(2, 2 * round(info.height * height / info.width / 2))
    return max(2, 2 * round(info.width * height / info.height / 2)), height


def encoder_options(options: Mapping[str, Any]) -> EncoderOptions:
    """Return the typed options of the encoder; what was not asked for keeps its default.

    Raises:
        ActorsError: a value that the codec does not have.
    """
    named = ("codec", "crf", "preset", "pix_fmt", "encoder")
    asked = {name: options[name] for name in named if options.get(name) is not None}
    try:
        return EncoderOptions(**asked)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "codec"
        raise ActorsError(
            f"{name} {asked.get(name)!r} is not possible for codec {asked.get('codec', 'auto')}: {first['msg']}.",
            code="encoder-options",
            remedy=f"Change --{name.replace('_', '-')} or leave it out.",
        ) from error


def check_output(info: VideoInfo, destination: str, options: Mapping[str, Any]) -> list[str]:
    """Raise what the writer would raise later: container, codec, pixel format, size and form must go together.

    Returns:
        What the result cannot hold of the source's pictures, in words.

    Raises:
        ActorsError, UnsupportedOutput: they do not.
    """
    encoder = encoder_options(options)
    suffix = Path(destination).suffix
    if options.get("fragmented") and CONTAINERS.get(suffix.lower()) not in FRAGMENTED:
        raise UnsupportedOutput(
            f"{Path(destination).name} cannot be written in fragments: only MP4 and MOV can.",
            remedy="Leave --fragmented out, or write .mp4 or .mov.",
        )
    if suffix:  # without one it becomes a folder of pictures
        width, height = output_size(info, options["scale"], options["height"])
        muxer = container_for(suffix)
        settings = resolve(encoder, info, muxer, width, height)
        return [*settings.warnings, *uncarried(info, settings.codec, muxer)]
    return uncarried(info, "png", "")
