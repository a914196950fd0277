from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.refusals import AdmissionRefused, Forbidden, FrameTooLarge, RateExceeded, refusal_from_message
from infra.tenants import (
    ACCOUNTS_BEFORE_TIDYING,
    Accounts,
    Scope,
    Tenant,
    TenantLimits,
    TokenBucket,
    is_tenant_name,
    require,
)

ALICE = Tenant("alice", frozenset({Scope.LIVE}))
BOB = Tenant("bob", frozenset({Scope.LIVE}))
LIMITS = TenantLimits(
    sessions=2, pixels_per_second=1000, bytes_per_second=2048, frame_pixels=600, jobs=1, upload_bytes=4096
)


def accounts(limits: TenantLimits = LIMITS) -> Accounts:
    return Accounts(lambda _: limits)


arrivals = st.lists(
    st.tuples(st.floats(0, 3, allow_nan=False), st.integers(0, 1500)),  # seconds since the one before, units
    max_size=60,
)
starts = st.sampled_from([0.0, 12.345, 1e6 + 1 / 3, 1.7e9])


@given(rate=st.integers(1, 5000), burst=st.integers(1, 1500), start=starts, arrivals=arrivals)
@settings(max_examples=300, deadline=None)
def test_in_no_stretch_of_time_does_more_pass_than_rate_times_time_plus_burst(
    rate: int, burst: int, start: float, arrivals: list[tuple[float, int]]
) -> None:
    bucket, now, passed = TokenBucket(rate, burst, start), start, [(start, 0)]
    for pause, amount in arrivals:
        now += pause
        if amount <= burst and bucket.take(amount, now) == 0:
            passed.append((now, amount))
    for first in range(len(passed)):
        total = 0
        for moment, amount in passed[first:]:
            total += amount
            elapsed_ns = int(moment * 1_000_000_000) - int(passed[first][0] * 1_000_000_000)
            assert total * 1_000_000_000 <= rate * elapsed_ns + burst * 1_000_000_000


@given(rate=st.integers(1, 10**12), start=starts, share=st.floats(0, 1), arrivals=arrivals)
@settings(max_examples=300, deadline=None)
def test_who_waits_as_long_as_told_is_let_through(
    rate: int, start: float, share: float, arrivals: list[tuple[float, int]]
) -> None:
    burst = max(1, rate)
    bucket, now = TokenBucket(rate, burst, start), start
    for pause, part in arrivals:
        now += pause / 100
        amount = min(burst, int(burst * part / 1500 * share) + 1)
        wait_s = bucket.take(amount, now)
        if wait_s:
            assert bucket.take(amount, now) == wait_s  # asking took nothing
            now += wait_s
            assert bucket.take(amount, now) == 0


def test_what_may_pass_is_not_held_back() -> None:
    bucket = TokenBucket(100, 100, 0.0)
    assert bucket.take(100, 0.0) == 0
    assert bucket.take(50, 0.0) == pytest.approx(0.5, abs=1e-5)
    assert bucket.take(50, 0.5) == 0
    assert bucket.take(100, 1000.0) == 0 and bucket.take(1, 1000.0) > 0  # a long silence saves up one burst


def test_not_a_thousandth_of_a_unit_is_lent() -> None:
    bucket = TokenBucket(1000, 1000, 0.0)
    assert bucket.take(1000, 0.0) == 0
    assert bucket.take(1, 0.000_999_5) > 0
    assert bucket.take(1, 0.001) == 0


def test_a_clock_that_goes_back_fills_nothing() -> None:
    bucket = TokenBucket(100, 100, 50.0)
    assert bucket.take(100, 50.0) == 0
    assert bucket.take(1, 10.0) > 0
    assert bucket.take(1, 50.0) > 0


def test_pixels_and_bytes_are_charged_apart_and_by_tenant() -> None:
    books = accounts()
    assert books.charge_pixels(ALICE, 1000, 5.0) == 0
    assert books.charge_pixels(ALICE, 500, 5.0) == pytest.approx(0.5, abs=1e-5)
    assert books.charge_bytes(ALICE, 2048, 5.0) == 0
    assert books.charge_bytes(ALICE, 1024, 5.0) == pytest.approx(0.5, abs=1e-5)
    assert books.charge_pixels(BOB, 1000, 5.0) == 0
    assert books.charge_pixels(ALICE, 500, 5.6) == 0


def test_two_keys_of_a_tenant_share_its_account() -> None:
    books = accounts()
    other = Tenant("alice", frozenset({Scope.RESTORE}), key_id="0" * 16)
    assert books.charge_pixels(ALICE, 1000, 0.0) == 0
    assert books.charge_pixels(other, 1, 0.0) > 0


def test_what_would_never_pass_is_refused_instead_of_put_off() -> None:
    books = accounts()
    with pytest.raises(RateExceeded) as caught:
        books.charge_pixels(ALICE, 1001, 0.0)
    assert caught.value.limit == "1000 pixels a second" and caught.value.retry_after_s is None
    assert books.charge_pixels(ALICE, 1000, 0.0) == 0


def test_a_new_limit_holds_for_a_stream_that_runs() -> None:
    limits = LIMITS
    books = Accounts(lambda _: limits)
    with books.open_session(ALICE):
        assert books.charge_pixels(ALICE, 1000, 0.0) == 0
        limits = LIMITS.model_copy(update={"pixels_per_second": 256})
        with pytest.raises(RateExceeded):
            books.charge_pixels(ALICE, 1000, 9.0)
        assert books.charge_pixels(ALICE, 256, 9.0) == 0


