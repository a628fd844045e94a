"""Numbers of a float type as an `Encoded`: a tensor as it is, or what a quantized one decodes to without loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moeglot import scratch
from moeglot.encoded import Encoded
from moeglot.encodings.plain import Plain
from moeglot.survival import SAFE

if TYPE_CHECKING:
    import torch


def values(tensor: torch.Tensor) -> Encoded:
    """A tensor of a float dtype as an `Encoded`."""
    from moeglot.dtypes import dtype_of

    return Encoded(Plain(dtype_of(tensor).name), {"value": tensor}, tuple(tensor.shape))


def exact_dtype(encoded: Encoded) -> torch.dtype:
    """The float type that holds all of its numbers: its own if it is plain, else bfloat16 where that does, else float32."""
    import torch

    if isinstance(encoded.encoding, Plain):
        return encoded.parts["value"].dtype
    return torch.bfloat16 if encoded.encoding.fits_in(Plain("BF16")) else torch.float32


def compared_dtype(a: Encoded, b: Encoded) -> torch.dtype:
    """The float type in which two are compared: float64 where one is stored so, else float32, which holds all else."""
    import torch

    return torch.float64 if torch.float64 in (exact_dtype(a), exact_dtype(b)) else torch.float32


def exactly(encoded: Encoded) -> Encoded:
    """The same numbers as plain floats: itself if it is plain, else decoded into memory that is used again."""
    if isinstance(encoded.encoding, Plain):
        return encoded
    dtype = exact_dtype(encoded)
    return values(encoded.decode(dtype, scratch.empty(encoded.shape, dtype)))


def row_pairs(a: Encoded, b: Encoded, numbers: int = 1 << 18) -> Iterator[tuple[Encoded, Encoded]]:
    """The same runs of rows of two matrices [out, in], as views, of about `numbers` of them each; one that is flat is decoded as a whole first."""
    a, b = (exactly(one) if one.is_flat else one for one in (a, b))
    return zip(a.row_blocks(numbers, b.row_unit), b.row_blocks(numbers, a.row_unit), strict=True)


def squares(numbers: torch.Tensor) -> float:
    """The sum of their squares; in float64, whose range no square of a float32 leaves, where float32 may have lost something."""
    import torch

    if numbers.dtype == torch.float32 and SAFE[0] < (found := float((flat := numbers.flatten()).dot(flat))) < SAFE[1]:
        return found
    return float(torch.linalg.vector_norm(numbers, dtype=torch.float64)) ** 2
