"""How the result is encoded: a small typed set of choices, never a raw option string.

`EncoderOptions` is what a user chooses; `resolve` turns it into the settings of one libav encoder for one source and
one container. Given the same choices and the same pictures the bytes are the same on every machine of one kind,
because the thread count is a setting and not taken from the machine, and because encoders are kept from those of their
paths that read memory which was never written.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import av
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.colour import RANGE_FULL, RANGE_LIMITED, effective_range, is_rgb_format
from pipeline.video_errors import UnsupportedOutput
from pipeline.video_probe import ContentLight, MasteringDisplay, VideoInfo

Codec = Literal["h264", "hevc", "av1", "vp9", "ffv1", "prores"]
Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]
Encoder = Literal["software", "nvenc"]
PixelFormat = Literal["auto", "yuv420p", "yuv422p", "yuv444p", "yuv420p10", "yuv422p10", "yuv444p10"]

_ENCODERS: dict[str, str] = {
    "h264": "libx264", "hevc": "libx265", "av1": "libsvtav1",
    "vp9": "libvpx-vp9", "ffv1": "ffv1", "prores": "prores_ks",
}  # fmt: skip
# NVIDIA's encoder on the GPU, and what it takes; it knows ten bits as p010le.
_NVENC = {"h264": "h264_nvenc", "hevc": "hevc_nvenc", "av1": "av1_nvenc"}
_NVENC_PIX_FMTS = {
    "h264": {"yuv420p", "yuv444p"},
    "hevc": {"yuv420p", "yuv444p", "yuv420p10le"},
    "av1": {"yuv420p", "yuv420p10le"},
}
_NVENC_PRESETS = ("p1", "p1", "p2", "p3", "p4", "p5", "p6", "p7", "p7")
# Visually transparent or nearly so, on the scale of each encoder.
DEFAULT_CRF = {"h264": 16, "hevc": 18, "av1": 22, "vp9": 20}
_MAX_CRF = {"h264": 51, "hevc": 51, "av1": 63, "vp9": 63}
_PRESETS: tuple[Preset, ...] = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow",
)  # fmt: skip
_SVT_PRESETS = (13, 12, 11, 10, 9, 8, 6, 4, 2)
_VPX_CPU_USED = (8, 7, 6, 5, 4, 3, 2, 1, 0)
_PIX_FMTS = {
    "h264": {"yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"},
    "hevc": {"yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"},
    "av1": {"yuv420p", "yuv420p10le"},
    "vp9": {"yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"},
    "ffv1": {"yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"},
    "prores": {"yuv422p10le", "yuv444p10le"},
}
# Codecs whose encoder cuts chroma of odd sizes off instead of keeping it.
_EVEN_ONLY = {"h264", "hevc", "av1"}
CONTAINERS = {
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".ts": "mpegts",
    ".m2ts": "mpegts", ".mts": "mpegts",
}  # fmt: skip
_CONTAINER_CODECS = {
    "mp4": {"h264", "hevc", "av1", "vp9"},
    "mov": {"h264", "hevc", "prores"},
    "matroska": {"h264", "hevc", "av1", "vp9", "ffv1", "prores"},
    "webm": {"vp9", "av1"},
    "mpegts": {"h264", "hevc"},
}


class EncoderOptions(BaseModel):
    """The encoder's settings that a user may choose.

    `codec` None takes VP9 for WebM, else H.265 for sources deeper than 8 bits and H.264 for the rest. `crf` None takes
    a nearly transparent quality; it has no meaning for the lossless FFV1 and for ProRes. `pix_fmt` "auto" keeps the
    source's chroma sampling and depth as far as the codec can. `encoder` "nvenc" encodes on an NVIDIA GPU, whose scale
    of quality is its own. `threads` is part of the result (x264 and x265 give other bytes for other counts).
    `bit_exact` keeps versions and random identifiers out of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    codec: Codec | None = None
    crf: int | None = Field(default=None, ge=0, le=63)
    preset: Preset = "medium"
    pix_fmt: PixelFormat = "auto"
    encoder: Encoder = "software"
    threads: int = Field(default=2, ge=1, le=64)
    bit_exact: bool = False


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """Everything that the writer hands to libav for one file."""

    codec: Codec
    encoder: str
    pix_fmt: str
    colour_range: int
    options: dict[str, str]
    warnings: tuple[str, ...]


