"""NVFP4: 16 numbers of 4 bits (E2M1) share a scale in E4M3, all of a matrix one float32, and which of two conventions that float32 follows.

packed U8 [..., out, in / 2], low nibble first; scale F8_E4M3 [..., out, in / 16]; global F32, one for a matrix.
modelopt: value = code × (scale × global), `weight_scale_2`; https://github.com/NVIDIA/TensorRT-Model-Optimizer
compressed-tensors: value = code × (scale / global), `weight_global_scale`; https://github.com/vllm-project/compressed-tensors (compressors/nvfp4)
The inner operation is rounded to float32 first, in both libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import TYPE_CHECKING, Literal

from moeglot.dtypes import DTYPES
from moeglot.encoding import WHOLE, Encoding, Part, Parts, Stored
from moeglot.encodings.carried import carried_of, carried_parts, carried_problem, carries, single_of, without_carried
from moeglot.encodings.plain import Plain
from moeglot.errors import LossRefused

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Lattice
    from moeglot.kernels.nvfp4 import Rules

GROUP = 16
Convention = Literal["modelopt", "compressed-tensors"]
INPUTS = ("input_scale",)


@dataclass(frozen=True)
class NVFP4(Encoding):
    """`single`: the global as a file has it, by default the convention's: no axis for ModelOpt, one for compressed-tensors.

    `whole`: the global to encode under, None for each matrix's own; what `common` settles for several.
    `carried`: a scale of activations that a file may have, under the name `input_scale` in either convention (compressed-tensors' is the reciprocal).
    Encoding: the global makes the largest group's scale 448; each group's scale is the nearest to its largest magnitude / 6; ties of codes go to even.
    Values that were NVFP4 before get scales that reproduce each of them. The values do not tell how a factor was split between the group's scale and
    the global: of all splits we take the one with the largest scales, which is the producers' unless two matrices share a global.
    """

    convention: Convention = "modelopt"
    single: tuple[int, ...] | None = None
    carried: tuple[Part, ...] = ()
    whole: float | None = None

    @property
    def name(self) -> str:
        return "nvfp4" if self.convention == "modelopt" else "nvfp4:compressed-tensors"

    @property
    def parts(self) -> tuple[Part, ...]:
        usual = () if self.convention == "modelopt" else (1,)
        whole = Part("global", ("F32",), (WHOLE, WHOLE), single=usual if self.single is None else self.single)
        return (Part("packed", ("U8",), (1, 2)), Part("scale", ("F8_E4M3",), (1, GROUP)), whole, *self.carried)

    @property
    def _rules(self) -> Rules:
        from moeglot.kernels.nvfp4 import Rules

        return Rules(divides=self.convention == "compressed-tensors")

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> NVFP4:
        return replace(self, single=single_of(found["global"][1], leading), carried=carried_parts(found, INPUTS, leading))

    @property
    def bare_of_carried(self) -> NVFP4:
        return replace(self, carried=())

    def like(self, other: Encoding) -> Encoding:
        if not isinstance(other, NVFP4):
            return self
        return other if other.convention == self.convention else replace(self, carried=other.carried)

    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = parts["packed"].shape
        return rows, 2 * columns

    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from moeglot.kernels import nvfp4

        return nvfp4.decode(parts["packed"], parts["scale"], parts["global"], self._rules, dtype, out)

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        from moeglot.kernels import nvfp4

        without_carried(self, self.carried)
        self.parts[1].shape(tuple(values.shape))
        packed, scale, whole = nvfp4.encode(values, self._rules, self.whole)
        return {"packed": packed, "scale": scale, "global": whole}

    def common(self, matrices: Sequence[torch.Tensor]) -> NVFP4:
        from moeglot.kernels import nvfp4

        return replace(self, whole=nvfp4.common(matrices, self._rules))

    def _falls_short(self, parts: Parts, largest: float) -> int:
        """By how many powers of two the global is too small for a number of this size, whatever the scale of its group."""
        import torch

        from moeglot.kernels import e2m1, nvfp4

        by = parts["global"] if self.whole is None else torch.tensor(self.whole, dtype=torch.float32, device="cpu")
        reach = float(self._rules.factor(torch.tensor(nvfp4.LARGEST_SCALE, dtype=torch.float32, device="cpu"), by).min())
        return 0 if largest <= reach * e2m1.levels("even").reach[1] else ceil(log2(largest / (reach * nvfp4.LARGEST_CODE)))

    def raised(self, parts: Parts, beside: Iterable[tuple[Parts, float]]) -> Parts:
        """Powers of two go from the scales to the global, so that no value moves unless a scale becomes too small for E4M3."""
        import torch

        from moeglot.kernels import nvfp4

        if not (times := max(self._falls_short(one, largest) for one, largest in beside)):
            return parts
        scale, by = nvfp4.raised(parts["scale"], parts["global"], times, self._rules)
        used = (parts["packed"].view(*scale.shape, GROUP // 2) & 0x77).amax(-1) > 0
        if bool(((scale.to(torch.float32) * 2.0**times != parts["scale"].to(torch.float32)) & used).any()):
            raise LossRefused(
                f"with a global that reaches 2^{times} times as far, some scales are smaller than E4M3 has",
                "gate and up of an expert have one global, and the adapter makes a number of one of them that large",
                "pass --encode bf16, or ask for an earlier adapter",
            )
        return {**parts, "scale": scale, "global": by}

    def _problem(self, parts: Parts) -> str | None:
        import torch

        from moeglot.kernels import fp8, nvfp4

        packed, scale, whole = parts["packed"], parts["scale"], parts["global"]
        if fp8.has_nan(scale):
            return "has scales of 0x7f or 0xff, which are NaN in E4M3"
        largest = int(scale.view(torch.uint8).amax()) if scale.numel() else 0
        if largest > 0x80:
            return "has negative scales"
        if not bool(whole.isfinite().all()) or bool((whole < 0).any()):
            return f"has a global scale of {whole.min().item():g}"
        lowest, highest = (1 / nvfp4.MOST, 1 / nvfp4.LEAST) if self._rules.divides else (nvfp4.LEAST, nvfp4.MOST)
        empty = bool(((whole < lowest) | (whole > highest)).any()) or not largest
        # A single scale of zero beside codes is what some exports of small groups hold: its values are zeros.
        if empty and bool((packed & 0x77).any()):
            return f"has scales of zero or a global of {whole.min().item():g} beside codes that are not zero, as in a file that was never filled"
        most = scale.to(torch.float32).amax() if scale.numel() else torch.ones((), dtype=torch.float32, device="cpu")
        if not bool((self._rules.factor(most, whole) * nvfp4.LARGEST_CODE).isfinite().all()):
            return f"has a global scale of {whole.min().item():g}, under which numbers are not finite"
        return carried_problem(parts, self.carried)

    def fits_in(self, other: Encoding) -> bool:
        if isinstance(other, Plain):
            return other.dtype is not None and DTYPES["F32"].fits_in(DTYPES[other.dtype])
        return isinstance(other, NVFP4) and self.convention == other.convention

    def recodes(self, other: Encoding) -> bool:
        """To the other convention."""
        return isinstance(other, NVFP4) and carries(self, other)

    def recode(self, parts: Parts, other: Encoding) -> Parts | None:
        """The same codes and scales under the reciprocal of the global; None if that moves a value. A global that is a power of two moves none, and one
        in six of the others does not either: E4M3 has eight significands, so a factor scale × global has few ways to round.
        """
        import torch

        assert isinstance(other, NVFP4)
        if self.convention == other.convention:
            return carried_of(parts, other)
        found, scale = self.nearest(parts, other), parts["scale"].to(torch.float32)
        mine, theirs = self._rules.factor(scale, parts["global"]), other._rules.factor(scale, found["global"])
        return found if torch.equal(mine, theirs) else None

    def nearest(self, parts: Parts, other: Encoding) -> Parts:
        """Parts of the other convention with the same codes and scales, under the float32 nearest to the reciprocal of the global.

        A value moves by at most 2 units in its last place of float32 (2.4e-7 of itself): where `recode` gives None, this is a lossy step, to be measured.
        A carried scale of activations becomes the nearest reciprocal too.
        """
        assert isinstance(other, NVFP4)
        return {**carried_of(parts, other), **{name: 1 / parts[name] for name in ("global", *(part.name for part in other.carried))}}

    def common_of_powers(self, matrices: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> NVFP4 | None:
        """As `common`, of MXFP4's packed u8 [out, n, 16] and power u8 [out, n]: then `from_powers` has each. None if E4M3 does not span all of them."""
        from moeglot.kernels import nvfp4

        whole = nvfp4.power_of(matrices, self._rules)
        return None if whole is None else replace(self, whole=whole)

    def from_powers(self, packed: torch.Tensor, power: torch.Tensor) -> Parts | None:
        """MXFP4's packed u8 [..., n, 16] and power u8 [..., n] with the same values, bit for bit; None if E4M3 does not span the powers."""
        from moeglot.kernels import nvfp4

        found = None if self.carried else nvfp4.from_powers(packed, power, self._rules, self.whole)
        return None if found is None else dict(zip(("packed", "scale", "global"), found, strict=True))

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Lattice:
        import torch

        from moeglot.kernels import e2m1
        from moeglot.kernels.lattice import Lattice, spread

        factor = self._rules.factor(parts["scale"].to(torch.float32), parts["global"])
        return Lattice(e2m1.levels("even"), spread(factor, (1, GROUP), shape), e2m1.codes(parts["packed"]))

    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        from moeglot.kernels import e2m1

        return {**parts, "packed": e2m1.packed(self.grid(parts, tuple(values.shape)).kept(values, kept))}

    def rescaled(self, parts: Parts, values: torch.Tensor, beyond: torch.Tensor) -> Parts:
        """Under the same global where its scales reach that far, else all of the matrix under a new one."""
        import torch

        from moeglot.kernels.grid import largest
        from moeglot.kernels.lattice import any_in, chosen

        new, by = any_in(beyond, (1, GROUP)), parts["global"]
        scale = self._rules.group(largest(values, (1, GROUP)), by)
        found = {**parts, "scale": chosen(new, scale.to(torch.float8_e4m3fn), parts["scale"])}
        clipped = self.grid(found, tuple(values.shape)).clips(values)
        if clipped is not None and bool(clipped[beyond].any()):
            return {**parts, **self.bare_of_carried.encode(values)}
        return found

    def undetermined(self, parts: Parts) -> int:
        """Groups that return with another scale or other codes; all of a matrix that returns with another global."""
        from moeglot.kernels import nvfp4

        return nvfp4.changed(parts["packed"], parts["scale"], parts["global"], self._rules)

    def inverted(self, parts: Parts) -> Parts:
        """The global alone: the other convention's reading of the file."""
        return {**parts, "global": 1 / parts["global"]}
