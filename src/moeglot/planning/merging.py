"""What a merge does to the tensors of a plan: to each expert's slices, and to matrices that are no experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from moeglot.checkpoints.dense import DecodedTensor, DenseTensor, HubTensor
from moeglot.encoded import Encoded
from moeglot.encoding import Encoding, Parts
from moeglot.encodings.plain import Plain
from moeglot.errors import BadNumbers, TensorMismatch, UnsupportedAdapter, UsageError
from moeglot.files.mapped import check_unchanged
from moeglot.files.shards import Entry, read_header
from moeglot.floats import values
from moeglot.folding import Move, Piece, fold
from moeglot.layout import Stored
from moeglot.rounding import Rounding
from moeglot.survival import Survival

if TYPE_CHECKING:
    import torch

    from moeglot.adapters.adapter import Adapter
    from moeglot.adapters.parts import Dense


@dataclass(frozen=True)
class Change:
    """What a merge does to a plan: which adapter is added, and how sums are rounded."""

    adapter: Adapter
    rounding: Rounding

    def check_unchanged(self) -> None:
        """Raises `BrokenFile` unless the adapter and the moments are those that were opened."""
        check_unchanged(found for entries in (self.adapter.files.entries, self._measured) for entry in entries.values() for found in entry.files)

    @property
    def identity(self) -> tuple[object, ...]:
        """What decides the bytes of a merge besides base and target."""
        files = sorted({entry.path for entry in self.adapter.files.entries.values()})
        files += [Path(self.rounding.moments)] if self.rounding.moments else []
        told = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return told, self.adapter.config.raw, self.adapter.convention and self.adapter.convention.name, self.rounding

    def touches(self, line: Stored, layer: int, expert: int) -> bool:
        return any(self.adapter.touches(layer, role, expert) for role in line.roles)

    def touches_any(self, line: Stored, layer: int) -> bool:
        """Some expert of a stored line is changed."""
        return bool(set(line.roles) & set(self.adapter.roles(layer)))

    def apply(
        self, line: Stored, layer: int, expert: int, encoding: Encoding, parts: Parts, roles: Callable[[], Mapping[str, Encoded]], moved: bool
    ) -> tuple[Parts, dict[str, Survival]]:
        """One expert's slice of a stored line with the change added, and what is left of it in each role.

        `parts`: the slice without the change, in stored axes; `roles` reads the base's matrices [out, in]; `moved` as in `fold`.
        """
        stored = Encoded(encoding, parts, line.expert_shape(self.adapter.base.sizes))
        if not line.movable(encoding, self.adapter.base.sizes):  # blocks hold numbers of several roles
            pieces = {role: self._piece(layer, role, expert, roles()[role], partial(_cut, line, role)) for role in line.roles}
            found, survived = fold(encoding, parts, stored.shape, pieces, partial(_join, line), self.rounding, self._moments, moved)
            return found, {role: survived[role] for role in line.roles if self.adapter.touches(layer, role, expert)}
        slices, survived = line.split(stored), {}

        def merged(role: str) -> Encoded:
            before = slices[role]
            if not self.adapter.touches(layer, role, expert):
                return before
            nearest, own = moved and self.rounding.kind == "nearest", before.encoding
            if nearest and (short := own.added(before.parts, *self.adapter.factors(layer, role, expert))):
                survived[role] = short[1]
                return Encoded(own, short[0], before.shape)
            piece = self._piece(layer, role, expert, roles()[role], _all)
            found, of_each = fold(own, before.parts, before.shape, {role: piece}, lambda of: of(role), self.rounding, self._moments, moved)
            survived.update(of_each)
            return Encoded(own, found, before.shape)

        return line.join(merged).parts, survived

    def _piece(self, layer: int, role: str, expert: int, encoded: Encoded, cut: Move) -> Piece:
        import torch

        return Piece(encoded.decode(torch.float32), *self.adapter.factors(layer, role, expert), cut, (layer, role, expert))

    def _moments(self, layer: int, role: str, expert: int) -> torch.Tensor | None:
        """float32 [in, in] of the inputs of one matrix; None for an expert that no token reached. Raises `UsageError` for a layer that was not measured."""
        from moeglot.kernels.finite import all_finite

        if found := self._measured.get(key := moments_key(layer, expert, role)):
            base = self.adapter.base
            width = base.sizes[base.format.line_of(role).role_axes.split()[-1]]
            if found.shape != (width, width):
                wrong = f"{self.rounding.moments}: {key} is {list(found.shape)}, the matrix has {width} inputs"
                raise TensorMismatch(wrong, f"it was gathered on another model than {base.source.name}", "gather them again on this base")
            if not all_finite(moments := found.read()):
                raise BadNumbers(f"{self.rounding.moments}: {key} has numbers that are not finite", "no text has such inputs", "gather them again on this base")
            return moments
        if not any(key.startswith(f"layers.{layer}.") for key in self._measured):
            raise UsageError(
                f"{self.rounding.moments} has no layers.{layer}",
                f"it has the second moments of {len(self._measured)} inputs",
                "gather them again on this base, or choose another rounding",
            )
        return None

    @cached_property
    def unmeasured(self) -> tuple[tuple[int, str, int], ...]:
        """Changed matrices of experts that no token of the measured text reached: they fall back to the nearest."""
        return tuple((layer, role, n) for layer, role, n in self.adapter.pairs if self._measured and moments_key(layer, n, role) not in self._measured)

    @cached_property
    def _measured(self) -> Mapping[str, Entry]:
        return read_header(Path(self.rounding.moments))[0] if self.rounding.moments else {}

    def dense(self, tensors: Mapping[str, DenseTensor]) -> dict[str, DenseTensor]:
        """Hub name -> tensor that is no expert, with the adapter's changes; raises `UnsupportedAdapter` where a tie would be cut."""
        from moeglot.adapters.parts import check_ties

        check_ties(self.adapter.dense, self.adapter.replaced, self.adapter.base)
        found = dict(tensors)
        exact = self.adapter.base.decoded("F32")
        for name, replaced in self.adapter.replaced.items():
            if not isinstance(found.get(name), HubTensor | DecodedTensor) or isinstance(found[name], HubTensor) != isinstance(exact[name], HubTensor):
                raise UnsupportedAdapter(f"{replaced.alias} replaces a quantized tensor", "it is no sum of factors", "pass --encode bf16, which decodes it")
            found[name] = Merged(name, found[name].dtype, found[name].shape, HubTensor(name, replaced.entry), None, self.rounding)
        for module, factors in self.adapter.dense.items():
            weight = module + ".weight"
            coded = exact[weight]
            if isinstance(coded, DecodedTensor) and not isinstance(found.get(weight), DecodedTensor):
                for part, entry in coded.parts.items():
                    found[entry.name] = MergedPart(entry.name, entry.dtype, entry.shape, coded, factors, self.rounding, part)
            else:
                before = found[weight]
                base = before.base if isinstance(before, Merged) else before
                found[weight] = Merged(weight, before.dtype, before.shape, base, factors, self.rounding)
            if factors.bias_entry:
                bias = found.get(module + ".bias")
                if bias is None:
                    raise UnsupportedAdapter(f"{factors.alias} has a trained bias, the base has none", "lora_bias was on", "train the adapter without it")
                found[module + ".bias"] = Merged(module + ".bias", bias.dtype, bias.shape, bias, factors, self.rounding)
        return found


