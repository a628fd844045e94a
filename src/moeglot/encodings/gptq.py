"""GPTQ and AWQ as numbers: their words decoded, made as INT4 is, moved to INT4 and back, and changed under their scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moeglot.dtypes import DTYPES
from moeglot.encoding import Encoding, Parts
from moeglot.encodings.int4 import DIVISORS, INT4
from moeglot.encodings.plain import Plain
from moeglot.encodings.words import SCALES, Words, no_place, scale_of
from moeglot.errors import BadNumbers, UsageError

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Lattice


@dataclass(frozen=True)
class GPTQ(Words):
    """Words of which numbers can be made. 4 bits are encoded; 8 are read, and their codes moved."""

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
            zeros = torch.zeros_like(scale, dtype=torch.float32)
        else:
            packed, scale, zero = int4.encode_with_zero(values, self.block, self.scale or "F16")
            zeros = int4.zero_points(zero, len(values))
        found = self.of_codes(int4.nibbles(packed)[:, : values.shape[1]], scale, zeros)
        if found is None:
            raise no_place()
        return found

    def _int4(self, upright: Parts) -> dict[str, torch.Tensor]:
        """The same codes of 4 bits as INT4 has them, inputs of a group side by side. Of one matrix."""
        import torch

        from moeglot.kernels import gptq, int4

        codes = self._side_by_side(upright, gptq.codes(upright["packed"], 4, self.packing == "awq"))
        shape = torch.tensor(codes.shape, dtype=torch.int64, device=codes.device).view(1, 1, 2)
        zero = {} if self.symmetric else {"zero_point": int4.pack_zero(self._zeros(upright))}
        scale = upright["scale"].contiguous()
        return {"packed": int4.packed(codes), "scale": scale, **zero, "shape": shape}

    def _as_int4(self) -> INT4:
        return INT4(self.group, "compressed-tensors", self.scale or "F16", "I64", not self.symmetric)

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
        scale = upright["scale"].to(DTYPES[scale_of(other)].torch)
        zeros = self._zeros(upright)
        symmetric = other.symmetric if isinstance(other, GPTQ) else isinstance(other, INT4) and not other.zero
        if not torch.equal(scale.to(torch.float32), upright["scale"].to(torch.float32)) or (symmetric and bool((zeros != 0).any())):
            return None
        codes = gptq.codes(upright["packed"], self.bits, self.packing == "awq")
        if isinstance(other, INT4):
            zero = {"zero_point": int4.pack_zero(zeros)} if other.zero else {}
            shape = torch.tensor(codes.shape, dtype=DTYPES[other.shape or "I64"].torch, device=codes.device).view(1, 1, 2)
            return {"packed": int4.packed(codes), "scale": scale.contiguous(), **zero, "shape": shape}
        assert isinstance(other, GPTQ)
        return other.of_codes(codes, upright["scale"], zeros, upright.get("order"))

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Lattice:
        import torch

        from moeglot.kernels import gptq
        from moeglot.kernels.lattice import Lattice, spread

        upright = self._upright(parts)
        scale, zeros = upright["scale"].to(torch.float32), self._zeros(upright)
        size = (shape[1], shape[0]) if self.down else (shape[0], shape[1])
        scale, zeros = (self._by_input(upright, one) if self.act else spread(one, self.block, size) for one in (scale, zeros))
        found = Lattice(gptq.levels(self.bits), scale, gptq.codes(upright["packed"], self.bits, self.packing == "awq"), zero=zeros)
        return found.moved(lambda tensor: tensor.mT.contiguous()) if self.down else found

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
        from moeglot.kernels import integers

        return {**parts, "scale": integers.reciprocal(parts["scale"])}
