"""Stored: one line of a format. Its key, the roles it holds and its axes; with `axes`, all that moves axes.

Letters: e expert, h hidden, i intermediate (j that of a second group), p which projection; how a string of them reads is said in `axes`. The letters of a role
in canonical order ([out, in]) are in `ROLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations, product
from math import prod
from typing import TYPE_CHECKING

from moeglot import scratch
from moeglot.axes import Groups, arrangements, block, halves, letters, parse_axes, put_together, taken_apart, written
from moeglot.encoded import Encoded
from moeglot.encoding import Encoding, Part
from moeglot.encodings.plain import FLOATS, Plain
from moeglot.errors import TensorMismatch
from moeglot.floats import exact_dtype, values

if TYPE_CHECKING:
    import torch

SECOND = "second_"
"""Begins the names of the roles of a second group of experts in a layer: those for images beside those for text, a decoder's beside an encoder's."""
BEHIND = -1
"""`Stored.offset` of experts that are numbered after those of the first group, however many these are."""
_FIRST = {"gate": "i h", "up": "i h", "down": "h i", "gate_bias": "i", "up_bias": "i", "down_bias": "h"}
ROLES = _FIRST | {SECOND + role: axes.replace("i", "j") for role, axes in _FIRST.items()}
"""The canonical axes of each role: a matrix is [out, in]. The second group's intermediate size is j."""

Sizes = Mapping[str, int]
"""Letter -> size, from config.json."""