def moments_key(layer: int, expert: int, role: str) -> str:
    """Where a file of second moments keeps those of one matrix's inputs: gate and up have the same."""
    return f"layers.{layer}.experts.{expert}.{'intermediate' if role == 'down' else 'hidden'}"


def _all(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _cut(line: Stored, role: str, tensor: torch.Tensor) -> torch.Tensor:
    """Numbers of an expert's slice, in stored axes -> those of a role, [out, in]."""
    return line.split(values(tensor))[role].parts["value"]


def _join(line: Stored, role: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """role -> [out, in] to the numbers of an expert's slice, in stored axes."""
    return line.join(lambda name: values(role(name))).parts["value"]


@dataclass(frozen=True)
class Merged:
    """A tensor that is no expert, with the change of an adapter, in the float type that it has: a matrix, or the bias of a module."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: DenseTensor
    factors: Dense | None
    rounding: Rounding

    @property
    def origin(self) -> str:
        return self.base.origin

    def read(self) -> torch.Tensor:
        return self.merge()[0]

    def merge(self) -> tuple[torch.Tensor, Survival]:
        """The tensor as it is to be stored, and what is left of the change."""
        import torch

        encoding = Plain(self.dtype)
        exact = self.base.exact().decode(torch.float32) if isinstance(self.base, DecodedTensor) else self.base.read()
        parts = encoding.encode(exact)
        if self.factors is None:
            return parts["value"], Survival()
        piece = _piece(self.factors, exact.to(torch.float32), self.name)
        found, survived = fold(encoding, parts, self.shape, {"": piece}, _alone, _without_moments(self.rounding), _no_moments, True)
        return found["value"], survived[""]


@dataclass(frozen=True)
class MergedPart:
    """A part of a quantized matrix that is no expert, with the change of an adapter, in the encoding that it has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    base: DecodedTensor
    factors: Dense
    rounding: Rounding
    part: str

    @property
    def origin(self) -> str:
        return self.name

    def read(self) -> torch.Tensor:
        return self.merge()[0]

    def merge(self) -> tuple[torch.Tensor, Survival]:
        """The part as it is to be stored; and, with the first of the parts, what is left of the change."""
        import torch

        coded = self.base.exact()
        piece = _piece(self.factors, coded.decode(torch.float32), self.base.name)
        found, survived = fold(coded.encoding, coded.parts, coded.shape, {"": piece}, _alone, _without_moments(self.rounding), _no_moments, True)
        return self.base.lying(found, self.part).reshape(self.shape), survived[""] if self.part == coded.encoding.parts[0].name else Survival()


def _piece(factors: Dense, weight: torch.Tensor, name: str) -> Piece:
    import torch

    if name.endswith(".bias"):
        bias = factors.bias()
        assert bias is not None
        left, right = bias.unsqueeze(1), torch.ones(1, 1, dtype=torch.float32, device="cpu")
        return Piece(weight, left, right, _all, (name,))
    return Piece(weight, *factors.factors(), _all, (name,))


def _alone(role: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return role("")


def _no_moments(*_: object) -> None:
    return None


def _without_moments(rounding: Rounding) -> Rounding:
    """Second moments are gathered for the inputs of experts; other matrices are rounded to the nearest."""
    return Rounding() if rounding.kind == "gptq" else rounding
