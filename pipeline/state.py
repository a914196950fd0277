"""StreamState: everything that one stream carries from frame to frame, and its file format.

Knows: which tensors and numbers make up a stream, how they are written to safetensors and read back bit for bit, and
how files of an older schema are brought up to date. Does not know: models, noise, flow, cut detection.

File format: one safetensors file. Tensors ``prev_output`` (3,4h,4w) and ``prev_input`` (3,h,w), absent before the first
frame and after a cut, ``detector.<name>`` and ``policy.<name>``; one metadata entry, ``upriver_state``, with the other
fields as JSON. Tensors of other names are ignored, and those of detector and policy may be absent: so a name that is
new there needs no new version. Whoever does not know it starts that memory afresh, and restores no pixel wrongly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.errors import StateError

VERSION: Final = 1
SEED_LIMIT: Final = 2**64

_METADATA_KEY: Final = "upriver_state"
_DETECTOR_PREFIX: Final = "detector."
_POLICY_PREFIX: Final = "policy."

Fields = dict[str, Any]
Upgrade = Callable[[Fields, dict[str, Tensor]], tuple[Fields, dict[str, Tensor]]]

# How to read older files: version k -> a function from the fields and tensors of version k to those of k + 1. When
# VERSION grows to N, the entry for N - 1 is written in the same change, so that a rolling upgrade never loses a
# stream.
UPGRADES: dict[int, Upgrade] = {}


@dataclass(slots=True, eq=False)
class StreamState:
    """The state of one stream: what `StreamDiffVSRPipeline.step` reads and, when it has succeeded, replaces.

    Attributes:
        model_sha256: fingerprint of the model that the stream belongs to; a step with another model refuses it.
        seed: key of the stream's noise, 0 <= seed < 2**64.
        index: zero-based number of the next frame presented to the stream. A cut does not change it.
        height, width: size of the input frames, or None while there is no previous frame.
        prev_output_3HW: previous decoder output (3,4h,4w), raw: not clamped, not quantised, in the pipeline's dtype.
        prev_input_3HW: previous input frame (3,h,w) in [-1, 1], fp32, from which flow is computed.
        detector: tensors of the cut detector, by name. A reset keeps them: the detector compares across cuts.
        policy: what `pipeline.step_policy` remembers, by name, always in main memory. It is replaced, never changed,
            and a reset keeps it. Empty where no policy chooses the steps.
        version: schema version.
    """

    model_sha256: str
    seed: int = 0
    index: int = 0
    height: int | None = None
    width: int | None = None
    prev_output_3HW: Tensor | None = None
    prev_input_3HW: Tensor | None = None
    detector: dict[str, Tensor] = field(default_factory=dict)
    policy: dict[str, Tensor] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        if not 0 <= self.seed < SEED_LIMIT:
            raise StateError(
                f"The seed {self.seed} is outside 0 to {SEED_LIMIT - 1}.",
                code="state-seed",
                remedy="Choose a non-negative seed of at most 64 bits.",
            )
        if self.index < 0:
            raise StateError(
                f"The frame index {self.index} is negative.", code="state-index", remedy="Start at index 0 or later."
            )

    @property
    def is_first(self) -> bool:
        """Whether the next frame has no previous one: at the start of the stream, and after a cut."""
        return self.prev_output_3HW is None

    def advance(self, output_3HW: Tensor, input_3HW: Tensor) -> None:
        """Take over the outcome of one successful step: (3,4h,4w) and (3,h,w)."""
        self.height, self.width = input_3HW.shape[-2:]
        self.prev_output_3HW = output_3HW
        self.prev_input_3HW = input_3HW
        self.index += 1

    def reset(self) -> None:
        """Forget the previous frame, as a cut demands. Seed, index, and what detector and policy remember stay."""
        self.height = self.width = None
        self.prev_output_3HW = self.prev_input_3HW = None

    def skip(self) -> None:
        """Count one frame that was presented but not restored by the model; the next one starts as after a cut."""
        self.reset()
        self.index += 1

    def hold(self) -> Tensor:
        """Count one frame that looks like the last restored one; returns that one's output (3,4h,4w), which it gets.

        Both pictures stay: they belong together, and flow goes on from the frame that was restored.

        Raises:
            StateError: there is no previous output.
        """
        if self.prev_output_3HW is None:
            raise StateError(
                f"Frame {self.index} has no previous output that could be held.",
                code="state-hold",
                remedy="Restore the first frame of a stream, and the first one after a cut.",
            )
        self.index += 1
        return self.prev_output_3HW

    def require_model(self, model_sha256: str) -> None:
        """Raise StateError unless the state belongs to the model with this fingerprint."""
        if self.model_sha256 != model_sha256:
            raise StateError(
                f"The state belongs to the model {self.model_sha256}, but the loaded model is {model_sha256}.",
                code="state-other-model",
                remedy="Load the model that the stream was started with, or start the stream again with this one.",
            )

    def to(self, device: torch.device | str) -> StreamState:
        """Move the tensors, but those of the policy, to `device` in place; return the state itself."""
        if self.prev_output_3HW is not None:
            self.prev_output_3HW = self.prev_output_3HW.to(device)
        if self.prev_input_3HW is not None:
            self.prev_input_3HW = self.prev_input_3HW.to(device)
        self.detector = {name: tensor.to(device) for name, tensor in self.detector.items()}
        return self

    def to_bytes(self) -> bytes:
        """Return the state as the bytes of a safetensors file; `load` restores every tensor bit for bit."""
        tensors = {_DETECTOR_PREFIX + name: tensor for name, tensor in self.detector.items()}
        tensors |= {_POLICY_PREFIX + name: tensor for name, tensor in self.policy.items()}
        if self.prev_output_3HW is not None and self.prev_input_3HW is not None:
            tensors |= {"prev_output": self.prev_output_3HW, "prev_input": self.prev_input_3HW}
        fields: Fields = {
            "version": self.version,
            "model_sha256": self.model_sha256,
            "seed": self.seed,
            "index": self.index,
            "height": self.height,
            "width": self.width,
        }
        # clone: views of one batch share storage, which safetensors refuses
        stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        return save_tensors(stored, metadata={_METADATA_KEY: json.dumps(fields)})

    def save(self, target: str | os.PathLike[str] | BinaryIO) -> None:
        """Write the state to a path (atomically: a reader sees the old file or the whole new one) or a binary file."""
        data = self.to_bytes()
        if not isinstance(target, str | os.PathLike):
            target.write(data)
            return
        path = Path(target)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | BinaryIO,
        device: torch.device | str | None = None,
        *,
        model_sha256: str | None = None,
    ) -> StreamState:
        """Read a state that `save` wrote.

        Args:
            source: a path, or a binary file that is read to its end.
            device: where the tensors go; None leaves them in main memory.
            model_sha256: fingerprint of the model that will go on with the stream. A step checks it in any case.

        Raises:
            StateError: not a state file, an unknown schema version, or another model's state (both are named).
            OSError: the file cannot be opened or read.
        """
        data = Path(source).read_bytes() if isinstance(source, str | os.PathLike) else source.read()
        name = str(source) if isinstance(source, str | os.PathLike) else getattr(source, "name", "the file object")
        fields, tensors = _parse(data, str(name))
        fields, tensors = _upgrade(fields, tensors, str(name))
        try:
            state = cls(
                model_sha256=fields["model_sha256"],
                seed=fields["seed"],
                index=fields["index"],
                height=fields["height"],
                width=fields["width"],
                prev_output_3HW=tensors.get("prev_output"),
                prev_input_3HW=tensors.get("prev_input"),
                detector=_named(tensors, _DETECTOR_PREFIX),
                policy=_named(tensors, _POLICY_PREFIX),
            )
        except KeyError as error:
            raise _unreadable(str(name), f"the field {error} is missing") from error
        if model_sha256 is not None:
            state.require_model(model_sha256)
        return state if device is None else state.to(device)


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _parse(data: bytes, name: str) -> tuple[Fields, dict[str, Tensor]]:
    """Split a safetensors file into the JSON fields of its metadata and its tensors."""
    try:
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        fields = json.loads(header["__metadata__"][_METADATA_KEY])
    except (SafetensorError, ValueError, KeyError) as error:
        raise _unreadable(name, str(error) or type(error).__name__) from error
    return fields, tensors


def _upgrade(fields: Fields, tensors: dict[str, Tensor], name: str) -> tuple[Fields, dict[str, Tensor]]:
    """Bring the contents of an older file to the current schema, one version at a time."""
    found = fields.get("version")
    while (version := fields.get("version")) != VERSION:
        if version not in UPGRADES:
            readable = sorted({*UPGRADES, VERSION})
            raise StateError(
                f"{name} has state version {found}; this program reads {', '.join(map(str, readable))}.",
                code="state-version",
                remedy="Use the version of Upriver that wrote it or the next one, or start the stream again.",
            )
        fields, tensors = UPGRADES[version](fields, tensors)
    return fields, tensors


def _unreadable(name: str, reason: str) -> StateError:
    return StateError(
        f"{name} is not a stream state: {reason}.",
        code="state-unreadable",
        remedy="Use a file that StreamState.save wrote, or start the stream again.",
    )
