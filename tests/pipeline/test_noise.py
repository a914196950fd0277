"""The noise is what the contract says: Philox by seed, index and element; normal; the same wherever it is drawn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.noise import NoiseCache, _tail, frame_noise, inverse_normal, philox4x32


def words(*values: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second, third, fourth = (torch.tensor([value]) for value in values)
    return first, second, third, fourth


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # known answers that the authors of Philox publish with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox4x32(words(*counter), key)) == expected


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 for one counter with Python's integers."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ counter[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (7, 3), (2**64 - 1, 2**32 + 5), (2**33 + 1, 2**40)])
def test_key_is_the_seed_and_counter_is_index_and_element(seed: int, index: int) -> None:
    """Element e of the row-major frame depends on seed, index and e by the formula of the documentation."""
    noise = frame_noise((4, 5, 7), seed=seed, index=index).flatten()
    for element in (0, 1, 34, 35, 139):
        out = philox_by_hand([element, 0, index & 0xFFFFFFFF, index >> 32], [seed & 0xFFFFFFFF, seed >> 32])
        uniform = ((out[0] << 20 | out[1] >> 12) + 0.5) * 2.0**-52
        expected = torch.special.ndtri(torch.tensor(uniform, dtype=torch.float64))
        assert noise[element] == pytest.approx(float(expected), rel=1e-6)


def test_inverse_normal_over_the_whole_range() -> None:
    p = torch.cat([torch.logspace(-15.9, -0.31, 2000, dtype=torch.float64), torch.linspace(0.4, 0.6, 501).double()])
    p = torch.cat([p, 1 - p[p > 1e-12]])
    torch.testing.assert_close(inverse_normal(p), torch.special.ndtri(p), rtol=1e-12, atol=1e-12)


def test_distribution() -> None:
    noise = frame_noise((4, 256, 256), seed=11, index=2).double()
    assert abs(float(noise.mean())) < 4 / 512
    assert float(noise.std()) == pytest.approx(1, abs=0.005)
    assert float((noise**4).mean()) == pytest.approx(3, abs=0.05)
    thresholds = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    below = torch.stack([(noise < t).double().mean() for t in thresholds])
    torch.testing.assert_close(below, torch.special.ndtr(thresholds.double()), rtol=0, atol=0.004)


def test_neighbours_are_independent() -> None:
    frames = torch.stack([frame_noise((1, 128, 128), seed=s, index=i) for s, i in ((0, 0), (0, 1), (1, 0), (1, 1))])
    correlation = torch.corrcoef(frames.flatten(1)) - torch.eye(4)
    assert correlation.abs().max() < 0.04
    shifted = (frames[0] * frames[0].roll(1, 2)).mean()
    assert abs(float(shifted)) < 0.04


def test_a_smaller_frame_is_not_a_crop_but_the_same_call_is_the_same() -> None:
    first = frame_noise((4, 16, 20), seed=5, index=9)
    assert torch.equal(first, frame_noise((4, 16, 20), seed=5, index=9))
    assert not torch.equal(first[:, :, :16], frame_noise((4, 16, 16), seed=5, index=9))


def test_threads_and_processes_change_no_bit(repository: Path) -> None:
    """Another process with another number of threads and other vector instructions draws the same bits."""
    code = (
        "import sys, torch; torch.set_num_threads(3); from pipeline.noise import frame_noise;"
        "sys.stdout.buffer.write(frame_noise((4, 96, 96), seed=123456789012345, index=77).numpy().tobytes())"
    )
    environment = {"PATH": "/usr/bin:/bin", "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(repository)}
    raw = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment).stdout
    here = frame_noise((4, 96, 96), seed=123456789012345, index=77)
    assert np.array_equal(np.frombuffer(raw, np.float32), here.numpy().ravel())


@pytest.mark.gpu
def test_the_gpu_draws_the_same_bits() -> None:
    arguments = {"seed": 2**63 + 17, "index": 2**33}
    on_gpu = frame_noise((4, 180, 320), **arguments, device="cuda")
    assert torch.equal(on_gpu.cpu(), frame_noise((4, 180, 320), **arguments))


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1)])
def test_out_of_range(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match=str(seed)):
        frame_noise((1, 2, 2), seed=seed, index=index)


def test_computing_the_tail_everywhere_changes_no_bit() -> None:
    """On a GPU all elements go through the tail's approximation, and those in the centre are put back."""
    p = (torch.arange(1, 4096, dtype=torch.float64) / 4096).clone()
    q = p - 0.5
    wanted = inverse_normal(p.clone())
    tail = q.abs() > 0.425
    assert torch.equal(torch.where(tail, _tail(p, q), wanted), wanted)


def test_drawn_noise_is_kept_within_a_limit() -> None:
    cpu = torch.device("cpu")
    cache = NoiseCache(limit_bytes=3 * 4 * 8 * 8 * 4)
    first = cache.draw((4, 8, 8), seed=1, index=0, device=cpu)
    assert torch.equal(first, frame_noise((4, 8, 8), seed=1, index=0))
    assert cache.draw((4, 8, 8), seed=1, index=0, device=cpu) is first
    for seed in (2, 3):
        cache.draw((4, 8, 8), seed=seed, index=0, device=cpu)
    assert cache.draw((4, 8, 8), seed=1, index=0, device=cpu) is first
    cache.draw((4, 8, 8), seed=4, index=0, device=cpu)
    assert cache.draw((4, 8, 8), seed=1, index=0, device=cpu) is first  # 2 was used longest ago
    assert not torch.equal(cache.draw((4, 8, 8), seed=2, index=0, device=cpu), first)
