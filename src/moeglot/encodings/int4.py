"""INT4: eight numbers in an int32, as 8 more than they are, a scale for each group of a row, and which rule chose the scale.

packed I32 [..., out, ⌈in / 8⌉], lowest nibble first; scale [..., out, in / group]; shape [2], the [out, in] of the matrix; value = (nibble - 8) × scale.
Asymmetric: zero_point I32 [..., ⌈out / 8⌉, in / group], packed along the rows in the same way; value = (nibble - zero nibble) × scale.
A scale may be negative: AutoRound gives the largest number of a group code -8, whatever its sign.
Nibbles are offset binary: 0 is -8 and 15 is 7. Read as two's complement every number is wrong, and packing and unpacking so is still a round trip.
https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized); Kimi-K2-Thinking: https://huggingface.co/moonshotai/Kimi-K2-Thinking
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moeglot.dtypes import DTYPES
from moeglot.encoding import WHOLE, Encoding, Part, Parts, Stored
from moeglot.encodings.plain import Plain
from moeglot.errors import UnknownFormat

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Lattice

ScaleType = Literal["BF16", "F16", "F32"]
SCALES: tuple[ScaleType, ...] = ("BF16", "F16", "F32")
Rule = Literal["compressed-tensors", "kimi"]
SAME_CODES = ("int4", "gptq", "awq")
"""Kinds that say the same numbers by the same codes, scales and zero points, and differ in how these lie."""
DIVISORS: dict[str, float] = {"compressed-tensors": 7.5, "kimi": 7.0}
"""The scale of a group is its largest magnitude over this: half of -8…7, or 7, which needs no -8."""


@dataclass(frozen=True)
class INT4(Encoding):
    """`group`: numbers of a row that share a scale, WHOLE for all. `rule` chooses the scale; it is not in the file and does not matter to decode.

    `scale`: its type; None stands, in a spec, for whichever the file has, and means BF16 to `encode`. `shape`: the type of the part that holds [out, in].
    `zero`: each group has a zero point as well (asymmetric).
    A group whose numbers are codes × a scale of that type already gets such a scale, whatever the rule, so that every value returns.
    """

    group: int = 32
    rule: Rule = "compressed-tensors"
    scale: ScaleType | None = None
    shape: Literal["I64", "I32"] | None = None
    zero: bool = False

    @property
    def name(self) -> str:
        return f"int4:{self.group or 'channel'}" + (":asymmetric" if self.zero else "")

    @property
    def block(self) -> tuple[int, int]:
        return (1, self.group)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("packed", ("I32",), (1, 8), ragged=True),
            Part("scale", (self.scale,) if self.scale else SCALES, self.block),
            *([Part("zero_point", ("I32",), (8, self.group), ragged=True)] if self.zero else []),
            Part("shape", (self.shape,) if self.shape else ("I64", "I32"), (WHOLE, WHOLE), (2,)),
        )

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> INT4:
        """Raises `UnknownFormat` for zero points that config.json does not declare, and for columns in another order than the groups'."""
        if "zero_point" in found and not self.zero:
            raise UnknownFormat(
                "these INT4 numbers have zero points, and config.json says symmetric",
                "value = (nibble - 8) × scale without them; a zero point moves every number",
                "take config.json from the checkpoint's producer",
            )
        if "order" in found:
            raise UnknownFormat(
                "the columns of these INT4 numbers are grouped in another order (weight_g_idx, actorder = group)",
                "which group a column belongs to is not read; its current producers write it no more",
                "decompress it with the compressed-tensors that wrote it",
            )
        scale = next(name for name in SCALES if name == found["scale"][0])
        return replace(self, scale=scale, shape="I64" if found["shape"][0] == "I64" else "I32")

    told_by = ("shape",)

    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = parts["shape"].tolist()
        return rows, columns

    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from moeglot.kernels import int4

        return int4.decode(parts["packed"], parts["scale"], int4.columns_of(parts["shape"]), self.block, dtype, parts.get("zero_point"), out)

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        from moeglot.kernels import int4

        self.parts[1].shape(tuple(values.shape))
        dtype, found = self.scale or "BF16", {}
        if self.zero:
            packed, scale, found["zero_point"] = int4.encode_with_zero(values, self.block, dtype)
        else:
            packed, scale = int4.encode(values, self.block, dtype, DIVISORS[self.rule])
        shape = torch.tensor(values.shape[-2:], dtype=DTYPES[self.shape or "I64"].torch, device="cpu")
        return {"packed": packed, "scale": scale, **found, "shape": shape.expand(*values.shape[:-2], 1, 1, 2).clone()}

    def _problem(self, parts: Parts) -> str | None:
        from moeglot.kernels import int4, integers

        packed, scale, shape = parts["packed"], parts["scale"], parts["shape"]
        sizes = shape.reshape(-1, 2).tolist()
        rows, columns = sum(size[0] for size in sizes), sizes[0][1]
        if rows != packed[..., 0].numel() or any(size[1] != columns for size in sizes) or -(-columns // 8) != packed.shape[-1]:
            return f"has packed numbers of shape {list(packed.shape)} beside a shape part that says {sizes[0] if len(sizes) == 1 else sizes}"
        zero = parts.get("zero_point")
        return integers.problem(scale, int4.WIDEST, lambda: int4.largest_codes(packed, columns, self.block, zero))

    def fits_in(self, other: Encoding) -> bool:
        if isinstance(other, Plain):
            return other.dtype is not None and DTYPES["F32"].fits_in(DTYPES[other.dtype])  # 4 bits × 8 or more
        return isinstance(other, INT4) and self.recodes(other) and self.scale in (other.scale, *(SCALES if other.scale == "F32" else ()))

    def lent(self, target: Encoding) -> Encoding:
        return target.like(self) if target.kind in SAME_CODES else target

    def recodes(self, other: Encoding) -> bool:
        """To another rule, or another type of scale or shape; and to the words of GPTQ and AWQ, in the same groups."""
        if isinstance(other, INT4):
            return self.group == other.group and self.zero == other.zero
        return other.kind in SAME_CODES and other.recodes(self)

    def recode(self, parts: Parts, other: Encoding) -> Parts | None:
        """The same codes; None if the other's scale type does not have these scales."""
        import torch

        if not isinstance(other, INT4):
            return self._words(parts, other)
        dtype = DTYPES[other.scale].torch if other.scale else parts["scale"].dtype
        scale = parts["scale"].to(dtype)
        if not torch.equal(scale.to(torch.float32), parts["scale"].to(torch.float32)):
            return None
        shape = parts["shape"].to(DTYPES[other.shape].torch) if other.shape else parts["shape"]
        return {**parts, "scale": scale, "shape": shape}

    def _words(self, parts: Parts, other: Encoding) -> Parts | None:
        import torch

        from moeglot.encodings.gptq import GPTQ
        from moeglot.kernels import int4

        assert isinstance(other, GPTQ)
        rows, columns = parts["shape"].flatten().tolist()
        zeros = int4.zero_points(parts["zero_point"], rows) if self.zero else torch.zeros_like(parts["scale"], dtype=torch.float32)
        return other.of_codes(int4.nibbles(parts["packed"])[:, :columns], parts["scale"], zeros)

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Lattice:
        import torch

        from moeglot.kernels import int4
        from moeglot.kernels.lattice import Lattice, spread

        scale = parts["scale"].to(torch.float32).view(self.parts[1].shape(shape))
        zero = spread(int4.zero_points(parts["zero_point"], shape[0]), self.block, shape) if self.zero else None
        return Lattice(int4.levels(), spread(scale, self.block, shape), int4.nibbles(parts["packed"])[:, : shape[1]], zero=zero)

    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        from moeglot.kernels import int4

        return {**parts, "packed": int4.packed(self.grid(parts, tuple(values.shape)).kept(values, kept))}

    def rescaled(self, parts: Parts, values: torch.Tensor, beyond: torch.Tensor) -> Parts:
        import torch

        from moeglot.kernels import int4
        from moeglot.kernels.lattice import any_in, chosen

        new, fresh = any_in(beyond, self.block), self.encode(values)
        found = {**parts, "scale": chosen(new, fresh["scale"], parts["scale"])}
        if self.zero:
            mine, theirs = (int4.zero_points(of["zero_point"], values.shape[0]) for of in (parts, fresh))
            found["zero_point"] = int4.pack_zero(torch.where(new, theirs, mine))
        return found

    def undetermined(self, parts: Parts) -> int:
        """Groups of zeros, and those whose values another scale gives too."""
        from moeglot.kernels import int4

        columns = int4.columns_of(parts["shape"])
        dtype, zero = self.scale or "BF16", parts.get("zero_point")
        return int4.changed(parts["packed"], parts["scale"], columns, self.block, dtype, DIVISORS[self.rule], zero)

    def inverted(self, parts: Parts) -> Parts:
        from moeglot.kernels import integers

        return {**parts, "scale": integers.reciprocal(parts["scale"])}

    def __str__(self) -> str:
        return self.name if self.rule == "compressed-tensors" else f"{self.name}:{self.rule}"