def container_for(suffix: str) -> str:
    """libav's muxer for a file suffix.

    Raises:
        UnsupportedOutput: a container that cannot hold time stamps and tags faithfully (AVI), or an unknown one.
    """
    found = CONTAINERS.get(suffix.lower())
    if found is None:
        raise UnsupportedOutput(
            f"Results are not written as {suffix or 'a file without a suffix'}.",
            remedy=f"Use one of {', '.join(sorted(CONTAINERS))}, or a folder for PNG pictures; .mkv holds everything.",
        )
    return found


def resolve(options: EncoderOptions, source: VideoInfo, container: str, width: int, height: int) -> EncoderSettings:
    """Settle every choice for one source, container and size.

    Raises:
        UnsupportedOutput: the choices contradict each other; the message names which.
    """
    codec = resolve_codec(options, source, container)
    if codec not in _CONTAINER_CODECS[container]:
        raise UnsupportedOutput(
            f"{container} files do not hold {codec} here.",
            remedy=f"Choose {' or '.join(sorted(_CONTAINER_CODECS[container]))}, or write .mkv.",
        )
    if options.encoder == "nvenc" and codec not in _NVENC:
        raise UnsupportedOutput(
            f"NVENC does not encode {codec}.", remedy=f"Choose {', '.join(_NVENC)}, or --encoder software."
        )
    warnings: list[str] = []
    pix_fmt = _pixel_format(options, source, codec, width, height, warnings)
    if codec in _EVEN_ONLY and "444" not in pix_fmt and (width % 2 or (height % 2 and "420" in pix_fmt)):
        raise UnsupportedOutput(
            f"{codec} in {pix_fmt} needs even sizes; {width}x{height} is odd.",
            remedy="Choose an even size, --pix-fmt yuv444p, or the codec ffv1.",
        )
    colour_range = effective_range(source.colour, source.pix_fmt)
    if is_rgb_format(source.pix_fmt):
        colour_range = RANGE_LIMITED
    if codec == "prores" and colour_range == RANGE_FULL:
        colour_range = RANGE_LIMITED
        warnings.append("ProRes has no full range: the code values were converted to limited range")
    if options.encoder == "nvenc":
        return EncoderSettings(
            codec,
            _NVENC[codec],
            "p010le" if pix_fmt == "yuv420p10le" else pix_fmt,
            colour_range,
            _nvenc_options(codec, options, source, warnings),
            tuple(warnings),
        )
    settings = _codec_options(codec, options, source, min(width, height), warnings)
    if container == "mpegts" and _starts_early(source):
        # The first decoding time would lie before zero, which MPEG-TS cannot say: libav would shift every stamp.
        key = "x265-params" if codec == "hevc" else "bf"
        settings[key] = f"{settings[key]}:bframes=0" if codec == "hevc" else "0"
    if source.colour.chroma_location:
        settings["chroma_sample_location"] = source.colour.chroma_location
    return EncoderSettings(codec, _ENCODERS[codec], pix_fmt, colour_range, settings, tuple(warnings))


def _starts_early(source: VideoInfo) -> bool:
    """Whether the first picture leaves no room for the decoding delay of reordered pictures."""
    return source.start_pts * source.time_base < 5 / source.average_rate


def resolve_codec(options: EncoderOptions, source: VideoInfo, container: str) -> Codec:
    """The codec for one source and container: the one that was chosen, or the default."""
    if options.codec is not None:
        return options.codec
    if container == "webm":
        return "vp9"
    return "hevc" if source.bit_depth > 8 else "h264"


