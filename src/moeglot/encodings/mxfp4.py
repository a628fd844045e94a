"""MXFP4: 32 numbers of 4 bits (E2M1) share one power of two (E8M0), which rule chose that power and broke the ties, and in which container.

value = E2M1 × 2^(scale - 127), low nibble first. Three containers hold the same bytes:
blocks   packed U8 [..., out, in / 32, 16]  scale U8       https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/weights.py
packed   packed U8 [..., out, in / 2]       scale U8       https://github.com/vllm-project/compressed-tensors (compressors/mxfp4)
int8     packed I8 [..., out, in / 2]       scale F8_E8M0  DeepSeek-V4: I8 is a container, no number is an INT8
Format: OCP Microscaling Formats (MX) 1.0, 5.3 and 6.3, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moeglot.dtypes import DTYPES
from moeglot.encoding import Encoding, Part, Parts, Stored
from moeglot.encodings.carried import carried_of, carried_parts, carried_problem, carries, without_carried
from moeglot.encodings.nvfp4 import NVFP4
from moeglot.encodings.plain import Plain
from moeglot.survival import Survival

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Lattice

GROUP = 32

ScaleRule = Literal["ceil", "floor", "even"]
Ties = Literal["away", "even"]
Container = Literal["blocks", "packed", "int8"]


@dataclass(frozen=True)
class MXFP4(Encoding):
    """`scale_rule` chooses the power of two of a group from its largest magnitude, `ties` the code of a value halfway between two.

    ceil: the smallest that nothing overflows, ceil(log2(amax / 6)); floor: OCP's floor(log2 amax) - 2, which clips above 6;
    even: amax rounded to two bits first, as compressed-tensors and torchao's EVEN do. The rule is not in the file and does not matter to decode.
    """

    scale_rule: ScaleRule = "ceil"
    ties: Ties = "away"

    container: Container = "blocks"
    scale: Literal["U8", "F8_E8M0"] | None = None
    """Its type; None stands, in a spec, for whichever the file has, and means the container's usual one to `encode`."""
    carried: tuple[Part, ...] = ()
    """The scale of activations in FP8, which Quark stores beside such weights."""

    name = "mxfp4"

    @property
    def parts(self) -> tuple[Part, ...]:
        usual = ("F8_E8M0", "U8") if self.container == "int8" else ("U8",)
        scale = Part("scale", (self.scale,) if self.scale else usual, (1, GROUP))
        if self.container == "blocks":
            return (Part("packed", ("U8",), (1, GROUP), (GROUP // 2,)), scale, *self.carried)
        return (Part("packed", ("I8",) if self.container == "int8" else ("U8",), (1, 2)), scale, *self.carried)

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> MXFP4:
        carried = carried_parts(found, ("input_scale",), leading)
        scale: Literal["U8", "F8_E8M0"] = "F8_E8M0" if found["scale"][0] == "F8_E8M0" else "U8"
        return replace(self, scale=scale if self.container == "int8" else self.scale, carried=carried)

    @property
    def bare_of_carried(self) -> MXFP4:
        return replace(self, carried=())

    def like(self, other: Encoding) -> Encoding:
        if not isinstance(other, MXFP4):
            return self
        scale = other.scale if other.container == self.container else self.scale
        return replace(self, scale_rule=other.scale_rule, ties=other.ties, scale=scale, carried=other.carried)

    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        rows = parts["scale"].shape[0]
        return rows, 2 * parts["packed"].numel() // rows

    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from moeglot.kernels import mxfp4

        return mxfp4.decode(*_blocks(parts), dtype, out)

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        from moeglot.kernels import mxfp4

        without_carried(self, self.carried)
        packed, scale = mxfp4.encode(values, self.scale_rule, self.ties)
        return self._contained(packed, scale)

    def _contained(self, packed: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """packed u8 [..., n, 16] and scale u8 [..., n], as views of this container's types and shapes."""
        import torch

        if self.container != "blocks":
            packed = packed.flatten(-2)
        if self.container == "int8":
            packed = packed.view(torch.int8)
        return {"packed": packed, "scale": scale.view(torch.float8_e8m0fnu) if self.parts[1].dtypes[0] == "F8_E8M0" else scale}

    def _problem(self, parts: Parts) -> str | None:
        from moeglot.kernels import mxfp4

        packed, scale = _blocks(parts)
        largest = int(scale.amax()) if scale.numel() else 0
        if largest == 255:
            return "has scales of 255, which is NaN in E8M0"
        if not largest and bool((packed & 0x77).any()):
            return "has scales that are all zero beside codes that are not, as in a file that was never filled"
        if (bad := mxfp4.infinite(packed, scale)) is not None:
            return f"has scales of {bad}, under which codes are infinite"
        return carried_problem(parts, self.carried)

    def fits_in(self, other: Encoding) -> bool:
        if isinstance(other, Plain):
            return other.dtype is not None and DTYPES["BF16"].fits_in(DTYPES[other.dtype])  # two bits of significand, eight of exponent
        return isinstance(other, MXFP4)

    def recodes(self, other: Encoding) -> bool:
        """To another container; to NVFP4, whose scales are E4M3 times one float32."""
        return isinstance(other, MXFP4 | NVFP4) and carries(self, other)

    def recode(self, parts: Parts, other: Encoding) -> Parts | None:
        """The same codes. For NVFP4, None if the powers of two lie further apart than E4M3's (2^-9 to 2^8)."""
        assert isinstance(other, MXFP4 | NVFP4)
        packed, scale = _blocks(parts)
        return carried_of({**parts, **other._contained(packed, scale)}, other) if isinstance(other, MXFP4) else other.from_powers(packed, scale)

    def common_codes(self, matrices: Sequence[Parts], other: Encoding) -> Encoding | None:
        return other.common_of_powers([_blocks(parts) for parts in matrices]) if isinstance(other, NVFP4) else other

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Lattice:
        from moeglot.kernels import e2m1, mxfp4
        from moeglot.kernels.lattice import Lattice, spread

        packed, scale = _blocks(parts)
        return Lattice(e2m1.levels(self.ties), spread(mxfp4.powers(scale), (1, GROUP), shape), e2m1.codes(packed).view(shape))

    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        from moeglot.kernels import e2m1

        packed = e2m1.packed(self.grid(parts, tuple(values.shape)).kept(values, kept))
        return {**parts, "packed": packed.view(parts["packed"].dtype).view(parts["packed"].shape)}

    def rescaled(self, parts: Parts, values: torch.Tensor, beyond: torch.Tensor) -> Parts:
        from moeglot.kernels.lattice import any_in, chosen

        fresh = replace(self, scale_rule="ceil", carried=()).encode(values)  # the other rules may choose one that does not reach
        return {**parts, "scale": chosen(any_in(beyond, (1, GROUP)), fresh["scale"], parts["scale"])}

    def added(self, parts: Parts, left: torch.Tensor, right: torch.Tensor) -> tuple[Parts, Survival] | None:
        from moeglot.kernels import added

        found = added.added(*_blocks(parts), left, right, self.ties)
        return None if found is None else ({**parts, **self._contained(*found[:2])}, found[2])

    def undetermined(self, parts: Parts) -> int:
        """Groups whose largest code is at most 3, or zero: a smaller scale with larger codes has the same values."""
        import torch

        from moeglot.kernels import mxfp4

        return mxfp4.undetermined(parts["packed"].view(torch.uint8).reshape(-1, GROUP // 2))

    def inverted(self, parts: Parts) -> Parts:
        from moeglot.kernels import mxfp4

        packed, scale = _blocks(parts)
        return {**parts, **self._contained(packed, (254 - scale).clamp(max=mxfp4.LAST_FINITE))}

    def __str__(self) -> str:
        return f"mxfp4:{next(name for name, rule in RULES.items() if rule == (self.scale_rule, self.ties))}"


def _blocks(parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """packed u8 [..., n, 16] and scale u8 [..., n] of any container, as views."""
    import torch

    scale = parts["scale"].view(torch.uint8)
    return parts["packed"].view(torch.uint8).reshape(*scale.shape, GROUP // 2), scale


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


def mxfp4(rule: str, container: Container = "blocks") -> MXFP4:
    """The encoding with the rules of that name."""
    return MXFP4(*RULES[rule], container)
