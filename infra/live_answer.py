"""Answers of the live service as a client gets them, and pictures in the codecs that have no memory."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra import protocol
from infra.protocol import DropReason, Flag, FrameHeader
from infra.refusals import BadMessage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LiveAnswer:
    """The service's answer to one frame.

    Attributes:
        header: see `FrameHeader`; `header.flags` has `Flag.DROPPED` if there is no picture.
        payload: the restored picture in the codec `codec`.
        latency_s: from the sending of the frame to its answer's arrival.
        connection: number of the connection that it came by.
    """

    header: FrameHeader
    payload: bytes
    codec: protocol.Codec
    width: int
    height: int
    latency_s: float
    connection: int = 0

    @property
    def id(self) -> int:
        """Number of the frame."""
        return self.header.id

    @property
    def dropped(self) -> DropReason | None:
        """Why the frame was not restored; None if it was."""
        return self.header.reason if Flag.DROPPED in self.header.flags else None

    def picture(self) -> NDArray[np.uint8]:
        """Return the restored picture (H,W,3) of a stream whose `codec_out` is not h264."""
        import numpy as np
        from PIL import Image

        if self.codec == "raw":
            return np.frombuffer(self.payload, np.uint8).reshape(self.height, self.width, 3)
        return np.asarray(Image.open(io.BytesIO(self.payload)).convert("RGB"))


def encode_picture(rgb_HWC: NDArray[np.uint8], codec: protocol.Codec, quality: int) -> bytes:
    """Return a picture (H,W,3) in a codec that has no memory.

    Raises:
        BadMessage: h264, which needs an encoder with memory.
    """
    from PIL import Image

    if codec == "raw":
        return rgb_HWC.tobytes()
    if codec == "h264":
        raise BadMessage(
            "A single picture cannot be encoded as h264.",
            remedy="Encode the stream and use `send`, one access unit each.",
        )
    file = io.BytesIO()
    Image.fromarray(rgb_HWC).save(file, codec, quality=quality)
    return file.getvalue()