def _pixel_format(
    options: EncoderOptions, source: VideoInfo, codec: Codec, width: int, height: int, warnings: list[str]
) -> str:
    allowed = _encodable(codec) if options.encoder == "software" else frozenset(_NVENC_PIX_FMTS[codec])
    if options.pix_fmt != "auto":
        wanted = options.pix_fmt + "le" if options.pix_fmt.endswith("10") else options.pix_fmt
        if wanted not in allowed:
            raise UnsupportedOutput(
                f"{codec} does not encode {options.pix_fmt}.",
                remedy=f"Choose one of {', '.join(sorted(name.removesuffix('le') for name in allowed))}.",
            )
        return wanted
    deep = source.bit_depth > 8 or codec == "prores"
    sampling = _sampling(source.pix_fmt)
    wanted = f"yuv{sampling}p10le" if deep else f"yuv{sampling}p"
    if deep and codec != "prores" and not any(name.endswith("10le") for name in allowed):
        deep, wanted = False, f"yuv{sampling}p"
        warnings.append(f"{source.bit_depth} bits per component were reduced to 8: this {codec} encoder has no more")
    elif source.bit_depth > 10:
        warnings.append(f"{source.bit_depth} bits per component were reduced to 10")
    if wanted not in allowed:
        nearest = "yuv422p10le" if codec == "prores" else wanted.replace("422", "420").replace("444", "420")
        if not (is_rgb_format(source.pix_fmt) or sampling == "420"):
            warnings.append(f"chroma sampling 4:{sampling[1]}:{sampling[2]} became {nearest}: {codec} has no other")
        wanted = nearest
    return wanted


@lru_cache
def _encodable(codec: Codec) -> frozenset[str]:
    """The pixel formats that this build's encoder takes, of those that are offered; builds differ in depth."""
    built = {layout.name for layout in av.Codec(_ENCODERS[codec], "w").video_formats or ()}
    return frozenset(_PIX_FMTS[codec] & built)


def _sampling(pix_fmt: str) -> str:
    """The chroma sampling to keep; RGB and grey sources, and the rare 4:1:1 and 4:1:0, become 4:2:0."""
    for known in ("422", "444"):
        if known in pix_fmt:
            return known
    return "422" if pix_fmt.startswith(("uyvy", "yuyv", "nv16", "p21")) else "420"


def _codec_options(
    codec: Codec, options: EncoderOptions, source: VideoInfo, smaller_side: int, warnings: list[str]
) -> dict[str, str]:
    level = _PRESETS.index(options.preset)
    crf = options.crf if options.crf is not None else DEFAULT_CRF.get(codec)
    if crf is not None and codec in _MAX_CRF and crf > _MAX_CRF[codec]:
        raise UnsupportedOutput(f"crf {crf} is above the {_MAX_CRF[codec]} of {codec}.", remedy="Choose a smaller crf.")
    if options.crf is not None and codec not in _MAX_CRF:
        warnings.append(f"crf has no effect on {codec}")
    threads = str(options.threads)
    if codec == "h264":
        return {"preset": options.preset, "crf": str(crf), "threads": threads, **_x264_extras(source)}
    if codec == "hevc":
        # frame-threads is fixed because x265 would take it from the machine, and it changes the result.
        params = [f"pools={threads}", f"frame-threads={min(options.threads, 4)}", "log-level=error"]
        params += [*_x265_small(smaller_side), *_x265_hdr(source)]
        return {"preset": options.preset, "crf": str(crf), "x265-params": ":".join(params)}
    if codec == "av1":
        params = [f"lp={threads}", *_svt_hdr(source)]
        return {"preset": str(_SVT_PRESETS[level]), "crf": str(crf), "svtav1-params": ":".join(params)}
    if codec == "vp9":
        cpu_used = str(_VPX_CPU_USED[level])
        return {"crf": str(crf), "b": "0", "cpu-used": cpu_used, "row-mt": "1", "threads": threads, "deadline": "good"}
    if codec == "ffv1":
        return {"level": "3", "slicecrc": "1", "slices": "4", "threads": threads}
    return {"profile": "4" if _sampling(source.pix_fmt) == "444" else "3", "vendor": "apl0", "threads": threads}


