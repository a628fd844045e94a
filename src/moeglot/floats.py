"""Numbers of a float type as an `Encoded`: a tensor as it is, or what a quantized one decodes to without loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeglot.encoding import Encoded
from moeglot.encodings.plain import Plain

if TYPE_CHECKING:
    import torch


def values(tensor: torch.Tensor) -> Encoded:
    """A tensor of a float dtype as an `Encoded`."""
    from moeglot.dtypes import dtype_of

    return Encoded(Plain(dtype_of(tensor).name), {"value": tensor}, tuple(tensor.shape))


def exactly(encoded: Encoded) -> Encoded:
    """The same numbers as plain floats: itself if it is plain, else in bfloat16 if that holds all of them, else in float32."""
    import torch

    if isinstance(encoded.encoding, Plain):
        return encoded
    return values(encoded.decode(torch.bfloat16 if encoded.encoding.fits_in(Plain("BF16")) else torch.float32))
