"""What the laws are tried on: sizes that hide a wrong axis (H = I, H = 2I, E = H) more often than others, and random codes."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from moeglot.dtypes import DTYPES
from moeglot.encoded import Encoded
from moeglot.encoding import Encoding, Part
from moeglot.encodings.gptq import GPTQ
from moeglot.encodings.int8 import INT8
from moeglot.encodings.plain import Plain

settings.register_profile("moeglot", deadline=None, max_examples=60, derandomize=True, print_blob=False)
settings.load_profile("moeglot")

TREACHEROUS = [(2, 32, 32), (32, 32, 32), (3, 64, 32), (4, 32, 64), (64, 64, 32), (1, 64, 64)]
SIZES = st.one_of(
    st.sampled_from(TREACHEROUS),
    st.tuples(st.integers(1, 6), st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96])),
).map(lambda found: dict(zip("ehij", (*found, found[1]), strict=True)))
"""e, h, i, and j of a second group of experts; multiples of 32 for the sake of MXFP4's groups."""


def make_parts(encoding: Encoding, shape: tuple[int, ...], seed: int) -> Encoded:
    """Random parts of a tensor of this shape."""
    random = torch.Generator().manual_seed(seed)
    if isinstance(encoding, Plain):
        return Encoded(encoding, {"value": torch.randn(shape, generator=random).to(torch.bfloat16)}, shape)
    parts = {part.name: _random_part(encoding, part, part.shape(shape), random) for part in encoding.parts}
    if isinstance(encoding, GPTQ):
        return Encoded(encoding, parts | _declared(encoding, parts, shape), shape)
    if "shape" in parts:
        parts["shape"] = torch.tensor(shape[-2:], dtype=parts["shape"].dtype).expand(parts["shape"].shape).clone()
    if "shape" in parts or (isinstance(encoding, INT8) and encoding.block[0] == 1):
        parts["scale"] *= torch.where(torch.rand(parts["scale"].shape, generator=random) < 0.5, -1, 1)  # AutoRound gives the largest number code -8
    return Encoded(encoding, parts, shape)


def _declared(encoding: GPTQ, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Zero points that are what the encoding says, and the group of each input."""
    words = {4: {True: 0x77777777, False: -0x77777778}, 8: {True: 0x7F7F7F7F, False: -0x7F7F7F80}}[encoding.bits]
    zero = parts["zero_point"]
    zero = torch.full_like(zero, words[encoding.less]) if encoding.symmetric else zero & 0x77777777 if encoding.less else zero
    inputs = shape[-2] if encoding.down else shape[-1]
    order = torch.arange(inputs, dtype=torch.int32) // (encoding.group or inputs)
    if encoding.act:
        order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    own = (*shape[:-2], inputs, 1) if encoding.down else (*shape[:-2], 1, inputs)
    return {"zero_point": zero, **({"order": order.expand(*shape[:-2], inputs).reshape(own)} if encoding.order else {})}


def _random_part(encoding: Encoding, part: Part, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Any code that is a number; scales within what the part's type and `check` allow."""
    dtype = DTYPES[part.dtypes[0]].torch
    if part.name in ("packed", "zero_point") or dtype == torch.int8:
        return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=random).view(dtype).squeeze(-1)
    if part.name == "weight":
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
        return torch.where((codes & 0x7F) == 0x7F, 0x7E, codes).view(dtype)
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.randint(90, 160, shape, dtype=torch.uint8, generator=random).view(dtype)
    if dtype == torch.float8_e4m3fn:
        return torch.randint(0x20, 0x7F, shape, dtype=torch.uint8, generator=random).view(dtype)
    return ((torch.rand(shape, generator=random) + 0.5) * torch.exp2(torch.randint(-12, 4, shape, generator=random).float())).to(dtype)