def test_as_many_sessions_as_allowed_and_places_come_back() -> None:
    books = accounts()
    first, second = books.open_session(ALICE), books.open_session(ALICE)
    with pytest.raises(AdmissionRefused) as caught:
        books.open_session(ALICE)
    assert caught.value.limit == "2 sessions" and caught.value.retry_after_s
    told = refusal_from_message(caught.value.to_message())
    assert isinstance(told, AdmissionRefused) and told.limit == "2 sessions"
    books.open_session(BOB).close()
    first.close()
    first.close()  # once is enough: another's place does not come back
    with books.open_session(ALICE), pytest.raises(AdmissionRefused):
        books.open_session(ALICE)
    second.close()
    assert books.held() == {}


def test_a_lease_comes_back_whatever_happens_inside() -> None:
    books = accounts()
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), books.open_session(ALICE), books.open_job(ALICE):
            assert books.held()["alice"] == {"sessions": 1, "jobs": 1}
            raise ZeroDivisionError
    assert books.held() == {}


def test_jobs_may_be_forbidden_altogether() -> None:
    books = accounts(LIMITS.model_copy(update={"jobs": 0}))
    with pytest.raises(AdmissionRefused) as caught:
        books.open_job(ALICE)
    assert caught.value.retry_after_s is None and books.held() == {}


@given(moves=st.lists(st.tuples(st.sampled_from(["open", "close", "again"]), st.integers(0, 5)), max_size=80))
@settings(max_examples=200, deadline=None)
def test_the_count_is_that_of_open_leases(moves: list[tuple[str, int]]) -> None:
    books, open_leases, closed = accounts(LIMITS.model_copy(update={"sessions": 3})), [], []
    for move, which in moves:
        if move == "open":
            if len(open_leases) < 3:
                open_leases.append(books.open_session(ALICE))
            else:
                with pytest.raises(AdmissionRefused):
                    books.open_session(ALICE)
        elif move == "close" and open_leases:
            closed.append(open_leases.pop(which % len(open_leases)))
            closed[-1].close()
        elif move == "again" and closed:
            closed[which % len(closed)].close()
        assert books.held().get("alice", {"sessions": 0})["sessions"] == len(open_leases)


def test_threads_never_hold_more_than_allowed() -> None:
    books = accounts()
    most, lock, running, ended = 0, threading.Lock(), Counter[str](), threading.Barrier(8)

    def work(_: int) -> int:
        nonlocal most
        ended.wait()
        opened = 0
        for _ in range(200):
            try:
                with books.open_session(ALICE):
                    with lock:
                        running["now"] += 1
                        most = max(most, running["now"])
                    opened += 1
                    with lock:
                        running["now"] -= 1
            except AdmissionRefused:
                pass
        return opened

    with ThreadPoolExecutor(8) as pool:
        opened = sum(pool.map(work, range(8)))
    assert opened and most <= 2 and books.held() == {}


def test_threads_together_get_no_more_than_the_rate() -> None:
    books = accounts()
    with ThreadPoolExecutor(8) as pool:
        waits = list(pool.map(lambda _: books.charge_pixels(ALICE, 10, 3.0), range(400)))
    assert sum(1 for wait in waits if wait == 0) == 100


def test_accounts_that_are_not_used_are_forgotten() -> None:
    books = accounts()
    with books.open_session(ALICE):
        for number in range(3 * ACCOUNTS_BEFORE_TIDYING):
            # Every name is new, each comes a second after the one before, and its bucket is full again by then.
            someone = Tenant(f"tenant-{number}", frozenset())
            books.open_session(someone).close()
            assert books.charge_pixels(someone, 1000, float(number)) == 0
            assert number % 100 or len(books.held()) <= ACCOUNTS_BEFORE_TIDYING + 1
        assert books.held()["alice"]["sessions"] == 1


def test_forgetting_gives_nobody_more() -> None:
    books = accounts()
    for number in range(2 * ACCOUNTS_BEFORE_TIDYING):
        assert books.charge_pixels(Tenant(f"tenant-{number}", frozenset()), 1000, 7.0) == 0
    for number in range(2 * ACCOUNTS_BEFORE_TIDYING):
        assert books.charge_pixels(Tenant(f"tenant-{number}", frozenset()), 1, 7.0) > 0


def test_frames_and_uploads_have_a_largest_size() -> None:
    books = accounts()
    books.check_frame(ALICE, 20, 30)
    with pytest.raises(FrameTooLarge, match="20x31"):
        books.check_frame(ALICE, 20, 31)
    slow = accounts(LIMITS.model_copy(update={"pixels_per_second": 300}))
    with pytest.raises(FrameTooLarge, match="300"):
        slow.check_frame(ALICE, 20, 30)  # it could never be charged
    books.check_upload(ALICE, 4096)
    with pytest.raises(FrameTooLarge) as caught:
        books.check_upload(ALICE, 4097)
    assert caught.value.http_status == 413 and caught.value.limit == "4096 bytes"


def test_a_scope_that_is_missing_is_forbidden_not_unauthorized() -> None:
    require(ALICE, Scope.LIVE)
    for scope in set(Scope) - {Scope.LIVE}:
        with pytest.raises(Forbidden) as caught:
            require(ALICE, scope)
        assert caught.value.http_status == 403 and scope.value in caught.value.remedy
        assert isinstance(refusal_from_message(caught.value.to_message()), Forbidden)


@pytest.mark.parametrize("name", ["a", "alice", "auth0|58a1", "a.b@example.org", "A-1:x+y", "x" * 128])
def test_names_of_tenants(name: str) -> None:
    assert is_tenant_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a b", "a\n", "a\0", "-a", "é", "x" * 129, "a\\b", None, 7, ["a"]]
)
def test_what_names_no_tenant(name: object) -> None:
    assert not is_tenant_name(name)
