"""FP8: one byte a number (E4M3), a scale for each block, each output channel or the whole matrix, and which type the scale has.

weight F8_E4M3 [..., out, in]; value = weight × scale in float32, whatever the file calls the scale (`weight_scale_inv` multiplies too).
Blocks: https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md; powers of two (E8M0, as itself or as bytes): DeepSeek-V3.1, DeepSeek-V4.
MXFP8: groups of 32 in a row under a power of two, U8; OCP Microscaling Formats 1.0; compressed-tensors (compressors/mxfp8), ModelOpt (mxfp8_tensor.py).
Channels and tensors: https://github.com/vllm-project/compressed-tensors (compressors/naive_quantized)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Literal

from moeglot.dtypes import DTYPES
from moeglot.encoding import WHOLE, Encoding, Part, Parts, Stored
from moeglot.encodings.carried import carried_of, carried_parts, carried_problem, carries, is_joint, single_of, without_carried
from moeglot.encodings.plain import Plain

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Lattice

MX_GROUP = 32
LARGEST_POWER = 245
"""Of a scale in E8M0 whose products with every code are finite float32; some producers write 2^-127 for a group of zeros."""
ScaleType = Literal["F32", "BF16", "F8_E8M0", "U8"]
SCALES: tuple[ScaleType, ...] = ("F32", "BF16", "F8_E8M0", "U8")
_HOLDS: dict[str, tuple[str, ...]] = {"F32": SCALES, "BF16": ("BF16", "F8_E8M0", "U8"), "F8_E8M0": ("F8_E8M0", "U8"), "U8": ("F8_E8M0", "U8")}


@dataclass(frozen=True)
class FP8(Encoding):
    """`block`: numbers that share a scale, (1, WHOLE) for a channel, (WHOLE, WHOLE) for a matrix. It is declared by the file's config, never taken
    from shapes: 192 rows have two scales under 128, and under 96 as well.

    `scale`: its type; None stands, in a spec, for whichever the file has, and means F32 to `encode`. `single`: a matrix's one scale as a file has it;
    `bare`: the scales of channels are a vector there; `joint`: gate and up have one scale where a tensor holds both.
    `carried`: parts beside these that a file may have (an activation's scale): moved, never made.
    Encoding: the scale is amax / 448, to the nearest bfloat16 if it is BF16, up to the next power of two if it is E8M0 or U8; a block whose numbers
    are codes × a scale of that type already gets such a scale, so that every value returns.
    """

    block: tuple[int, int] = (128, 128)
    scale: ScaleType | None = None
    single: tuple[int, ...] = ()
    carried: tuple[Part, ...] = ()
    bare: bool = False
    joint: bool = False

    @property
    def name(self) -> str:
        if self.block == (128, 128):
            return "fp8-block"
        if self.block == (1, MX_GROUP) and self.scale in ("F8_E8M0", "U8"):
            return "mxfp8"
        named = {(1, WHOLE): "fp8-channel", (WHOLE, WHOLE): "fp8-tensor"}
        return named.get(self.block, f"fp8-block-{self.block[0] or 'all'}x{self.block[1] or 'all'}")

    @property
    def kind(self) -> str:
        return self.name if WHOLE in self.block or self.name == "mxfp8" else "fp8-block"

    @property
    def parts(self) -> tuple[Part, ...]:
        scale = Part("scale", (self.scale,) if self.scale else SCALES, self.block, ragged=True, single=self.single, bare=self.bare, joint=self.joint)
        return (Part("weight", ("F8_E4M3",)), scale, *self.carried)

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> FP8:
        dtype, shape = found["scale"]
        one = self.block == (WHOLE, WHOLE)
        joint = one and is_joint(shape, leading)
        single, carried = single_of(shape, leading - joint) if one else (), carried_parts(found, ("input_scale",), leading)
        return replace(self, scale=next(name for name in SCALES if name == dtype), single=single, carried=carried, joint=joint)

    @property
    def bare_of_carried(self) -> FP8:
        return replace(self, carried=())

    def like(self, other: Encoding) -> Encoding:
        return replace(other, bare=self.bare) if isinstance(other, FP8) else self

    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = parts["weight"].shape
        return rows, columns

    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from moeglot.kernels import fp8

        return fp8.decode(parts["weight"], parts["scale"], self.block, dtype, out)

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        from moeglot.kernels import fp8

        without_carried(self, self.carried)
        weight, scale = fp8.encode(values, self.block, self.scale or "F32")
        return {"weight": weight, "scale": scale}

    def _problem(self, parts: Parts) -> str | None:
        import torch

        from moeglot.kernels import fp8

        weight, stored = parts["weight"], parts["scale"]
        if fp8.has_nan(weight):
            return "has codes of 0x7f or 0xff, which are NaN in E4M3"
        scale = fp8.scale_values(stored)
        if not bool(scale.isfinite().all()):
            return "has scales that are NaN or infinite"
        if bool((scale < 0).any()):
            return f"has negative scales, {scale.min().item():g} for example"
        if scale.numel() and not isfinite((largest := scale.max()).mul(fp8.LARGEST).item()):
            return f"has scales of {largest.item():g}, under which codes are infinite: they go to {fp8.LARGEST:g}"
        small = scale == 0 if stored.dtype in (torch.uint8, torch.float8_e8m0fnu) else scale < fp8.LEAST
        if bool(small.any()):
            whole = tuple(scale.shape) != self.parts[1].shape(tuple(weight.shape))  # two projections, each with its own
            codes = fp8.largest_codes(weight, (WHOLE, WHOLE) if whole else self.block)
            if bool((small & (codes > 0)).any()):
                return f"has scales of {scale[small].max().item():g} beside codes that are not zero, as in a file that was never filled"
        return carried_problem(parts, self.carried)

    def fits_in(self, other: Encoding) -> bool:
        if isinstance(other, Plain):
            # Four bits of significand times a power of two are a bfloat16; decode refuses the few (under 2^-124) that are too small for its exponent.
            smallest = "BF16" if self.scale in ("F8_E8M0", "U8") else "F32"
            return other.dtype is not None and DTYPES[smallest].fits_in(DTYPES[other.dtype])
        return isinstance(other, FP8) and self.block == other.block and (self.scale or "F32") in _HOLDS[other.scale or "F32"]

    def recodes(self, other: Encoding) -> bool:
        """To another type of scale."""
        return isinstance(other, FP8) and self.block == other.block and carries(self, other)

    def recode(self, parts: Parts, other: Encoding) -> Parts | None:
        """The same codes; None if the other's scale type does not have these scales."""
        from moeglot.kernels import fp8

        assert isinstance(other, FP8)
        if other.scale in (None, self.scale):
            return carried_of(parts, other)
        scale = fp8.scale_as(fp8.scale_values(parts["scale"]), other.scale)
        return None if scale is None else carried_of({**parts, "scale": scale}, other)

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Lattice:
        import torch

        from moeglot.kernels import fp8
        from moeglot.kernels.lattice import Lattice, spread

        scale = fp8.scale_values(parts["scale"]).view(self.parts[1].shape(shape))
        return Lattice(fp8.levels(), spread(scale, self.block, shape), parts["weight"].view(torch.uint8))

    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        return {**parts, "weight": self.grid(parts, tuple(values.shape)).kept(values, kept).view(parts["weight"].dtype)}

    def rescaled(self, parts: Parts, values: torch.Tensor, beyond: torch.Tensor) -> Parts:
        from moeglot.kernels.lattice import any_in, chosen

        fresh = self.bare_of_carried.encode(values)
        return {**parts, "scale": chosen(any_in(beyond, self.block), fresh["scale"], parts["scale"])}

    def undetermined(self, parts: Parts) -> int:
        """Blocks of zeros, and those whose values another scale gives too: half of it if no code is above 224, a neighbour for one of few codes."""
        from moeglot.kernels import fp8

        weight, scale = parts["weight"], parts["scale"]
        if self.scale in ("F8_E8M0", "U8"):
            return int((fp8.largest_codes(weight, self.block) <= fp8.LARGEST / 2).sum())
        return fp8.changed(weight, scale, self.block, self.scale or "F32")

    def inverted(self, parts: Parts) -> Parts:
        import torch

        scale = parts["scale"]
        if scale.dtype == torch.uint8:
            return {**parts, "scale": (254 - scale).clamp(max=LARGEST_POWER)}
        if scale.dtype == torch.float8_e8m0fnu:
            return {**parts, "scale": (254 - scale.view(torch.uint8)).clamp(max=LARGEST_POWER).view(torch.float8_e8m0fnu)}
        return {**parts, "scale": 1 / scale}

    def __str__(self) -> str:
        suffix = {None: "", "F32": "", "BF16": ":bf16", "F8_E8M0": ":e8m0", "U8": ":u8"}[self.scale]
        return self.name + (suffix if self.name != "mxfp8" else "")
