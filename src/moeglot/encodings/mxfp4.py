"""MXFP4: 32 numbers of 4 bits (E2M1) share one power of two (E8M0), and which rule chose that power and broke the ties.

packed u8 [..., out, in / 32, 16], low nibble first; scale u8 [..., out, in / 32], biased by 127; value = E2M1 × 2^(scale - 127).
Layout: https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/weights.py
Format: OCP Microscaling Formats (MX) 1.0, 5.3 and 6.3, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moeglot.dtypes import DTYPES
from moeglot.encoding import Encoding, Part, Parts
from moeglot.encodings.plain import Plain

if TYPE_CHECKING:
    import torch

GROUP = 32

ScaleRule = Literal["ceil", "floor", "even"]
Ties = Literal["away", "even"]


@dataclass(frozen=True)
class MXFP4(Encoding):
    """`scale_rule` chooses the power of two of a group from its largest magnitude, `ties` the code of a value halfway between two.

    ceil: the smallest that nothing overflows, ceil(log2(amax / 6)); floor: OCP's floor(log2 amax) - 2, which clips above 6;
    even: amax rounded to two bits first, as compressed-tensors and torchao's EVEN do. The rule is not in the file and does not matter to decode.
    """

    scale_rule: ScaleRule = "ceil"
    ties: Ties = "away"

    name = "mxfp4"
    parts = (Part("packed", ("U8",), (1, GROUP), (GROUP // 2,)), Part("scale", ("U8",), (1, GROUP)))

    def decode(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        from moeglot.kernels import mxfp4

        return mxfp4.decode(parts["packed"], parts["scale"], dtype)

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        from moeglot.kernels import mxfp4

        packed, scale = mxfp4.encode(values, self.scale_rule, self.ties)
        return {"packed": packed, "scale": scale}

    def check(self, parts: Parts) -> str | None:
        scale = parts["scale"]
        if scale.is_meta or parts["packed"].is_meta:
            return "is a placeholder without numbers (meta device)"
        if bool((scale == 255).any()):
            return "has scales of 255, which is NaN in E8M0"
        if bool((scale == 0).all()) and bool((parts["packed"] & 0x77).any()):
            return "has scales that are all zero beside codes that are not, as in a file that was never filled"
        return None

    def fits_in(self, other: Encoding) -> bool:
        if isinstance(other, Plain):
            return other.dtype is not None and DTYPES["BF16"].fits_in(DTYPES[other.dtype])  # two bits of significand, eight of exponent
        return isinstance(other, MXFP4)

    def undetermined(self, parts: Parts) -> int:
        """Groups whose largest code is at most 3, or zero: a smaller scale with larger codes has the same values."""
        from moeglot.kernels import mxfp4

        return mxfp4.undetermined(parts["packed"])

    def inverted(self, parts: Parts) -> Parts:
        return {"packed": parts["packed"], "scale": 254 - parts["scale"]}

    def __str__(self) -> str:
        return f"mxfp4:{next(name for name, rule in RULES.items() if rule == (self.scale_rule, self.ties))}"


RULES: dict[str, tuple[ScaleRule, Ties]] = {
    # https://github.com/triton-lang/triton/blob/main/python/triton_kernels/triton_kernels/numerics_details/mxfp.py (DequantScaleRoundingMode.ROUND_UP)
    "openai": ("ceil", "away"),
    # OCP MX 1.0, 6.3; the scale rule of torchao's FLOOR
    "ocp": ("floor", "even"),
    # https://github.com/vllm-project/compressed-tensors (quantization/utils/mxfp_utils.py), torchao's EVEN
    "compressed-tensors": ("even", "even"),
    # torchao's RCEIL, NVIDIA's cvt.rp.satfinite.ue8m0x2
    "rceil": ("ceil", "even"),
    "floor-away": ("floor", "away"),
    "even-away": ("even", "away"),
}


def mxfp4(rule: str) -> MXFP4:
    """The encoding with the rules of that name."""
    return MXFP4(*RULES[rule])
