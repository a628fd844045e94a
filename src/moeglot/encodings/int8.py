"""INT8: whole numbers of a byte each, or four to an int32, and a scale for each output channel, each group of a row or the whole matrix.

bytes: weight I8 [..., out, in], in two's complement; scale [..., out, in / group], or one for a matrix; value = code × scale.
words: packed I32 [..., out, ⌈in / 4⌉], lowest byte first, each 128 more than its number; shape [2], the [out, in] of the matrix.
Zero points, if there are some: value = (code - zero) × scale. They are I8 as the scales lie beside bytes, and beside words packed along the rows as the
codes are: I32 [..., ⌈out / 4⌉, in / group].
https://github.com/vllm-project/compressed-tensors (compressors/naive_quantized, compressors/pack_quantized)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moeglot.dtypes import DTYPES
from moeglot.encoding import WHOLE, Encoding, Part, Parts, Stored
from moeglot.encodings.carried import carried_parts, carried_problem, carries, single_of, without_carried
from moeglot.encodings.plain import Plain
from moeglot.errors import UnknownFormat

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Lattice

ScaleType = Literal["BF16", "F16", "F32"]
SCALES: tuple[ScaleType, ...] = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class INT8(Encoding):
    """`block`: numbers that share a scale, (1, WHOLE) for a channel, (1, n) for a group, (WHOLE, WHOLE) for a matrix. `container`: bytes or words.

    `symmetric`: every zero point is 0, and there are none, unless `zeros`: then they are there all the same.
    `scale`: its type; None stands, in a spec, for whichever the file has, and means BF16 to `encode`. `shape`: the type of the part that holds [out, in].
    `single`: a matrix's one scale as a file has it; `bare`: the scales of channels are a vector there.
    `carried`: parts beside these that a file may have (an activation's scale and its zero point): moved, never made.
    A block whose numbers are codes × a scale of that type already gets such a scale, so that every value returns.
    """

    block: tuple[int, int] = (1, WHOLE)
    container: Literal["bytes", "words"] = "bytes"
    symmetric: bool = True
    zeros: bool = False
    scale: ScaleType | None = None
    shape: Literal["I64", "I32"] | None = None
    single: tuple[int, ...] = ()
    bare: bool = False
    carried: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        spread = {(1, WHOLE): "channel", (WHOLE, WHOLE): "tensor"}.get(self.block, f"group:{self.block[1]}")
        found = f"int8-pack:{spread.removeprefix('group:')}" if self.container == "words" else f"int8-{spread}"
        return found + ("" if self.symmetric else ":asymmetric")

    @property
    def has_zero_points(self) -> bool:
        return self.zeros or not self.symmetric

    @property
    def parts(self) -> tuple[Part, ...]:
        scale = Part("scale", (self.scale,) if self.scale else SCALES, self.block, single=self.single, bare=self.bare)
        if self.container == "bytes":
            return (Part("weight", ("I8",)), scale, *([replace(scale, name="zero_point", dtypes=("I8",))] if self.has_zero_points else []), *self.carried)
        zero = [Part("zero_point", ("I32",), (4, self.block[1]), ragged=True)] if self.has_zero_points else []
        shape = Part("shape", (self.shape,) if self.shape else ("I64", "I32"), (WHOLE, WHOLE), (2,))
        return (Part("packed", ("I32",), (1, 4), ragged=True), scale, *zero, shape)

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> INT8:
        """Raises `UnknownFormat` for zero points that config.json does not declare, and for columns in another order than the groups'."""
        if "zero_point" in found and not self.has_zero_points:
            raise UnknownFormat(
                "these INT8 numbers have zero points, and config.json says symmetric",
                "value = code × scale without them; a zero point moves every number",
                "take config.json from the checkpoint's producer",
            )
        if "order" in found:
            raise UnknownFormat(
                "the columns of these INT8 numbers are grouped in another order (weight_g_idx, actorder = group)",
                "which group a column belongs to is not read; its current producers write it no more",
                "decompress it with the compressed-tensors that wrote it",
            )
        dtype, shape = found["scale"]
        given = replace(self, scale=next(name for name in SCALES if name == dtype))
        if self.container == "words":
            return replace(given, shape="I64" if found["shape"][0] == "I64" else "I32")
        single = single_of(shape, leading) if self.block == (WHOLE, WHOLE) else ()
        return replace(given, single=single, carried=carried_parts(found, ("input_scale", "input_zero_point"), leading))

    @property
    def bare_of_carried(self) -> INT8:
        return replace(self, carried=())

    def like(self, other: Encoding) -> Encoding:
        if not isinstance(other, INT8):
            return self
        carried = () if self.container == "words" else other.carried
        return replace(other, container=self.container, zeros=self.zeros, bare=self.bare, carried=carried)

    def lent(self, target: Encoding) -> Encoding:
        """What shares a scale stays together; words are of channels and groups."""
        if not isinstance(target, INT8) or (target.container == "words" and self.block[0] == WHOLE):
            return target
        return target.like(self) if target.container == "words" or target.kind == replace(self, container="bytes").kind else target

    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = parts["weight"].shape if self.container == "bytes" else parts["shape"].tolist()
        return rows, columns

    def numbers(self, parts: Parts) -> torch.Tensor:
        """i8 [..., out, in], without the zero points."""
        from moeglot.kernels import int4, int8

        return parts["weight"] if self.container == "bytes" else int8.of_words(parts["packed"], int4.columns_of(parts["shape"]))

    def zero_points(self, parts: Parts) -> torch.Tensor | None:
        """i8 as the scales lie; None if there are none."""
        from moeglot.kernels import int8

        if not self.has_zero_points:
            return None
        return parts["zero_point"] if self.container == "bytes" else int8.of_words(parts["zero_point"].mT, parts["packed"].shape[-2]).mT

    def of_numbers(self, numbers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The inverse of the two, with zero points of 0 where there are none and these parts have some."""
        import torch

        from moeglot.kernels import int8

        zero = (torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero) if self.has_zero_points else None
        if self.container == "bytes":
            return {"weight": numbers, "scale": scale, **({} if zero is None else {"zero_point": zero})}
        shape = torch.tensor(numbers.shape[-2:], dtype=DTYPES[self.shape or "I64"].torch, device=numbers.device)
        told = {"shape": shape.expand(*numbers.shape[:-2], 1, 1, 2).clone()}
        down = None if zero is None else int8.words(zero.mT).mT.clone(memory_format=torch.contiguous_format)  # strides of an axis of one may be anything
        return {"packed": int8.words(numbers), "scale": scale, **({} if down is None else {"zero_point": down}), **told}

    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from moeglot.kernels import int8

        return int8.decode(self.numbers(parts), parts["scale"], self.zero_points(parts), self.block, dtype, out)

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        from moeglot.kernels import int8

        without_carried(self, self.carried)
        if self.block[1] != WHOLE:
            self.parts[1].shape(tuple(values.shape))  # whole groups
        return self.of_numbers(*int8.encode(values, self.block, self.scale or "BF16", self.symmetric))

    def _problem(self, parts: Parts) -> str | None:
        from moeglot.kernels import int8, integers

        scale = parts["scale"]
        if self.container == "words":
            rows, sizes = parts["packed"].shape, parts["shape"].reshape(-1, 2).tolist()
            if sum(size[0] for size in sizes) != rows[:-1].numel() or any(size[1] != sizes[0][1] for size in sizes) or -(-sizes[0][1] // 4) != rows[-1]:
                return f"has packed numbers of shape {list(rows)} beside a shape part that says {sizes[0] if len(sizes) == 1 else sizes}"
        numbers, zero = self.numbers(parts), self.zero_points(parts)
        if zero is not None and self.symmetric and bool((zero != 0).any()):
            return f"has the zero point {zero[zero != 0][0].item()}, and quantization_config says that all are 0: symmetric is true"
        whole = tuple(scale.shape) != self.parts[1].shape(tuple(numbers.shape))  # two projections, each with its own
        block, zero = ((WHOLE, WHOLE), None) if whole else (self.block, zero)
        return integers.problem(scale, int8.WIDEST, lambda: int8.largest_codes(numbers, zero, block)) or carried_problem(parts, self.carried)

    # --- into other parts ------------------------------------------------------------------------------------------------------------

    def fits_in(self, other: Encoding) -> bool:
        if isinstance(other, Plain):
            return other.dtype is not None and DTYPES["F32"].fits_in(DTYPES[other.dtype])  # 8 bits × 8 or more
        if not isinstance(other, INT8) or not self.recodes(other) or (other.symmetric and not self.symmetric):
            return False
        return self.scale in (other.scale or "BF16", *(SCALES if other.scale == "F32" else ()))

    def recodes(self, other: Encoding) -> bool:
        """To the other container, with zero points or without, to another type of scale or shape."""
        return isinstance(other, INT8) and self.block == other.block and carries(self, other)

    def recode(self, parts: Parts, other: Encoding) -> Parts | None:
        """The same codes; None if the other's scale type does not have these scales, or it has no zero points but 0."""
        import torch

        assert isinstance(other, INT8)
        scale = parts["scale"].to(DTYPES[other.scale].torch) if other.scale else parts["scale"]
        zero = self.zero_points(parts)
        if not torch.equal(scale.to(torch.float32), parts["scale"].to(torch.float32)) or (zero is not None and other.symmetric and bool((zero != 0).any())):
            return None
        own = replace(other, shape=other.shape or self.shape)
        told = {"shape": parts["shape"].to(DTYPES[own.shape].torch)} if own.shape and self.container == other.container else {}  # of gate and up, for each
        return {**own.of_numbers(self.numbers(parts), scale, zero), **told, **{part.name: parts[part.name] for part in other.carried}}

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Lattice:
        import torch

        from moeglot.kernels import int8
        from moeglot.kernels.lattice import Lattice, spread

        def of_each(tiles: torch.Tensor) -> torch.Tensor:
            return spread(tiles.to(torch.float32).view(self.parts[1].shape(shape)), self.block, shape)

        zero = self.zero_points(parts)
        codes = self.numbers(parts).view(torch.uint8)
        return Lattice(int8.levels(), of_each(parts["scale"]), codes, zero=None if zero is None else of_each(zero))

    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        import torch

        codes = self.grid(parts, tuple(values.shape)).kept(values, kept).view(torch.int8)
        return {**parts, **self.of_numbers(codes, parts["scale"], self.zero_points(parts))}

    def rescaled(self, parts: Parts, values: torch.Tensor, beyond: torch.Tensor) -> Parts:
        from moeglot.kernels.lattice import any_in, chosen

        new, fresh = any_in(beyond, self.block), self.bare_of_carried.encode(values)
        mine, theirs = self.zero_points(parts), self.zero_points(fresh)
        zero = None if mine is None or theirs is None else chosen(new, theirs, mine)
        return {**parts, **self.of_numbers(self.numbers(parts), chosen(new, fresh["scale"], parts["scale"]), zero)}

    def undetermined(self, parts: Parts) -> int:
        """Blocks of zeros, and those whose values another scale gives too."""
        from moeglot.kernels import int8

        return int8.changed(self.numbers(parts), parts["scale"], self.zero_points(parts), self.block, self.scale or "BF16", self.symmetric)

    def inverted(self, parts: Parts) -> Parts:
        from moeglot.kernels import integers

        return {**parts, "scale": integers.reciprocal(parts["scale"])}
