"""Noise that depends on nothing but the seed, the frame index and the element: counter-based, by Philox.

The value at one element of one frame is a pure function of (seed, index, element), so that results do not depend on
sharding, restarts, batches or tiles. The uniform numbers are Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) with key = seed and counter = (element, index), 64 bits each, low words first. They become
normal through the inverse of the normal distribution by Wichura's algorithm AS 241 (Applied Statistics 37, 1988).

Only integer arithmetic and the correctly rounded operations + - * / and square root are used, even for the logarithm:
so a CPU and a GPU give equal bits, which sine, cosine and logarithm of their libraries would not.

Does not know: streams, latents, dtypes of models.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from typing import Final

import torch
from torch import Tensor

_MASK32: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10
_PIECE: Final = 2**20  # elements drawn at once

# AS 241, routine PPND16: coefficients of the three rational approximations, constant term first.
_CENTRE: Final = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_TAIL: Final = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_FAR_TAIL: Final = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four output words of Philox4x32-10.

    Args:
        counter: four int64 tensors of equal (or broadcastable) shape with values in 0 .. 2**32 - 1, low word first.
        key: two integers in 0 .. 2**32 - 1.

    Returns:
        Four int64 tensors with values in 0 .. 2**32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, and the arithmetic shift is masked: the bits are those of unsigned arithmetic
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def frame_noise(shape: tuple[int, int, int], *, seed: int, index: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the initial latent of one frame from the standard normal distribution.

    Args:
        shape: (channels, height, width) of the whole frame's latent; element = row-major position in it.
        seed: key of the stream, 0 <= seed < 2**64.
        index: number of the frame in its stream, 0 <= index < 2**64.
        device: where the tensor is wanted; its bits are the same everywhere.

    Returns:
        (channels, height, width) in fp32.

    Raises:
        ValueError: seed or index out of range.
    """
    if not (0 <= seed < 2**64 and 0 <= index < 2**64):
        raise ValueError(f"seed {seed} and index {index} must be in 0 .. 2**64 - 1")
    device = torch.device(device)
    # fp64 and int64 are needed; a device without them receives the CPU's numbers
    where = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    count = math.prod(shape)
    # piece by piece: the arithmetic holds some thirty times the memory of its result
    pieces = [
        _elements(start, min(start + _PIECE, count), seed, index, where).to(device) for start in range(0, count, _PIECE)
    ]
    return torch.cat(pieces).reshape(shape)


class NoiseCache:
    """Draws of `frame_noise` that come again: those of streams whose noise is the same for every frame.

    Args:
        limit_bytes: drawn noise beyond this is forgotten, what was used longest ago first.
    """

    def __init__(self, limit_bytes: int = 64 << 20) -> None:
        self._limit_bytes = limit_bytes
        self._drawn: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def draw(self, shape: tuple[int, int, int], *, seed: int, index: int, device: torch.device) -> Tensor:
        """Return what `frame_noise` returns; the tensor is shared and must not be changed."""
        key = (shape, seed, index, device)
        with self._lock:
            if key in self._drawn:
                self._drawn.move_to_end(key)
                return self._drawn[key]
        drawn = frame_noise(shape, seed=seed, index=index, device=device)
        with self._lock:
            self._drawn[key] = drawn
            while len(self._drawn) > 1 and sum(x.nbytes for x in self._drawn.values()) > self._limit_bytes:
                self._drawn.popitem(last=False)
        return drawn


def _elements(start: int, stop: int, seed: int, index: int, device: torch.device) -> Tensor:
    """Return the noise (fp32) of the elements `start` to `stop` of one frame."""
    element = torch.arange(start, stop, dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32(
        (element & _MASK32, element >> 32, zero + (index & _MASK32), zero + (index >> 32)),
        (seed & _MASK32, seed >> 32),
    )
    # 52 random bits, centred in their cell: never 0 or 1, and exact in fp64
    bits52 = (words[0] << 20) | (words[1] >> 12)
    uniform = (bits52.to(torch.float64) + 0.5) * 2.0**-52
    return inverse_normal(uniform).to(torch.float32)


def inverse_normal(p: Tensor) -> Tensor:
    """Return the x for which a standard normal variable is below x with probability `p` (0 < p < 1, fp64); AS 241."""
    q = p - 0.5
    r = 0.180625 - q * q
    x = q * _rational(_CENTRE, r)
    tail = q.abs() > 0.425
    if p.is_cuda:  # choosing the tail would make the processor wait for the GPU; computing all of it costs less
        return torch.where(tail, _tail(p, q), x)
    x[tail] = _tail(p[tail], q[tail])
    return x


def _tail(p: Tensor, q: Tensor) -> Tensor:
    smaller = torch.where(q < 0, p, 1.0 - p)
    r = torch.sqrt(-_log(smaller))
    magnitude = torch.where(r <= 5.0, _rational(_TAIL, r - 1.6), _rational(_FAR_TAIL, r - 5.0))
    return torch.where(q < 0, -magnitude, magnitude)


def _rational(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Tensor) -> Tensor:
    numerator, denominator = (_polynomial(terms, x) for terms in coefficients)
    return numerator / denominator


def _polynomial(terms: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule, constant term first; product and sum stay two operations, so that no device fuses them."""
    value = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        value.mul_(x).add_(term)
    return value


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive fp64 numbers: exponent times ln 2 plus the series of artanh; error below 2e-15."""
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    exponent = exponent.to(torch.float64) - small.to(torch.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(tuple(2.0 / (2 * k + 1) for k in range(12)), s * s)
    return exponent * math.log(2.0) + s * series
