"""Parameters of an inference request: which sequence it belongs to, how long it may take, how it is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from actors.oip import Clip, bad
from infra.protocol import LARGEST_SIDE, SMALLEST_SIDE, Credentials, Hello, Lossless

_LONGEST_ID: Final = 128
_OF_THE_STREAM: Final = ("seed", "scale", "output_height", "output_codec", "quality", "scene_cuts", "least_steps")


class CallParameters(BaseModel):
    """See docs/predictor.md for each. Unknown ones are refused: a misspelt parameter would have no effect.

    Those of the stream hold from its first frame on; a later request of a sequence may repeat them, not change them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Triton's: sequences, time, order.
    sequence_id: str = Field(default="", max_length=_LONGEST_ID)
    sequence_start: bool = False
    sequence_end: bool = False
    timeout: int | None = Field(default=None, ge=0, description="microseconds until the answer is of no use; 0: none")
    priority: int | str | None = None  # taken and not used: who goes first is decided by the frames' arrival
    binary_data_output: bool = False  # REST: read where answers are written

    # Of the request.
    frame_index: int | None = Field(default=None, ge=0, description="number of its first frame in the sequence")
    cut: bool = Field(default=False, description="a new scene begins with the first frame")

    # Of the stream.
    seed: int = Field(default=0, ge=0, lt=2**63)
    scale: Literal[2, 3, 4] = 4
    output_height: int | None = Field(default=None, ge=SMALLEST_SIDE, le=2 * LARGEST_SIDE)
    output_codec: Literal["raw", "jpeg", "png", "webp"] | None = None
    quality: int = Field(default=90, ge=1, le=100)
    scene_cuts: bool = True
    least_steps: Literal[0, 1, 2, 4] = 4

    @field_validator("sequence_id", mode="before")
    @classmethod
    def _one_spelling(cls, value: object) -> object:
        """5 and "5" are one sequence: REST has numbers where gRPC may have text. 0 and "" are none, as in Triton."""
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError("a sequence is named by a number or a text")
        return "" if value in (0, "", "0") else str(value)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Return the parameters of a request.

        Raises:
            BadMessage: one is unknown or not possible. Names the parameter and what is wrong with it.
        """
        try:
            parameters = cls.model_validate({name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "extra_forbidden":
                message = f"There is no parameter {name[:60]!r}."
            else:
                message = f"The parameter {name!r} is not possible: {first['msg']}."
            raise bad(message, "See docs/predictor.md.", code="bad-parameter") from None
        if not parameters.sequence_id and (parameters.sequence_start or parameters.sequence_end):
            raise bad(
                "The request starts or ends a sequence and does not name it.",
                "Give a sequence_id other than 0.",
                code="sequence-unnamed",
            )
        return parameters

    @property
    def timeout_s(self) -> float | None:
        """Seconds until the answer is of no use; None: it always is."""
        return self.timeout / 1e6 if self.timeout else None

    def hello(self, clip: Clip, model: str, credentials: Credentials) -> Hello:
        """Return how a stream begins whose first frames are these; its frames may be as large as the largest."""
        width, height = max(clip.sizes, key=lambda size: size[0] * size[1])
        return Hello(
            width=width,
            height=height,
            model=model,
            scale=self.scale,
            out_height=self.output_height,
            codec_in=clip.codec,
            codec_out=self.output_codec or clip.codec,
            quality=self.quality,
            policy=Lossless(),
            least_steps=self.least_steps,
            cuts=self.scene_cuts,
            seed=self.seed,
            credentials=credentials,
        )

    def require_same_stream(self, first: CallParameters) -> None:
        """Do nothing where what is said of the stream is what its first request said.

        Raises:
            BadMessage: it is something else.
        """
        for name in _OF_THE_STREAM:
            if name in self.model_fields_set and getattr(self, name) != getattr(first, name):
                raise bad(
                    f"The parameter {name!r} is {getattr(self, name)!r}; the sequence began with "
                    f"{getattr(first, name)!r}.",
                    "Leave it out, or start another sequence.",
                    code="sequence-parameters",
                )
