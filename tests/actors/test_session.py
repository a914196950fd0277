"""The life of a live stream: order, policies, credit, by plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import ActorsError
from actors.session import LEGAL_MOVES, Incoming, Session, SessionKey, SessionLimits, SessionState, window_for
from infra.protocol import Deadline, DropReason, Flag, FrameHeader, Hello, Lossless, Newest
from infra.refusals import BadMessage, OutOfOrder, RateExceeded, TimedOut
from pipeline.state import StreamState

PICTURE = np.zeros((16, 16, 3), np.uint8)


def session(policy: Any = None, *, window: int = 8, **options: Any) -> Session:
    hello = Hello(width=16, height=16, policy=policy or Lossless())
    limits = SessionLimits(window=window, idle_timeout_s=10, max_life_s=100, unread_timeout_s=5)
    return Session(SessionKey("t", "s"), hello, limits, StreamState(model_sha256="m"), now=0.0, **options)


def offer(stream: Session, id_: int, now: float = 0.0, **header: Any) -> Incoming:
    frame = stream.arrive(FrameHeader(id_, **header), now)
    if frame.reason is DropReason.NONE:
        frame.rgb_HWC = PICTURE
        stream.wait(frame)
    return frame


def step(stream: Session, now: float = 0.0) -> tuple[int | None, list[tuple[int, DropReason]]]:
    """Take and restore the next frame, send all answers; returns its id and what was dropped before it."""
    from actors.session import Answer

    frame, level, dropped = stream.take(now, 0.0)
    for answer in dropped:
        stream.header(answer, now=now, encode_us=0, key=False)
    if frame is not None:
        answer = stream.stepped(Answer(frame, level=level))
        stream.header(answer, now=now, encode_us=0, key=False)
    return frame.id if frame else None, [(one.frame.id, one.reason) for one in dropped]


def acknowledge_all(stream: Session, now: float = 0.0) -> None:
    id_, receipt = stream._unread[-1]
    stream.acknowledge(id_ + 1, receipt, now)


@pytest.mark.parametrize("start", SessionState)
@pytest.mark.parametrize("to", SessionState)
def test_only_legal_moves(start: SessionState, to: SessionState) -> None:
    stream = session()
    stream.life = start
    if to in LEGAL_MOVES[start]:
        stream.move(to)
        assert stream.life is to
    else:
        with pytest.raises(ActorsError, match=f"{start} to {to}"):
            stream.move(to)


def test_lossless_restores_every_frame_in_order() -> None:
    stream = session()
    for id_ in range(5):
        offer(stream, id_)
    assert [step(stream) for _ in range(6)] == [(n, []) for n in range(5)] + [(None, [])]


def test_lossless_refuses_what_is_repeated_or_late() -> None:
    stream = session()
    offer(stream, 7)
    for id_ in (7, 3):
        with pytest.raises(OutOfOrder, match=f"Frame {id_} came after frame 7"):
            offer(stream, id_)


def test_other_policies_answer_repeats_and_go_on() -> None:
    stream = session(Newest())
    offer(stream, 7)
    assert offer(stream, 7).reason is DropReason.REPEATED
    assert offer(stream, 3).reason is DropReason.OUT_OF_ORDER
    assert step(stream) == (7, [])


def test_a_gap_is_marked_and_harmless() -> None:
    stream = session()
    assert Flag.GAP not in offer(stream, 5).flags  # where a stream begins is its client's matter
    assert Flag.GAP in offer(stream, 9).flags
    assert step(stream)[0] == 5
    assert step(stream)[0] == 9


def test_newest_takes_the_newest_and_answers_the_others_in_their_order() -> None:
    stream = session(Newest())
    for id_ in range(4):
        offer(stream, id_)
    assert step(stream) == (3, [(n, DropReason.NEWER) for n in range(3)])
    offer(stream, 4)
    assert step(stream) == (4, [])


def test_a_cut_before_a_dropped_frame_is_a_cut_before_the_next() -> None:
    stream = session(Newest())
    offer(stream, 0, flags=Flag.CUT)
    offer(stream, 1)
    frame, _, _ = stream.take(0.0, 0.0)
    assert frame is not None and frame.id == 1 and Flag.CUT in frame.flags


def test_a_reset_marks_the_next_frame_that_comes() -> None:
    stream = session()
    offer(stream, 0)
    stream.mark_cut()
    assert Flag.CUT in offer(stream, 1).flags and Flag.CUT not in offer(stream, 2).flags


@pytest.mark.parametrize(("late", "outcome"), [("drop", (1, [(0, DropReason.LATE)])), ("resize", (0, []))])
def test_deadline(late: Any, outcome: Any) -> None:
    stream = session(Deadline(ms=100, late=late))
    offer(stream, 0, now=0.0)
    offer(stream, 1, now=0.19)
    assert step(stream, now=0.2) == outcome


def test_a_late_frame_that_wants_an_answer_gets_its_plain_resize() -> None:
    stream = session(Deadline(ms=100, late="resize"))
    offer(stream, 0, now=0.0)
    _, level, _ = stream.take(0.2, 0.0)
    assert level == 0


def test_the_time_of_the_step_counts_against_the_deadline() -> None:
    stream = session(Deadline(ms=100))
    offer(stream, 0, now=0.0)
    assert stream.take(0.05, 0.06)[0] is None


def test_more_than_granted_is_refused() -> None:
    stream = session(window=3)
    for id_ in range(3):
        offer(stream, id_)
    with pytest.raises(RateExceeded, match="3 frames"):
        offer(stream, 3)


def test_answers_must_be_acknowledged_before_more_is_granted() -> None:
    stream = session(window=2)
    offer(stream, 0)
    step(stream)
    assert stream.granted == 2
    acknowledge_all(stream)
    assert stream.granted == 3 and stream.outstanding == 0


def test_an_acknowledgement_needs_the_receipt() -> None:
    stream = session()
    offer(stream, 0)
    step(stream)
    id_, receipt = stream._unread[-1]
    for below, wrong in ((id_ + 1, receipt ^ 1), (id_ + 2, receipt)):
        with pytest.raises(BadMessage, match="receipt"):
            stream.acknowledge(below, wrong, 0.0)
    stream.acknowledge(id_ + 1, receipt, 0.0)
    stream.acknowledge(id_ + 1, receipt, 0.0)  # told again with the next frame


def test_repeated_frames_use_up_credit_too() -> None:
    stream = session(Newest(), window=3)
    offer(stream, 5)
    offer(stream, 5)
    offer(stream, 5)
    with pytest.raises(RateExceeded):
        offer(stream, 5)


def test_times() -> None:
    stream = session()
    stream.check_times(9.0)
    with pytest.raises(TimedOut, match="No frame"):
        stream.check_times(11.0)
    offer(stream, 0, now=11.0)
    step(stream, now=11.0)
    with pytest.raises(TimedOut, match="No answer was acknowledged"):
        stream.check_times(17.0)
    acknowledge_all(stream, now=17.0)
    stream.check_times(17.5)
    offer(stream, 1, now=101.0)
    with pytest.raises(TimedOut, match="open for 100 s"):
        stream.check_times(101.0)


def test_a_resumed_stream_restores_again_what_its_client_has() -> None:
    stream = session(epoch=2, resume_at=3, received=5)
    frames = [offer(stream, id_, level=2) for id_ in (2, 3, 4, 5)]
    assert [frame.decode_only for frame in frames] == [True, False, False, False]
    assert [frame.replayed for frame in frames] == [True, True, True, False]


def test_replayed_frames_get_the_level_that_they_had_and_are_not_dropped() -> None:
    stream = session(Newest(), epoch=2, resume_at=3, received=5)
    for id_ in (3, 4, 5, 6):
        offer(stream, id_, level=2)
    frame, level, dropped = stream.take(0.0, 0.0)
    assert frame is not None
    assert (frame.id, level, dropped) == (3, 2, [])


def test_wiping_leaves_nothing() -> None:
    import torch

    stream = session()
    tensor = torch.ones(3, 4, 4)
    stream.stream.advance(tensor, torch.ones(3, 1, 1))
    offer(stream, 0)
    stream.wipe()
    assert stream.waiting == 0 and stream.stream.prev_output_3HW is None and not tensor.any()


def test_windows_are_smaller_for_large_frames() -> None:
    assert window_for(100_000) == 16
    assert window_for(8 << 20) == 4
    assert window_for(100 << 20) == 2


@given(
    policy=st.sampled_from([Lossless(), Newest(), Deadline(ms=50), Deadline(ms=50, late="resize")]),
    moves=st.lists(st.tuples(st.sampled_from("fsat"), st.integers(1, 3)), max_size=60),
)
def test_every_frame_is_answered_once_and_in_order(policy: Any, moves: list[tuple[str, int]]) -> None:
    """Whatever happens in whatever order: nothing is lost, repeated or reordered, and credit is never exceeded."""
    stream, now, next_id = session(policy, window=4), 0.0, 0
    sent: list[int] = []
    answered: list[int] = []
    for move, amount in moves:
        if move == "f" and stream._came < stream.granted:
            next_id += amount
            sent.append(next_id)
            offer(stream, next_id, now)
        elif move == "s":
            taken, dropped = step(stream, now)
            answered += [id_ for id_, _ in dropped] + ([taken] if taken is not None else [])
        elif move == "a" and stream._unread:
            acknowledge_all(stream, now)
        elif move == "t":
            now += 0.03 * amount
        assert stream.outstanding <= 4
    while stream.waiting:
        taken, dropped = step(stream, now)
        answered += [id_ for id_, _ in dropped] + ([taken] if taken is not None else [])
    assert answered == sent
    if isinstance(policy, Lossless):
        assert not stream.totals.dropped


def test_a_frame_sent_again_cannot_ask_for_more_steps_than_there_are() -> None:
    stream = session(resume_at=0, received=9)
    with pytest.raises(BadMessage, match="level 200"):
        offer(stream, 0, level=200)
    with pytest.raises(BadMessage, match=str(2**64 - 1)):
        offer(stream, 2**64 - 1)


def test_what_was_left_out_on_resumption_is_no_gap() -> None:
    stream = session(Newest(), resume_at=4, received=8, epoch=2)
    assert not [id_ for id_ in (4, 7, 8) if Flag.GAP in offer(stream, id_).flags]  # 5 and 6 were answered as dropped
    assert Flag.GAP in offer(stream, 10).flags


@pytest.mark.parametrize("reason", [DropReason.UNDECODABLE, DropReason.RATE])
def test_a_cut_on_a_frame_without_a_picture_counts_for_the_next_one(reason: DropReason) -> None:
    stream = session()
    frame = stream.arrive(FrameHeader(0, flags=Flag.CUT), 0.0)
    frame.reason = reason
    stream.wait(frame)
    step(stream)
    offer(stream, 1)
    taken, *_ = stream.take(0.0, 0.0)
    assert taken is not None and Flag.CUT in taken.flags


def test_a_cut_on_a_frame_that_only_the_decoder_needs_again_counts_for_the_next_one() -> None:
    stream = session(Newest(), resume_at=2, received=5, epoch=2)
    for id_ in (1, 3):  # before the state, and dropped after it
        frame = stream.arrive(FrameHeader(id_, flags=Flag.CUT, reason=DropReason.NEWER), 0.0)
        assert frame.decode_only
        stream.release(frame)
        offered = stream.arrive(FrameHeader(id_ + 1), 0.0)
        stream.wait(offered)
        assert (Flag.CUT in offered.flags) == (id_ == 3)


def test_a_newest_stream_grows_more_urgent_the_longer_it_waits() -> None:
    stream = session(Newest())
    offer(stream, 0, now=0.0)
    offer(stream, 1, now=5.0)
    due = stream.due()
    assert due is not None and due < 5.0
