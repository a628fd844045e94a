"""The words of GPTQ and AWQ: integers of 4 or 8 bits in int32 that lie [in, out], a scale and a zero point for each group of inputs of an output.

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
from moeglot.encodings.int4 import INT4
from moeglot.errors import BadNumbers

if TYPE_CHECKING:
    import torch

ScaleType = Literal["F16", "BF16", "F32"]
SCALES: tuple[ScaleType, ...] = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Words(Encoding):
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
    def turned(self) -> Encoding:
        return replace(self, down=not self.down)

    @property
    def is_turned(self) -> bool:
        return self.down

    @property
    def is_whole(self) -> bool:
        return self.act

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> Encoding:
        scale = next((name for name in SCALES if "scale" in found and name == found["scale"][0]), None)
        return replace(self, scale=scale, order="order" in found)

    def like(self, other: Encoding) -> Encoding:
        if isinstance(other, INT4):
            return replace(self, group=other.group, symmetric=not other.zero, less=self.less and not other.zero, act=False, scale="F16")
        if not isinstance(other, Words):
            return self
        if other.act and not self.order:  # nothing says here which group an input is in: numbers are made anew
            return replace(self, group=other.group)
        if other.packing == self.packing:
            return replace(other, order=self.order or other.order, down=self.down)
        if self.packing == "awq":  # of 4 bits alone, and who reads it wants zero points, also where all are alike
            return replace(self, group=other.group, scale=other.scale if other.bits == 4 else None)
        return replace(other, packing=self.packing, order=self.order, down=self.down, less=self.less and other.symmetric)

    def lent(self, target: Encoding) -> Encoding:
        """INT4 with scales of these types holds the same numbers."""
        if isinstance(target, INT4) and self.bits == 4 and not self.act:
            return replace(target, group=self.group, zero=not self.symmetric, scale=self.scale)
        return target.like(self) if isinstance(target, Words) else target

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
            raise no_place()
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

    def of_codes(self, codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, order: torch.Tensor | None = None) -> dict[str, torch.Tensor] | None:
        """codes u8 [out, in], scale and zeros (how far from the middle) [out, groups], the group of each input [1, in] -> the parts of one matrix; None if
        these have no place for such scales or zero points.
        """
        import torch

        from moeglot.kernels import gptq

        own = scale.to(DTYPES[scale_of(self)].torch)
        least = -gptq.middle(self.bits) + int(self.less)
        if not torch.equal(own.float(), scale.float()) or bool((zeros < least).any()) or (self.symmetric and bool((zeros != 0).any())):
            return None
        inputs = codes.shape[1]
        plain = (torch.arange(inputs, dtype=torch.int32, device=codes.device) // (self.group or inputs)).unsqueeze(0)
        found = {"packed": gptq.packed(codes, self.bits, self.packing == "awq"), "zero_point": self._zero_point(zeros), "scale": own}
        return self._lying({**found, **({"order": plain if order is None else order} if self.order else {})})

    def _problem(self, parts: Parts) -> str | None:
        import torch

        from moeglot.kernels import gptq, integers

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
        if not bool((wide < integers.LEAST).any()) and bool((wide * most).isfinite().all()):
            return None
        away = torch.stack([self._away(one) for one in self._matrices(parts)]).view(scale.shape)
        if bool(((wide < integers.LEAST) & (away > 0)).any()):
            return f"has scales of {scale[wide < integers.LEAST].max().item():g} beside codes that are not zero, as in a file that was never filled"
        return None if bool((wide * away).isfinite().all()) else f"has scales of {wide.max().item():g}, under which codes are infinite"

    def _order_problem(self, order: torch.Tensor, groups: int) -> str | None:
        """What is wrong with a g_idx [..., 1, in]."""
        import torch

        inputs = order.shape[-1]
        plain = torch.arange(inputs, dtype=order.dtype, device=order.device) // (self.group or inputs)
        if bool((order == plain).all()):
            return None
        if not self.act:
            return "has inputs in groups of another order than their own (g_idx), and quantization_config does not say desc_act"
        if bool((order < 0).any()) or bool((order >= groups).any()) or any(not torch.equal(one.sort().values, plain) for one in order.reshape(-1, inputs)):
            return f"has a g_idx that does not put {self.group or inputs} of {inputs} inputs in each of {groups} groups"
        return None


def scale_of(encoding: Encoding) -> str:
    """The type of the scales that a target has."""
    return next(part.dtypes[0] for part in encoding.parts if part.name == "scale")


def no_place() -> BadNumbers:
    known = 'checkpoint_format "gptq" stores zero points less one; all numbers of that group are positive'
    return BadNumbers("a group has the zero point 0, which cannot be stored less one", known, "write AWQ, or another encoding")
