from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from actors.overlap import ReadAhead, WriteBehind


def test_read_ahead_keeps_the_order_and_its_distance() -> None:
    taken = 0
    leads: list[int] = []

    def source() -> Iterator[int]:
        for number in range(50):
            leads.append(number - taken)
            yield number

    ahead = ReadAhead(source(), depth=3)
    seen = []
    for number in ahead:
        seen.append(number)
        taken = len(seen)
    assert seen == list(range(50))
    assert max(leads) <= 5  # three in the queue, one in the thread's hand, one being taken


def test_read_ahead_hands_on_the_error_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken at three")

    ahead = ReadAhead(source())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="broken at three"):
        next(ahead)


def test_closing_read_ahead_ends_its_thread_while_it_waits_for_room() -> None:
    before = threading.active_count()
    ahead = ReadAhead(iter(range(1000)), depth=2)
    assert next(ahead) == 0
    ahead.close()
    assert threading.active_count() == before


def test_write_behind_consumes_in_order_and_waits_at_the_end() -> None:
    seen: list[int] = []
    behind = WriteBehind(seen.append, depth=2)
    for number in range(100):
        behind.put(number)
    behind.finish()
    assert seen == list(range(100))


def test_write_behind_holds_at_most_its_depth() -> None:
    gate = threading.Event()
    behind = WriteBehind(lambda _: gate.wait(), depth=2)
    behind.put(1)
    behind.put(2)
    blocked = threading.Thread(target=behind.put, args=(3,), daemon=True)
    blocked.start()
    blocked.join(timeout=0.2)
    assert blocked.is_alive()
    gate.set()
    blocked.join(timeout=10)
    assert not blocked.is_alive()
    behind.finish()


def test_write_behind_raises_the_consumers_error_in_the_producer() -> None:
    def refuse(number: int) -> None:
        if number == 2:
            raise OSError("no space")

    behind = WriteBehind(refuse, depth=1)
    with pytest.raises(OSError, match="no space"):
        for number in range(100):
            behind.put(number)
        behind.finish()


def test_closing_write_behind_drops_what_waits() -> None:
    gate, seen = threading.Event(), []

    def consume(number: int) -> None:
        gate.wait()
        seen.append(number)

    behind = WriteBehind(consume, depth=5)
    for number in range(5):
        behind.put(number)
    gate.set()
    behind.close()
    assert len(seen) <= 5 and seen == list(range(len(seen)))
    with pytest.raises(RuntimeError, match="closed"):
        behind.put(6)
