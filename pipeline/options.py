"""What a checkpoint's ``upriver.json`` may say, and the switches of the guidance.

A checkpoint without that file behaves like the published one: the defaults below.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.flow import FlowName, FlowSize
from pipeline.guidance import WarpMode


class Guidance(BaseModel):
    """Which uses of the previous output are on; for ablations (paper, table 10). All on is the model as trained.

    Attributes:
        artg: the ControlNet on the warped previous output.
        tpm: the temporal modules of the decoder.
        tpm_warped: whether these see the warped previous output, or the previous output as it was.

    With `artg` and `tpm` off, every frame is restored by itself and no flow is estimated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    artg: bool = True
    tpm: bool = True
    tpm_warped: bool = True

    @property
    def needs_previous(self) -> bool:
        """Whether anything looks at the previous output."""
        return self.artg or self.tpm

    @property
    def needs_warp(self) -> bool:
        """Whether anything looks at the *warped* previous output, so that flow is needed."""
        return self.artg or (self.tpm and self.tpm_warped)


class ModelOptions(BaseModel):
    """The contents of ``upriver.json``: what diffusers' configuration files have no place for.

    Attributes:
        warp: arithmetic of the warp, see `pipeline.guidance.flow_warp`.
        flow: the flow estimator that the model was trained with.
        flow_size: where it estimates, at input or output size; None is the estimator's own default.
        noise: ``"per_frame"`` draws a new initial latent for every frame, ``"fixed"`` uses that of frame 0 for all
            frames of a stream.
        schedules: timesteps by number of steps, where they differ from the scheduler's own.
        guidance: which guidance the model has.
        training: notes on how the model was made; not read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    warp: WarpMode = "published"
    flow: FlowName = "raft"
    flow_size: FlowSize | None = None
    noise: Literal["per_frame", "fixed"] = "per_frame"
    schedules: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    guidance: Guidance = Field(default_factory=Guidance)
    training: dict[str, object] = Field(default_factory=dict)
