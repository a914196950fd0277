"""What a client keeps to send again: a cut on a dropped frame is not lost with it."""

from __future__ import annotations

import pytest

from infra.kept_frames import KeptFrame, KeptFrames, header_to_send
from infra.protocol import NO_FLAGS, DropReason, Flag, FrameHeader


def keep(kept: KeptFrames, id_: int, flags: Flag = NO_FLAGS) -> None:
    kept.add(KeptFrame(FrameHeader(id_, flags=flags), b"picture", (16, 16)))


@pytest.mark.parametrize("there_already", [True, False])
def test_a_cut_on_a_dropped_frame_is_sent_again_with_the_next_one(there_already: bool) -> None:
    kept = KeptFrames(in_groups=False)
    keep(kept, 0, Flag.CUT)
    if there_already:
        keep(kept, 1)
    kept.answered(FrameHeader(0, reason=DropReason.NEWER))
    if not there_already:
        keep(kept, 1)
    keep(kept, 2)
    assert kept.get(0) is None
    cuts = [Flag.CUT in header_to_send(kept[id_], acknowledged=0, receipt=0).flags for id_ in (1, 2)]
    assert cuts == [True, False]
