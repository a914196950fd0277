from __future__ import annotations

import queue

from actors.watchdog import EXIT_STATUS, Watchdog


def test_a_task_that_stands_still_is_told_and_ends_the_process() -> None:
    told: queue.Queue[object] = queue.Queue()
    dog = Watchdog(0.05, told.put, told.put)
    dog.beat("row-1")
    assert told.get(timeout=30) == "row-1"
    assert told.get(timeout=30) == EXIT_STATUS
    dog.finish("row-1")


def test_a_task_that_is_over_is_not_watched() -> None:
    told: queue.Queue[object] = queue.Queue()
    dog = Watchdog(0.05, told.put, told.put)
    dog.beat("over")
    dog.finish("over")
    dog.beat("row-2")  # the first that is told is this one
    assert told.get(timeout=30) == "row-2"
    dog.finish("row-2")


def test_the_process_ends_even_when_nothing_can_be_told() -> None:
    ended: queue.Queue[int] = queue.Queue()

    def tell(task: str) -> None:
        raise OSError("the store is away")

    dog = Watchdog(0.05, tell, ended.put)
    dog.beat("row")
    assert ended.get(timeout=30) == EXIT_STATUS
    dog.finish("row")
