"""Where the states of live streams are kept."""

from __future__ import annotations

import pytest

from actors.session import SessionKey
from actors.state_book import IDLE_S, UNKNOWN, Snapshot, StateBook
from infra.refusals import AdmissionRefused, StateLost

KEY = SessionKey("tenant", "stream")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(**options: object) -> tuple[StateBook, str, Clock]:
    clock = Clock()
    book = StateBook(clock=clock, **options)  # type: ignore[arg-type]
    return book, book.open(KEY, {"model": "m"}, Snapshot(0, b"")), clock


def test_the_newest_snapshot_that_the_client_has_answers_for() -> None:
    book, token, _ = opened()
    book.put(KEY, 1, Snapshot(10, b"ten"), received=8)
    book.put(KEY, 1, Snapshot(20, b"twenty"), received=12)
    takeover = book.take_over(KEY, token, received=15)
    assert (takeover.snapshot.below, takeover.snapshot.state, takeover.epoch) == (10, b"ten", 2)
    assert takeover.about == {"model": "m"}


def test_before_the_first_snapshot_a_stream_begins_at_its_beginning() -> None:
    book, token, _ = opened()
    assert book.take_over(KEY, token, received=0).snapshot == Snapshot(0, b"")


def test_the_older_owner_can_write_no_more() -> None:
    book, token, _ = opened()
    book.take_over(KEY, token, received=0)
    with pytest.raises(StateLost):
        book.put(KEY, 1, Snapshot(10, b"old"), received=10)
    book.close(KEY, 1)
    book.put(KEY, 2, Snapshot(10, b"new"), received=10)
    assert book.take_over(KEY, token, received=10).snapshot.state == b"new"


@pytest.mark.parametrize(
    ("key", "token"),
    [(SessionKey("other", "stream"), None), (SessionKey("tenant", "other"), None), (KEY, "guess"), (KEY, "")],
)
def test_nobody_else_gets_it_and_nobody_learns_why(key: SessionKey, token: str | None) -> None:
    book, right, _ = opened()
    with pytest.raises(StateLost, match="cannot be resumed here") as caught:
        book.take_over(key, right if token is None else token, received=0)
    assert right not in str(caught.value)
    assert book.take_over(KEY, right, received=0).epoch == 2


def test_snapshots_that_can_no_longer_be_asked_for_are_gone() -> None:
    book, token, _ = opened()
    book.put(KEY, 1, Snapshot(10, bytes(100)), received=0)
    book.put(KEY, 1, Snapshot(20, bytes(100)), received=15)
    assert book.size_bytes == 200
    book.put(KEY, 1, Snapshot(30, bytes(100)), received=30)
    assert book.size_bytes == 100
    with pytest.raises(StateLost):
        book.take_over(KEY, token, received=20)


def test_a_client_that_acknowledges_nothing_does_not_fill_the_book() -> None:
    book, token, _ = opened()
    for below in range(10, 1000, 10):
        book.put(KEY, 1, Snapshot(below, bytes(100)), received=0)
    assert book.size_bytes <= 400
    assert book.take_over(KEY, token, received=0).snapshot == Snapshot(0, b"")


def test_full() -> None:
    book, _, clock = opened(most_bytes=1000, kept_s=60)
    with pytest.raises(AdmissionRefused, match="GB") as caught:
        book.put(KEY, 1, Snapshot(1, bytes(1001)), received=1)
    assert caught.value.retry_after_s
    book.put(KEY, 1, Snapshot(1, bytes(900)), received=1)
    clock.now = 61.0
    book.open(SessionKey("tenant", "next"), {}, Snapshot(0, bytes(900)))


def test_a_tenant_that_leaves_its_streams_behind_does_not_fill_the_book_for_the_others() -> None:
    clock = Clock()
    book = StateBook(most_bytes=1000, kept_s=3600, clock=clock)
    mine = SessionKey("mine", "idle")
    book.open(mine, {}, Snapshot(0, bytes(300)))
    clock.now = 1.0
    left = [SessionKey("greedy", str(number)) for number in range(7)]
    for key in left:
        book.open(key, {}, Snapshot(0, bytes(100)))
    busy = SessionKey("new", "busy")
    with pytest.raises(AdmissionRefused):  # all of them may still be in use
        book.open(busy, {}, Snapshot(0, bytes(100)))
    clock.now = 1.0 + IDLE_S
    book.put(left[0], 1, Snapshot(1, bytes(100)), received=1)  # makes room for its own second snapshot, and is busy now
    book.open(busy, {}, Snapshot(0, bytes(100)))
    with pytest.raises(AdmissionRefused):  # would never fit, so nothing else goes
        book.open(SessionKey("new", "huge"), {}, Snapshot(0, bytes(1001)))
    assert len(book) == 8
    for key in (mine, busy, left[0], *left[2:]):
        with pytest.raises(StateLost) as caught:
            book.put(key, 0, Snapshot(9, b""), received=0)  # an owner of long ago: known, and refused
        assert caught.value.code != UNKNOWN
    with pytest.raises(StateLost) as caught:
        book.put(left[1], 1, Snapshot(1, b""), received=1)
    assert caught.value.code == UNKNOWN


def test_a_stream_that_nobody_writes_to_is_forgotten() -> None:
    book, token, clock = opened(kept_s=60)
    clock.now = 61.0
    with pytest.raises(StateLost):
        book.take_over(KEY, token, received=0)
    assert len(book) == 0


def test_a_closed_stream_is_gone() -> None:
    book, token, _ = opened()
    book.close(KEY, 1)
    with pytest.raises(StateLost):
        book.take_over(KEY, token, received=0)


def test_an_owner_whose_stream_is_unknown_enters_it_again_and_the_newest_owner_wins() -> None:
    book, token, _ = opened()
    book.take_over(KEY, token, received=0)
    book = StateBook()  # the one before is lost
    with pytest.raises(StateLost) as caught:
        book.put(KEY, 2, Snapshot(10, b"ten"), received=10)
    assert caught.value.code == UNKNOWN
    book.enter_again(KEY, 1, token, {"model": "m"}, Snapshot(5, b"old"))  # by an owner that has not noticed yet
    with pytest.raises(StateLost) as caught:
        book.put(KEY, 2, Snapshot(10, b"ten"), received=10)
    assert caught.value.code == UNKNOWN
    book.enter_again(KEY, 2, token, {"model": "m"}, Snapshot(10, b"ten"))
    for epoch in (1, 2):
        with pytest.raises(StateLost) as caught:
            book.enter_again(KEY, epoch, token, {}, Snapshot(11, b"no"))
        assert caught.value.code != UNKNOWN
    with pytest.raises(StateLost, match="cannot be resumed"):
        book.put(KEY, 1, Snapshot(12, b"no"), received=12)
    with pytest.raises(StateLost):
        book.take_over(KEY, "guess", received=10)
    takeover = book.take_over(KEY, token, received=10)
    assert (takeover.epoch, takeover.snapshot.state, takeover.about) == (3, b"ten", {"model": "m"})
