"""What can be wrong with a video file or with the place where the result should go.

Every class carries the `code` that programs match on and a `remedy` for people; none of them knows of exit codes.
"""

from __future__ import annotations

from pipeline.errors import PipelineError


class VideoError(PipelineError):
    """Root of everything that reading or writing video raises on purpose."""


class VideoNotFound(VideoError):
    """The path does not exist, or is a folder without pictures."""

    def __init__(self, message: str, *, remedy: str = "Check the path.") -> None:
        super().__init__(message, code="video-not-found", remedy=remedy)


class UnreadableVideo(VideoError):
    """The file is no video, is of a kind that is not opened, or holds nothing that decodes."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message, code="video-unreadable", remedy=remedy)


class NoVideoStream(VideoError):
    """The file is fine, but there is no moving picture in it."""

    def __init__(self, message: str, *, remedy: str = "Give a file that contains a video stream.") -> None:
        super().__init__(message, code="video-no-stream", remedy=remedy)


class FrameTooLarge(VideoError):
    """The header declares more pixels or a longer side than the limits allow; nothing was allocated for it."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message, code="video-frame-too-large", remedy=remedy)


class FrameTooSmall(VideoError):
    """The picture is below the smallest size that can be restored."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message, code="video-frame-too-small", remedy=remedy)


class DestinationError(VideoError):
    """The result cannot be put where it was asked for."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message, code="video-destination", remedy=remedy)


class UnsupportedOutput(VideoError):
    """The container, codec, pixel format and size that were asked for do not go together."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message, code="video-output-unsupported", remedy=remedy)


class EncodeError(VideoError):
    """The encoder or the muxer refused a frame or a packet while writing."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message, code="video-encode", remedy=remedy)