def _nvenc_options(codec: Codec, options: EncoderOptions, source: VideoInfo, warnings: list[str]) -> dict[str, str]:
    """Constant quality on NVENC's scale, without reordering: a segment's decoding times begin where it does."""
    crf = options.crf if options.crf is not None else DEFAULT_CRF[codec]
    if crf > _MAX_CRF[codec]:
        raise UnsupportedOutput(f"crf {crf} is above the {_MAX_CRF[codec]} of {codec}.", remedy="Choose a smaller crf.")
    if source.mastering or source.content_light:
        warnings.append("NVENC writes no HDR mastering data; use --encoder software to keep it")
    preset = _NVENC_PRESETS[_PRESETS.index(options.preset)]
    return {"preset": preset, "tune": "hq", "rc": "vbr", "cq": str(crf), "b": "0", "bf": "0", "forced-idr": "1"}


def _x264_extras(source: VideoInfo) -> dict[str, str]:
    # With AVX-512, its rate control adds up memory that was never written, in pictures whose width is not a multiple
    # of 128. Up to AVX2 it does not; the bytes are the same otherwise, and so is the speed.
    params = ["asm=avx2"] if _has_avx512() else []
    if source.mastering:
        params.append(f"mastering-display={_mastering(source.mastering)}")
    if source.content_light:
        params.append(f"cll={_light(source.content_light)}")
    return {"x264-params": ":".join(params)} if params else {}


@lru_cache
def _has_avx512() -> bool:
    """Whether this processor has AVX-512, and therefore AVX2."""
    found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    return any(name == "X86_V4" or name.startswith("AVX512") for name in found)


def _x265_small(smaller_side: int) -> list[str]:
    """What keeps x265 from memory that is not its own in small pictures.

    Where only one coding tree unit fits beside or below another, motion is searched in memory that was never written:
    the bytes then depend on what the process did before. And for fewer than four lookahead blocks of 16x16 in a row
    its propagation of costs writes behind the end of its buffer.
    """
    if smaller_side >= 128:
        return []
    return ["ctu=32"] if smaller_side >= 64 else ["ctu=16", "cutree=0"]


def _x265_hdr(source: VideoInfo) -> list[str]:
    params = []
    if source.mastering:
        params.append(f"master-display={_mastering(source.mastering)}")
    if source.content_light:
        params.append(f"max-cll={_light(source.content_light)}")
    return [*params, "hdr10=1", "repeat-headers=1"] if params else []


def _svt_hdr(source: VideoInfo) -> list[str]:
    params = []
    if source.mastering:
        m = source.mastering

        def pair(xy: tuple[Fraction, Fraction]) -> str:
            return f"({float(xy[0]):.4f},{float(xy[1]):.4f})"

        params.append(
            f"mastering-display=G{pair(m.green)}B{pair(m.blue)}R{pair(m.red)}WP{pair(m.white)}"
            f"L({float(m.max_luminance):.4f},{float(m.min_luminance):.4f})"
        )
    if source.content_light:
        params.append(f"content-light={_light(source.content_light)}")
    return params


def _mastering(display: MasteringDisplay) -> str:
    """ST 2086 as x264 and x265 take it: chromaticities in 0.00002, luminances in 0.0001 cd/m2."""

    def pair(xy: tuple[Fraction, Fraction]) -> str:
        return f"({round(xy[0] * 50000)},{round(xy[1] * 50000)})"

    luminance = f"({round(display.max_luminance * 10000)},{round(display.min_luminance * 10000)})"
    return f"G{pair(display.green)}B{pair(display.blue)}R{pair(display.red)}WP{pair(display.white)}L{luminance}"


def _light(light: ContentLight) -> str:
    return f"{light.max_content},{light.max_average}"
