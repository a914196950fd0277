"""`upriver restore` as a job asked for over the network: what may be asked for, and the command that it becomes.

Nothing of what is asked for becomes part of a command unless it is named here, has its type, and cannot be taken for
anything else: places must lie under prefixes that the operator allows, options are a closed set.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from infra.ray_jobs import python_command
from infra.refusals import BadMessage, Forbidden
from infra.settings import Codec, PixelFormat, Preset, ladder_heights

LONGEST_PLACE: Final = 1024
TENANT: Final = "{tenant}"
# `upriver restore` reads these as patterns and as tables that name other places.
_PATTERN_CHARACTERS: Final = "*?[]"
_LIST_SUFFIXES: Final = (".csv", ".jsonl", ".ndjson", ".parquet")


class JobOptions(BaseModel):
    """Options of `upriver restore` that may be asked for; none is the operator's own setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(default=None, max_length=200, pattern=r"^[A-Za-z0-9][\w./:-]*$")
    steps: Annotated[int, Field(ge=1, le=50)] | Literal["auto"] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    scale: int | None = Field(default=None, ge=2, le=4)
    height: int | None = Field(default=None, ge=16, le=16384)
    codec: Codec | None = None
    crf: int | None = Field(default=None, ge=0, le=63)
    preset: Preset | None = None
    pix_fmt: PixelFormat | None = None
    fragmented: bool | None = None
    framemd5: bool | None = None
    hls: str | None = Field(default=None, max_length=200, pattern=r"^[0-9, ]+$")
    cuts: bool | None = None
    overwrite: bool = False

    @field_validator("hls")
    @classmethod
    def _heights(cls, value: str | None) -> str | None:
        ladder_heights(value)
        return value

    @model_validator(mode="after")
    def _one_size(self) -> JobOptions:
        if self.scale is not None and self.height is not None:
            raise ValueError("scale and height exclude each other")
        return self

    def flags(self) -> list[str]:
        """Return them as `upriver restore` takes them, one argument each."""
        flags = []
        for name, value in self.model_dump(exclude_none=True, exclude={"overwrite"}).items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{option}" if value else f"--no-{option}")
            else:
                flags.append(f"--{option}={value}")
        return [*flags, "--overwrite"] if self.overwrite else flags


class JobRules(BaseModel):
    """What an operator lets others ask for.

    Attributes:
        sources, destinations: prefixes of places, such as ``s3://tapes/in/``; in a prefix ``{tenant}`` stands for the
            tenant's name. None allowed is nothing allowed. Local folders are allowed by naming them here too.
        models: names that may be asked for.
        jobs_per_tenant: that have not ended.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[str, ...] = ()
    destinations: tuple[str, ...] = ()
    models: tuple[str, ...] = ("tiny",)
    jobs_per_tenant: int = Field(default=8, ge=1)

    @field_validator("sources", "destinations")
    @classmethod
    def _folders(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in value:
            if not prefix.startswith(("s3://", "/")) or prefix in ("s3://", "/"):
                raise ValueError(f"{prefix!r} is neither s3://bucket/... nor the whole path of a folder")
        # `s3://tapes` must not stand for `s3://tapes-of-others/` as well.
        return tuple(prefix if prefix.endswith("/") else f"{prefix}/" for prefix in value)

    def command(self, tenant: str, source: str, destination: str, options: JobOptions) -> list[str]:
        """Return the command of a job.

        Raises:
            BadMessage: a place or an option that is not possible. Forbidden: one that is not allowed.
        """
        _check_place("source", source, self.sources, tenant)
        _check_place("destination", destination, self.destinations, tenant)
        if source.rstrip("/").lower().endswith(_LIST_SUFFIXES):
            raise BadMessage(
                "The source is a list, which may name any place.",
                code="job-list",
                remedy="Ask for a job for each video, or for the folder that they are in.",
            )
        if options.model is not None and options.model not in self.models:
            raise Forbidden(
                f"The model {options.model} may not be asked for.",
                code="job-model",
                limit=", ".join(self.models),
                remedy="Ask for one of those.",
            )
        return python_command(["restore", *options.flags(), "--", source, destination])


def _check_place(what: str, place: str, prefixes: tuple[str, ...], tenant: str) -> None:
    problem = _problem(place)
    if problem:
        raise BadMessage(f"The {what} {problem}.", code="job-place", remedy="Give the whole place of a file or folder.")
    allowed = [prefix.replace(TENANT, tenant) for prefix in prefixes if TENANT not in prefix or _is_one_part(tenant)]
    if not any(f"{place}/".startswith(prefix) for prefix in allowed):
        raise Forbidden(
            f"The {what} does not lie under a place that is allowed.",
            code=f"job-{what}",
            limit=" ".join(allowed),
            remedy="Give a place under one of those, or ask the operator for another.",
        )


def _problem(place: str) -> str:
    """What is wrong with a place whatever is allowed, in words; never shows it: it may hold a password."""
    if len(place) > LONGEST_PLACE:
        return f"has {len(place)} characters; the limit is {LONGEST_PLACE}"
    if not place.isprintable() or place != place.strip():
        return "has characters that are not printed"
    if any(character in place for character in _PATTERN_CHARACTERS):
        return f"has one of the characters {_PATTERN_CHARACTERS}, which stand for many places"
    scheme, separator, rest = place.partition("://")
    if (scheme != "s3") if separator else not place.startswith("/"):
        return "is neither s3://bucket/... nor the whole path of a file"
    parts = (rest if separator else place[1:]).rstrip("/").split("/")
    if any(part in ("", ".", "..") or part.startswith("-") or part.endswith(".upriver") for part in parts):
        return "has a part that is empty, begins with a dash, is . or .., or is a work area"
    return ""


def _is_one_part(tenant: str) -> bool:
    return bool(tenant) and "/" not in tenant and tenant not in (".", "..")
