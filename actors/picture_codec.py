"""JPEG, WebP and PNG: every frame a whole file.

Files are decoded by Pillow, one format only, after `picture_header` has read their size and taken their metadata out:
Pillow tells of truncated files, OpenCV gives half a picture and writes to the terminal. They are encoded by whichever
of the two is faster: JPEG and PNG by OpenCV, WebP by Pillow. Both leave the interpreter to other threads meanwhile.
"""

from __future__ import annotations

import io
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.errors import Undecodable
from actors.frame_codec import DecodedFrame, EncodedFrame, FrameDecoder, FrameEncoder
from actors.picture_header import PictureFormat, check_png_pixels, read_picture
from infra.protocol import Codec

_PILLOW_FORMATS: Final[dict[str, str]] = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
# Colour at full resolution costs bytes that only those who ask for the highest quality want to spend.
_FULL_COLOUR_QUALITY: Final = 95
_WEBP_METHOD: Final = 0  # of 0 (fastest) to 6


class PictureDecoder(FrameDecoder):
    """Files of one of the three formats."""

    def _decode(self, payload: memoryview, id: int) -> list[DecodedFrame]:
        format: PictureFormat = self.codec  # type: ignore[assignment]
        bare = read_picture(format, payload)
        self.check_size(bare.width, bare.height)
        if format == "png":
            check_png_pixels(bare)
        try:
            with Image.open(io.BytesIO(bare.data), formats=(_PILLOW_FORMATS[format],)) as image:
                if image.size != (bare.width, bare.height):
                    raise ValueError("its size differs from what its header declares")
                image.decodermaxblock = len(bare.data)  # the whole file at once, instead of ever longer pieces
                return [DecodedFrame(id, _rgb(image))]
        except MemoryError:
            raise
        except Exception as error:  # of any type: Pillow's plugins promise none
            raise Undecodable(
                f"A frame is no {format.upper()} picture that can be shown: {_first_line(error)}.",
                remedy=f"Send one whole {format.upper()} file in each message.",
            ) from None


class PictureEncoder(FrameEncoder):
    """Files of one of the three formats.

    Args:
        codec: `jpeg`, `webp` or `png`.
        quality: 1 to 100; from 95 on JPEG keeps the colour of every pixel (4:4:4), below that of every fourth (4:2:0).
    """

    def __init__(self, codec: Codec, *, quality: int) -> None:
        self.codec = codec
        self._quality = quality
        sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420
        if quality >= _FULL_COLOUR_QUALITY:
            sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
        self._jpeg = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]

    def _encode(self, rgb_HWC: NDArray[np.uint8], id: int, *, force_key: bool) -> list[EncodedFrame]:
        if self.codec == "webp":
            return [EncodedFrame(id, self._webp(rgb_HWC), True)]
        bgr_HWC = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2BGR)
        if self.codec == "jpeg":
            _, file = cv2.imencode(".jpg", bgr_HWC, self._jpeg)
        else:
            _, file = cv2.imencode(".png", bgr_HWC, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        return [EncodedFrame(id, file.data.cast("B"), True)]

    def _webp(self, rgb_HWC: NDArray[np.uint8]) -> memoryview:
        file = io.BytesIO()
        Image.fromarray(rgb_HWC).save(file, "WEBP", quality=self._quality, method=_WEBP_METHOD)
        return file.getbuffer()


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of a picture of any mode: 16 bits rounded to 8, palettes and greys spread, transparency over black."""
    if image.mode == "I;16":
        grey_HW = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(grey_HW.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