@dataclass(frozen=True)
class Stored:
    """One stored tensor: key template, roles it holds, axes. `names` gives the suffix of the key for each part of the encoding.

    `offset`: how much larger the expert's number is in the key than among its group. `shaped`: the axes of the shape that the file declares, where that is
    not how the numbers lie. `also`: axes that its producer gives the same tensor under another setting, so that reading it by these is a mistake that happens.
    `common`: the roles of an expert that are coded under one, for all of them, of what their encoding has one of for a matrix.
    """

    key: str
    roles: tuple[str, ...]
    axes: str
    encoding: Encoding = FLOATS
    names: Mapping[str, str] = field(default_factory=lambda: {"value": ""})
    offset: int = 0
    shaped: str = ""
    also: tuple[str, ...] = ()
    common: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stored = letters(self.groups)
        carried = {ROLES[role] for role in self.roles}
        expected = sorted({"e", *carried.pop().split(), *(["p"] if len(self.roles) > 1 else [])})
        found = sorted(stored + (["e"] if "{expert}" in self.key else []))
        if carried or found != expected:
            raise ValueError(f"{self.key}: {self.roles} need each of {expected} exactly once, in the key or in {self.axes!r}, not {found}")
        if self.shaped and (sorted(letters(parse_axes(self.shaped))) != sorted(stored) or not self.is_plain):
            raise ValueError(f"{self.key}: a shape {self.shaped!r} is not that of floats that lie as {self.axes!r}")
        if "e" in stored and stored[0] != "e":
            raise ValueError(f"{self.key}: {self.axes!r} must start with e, so that an expert is one run of bytes")
        if "{layer}" not in self.key:
            raise ValueError(f"{self.key}: no {{layer}} in the key")
        if not {part.name for part in self.encoding.parts} <= set(self.names):
            raise ValueError(f"{self.key}: {self.encoding} has parts {[part.name for part in self.encoding.parts]}, named are {list(self.names)}")

    @cached_property
    def groups(self) -> Groups:
        return parse_axes(self.axes)

    @cached_property
    def block(self) -> int:
        """How many rows of gate stand before as many of up; 0 if they do not take turns in blocks."""
        return block(self.groups)

    @property
    def per_expert(self) -> bool:
        """One tensor for each expert, so that e is in the key."""
        return "{expert}" in self.key

    @property
    def is_matrix(self) -> bool:
        """It holds matrices, and not the biases beside them."""
        return len(self.role_axes.split()) == 2

    @cached_property
    def is_plain(self) -> bool:
        """Not quantized."""
        return isinstance(self.encoding, Plain)

    def module(self, layer: int, expert: int = 0) -> str:
        """What quantization_config calls the matrices of an expert."""
        return self.stem(layer, expert).removesuffix(".weight")

    def stem(self, layer: int, expert: int | None = None) -> str:
        """The key, without the suffix of a part."""
        return self.key.format(layer=layer, expert=None if expert is None else expert + self.offset)

    @property
    def short(self) -> str:
        """Its name for people: `gate_up_proj`, `w1`."""
        *_, before, last = [piece for piece in self.key.replace("{expert}", "").split(".") if piece]
        return {"weight": before, "bias": f"{before}.bias"}.get(last, last)

    @cached_property
    def upright(self) -> bool:
        """A matrix lies as [out, in]."""
        return [letter for letter in letters(self.expert_groups) if letter != "p"] == self.role_axes.split()

    @property
    def leading(self) -> int:
        """How many axes a part with one entry for a matrix has: of experts, and of which projection."""
        return sum(letter in "ep" for group in self.groups for letter in group)

    @property
    def role_axes(self) -> str:
        return ROLES[self.roles[0]]

    @cached_property
    def expert_groups(self) -> Groups:
        """The axes of one expert's slice: without e."""
        rest = tuple(tuple(letter for letter in group if letter != "e") for group in self.groups)
        return tuple(group for group in rest if group)

    @cached_property
    def suffixes(self) -> dict[str, str]:
        """part -> what follows the key, for the parts that this line's encoding has."""
        return {part.name: self.names[part.name] for part in self.encoding.parts}

    def keys(self, layer: int, expert: int | None = None) -> dict[str, str]:
        """part -> full key."""
        key = self.stem(layer, expert)
        return {part: key + suffix for part, suffix in self.suffixes.items()}

    def key_of(self, part: Part, layer: int, expert: int | None) -> str:
        """The full key of a part."""
        return self.stem(layer, expert) + self.names[part.name]

    def _shape(self, groups: Iterable[tuple[str, ...]], sizes: Sizes) -> tuple[int, ...]:
        known = {**sizes, "p": len(self.roles)}
        return tuple(prod(known[letter] for letter in group if letter.isalpha()) for group in groups)

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the whole stored tensor, as the file declares it."""
        return self._shape(parse_axes(self.shaped or self.axes), sizes)

    def memory_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape in which the numbers of the whole stored tensor lie."""
        return self._shape(self.groups, sizes)

    def expert_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the values of one expert's slice."""
        return self._shape(self.expert_groups, sizes)

    def part_shape(self, part: Part, sizes: Sizes) -> tuple[int, ...]:
        """Shape in a file of a part of the whole stored tensor; raises `TensorMismatch` for a size that is no whole number of blocks."""
        if part.flat and not self.per_expert and sizes["e"] > 1 and prod(self.expert_shape(sizes)) % part.flat:
            raise TensorMismatch(
                f"{self.key}: an expert of {prod(self.expert_shape(sizes))} numbers is no whole number of {part.name} blocks of {part.flat}",
                "the blocks run over the whole stored tensor, so one would hold numbers of two experts",
                "choose a format that stores one tensor for each expert",
            )
        if part.is_single and not part.shared:
            return (*self._shape(((letter,) for group in self.groups for letter in group if letter in part.apart), sizes), *part.single, *part.trailing)
        shape = self._part_shape(groups := parse_axes(self.shaped or self.axes), part, sizes)
        return tuple(size for size, block in zip(shape, part.blocks(len(groups)), strict=True) if block) if part.bare else shape

    def slice_shape(self, part: Part, sizes: Sizes) -> tuple[int, ...]:
        """Shape of a part of one expert's slice, every axis kept: where a block is WHOLE, an axis of two projections is 2 long and any other 1."""
        return self._part_shape(self.expert_groups, part, sizes)

    def _part_shape(self, groups: Groups, part: Part, sizes: Sizes) -> tuple[int, ...]:
        if self.block and (rows := sizes[self.role_axes[0]]) % self.block:
            wrong = f"{self.key}: {rows} rows of each of {' and '.join(self.roles)} are no whole number of blocks of {self.block}"
            raise TensorMismatch(wrong, f'their rows take turns: "{self.axes}"', "choose a format in which they do not")
        if part.flat or part.shared:
            return part.shape(self._shape(groups, sizes))
        kept = [tuple(letter for letter in group if block or letter in part.apart) for group, block in zip(groups, part.blocks(len(groups)), strict=True)]
        blocked = part if all(part.block) else replace(part, block=(part.block[0] or 1, part.block[1] or 1))
        return blocked.shape(self._shape(kept, sizes))

    def movable(self, encoding: Encoding, sizes: Sizes) -> bool:
        """Codes of this encoding can be split into roles (and joined from them) as they are: no block would straddle a cut or be turned."""
        held = encoding.lying(self.upright)
        return all(self._part_moves(part, self.upright or held.is_turned, sizes) for part in held.parts if not (part.joint and part in held.carried))

    def _part_moves(self, part: Part, upright: bool, sizes: Sizes) -> bool:
        if part.flat:
            return upright and len(self.roles) == 1
        if not upright and (part.trailing or part.block[0] != part.block[1]):
            return False
        for group, rows in zip(self.expert_groups, part.blocks(len(self.expert_groups)), strict=True):
            cut = rows != 1 if self.block else rows > 1 and (group[-1] == "p" or prod(sizes[one] for one in group if one != "p") % rows)
            if "p" in group and (cut or part.joint):
                return False
        return True

    def split(self, stored: Encoded) -> dict[str, Encoded]:
        """One expert's slice -> role -> [out, in], as views where strides allow it."""
        from_letters = dict(zip(self.expert_groups, stored.shape, strict=True))
        sizes = {letter: n // (len(self.roles) if "p" in group else 1) for group, n in from_letters.items() for letter in letters((group,)) if letter != "p"}
        shape = tuple(sizes[letter] for letter in self.role_axes.split())
        if any(part.flat for part in stored.encoding.parts):
            assert self.movable(stored.encoding, sizes)
            return {self.roles[0]: stored}
        joint, count = stored.encoding.joint_parts, len(self.roles)
        moved = {name: taken_apart(part, self.expert_groups, self.role_axes, count, joint=name in joint) for name, part in stored.parts.items()}
        return {role: Encoded(stored.encoding.upright, {name: part[n] for name, part in moved.items()}, shape) for n, role in enumerate(self.roles)}

    def join(self, role: Callable[[str], Encoded]) -> Encoded:
        """role -> [out, in] to one expert's slice; the inverse of `split`. Asks for one role at a time; all must have one encoding."""
        if self.block:
            return self._woven([role(name) for name in self.roles])
        joined: Encoded | None = None
        for name in self.roles:
            encoded = role(name)
            if any(part.flat for part in encoded.encoding.parts):
                assert len(self.roles) == 1
                return encoded
            if joined is None:
                joint = encoded.encoding.joint_parts
                parts = {part: scratch.empty(self._joined_shape(tensor, part in joint), tensor.dtype) for part, tensor in encoded.parts.items()}
                shape = self._shape(self.expert_groups, dict(zip(self.role_axes.split(), encoded.shape, strict=True)))
                joined = Encoded(encoded.encoding.lying(self.upright), parts, shape)
                places = self.split(joined)
            for part, tensor in encoded.parts.items():
                places[name].parts[part].copy_(tensor)
        assert joined is not None
        return joined

    def _woven(self, roles: list[Encoded]) -> Encoded:
        """Roles whose rows take turns in blocks, which no strides can say."""
        parts = {part: put_together([one.parts[part] for one in roles], self.expert_groups, self.role_axes) for part in roles[0].parts}
        return Encoded(roles[0].encoding, parts, self._shape(self.expert_groups, dict(zip(self.role_axes.split(), roles[0].shape, strict=True))))

    def decoded(self, role: Callable[[str], Encoded], dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `join`, with the values of each role decoded, into the float type that holds all of them by default, where they belong in memory used again."""
        encoded = role(self.roles[0])
        dtype = dtype or exact_dtype(encoded)
        if self.block:
            return self._woven([values(role(name).decode(dtype)) for name in self.roles]).parts["value"]
        shape = self._shape(self.expert_groups, dict(zip(self.role_axes.split(), encoded.shape, strict=True)))
        found = scratch.empty(shape, dtype)
        places = self.split(values(found))
        for name in self.roles:
            encoded = encoded if name == self.roles[0] else role(name)
            encoded.decode(dtype, places[name].parts["value"])
        return found

    def in_out(self, slices: torch.Tensor) -> torch.Tensor:
        """Values of slices [b, ...] in stored axes -> [b, in, out], as a view."""
        return slices.mT if self.upright else slices

    def turns_into(self, other: Stored) -> bool:
        """Both hold the same roles, and one expert's slice becomes the other's by axes that change places as a whole."""
        return self.roles == other.roles and sorted(self.expert_groups) == sorted(other.expert_groups)

    def turned(self, other: Stored, tensor: torch.Tensor) -> torch.Tensor:
        """One expert's slice of a line that this `turns_into`, as a view with its axes."""
        return tensor.permute([other.expert_groups.index(group) for group in self.expert_groups])

    def _joined_shape(self, part: torch.Tensor, joint: bool) -> tuple[int, ...]:
        """Shape of a part of one expert's slice, from the shape that it has in one role."""
        shape, letters = tuple(part.shape), self.role_axes.split()
        return shape if joint else self._shape(self.expert_groups, dict(zip(letters, shape, strict=False))) + shape[len(letters) :]

    @cached_property
    def out_group(self) -> tuple[str, ...]:
        """The letters of the axis that a matrix gives, or of the one that a bias has: `("i", "p")`."""
        return next(group for group in self.expert_groups if self.role_axes[0] in group)

    def apart(self, given: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the stored matrix gives, [..., (i p)] -> role -> [..., i], as views where strides allow it."""
        if len(self.roles) == 1:
            return {self.roles[0]: given}
        moved = taken_apart(given, (self.out_group,), self.role_axes[0], len(self.roles), last=True)
        return {role: moved[n] for n, role in enumerate(self.roles)}

    def together(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The inverse of `apart`."""
        if len(self.roles) == 1:
            return given[self.roles[0]]
        return put_together([given[role] for role in self.roles], (self.out_group,), self.role_axes[0], last=True)

    def misreadings(self, sizes: Sizes) -> Iterator[Stored]:
        """Every other reading of the same bytes that no shape refutes: axes turned, gate and up in the other arrangement or order."""
        rows, own = sizes[self.role_axes[0]], ("e",)
        lying = arrangements(self.expert_groups, *(tuple(group for group in parse_axes(axes) if group != own) for axes in self.also))
        for roles, groups in product(permutations(self.roles), list(lying)):
            other = replace(self, roles=roles, axes=written(groups if self.per_expert else (own, *groups)))
            meant, same_shape = halves(groups, rows), other.expert_shape(sizes) == self.expert_shape(sizes)
            if same_shape and not (block(meant) and rows % block(meant)) and (roles, meant) != (self.roles, halves(self.expert_groups, rows)):
                yield other
