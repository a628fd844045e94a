"""What the laws are tried on: sizes that hide a wrong axis (H = I, H = 2I, E = H) more often than others, and random codes."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from moeglot.encoding import Encoded, Encoding
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.plain import Plain

settings.register_profile("moeglot", deadline=None, max_examples=60, derandomize=True, print_blob=False)
settings.load_profile("moeglot")

TREACHEROUS = [(2, 32, 32), (32, 32, 32), (3, 64, 32), (4, 32, 64), (64, 64, 32), (1, 64, 64)]
SIZES = st.one_of(
    st.sampled_from(TREACHEROUS),
    st.tuples(st.integers(1, 6), st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96])),
).map(lambda found: dict(zip("ehi", found, strict=True)))
"""e, h, i; multiples of 32 for the sake of MXFP4's groups."""


def make_parts(encoding: Encoding, shape: tuple[int, ...], seed: int) -> Encoded:
    """Random parts of a tensor of this shape."""
    random = torch.Generator().manual_seed(seed)
    if isinstance(encoding, Plain):
        return Encoded(encoding, {"value": torch.randn(shape, generator=random).to(torch.bfloat16)}, shape)
    assert isinstance(encoding, MXFP4)
    packed, scale = (
        torch.randint(low, high, part.shape(shape), dtype=torch.uint8, generator=random)
        for part, low, high in zip(encoding.parts, (0, 90), (256, 160), strict=True)
    )
    return Encoded(encoding, {"packed": packed, "scale": scale}, shape)
