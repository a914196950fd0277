"""Who uses the service, what it may do, and how much of it is counted: tenants, their limits, their accounts.

Knows no credentials (`infra.auth` turns those into a tenant), no clock (the time is passed in) and no session. An
account counts what passes through this process: each replica has its own, so a limit holds per replica.
"""

from __future__ import annotations

import enum
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from infra.refusals import AdmissionRefused, Forbidden, FrameTooLarge, RateExceeded

_GIGA: Final = 1_000_000_000

# The name stands in labels of metrics, in log records and in the keys under which states lie: no slash, no space, no
# control character, no leading dot. What identity providers put into their claims ("auth0|58a1", mail addresses) fits.
TENANT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@|:+-]{0,127}", re.ASCII)

BURST_S: Final = 1.0  # a bucket holds what its rate fills in so long
RETRY_AFTER_S: Final = 5.0  # for a place that another stream of the tenant holds: nobody knows when that one ends
ACCOUNTS_BEFORE_TIDYING: Final = 1024


class Scope(enum.StrEnum):
    """What a key or a token is good for."""

    LIVE = "live"  # open streams
    RESTORE = "restore"  # upload a video and get it back restored
    JOBS = "jobs"  # start archive jobs, ask for them
    ADMIN = "admin"  # metrics, and which models run


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody whose credentials were accepted.

    Attributes:
        name: matches `TENANT_NAME`; states, limits and figures belong to it. Several keys may lead to one tenant.
        scopes: what these credentials are good for.
        key_id: the public part of the API key; None where it was a token, or nothing was asked for.
        expires_at_s: when the credentials end, in seconds since 1970; None: never.
    """

    name: str
    scopes: frozenset[Scope]
    key_id: str | None = None
    expires_at_s: float | None = None


def is_tenant_name(name: object) -> bool:
    """Return whether `name` is a text that can name a tenant."""
    return isinstance(name, str) and TENANT_NAME.fullmatch(name) is not None


def require(tenant: Tenant, scope: Scope) -> None:
    """Do nothing where the tenant's credentials are good for `scope`.

    Raises:
        Forbidden: they are not.
    """
    if scope not in tenant.scopes:
        raise Forbidden(
            f"These credentials are not good for {scope.value!r}.",
            limit=" ".join(sorted(tenant.scopes)),
            remedy=f"Use a key or a token with the scope {scope.value!r}.",
        )


class TenantLimits(BaseModel):
    """How much one tenant may have of a replica. The defaults carry eight streams of 640x360 at 30 frames a second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sessions: int = Field(default=8, ge=1, le=100_000, description="streams open at a time")
    pixels_per_second: int = Field(
        default=64_000_000, ge=256, le=10**12, description="input pixels, all streams together"
    )
    bytes_per_second: int = Field(default=64_000_000, ge=1024, le=10**12, description="bytes received in frames")
    frame_pixels: int = Field(default=3840 * 2160, ge=256, le=2**26, description="largest input frame, in pixels")
    jobs: int = Field(default=2, ge=0, le=10_000, description="archive jobs and uploads under way at a time")
    upload_bytes: int = Field(default=2_000_000_000, ge=1024, le=10**13, description="largest uploaded video")


