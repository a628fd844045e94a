"""GPTQ and AWQ: integers of 4 or 8 bits in int32 words that lie [in, out], a scale and a zero point for each group of inputs of an output.

GPTQ: qweight I32 [in × bits / 32, out], lowest bits first; qzeros I32 [in / group, out × bits / 32]; scales [in / group, out]; g_idx I32 [in], if it is
there: the group of each input. value = (code - zero) × scale. checkpoint_format "gptq" stores each zero point less one, "gptq_v2" as it is.
https://github.com/ModelCloud/GPTQModel (gptqmodel/nn_modules/qlinear, utils/model.py); https://github.com/intel/auto-round (auto_round_extension/torch)
AWQ "gemm": qweight I32 [in, out / 8] and qzeros I32 [in / group, out / 8], whose nibbles from the lowest are the outputs 0 2 4 6 1 3 5 7; no g_idx.
https://github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from moeglot.dtypes import DTYPES
from moeglot.encoding import WHOLE, Encoding, Part, Parts, Stored
from moeglot.encodings.int4 import DIVISORS, INT4
from moeglot.encodings.plain import Plain
from moeglot.errors import BadNumbers, UsageError

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Lattice

ScaleType = Literal["F16", "BF16", "F32"]
SCALES: tuple[ScaleType, ...] = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class GPTQ(Encoding):
    """`group`: inputs that share a scale, WHOLE for all. `symmetric`: every zero point is the code in the middle. `less`: zero points are stored less one.
    `order`: there is a g_idx; `act`: it may put inputs in any group, else input n is in group n // group.

    `scale`: its type; None stands, in a spec, for whichever the file has, and means F16 to `encode`. Encoding is that of INT4, of 4 bits alone.
    `down`: the parts are [in, out], as files have them.
    """

    group: int = 128
    bits: int = 4
    packing: Literal["gptq", "awq"] = "gptq"
    symmetric: bool = True
    less: bool = False
    order: bool = False
    act: bool = False
    scale: ScaleType | None = None
    down: bool = True

    @property
    def name(self) -> str:
        told = (
            ("8-bit", self.bits == 8),
            ("asymmetric", not self.symmetric),
            ("v2", self.packing == "gptq" and not self.less),
            ("act-order", self.act),
        )
        return ":".join([f"{self.packing}:{self.group or 'channel'}", *(word for word, said in told if said)])

    @property
    def block(self) -> tuple[int, int]:
        """Of [out, in]."""
        return (1, self.group)

    @property
    def parts(self) -> tuple[Part, ...]:
        word, awq = 32 // self.bits, self.packing == "awq"
        blocks = {"packed": (word, 1) if awq else (1, word), "zero_point": (word, self.group), "scale": self.block, "order": (WHOLE, 1)}
        types = {"scale": (self.scale,) if self.scale else SCALES}
        ragged = {"zero_point", "scale"} if not awq else set()
        return tuple(
            Part(name, types.get(name, ("I32",)), block[::-1] if self.down else block, ragged=name in ragged, bare=name == "order")
            for name, block in blocks.items()
            if name != "order" or self.order
        )

    @property
    def turned(self) -> GPTQ:
        return replace(self, down=not self.down)

    @property
    def is_turned(self) -> bool:
        return self.down

    @property
    def is_whole(self) -> bool:
        return self.act

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> GPTQ:
        scale = next((name for name in SCALES if "scale" in found and name == found["scale"][0]), None)
        return replace(self, scale=scale, order="order" in found)

    def like(self, other: Encoding) -> Encoding:
        if isinstance(other, INT4):
            return replace(self, group=other.group, symmetric=not other.zero, less=self.less and not other.zero, act=False, scale="F16")
        if not isinstance(other, GPTQ):
            return self
        mine = {"packing": self.packing, "order": self.order or other.act, "down": self.down, "less": self.less and other.symmetric}
        return replace(other, **mine) if other.packing != self.packing else replace(other, order=self.order or other.order, down=self.down)

    def lent(self, target: Encoding) -> Encoding:
        """INT4 with scales of these types holds the same numbers."""
        if isinstance(target, INT4) and self.bits == 4 and not self.act:
            return replace(target, group=self.group, zero=not self.symmetric, scale=self.scale)
        return target.like(self) if isinstance(target, GPTQ) and (self.bits == 4 or target.packing == "gptq") else target

    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = parts["packed"].shape
        blocks = self.parts[0].block
        return rows * blocks[0], columns * blocks[1]

    # --- its parts as those of [out, in] ---------------------------------------------------------------------------------------------

    def _upright(self, parts: Parts) -> Parts:
        return {name: part.mT for name, part in parts.items()} if self.down else parts

    def _lying(self, parts: Parts) -> dict[str, torch.Tensor]:
        """The inverse of `_upright`, without gaps."""
        return {name: (part.mT if self.down else part).contiguous() for name, part in parts.items()}

    def _zeros(self, upright: Parts) -> torch.Tensor:
        """float32 [..., out, groups]: how far each zero point is from the middle."""
        import torch

        from moeglot.kernels import gptq

        found = gptq.zero_codes(upright["zero_point"], self.bits, self.packing == "awq").to(torch.float32)
        return found + int(self.less) - gptq.middle(self.bits)

    def _zero_point(self, zeros: torch.Tensor) -> torch.Tensor:
        """The inverse, of one matrix; raises `BadNumbers` for a zero point that is not to be stored less one."""
        import torch

        from moeglot.kernels import gptq

        stored = zeros + gptq.middle(self.bits) - int(self.less)
        if bool((stored < 0).any()):
            raise _no_place()
        return gptq.zeros_packed(stored.to(torch.uint8), self.bits, self.packing == "awq")

    def _by_input(self, upright: Parts, of_groups: torch.Tensor) -> torch.Tensor:
        """[..., out, groups] -> [..., out, in], where inputs are in any group."""
        order = upright["order"].long()
        return of_groups.gather(-1, order.expand(*of_groups.shape[:-1], order.shape[-1]))

    def _matrices(self, parts: Parts) -> Iterator[dict[str, torch.Tensor]]:
        """Those of each matrix, upright."""
        from moeglot.kernels import backend

        upright = {name: backend.matrices(part) for name, part in self._upright(parts).items()}
        for n in range(len(upright["packed"])):
            yield {name: part[n] for name, part in upright.items()}

    def _side_by_side(self, upright: Parts, of_inputs: torch.Tensor) -> torch.Tensor:
        """[out, in] with the inputs of a group side by side."""
        return of_inputs[:, upright["order"][0].long().argsort(stable=True)] if self.act else of_inputs

    def _away(self, upright: Parts) -> torch.Tensor:
        """float32 [out, groups]: how far the farthest code of each group is from its zero point. Of one matrix."""
        from moeglot.kernels import gptq

        codes = self._side_by_side(upright, gptq.codes(upright["packed"], self.bits, self.packing == "awq"))
        return gptq.away(codes, self._zeros(upright), self.bits, self.block)

    def _int4(self, upright: Parts) -> dict[str, torch.Tensor]:
        """The same codes of 4 bits as INT4 has them, inputs of a group side by side. Of one matrix."""
        import torch

        from moeglot.kernels import gptq, int4

        codes = self._side_by_side(upright, gptq.codes(upright["packed"], 4, self.packing == "awq"))
        shape = torch.tensor(codes.shape).view(1, 1, 2)
        zero = {} if self.symmetric else {"zero_point": int4.pack_zero(self._zeros(upright))}
        scale = upright["scale"].contiguous()
        return {"packed": int4.packed(codes), "scale": scale, **zero, "shape": shape}

    def _as_int4(self) -> INT4:
        return INT4(self.group, "compressed-tensors", self.scale or "F16", "I64", not self.symmetric)

    # --- numbers ---------------------------------------------------------------------------------------------------------------------

    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from moeglot.kernels import backend, gptq, int4

        upright = self._upright(parts)
        words, scale, awq = upright["packed"], upright["scale"], self.packing == "awq"
        word = self.parts[0].block[::-1] if self.down else self.parts[0].block
        shape = (*words.shape[:-2], words.shape[-2] * word[0], words.shape[-1] * word[1])
        found = backend.place((*shape[:-2], shape[-1], shape[-2]) if self.down else shape, dtype, words.device, out)
        into, zero = found.mT if self.down else found, None if self.symmetric else self._zeros(upright)
        if self.symmetric and self.bits == 4 and not awq and not self.act:
            int4.decode(words.contiguous(), scale, shape[-1], self.block, dtype, None, into)
            return found
        if not bool(scale.isfinite().all()):
            raise BadNumbers("a scale is NaN or infinite", "a value is code × scale", "the file is damaged; compare its hash with its producer's")
        block = self.block
        if self.act:
            scale, zero, block = self._by_input(upright, scale), None if zero is None else self._by_input(upright, zero), (1, 1)
        gptq.decode(words, scale, zero, self.bits, awq, block, dtype, into)
        return found

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        from moeglot.kernels import backend

        if self.bits != 4:
            raise UsageError(f"{self.name} is read, and not made", "codes of 8 bits are moved as they are", "choose --encode gptq:128, or an FP8")
        upright = values.mT if self.down else values
        for part in self.upright.parts:
            part.shape(tuple(upright.shape))
        found = [self._encoded(one) for one in backend.matrices(upright)]
        return {name: torch.stack([one[name] for one in found]).view(*values.shape[:-2], *found[0][name].shape) for name in found[0]}

    def _encoded(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """values [out, in] of a matrix -> its parts."""
        import torch

        from moeglot.kernels import int4

        if self.symmetric:
            packed, scale = int4.encode(values, self.block, self.scale or "F16", DIVISORS["compressed-tensors"])
            zeros = torch.zeros(scale.shape)
        else:
            packed, scale, zero = int4.encode_with_zero(values, self.block, self.scale or "F16")
            zeros = int4.zero_points(zero, len(values))
        found = self.of_codes(int4.nibbles(packed)[:, : values.shape[1]], scale, zeros)
        if found is None:
            raise _no_place()
        return found

    def check(self, parts: Parts) -> str | None:
        import torch

        from moeglot.kernels import gptq, int4

        if any(part.is_meta for part in parts.values()):
            return "is a placeholder without numbers (meta device)"
        upright = self._upright(parts)
        scale, awq, most = upright["scale"], self.packing == "awq", (1 << self.bits) - 1
        if not bool(scale.isfinite().all()):
            return "has scales that are NaN or infinite"
        stored = gptq.zero_codes(upright["zero_point"], self.bits, awq)
        if self.less and bool((stored == most).any()):
            return f"has a zero point that is stored as {most}, one less than {most + 1}: its readers take that for 0, or for {most + 1}"
        zeros = self._zeros(upright)
        if self.symmetric and bool((zeros != 0).any()):
            other = int(zeros[zeros != 0][0]) + gptq.middle(self.bits)
            return f"has the zero point {other}, and quantization_config says that all are {gptq.middle(self.bits)}: sym is true, or zero_point false"
        if self.order and (problem := self._order_problem(upright["order"], scale.shape[-1])):
            return problem
        wide = scale.to(torch.float32).abs()
        if not bool((wide < int4.LEAST).any()) and bool((wide * most).isfinite().all()):
            return None
        away = torch.stack([self._away(one) for one in self._matrices(parts)]).view(scale.shape)
        if bool(((wide < int4.LEAST) & (away > 0)).any()):
            return f"has scales of {scale[wide < int4.LEAST].max().item():g} beside codes that are not zero, as in a file that was never filled"
        return None if bool((wide * away).isfinite().all()) else f"has scales of {wide.max().item():g}, under which codes are infinite"

    def _order_problem(self, order: torch.Tensor, groups: int) -> str | None:
        """What is wrong with a g_idx [..., 1, in]."""
        import torch

        inputs = order.shape[-1]
        plain = torch.arange(inputs, device=order.device) // (self.group or inputs)
        if bool((order == plain).all()):
            return None
        if not self.act:
            return "has inputs in groups of another order than their own (g_idx), and quantization_config does not say desc_act"
        if bool((order < 0).any()) or bool((order >= groups).any()) or any(not torch.equal(one.sort().values, plain) for one in order.reshape(-1, inputs)):
            return f"has a g_idx that does not put {self.group or inputs} of {inputs} inputs in each of {groups} groups"
        return None

    # --- into other parts ------------------------------------------------------------------------------------------------------------

    def fits_in(self, other: Encoding) -> bool:
        if isinstance(other, Plain):
            return other.dtype is not None and DTYPES["F32"].fits_in(DTYPES[other.dtype])
        if not self.recodes(other) or self.scale is None:
            return False
        mine = self.scale in (getattr(other, "scale", None) or "F16", *(SCALES if getattr(other, "scale", None) == "F32" else ()))
        if isinstance(other, GPTQ):
            return mine and (self.symmetric or not other.symmetric) and (self.symmetric or self.less or not other.less)
        return mine and (self.symmetric or (isinstance(other, INT4) and other.zero))

    def recodes(self, other: Encoding) -> bool:
        """To the other packing, with or without g_idx, and to INT4 in the same groups."""
        if isinstance(other, GPTQ):
            return (self.group, self.bits, self.act) == (other.group, other.bits, other.act)
        return isinstance(other, INT4) and self.group == other.group and self.bits == 4 and not self.act

    def recode(self, parts: Parts, other: Encoding) -> Parts | None:
        """The same codes; None if the other's zero points or scales are not these."""
        import torch

        from moeglot.kernels import gptq, int4

        if isinstance(other, GPTQ) and other == self:
            return parts
        upright = self._upright(parts)
        scale = upright["scale"].to(DTYPES[_scale_of(other)].torch)
        zeros = self._zeros(upright)
        symmetric = other.symmetric if isinstance(other, GPTQ) else isinstance(other, INT4) and not other.zero
        if not torch.equal(scale.to(torch.float32), upright["scale"].to(torch.float32)) or (symmetric and bool((zeros != 0).any())):
            return None
        codes = gptq.codes(upright["packed"], self.bits, self.packing == "awq")
        if isinstance(other, INT4):
            zero = {"zero_point": int4.pack_zero(zeros)} if other.zero else {}
            shape = torch.tensor(codes.shape, dtype=DTYPES[other.shape or "I64"].torch).view(1, 1, 2)
            return {"packed": int4.packed(codes), "scale": scale.contiguous(), **zero, "shape": shape}
        assert isinstance(other, GPTQ)
        return other.of_codes(codes, upright["scale"], zeros, upright.get("order"))

    def of_codes(self, codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, order: torch.Tensor | None = None) -> dict[str, torch.Tensor] | None:
        """codes u8 [out, in], scale and zeros (how far from the middle) [out, groups], the group of each input [1, in] -> the parts of one matrix; None if
        these have no place for such scales or zero points.
        """
        import torch

        from moeglot.kernels import gptq

        own = scale.to(DTYPES[_scale_of(self)].torch)
        least = -gptq.middle(self.bits) + int(self.less)
        if not torch.equal(own.float(), scale.float()) or bool((zeros < least).any()) or (self.symmetric and bool((zeros != 0).any())):
            return None
        inputs = codes.shape[1]
        plain = (torch.arange(inputs, dtype=torch.int32) // (self.group or inputs)).unsqueeze(0)
        found = {"packed": gptq.packed(codes, self.bits, self.packing == "awq"), "zero_point": self._zero_point(zeros), "scale": own}
        return self._lying({**found, **({"order": plain if order is None else order} if self.order else {})})

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Lattice:
        import torch

        from moeglot.kernels import gptq
        from moeglot.kernels.lattice import Lattice, spread

        upright = self._upright(parts)
        scale, zeros = upright["scale"].to(torch.float32), self._zeros(upright)
        size = (shape[1], shape[0]) if self.down else (shape[0], shape[1])
        scale, zeros = (self._by_input(upright, one) if self.act else spread(one, self.block, size) for one in (scale, zeros))
        found = Lattice(gptq.levels(self.bits), scale, gptq.codes(upright["packed"], self.bits, self.packing == "awq"), zero=zeros)
        return found.moved(lambda tensor: tensor.mT) if self.down else found

    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        from moeglot.kernels import gptq

        codes = self.grid(parts, tuple(values.shape)).kept(values, kept)
        packed = gptq.packed(codes.mT if self.down else codes, self.bits, self.packing == "awq")
        return {**parts, **self._lying({"packed": packed})}

    def rescaled(self, parts: Parts, values: torch.Tensor, beyond: torch.Tensor) -> Parts:
        import torch

        from moeglot.kernels.lattice import any_in, chosen

        if self.bits != 4:
            return parts  # what lies beyond is clipped
        upright = self._upright(parts)
        values, beyond = (self._side_by_side(upright, one.mT if self.down else one) for one in (values, beyond))
        fresh = replace(self, down=False, act=False).encode(values)
        new = any_in(beyond, self.block)
        zeros = torch.where(new, self._zeros(fresh), self._zeros(upright))
        return {**parts, **self._lying({"scale": chosen(new, fresh["scale"], upright["scale"].contiguous()), "zero_point": self._zero_point(zeros)})}

    def undetermined(self, parts: Parts) -> int:
        """Groups of zeros, and those whose values another scale gives too; of 8 bits, those whose codes could all be twice as large."""
        from moeglot.kernels import gptq

        if self.bits == 4:
            return sum(self._as_int4().undetermined(self._int4(one)) for one in self._matrices(parts))
        return sum(int((self._away(one) <= gptq.middle(self.bits) // 2).sum()) for one in self._matrices(parts))

    def inverted(self, parts: Parts) -> Parts:
        from moeglot.kernels import int4

        return {**parts, "scale": int4.reciprocal(parts["scale"])}


def _scale_of(encoding: Encoding) -> str:
    """The type of the scales that a target has."""
    return next(part.dtypes[0] for part in encoding.parts if part.name == "scale")


def _no_place() -> BadNumbers:
    known = 'checkpoint_format "gptq" stores zero points less one; all numbers of that group are positive'
    return BadNumbers("a group has the zero point 0, which cannot be stored less one", known, "write AWQ, or another encoding")
