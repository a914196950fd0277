"""The pipe between an event loop and a thread: order, bounds, waiting on both sides, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.byte_pipe import BytePipe, Gone
from actors.thread_call import ThreadCall

WAIT_S = 10.0


def run(make: Callable[[], Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(make(), WAIT_S)

    return asyncio.run(limited())


def drained(pipe: BytePipe, size: int = 7) -> bytes:
    parts = []
    while part := pipe.read(size):
        assert len(part) <= size  # libav copies it into a buffer of that size
        parts.append(part)
    return b"".join(parts)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=200), max_size=12),
    st.integers(1, 64),
    st.sampled_from([0, 1, 50, 10_000]),
    st.integers(1, 90),
)
def test_bytes_come_out_as_they_went_in(chunks: list[bytes], capacity: int, spill: int, size: int) -> None:
    async def inward() -> bytes:
        pipe = BytePipe(capacity, spill_bytes=spill)
        reading = ThreadCall(lambda: drained(pipe, size), "reading")
        for chunk in chunks:
            await pipe.put(chunk)
            assert pipe.held_bytes <= capacity and pipe.spilled_bytes <= spill
        pipe.end()
        return await reading

    async def outward() -> bytes:
        pipe = BytePipe(capacity, spill_bytes=spill)

        def write() -> None:
            try:
                for chunk in chunks:
                    assert pipe.write(chunk) == len(chunk)
                    assert pipe.held_bytes <= capacity and pipe.spilled_bytes <= spill
            finally:
                pipe.end()

        writing = ThreadCall(write, "writing")
        got = b"".join([chunk async for chunk in pipe.chunks()])
        await writing
        return got

    assert run(inward) == run(outward) == b"".join(chunks)


def test_who_awaits_is_kept_back_while_it_is_full() -> None:
    async def check() -> None:
        pipe = BytePipe(10)
        await pipe.put(b"x" * 10)
        waiting = asyncio.create_task(pipe.put(b"y" * 15))
        await asyncio.sleep(0)
        assert not waiting.done() and pipe.held_bytes == 10 and pipe.total_bytes == 10
        assert await ThreadCall(lambda: pipe.read(10), "reading") == b"x" * 10
        assert await ThreadCall(lambda: pipe.read(10), "reading") == b"y" * 10
        await waiting
        assert pipe.total_bytes == 25

    run(check)


def test_a_file_takes_what_memory_does_not_and_is_given_back(tmp_path: Path) -> None:
    async def check() -> None:
        pipe = BytePipe(10, spill_bytes=100, folder=str(tmp_path))
        await pipe.put(bytes(range(110)))  # nobody reads
        assert (pipe.held_bytes, pipe.spilled_bytes) == (10, 100)
        waiting = asyncio.create_task(pipe.put(b"z"))
        await asyncio.sleep(0)
        assert not waiting.done()
        got = b""
        while len(got) < 110:
            got += await pipe.get()
        await waiting
        assert got + await pipe.get() == bytes(range(110)) + b"z"
        assert (pipe.held_bytes, pipe.spilled_bytes) == (0, 0) and pipe._file is None

    run(check)
    assert list(tmp_path.iterdir()) == []  # the file never had a name


@pytest.mark.parametrize("spill", [0, 4])
def test_an_abort_reaches_everybody_who_waits(spill: int) -> None:
    async def check() -> None:
        empty, full = BytePipe(4), BytePipe(4, spill_bytes=spill)
        await full.put(b"x" * (4 + spill))
        awaiting = [asyncio.create_task(empty.get()), asyncio.create_task(full.put(b"more"))]
        blocked = [ThreadCall(lambda: empty.read(1), "r"), ThreadCall(lambda: full.write(b"more"), "w")]
        await asyncio.sleep(0.01)
        empty.abort(Gone())
        full.abort(Gone())
        for one in (*awaiting, *blocked):
            with pytest.raises(Gone):
                await one
        assert full.held_bytes == full.spilled_bytes == 0
        with pytest.raises(Gone):
            await full.put(b"x")
        with pytest.raises(Gone):
            empty.read(1)

    run(check)


def test_an_end_with_an_error_comes_after_what_is_there() -> None:
    async def check() -> None:
        pipe = BytePipe(100)
        pipe.write(b"restored")
        pipe.end(ValueError("broken"))
        await pipe.filled()
        assert await pipe.get() == b"restored"
        for _ in range(2):
            with pytest.raises(ValueError, match="broken"):
                await pipe.get()
        with pytest.raises(ValueError, match="broken"):
            await pipe.filled()

    run(check)


def test_filled_waits_for_the_first_byte_or_the_end() -> None:
    async def check() -> None:
        for act in (lambda pipe: pipe.write(b"x"), lambda pipe: pipe.end()):
            pipe = BytePipe(10)
            waiting = asyncio.create_task(pipe.filled())
            await asyncio.sleep(0)
            assert not waiting.done()
            threading.Thread(target=act, args=(pipe,)).start()
            await waiting

    run(check)


def test_a_loop_that_has_ended_is_no_matter() -> None:
    pipe = BytePipe(10)

    async def leave() -> None:
        task = asyncio.create_task(pipe.get())
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    pipe.write(b"x")
    assert pipe.read(5) == b"x"