class TokenBucket:
    """Lets through at most ``rate * seconds + burst`` in any time, by giving back how long to wait otherwise.

    Counts in whole billionths, so that no rounding lets more through. A clock that goes back fills nothing. Not safe
    to share between threads by itself.

    Args:
        rate: units per second. burst: units that may come at once. now: seconds of any clock; the bucket is full then.
    """

    __slots__ = ("_capacity", "_filled_at", "_level", "rate")

    def __init__(self, rate: int, burst: int, now: float) -> None:
        self.rate = rate
        self._capacity = burst * _GIGA
        self._level = self._capacity
        self._filled_at = _nanoseconds(now)

    def take(self, amount: int, now: float) -> float:
        """Take `amount` units and return 0; or take nothing and return after how many seconds they will be there.

        Raises:
            ValueError: more than the bucket ever holds.
        """
        wait_s = self.wait_for(amount, now)
        if not wait_s:
            self._level -= amount * _GIGA
        return wait_s

    def wait_for(self, amount: int, now: float) -> float:
        """Return after how many seconds `amount` units will be there; take nothing.

        Raises:
            ValueError: more than the bucket ever holds.
        """
        wanted = amount * _GIGA
        if wanted > self._capacity:
            raise ValueError(f"{amount} units never fit into a bucket of {self._capacity // _GIGA}")
        self._fill(now)
        if wanted <= self._level:
            return 0.0
        missing_ns = -(-(wanted - self._level) // self.rate)
        # Two microseconds more than needed: the caller's clock is a float, and one that waited must not come too early.
        return (missing_ns + 2_000) / _GIGA

    def is_full(self, now: float) -> bool:
        """Return whether forgetting the bucket would change nothing."""
        self._fill(now)
        return self._level == self._capacity

    def _fill(self, now: float) -> None:
        now_ns = _nanoseconds(now)
        if now_ns > self._filled_at:
            self._level = min(self._capacity, self._level + (now_ns - self._filled_at) * self.rate)
            self._filled_at = now_ns


def _nanoseconds(now: float) -> int:
    return int(now * _GIGA)


Countable: TypeAlias = Literal["sessions", "jobs"]


class Lease:
    """A place that a stream or a job holds; given back by `close`, once, however often it is called."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give the place back."""
        with self._lock:
            give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Account:
    """What one tenant has open, and its buckets."""

    __slots__ = ("buckets", "held")

    def __init__(self) -> None:
        self.held: dict[Countable, int] = {"sessions": 0, "jobs": 0}
        self.buckets: dict[str, TokenBucket] = {}

    def is_idle(self, now: float) -> bool:
        return not any(self.held.values()) and all(bucket.is_full(now) for bucket in self.buckets.values())


class Accounts:
    """The accounts of all tenants of a replica; safe to use from several threads.

    Args:
        limits_of: gives a tenant's limits by its name; asked each time, so limits may change while streams run.
    """

    def __init__(self, limits_of: Callable[[str], TenantLimits]) -> None:
        self._limits_of = limits_of
        self._accounts: dict[str, _Account] = {}
        self._tidy_at = ACCOUNTS_BEFORE_TIDYING
        self._lock = threading.Lock()

    def limits(self, tenant: Tenant) -> TenantLimits:
        """Return what `tenant` may have."""
        return self._limits_of(tenant.name)

    def open_session(self, tenant: Tenant) -> Lease:
        """Count one more stream until the lease is closed.

        Raises:
            AdmissionRefused: the tenant has as many as it may have.
        """
        return self._open(tenant, "sessions", self.limits(tenant).sessions)

    def open_job(self, tenant: Tenant) -> Lease:
        """Count one more archive job, or upload, until the lease is closed.

        Raises:
            AdmissionRefused: the tenant has as many as it may have.
        """
        return self._open(tenant, "jobs", self.limits(tenant).jobs)

    def check_frame(self, tenant: Tenant, width: int, height: int) -> None:
        """Do nothing where a frame of this size may come at all; a frame's pixels are charged besides.

        Raises:
            FrameTooLarge: it is larger than the tenant may send, or has more pixels than it may send in a second.
        """
        limits = self.limits(tenant)
        largest = min(limits.frame_pixels, int(limits.pixels_per_second * BURST_S))
        if width * height > largest:
            raise FrameTooLarge(
                f"A frame of {width}x{height} has {width * height} pixels; this tenant may send frames of {largest}.",
                limit=f"{largest} pixels",
                remedy="Send smaller frames, or ask the operator for a higher limit.",
            )

    def check_upload(self, tenant: Tenant, size_bytes: int) -> None:
        """Do nothing where an upload of so many bytes, or that has reached so many, may go on.

        Raises:
            FrameTooLarge: it is larger than the tenant may send; as an answer to a request, status 413.
        """
        largest = self.limits(tenant).upload_bytes
        if size_bytes > largest:
            raise FrameTooLarge(
                f"An upload of {size_bytes} bytes or more came; this tenant may send {largest}.",
                limit=f"{largest} bytes",
                remedy="Send a shorter video, or start an archive job for it.",
            )

    def charge_pixels(self, tenant: Tenant, pixels: int, now: float) -> float:
        """Charge the pixels of an input frame, or return how long to wait before trying again (seconds); 0: charged.

        Raises:
            RateExceeded: so many never pass at once; `check_frame` tells it before.
        """
        return self._charge(tenant, "pixels", pixels, self.limits(tenant).pixels_per_second, now)

    def charge_bytes(self, tenant: Tenant, size_bytes: int, now: float) -> float:
        """Charge the bytes of a message, or return how long to wait before trying again (seconds); 0: charged.

        Raises:
            RateExceeded: so many never pass at once.
        """
        return self._charge(tenant, "bytes", size_bytes, self.limits(tenant).bytes_per_second, now)

    def held(self) -> Mapping[str, Mapping[Countable, int]]:
        """Return what each known tenant has open, for figures and tests."""
        with self._lock:
            return {name: dict(account.held) for name, account in self._accounts.items()}

    def _open(self, tenant: Tenant, what: Countable, limit: int) -> Lease:
        with self._lock:
            account = self._accounts.setdefault(tenant.name, _Account())
            if account.held[what] >= limit:
                if not any(account.held.values()) and not account.buckets:
                    del self._accounts[tenant.name]
                raise AdmissionRefused(
                    f"This tenant has {account.held[what]} {what} open; the limit is {limit}.",
                    limit=f"{limit} {what}",
                    retry_after_s=RETRY_AFTER_S if limit else None,
                    remedy=f"Close one of your {what} first." if limit else f"Ask the operator for {what}.",
                )
            account.held[what] += 1
        return Lease(lambda: self._close(tenant.name, what))

    def _close(self, name: str, what: Countable) -> None:
        with self._lock:
            account = self._accounts[name]  # there as long as it holds something: tidying leaves those alone
            account.held[what] -= 1
            if not any(account.held.values()) and not account.buckets:
                del self._accounts[name]

    def _charge(self, tenant: Tenant, what: str, amount: int, rate: int, now: float) -> float:
        with self._lock:
            account = self._accounts.setdefault(tenant.name, _Account())
            bucket = account.buckets.get(what)
            if bucket is None or bucket.rate != rate:
                self._tidy(now, but=tenant.name)
                bucket = account.buckets[what] = TokenBucket(rate, max(1, int(rate * BURST_S)), now)
            try:
                return bucket.take(amount, now)
            except ValueError:
                raise RateExceeded(
                    f"{amount} {what} came at once; this tenant may send {rate} a second.",
                    limit=f"{rate} {what} a second",
                    remedy="Send smaller frames, or ask the operator for a higher limit.",
                ) from None

    def _tidy(self, now: float, *, but: str) -> None:
        """Forget accounts that hold nothing and have full buckets, once there are many: names come from tokens."""
        if len(self._accounts) < self._tidy_at:
            return
        for name in [name for name, account in self._accounts.items() if name != but and account.is_idle(now)]:
            del self._accounts[name]
        # Twice as many as are in use before the next time: looking through all of them stays cheap on average.
        self._tidy_at = max(ACCOUNTS_BEFORE_TIDYING, 2 * len(self._accounts))
