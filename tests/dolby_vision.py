"""Sources that say they are Dolby Vision: a small HDR10 film with the configuration record or with RPU units added."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av

# Bytes of an RPU that nobody can parse; that there is one is what counts.
_RPU = bytes([0x7C, 0x01, 0x19, *range(8, 40)])


def with_record(source: Path, result: Path, profile: int, compatibility: int) -> Path:
    """Remux an H.265 film to MP4 or Matroska with a Dolby Vision configuration record of this profile."""
    plain = result.with_suffix(".plain.mp4")
    remux(source, plain)
    data = bytearray(plain.read_bytes())
    # Version 1.0; profile, level 1; RPU and base layer present; compatibility.
    record = struct.pack(">BBHB", 1, 0, profile << 9 | 1 << 3 | 0b101, compatibility << 4) + bytes(19)
    box = struct.pack(">I4s", 8 + len(record), b"dvvC" if profile > 7 else b"dvcC") + record
    before = data.index(b"hvcC") - 4
    at = before + struct.unpack_from(">I", data, before)[0]
    data[at:at] = box
    for name in (b"hev1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        size_at = data.index(name) - 4
        struct.pack_into(">I", data, size_at, struct.unpack_from(">I", data, size_at)[0] + len(box))
    plain.write_bytes(data)
    if result.suffix == ".mp4":
        return plain.rename(result)
    remux(plain, result)
    plain.unlink()
    return result


def with_rpu(source: Path, result: Path) -> Path:
    """Remux an H.265 film with an RPU unit at the end of each picture and no configuration record."""
    if result.suffix == ".ts":
        remux(with_rpu(source, result.with_suffix(".mkv")), result)
        result.with_suffix(".mkv").unlink()
        return result
    remux(source, result, end=struct.pack(">I", len(_RPU)) + _RPU)
    return result


def remux(source: Path, result: Path, *, end: bytes = b"") -> None:
    """Copy the video stream; `end` is put behind each packet."""
    with av.open(str(source)) as before, av.open(str(result), "w") as after:
        stream = before.streams.video[0]
        copy = after.add_stream_from_template(stream)
        for packet in before.demux(stream):
            if packet.size:
                sent: Any = av.Packet(bytes(packet) + end)
                sent.pts, sent.dts, sent.duration = packet.pts, packet.dts, packet.duration
                sent.time_base, sent.is_keyframe, sent.stream = packet.time_base, packet.is_keyframe, copy
                after.mux(sent)
