"""Checkpoint: the shards of a model seen through its format, so that a role of a layer is one lazy tensor [e, out, in]."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from moeglot.checkpoints.config import hub_config
from moeglot.checkpoints.declared import dense_encoding
from moeglot.checkpoints.dense import DecodedTensor, DenseTensor, HubTensor, check_codes
from moeglot.checkpoints.evidence import decide
from moeglot.checkpoints.hub_names import HubNames
from moeglot.checkpoints.identify import Identification, identify
from moeglot.checkpoints.structure import check_place, structure_problems
from moeglot.codings import CODINGS
from moeglot.codings.coding import WEIGHT, Coding, brief, said, transformed
from moeglot.encoded import Encoded, LazyEncoded
from moeglot.encoding import Encoding
from moeglot.errors import BadNumbers, Contradiction, TensorMismatch, UnknownFormat
from moeglot.files.foreign import check_held
from moeglot.files.shards import Entry
from moeglot.files.source import Source, read_source
from moeglot.format import Format
from moeglot.layout import Stored
from moeglot.share import SHARE, Share
from moeglot.straddled import Straddled


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose format is settled and whose tensors are what the format says."""

    source: Source
    format: Format
    identification: Identification = field(repr=False)

    @property
    def evidence(self) -> tuple[str, ...]:
        share = self.source.share
        return (*self.identification.evidence, *([f"the safetensors header says {SHARE} = {share.mark}"] if share else []))

    @property
    def share(self) -> Share | None:
        """Whose tensors these are, if not all."""
        return self.source.share

    @property
    def tp(self) -> int:
        """Among how many processes heads, words and the rows of other layers are divided."""
        return self.share.tp.size if self.share else 1

    @cached_property
    def stage(self) -> range:
        """The numbers that the layers here, counted from 0, have in the whole model."""
        count = self.format.family.count(self.config)
        return self.share.stage(count) if self.share else range(count)

    @property
    def known(self) -> str:
        """Second line of an error: what we know and from where."""
        return f"the format is {self.format.name}, because {', and '.join(self.evidence)}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json under the Hub's keys."""
        return hub_config(self.source.config, self.format)

    def number(self, layer: int) -> int:
        """The number that a layer has in the whole model."""
        return self.stage[layer] if self.share else layer

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Letter -> size: e experts that are here, h hidden, i what of their intermediate size is, and what else the family needs."""
        return self.format.family.held_sizes(self.config, self.source.share)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers here that have experts."""
        return self.format.family.held_layers(self.config, self.source.share)

    def problems(self) -> Iterator[Exception]:
        """Every way in which the tensors are not what the format says."""
        return structure_problems(self.source, self.format, self.sizes, self.layers, self.config, self.known)

    def line(self, line: Stored, layer: int) -> Stored:
        """A line of the format as this layer has it: the same roles, perhaps not quantized, and then not turned."""
        return next(mine for mine in self.format.lines(layer) if mine.roles == line.roles)

    def encoding(self, line: Stored, layer: int) -> Encoding:
        """How this layer's tensor is coded; for plain floats, the type that the file holds."""
        line = self.line(line, layer)
        key = line.stem(layer, 0)
        found = {part: self.source.entries[key + suffix] for part, suffix in line.names.items() if key + suffix in self.source.entries}
        return line.encoding.as_stored({part: (entry.dtype, entry.shape) for part, entry in found.items()}, line.leading)

    def stored(self, line: Stored, layer: int, expert: int, only: range | None = None) -> Encoded:
        """One expert's slice of a stored tensor, its axes as they lie on disk. `only`: of a tensor with one expert's rows along i, no others of these."""
        check_place(self.layers, self.sizes["e"], lambda: self.known, layer, expert)
        line, encoding, parts = self.line(line, layer), self.encoding(line, layer), {}
        sizes = self.sizes if only is None else {**self.sizes, "i": len(only)}
        for part in encoding.parts:
            entry = self.source.entries[line.key_of(part, layer, expert)]
            entry = entry._replace(shape=line.memory_shape(self.sizes)) if line.shaped else entry
            first, rows = 0, None if line.per_expert or part.shared else entry.shape[0] // self.sizes["e"]
            if rows is not None:
                first = expert * rows
            elif only is not None and (block := part.blocks(len(line.expert_groups))[0]):
                first, rows = only.start // block, -(-only.stop // block) - only.start // block
            parts[part.name] = entry.read(first, rows).view(line.slice_shape(part, sizes))
        return Encoded(encoding, parts, line.expert_shape(sizes))

    def expert(self, line: Stored, layer: int, expert: int) -> Mapping[str, Encoded]:
        """role -> [out, in] of one expert; still encoded where no block straddles a cut, else decoded to float32 when it is asked for."""
        return self.split(self.line(line, layer), self.checked(line, layer, expert))

    def split(self, line: Stored, stored: Encoded) -> Mapping[str, Encoded]:
        """One expert's slice -> role -> [out, in], as `expert` has it. The line is the layer's own."""
        return line.split(stored) if line.movable(stored.encoding, self.sizes) else Straddled(line, stored)

    def checked(self, line: Stored, layer: int, expert: int) -> Encoded:
        """As `stored`; raises `BadNumbers` for parts that are impossible."""
        stored = self.stored(line, layer, expert)
        if problem := stored.encoding.check(stored.parts):
            key = self.line(line, layer).keys(layer, expert)
            raise BadNumbers(
                f"{next(iter(key.values()))}, expert {expert}: {problem}",
                f"read from {self.source.name}; {self.known}",
                "fetch the file again from its producer; a model with it computes nothing",
            )
        return stored

    def experts(self, layer: int) -> dict[str, LazyEncoded]:
        """role -> [e, out, in] of a layer, lazily: indexing by expert reads that expert's bytes and no others."""
        check_place(self.layers, self.sizes["e"], lambda: self.known, layer)
        found = {}
        for line in self.format.stored:
            encoding = self.encoding(line, layer).upright
            for role in line.roles:
                shape = tuple(self.sizes[letter] for letter in ("e", *line.role_axes.split()))
                found[role] = LazyEncoded(encoding, shape, partial(self._role, role, line, layer))
        return {role: found[role] for role in self.format.family.roles}

    def _role(self, role: str, line: Stored, layer: int, expert: int) -> Encoded:
        return self.expert(line, layer, expert)[role]

    @cached_property
    def others(self) -> dict[str, Entry]:
        """name -> tensor, for all that are not the experts'; those of layers for multi-token prediction are among them."""
        found = dict(self.source.entries)
        for _, _, keys in self.format.expert_keys(self.layers, self.sizes):
            for key in keys:
                found.pop(key, None)
        return found

    @cached_property
    def dense(self) -> dict[str, HubTensor]:
        """Hub name -> tensor, for every tensor that is no expert; raises `TensorMismatch` for one that the format cannot name."""
        found: dict[str, HubTensor] = {}
        names = HubNames(self.format, self.sizes, self.config, self.share, self.known)
        for key, entry in self.others.items():
            for tensor in names.tensors(key, entry):
                if tensor.name in found:
                    raise TensorMismatch(f"{tensor.name}: stored twice", f"as {found[tensor.name].entry.name} and as {key}", "remove the stale one")
                found[tensor.name] = tensor
        return found

    def decoded(self, dtype: str) -> dict[str, DenseTensor]:
        """As `dense`, but quantized matrices decoded to a float type, under the name that they have unquantized; all else as it is.

        Raises `UnknownFormat` where one is coded in a way that moeglot does not know.
        """
        found: dict[str, DenseTensor] = {}
        check_codes(self.dense, self.coded, said(self.source.config))
        for module, (encoding, parts) in self._quantized.items():
            coded = {part: self.dense[key].entry for part, key in parts.items()}
            found[module + WEIGHT] = DecodedTensor(module + WEIGHT, encoding, coded, dtype)
        return found | {name: tensor for name, tensor in self.dense.items() if name not in self.coded}

    @cached_property
    def coded(self) -> frozenset[str]:
        """Hub names of the parts of quantized matrices that are no experts."""
        return frozenset(key for _, parts in self._quantized.values() for key in parts.values())

    @cached_property
    def _quantized(self) -> dict[str, tuple[Encoding, dict[str, str]]]:
        """As `matrices`; raises `Contradiction` for scales that nothing declares."""
        scaled = {module for coding in self.codings for module in self._modules(coding)}
        if undeclared := sorted(scaled - self.matrices.keys()):
            raise Contradiction(
                f"{undeclared[0]} has scales, and config.json does not say how it is quantized, or in a way that moeglot does not know",
                f"quantization_config says {brief(said(self.source.config))}; {self.known}",
                "take config.json from the checkpoint's producer, or convert to a layout that keeps the encoding as it is",
            )
        return self.matrices

    @cached_property
    def matrices(self) -> dict[str, tuple[Encoding, dict[str, str]]]:
        """Module that is no expert -> its encoding, and part -> Hub name; for the quantized ones that config.json declares and that have all of their parts."""
        declared, found = said(self.source.config), dict[str, tuple[Encoding, dict[str, str]]]()
        for coding in self.codings:
            for module, parts in self._modules(coding).items():
                encoding = None if module in found else dense_encoding(declared, coding, module, self.format.family)
                if encoding and parts.keys() >= {part.name for part in encoding.parts}:
                    entries = {part: self.dense[key].entry for part, key in parts.items()}
                    found[module] = encoding.as_stored({part: (entry.dtype, entry.shape) for part, entry in entries.items()}), parts
        return found

    @property
    def has_quantized_others(self) -> bool:
        """Some matrices that are no experts are quantized."""
        return bool(self._quantized)

    @property
    def codings(self) -> tuple[Coding, ...]:
        """How matrices that are no experts may be quantized: as the experts are, as their producer has it, or in any way that config.json declares."""
        if not said(self.source.config):
            return ()
        coding = self.format.coding
        first = [one for one in (coding and coding.others, coding) if one]
        return (*first, *(one for one in CODINGS if one not in first))

    def _modules(self, coding: Coding) -> dict[str, dict[str, str]]:
        """Module that is no expert -> part -> Hub name, where a coding's names are there, a scale among them."""
        modules: dict[str, dict[str, str]] = {}
        for name in self.dense:
            if found := coding.module(name):
                modules.setdefault(found[0], {})[found[1]] = name
        needed = {"scale", coding.encoding.parts[0].name}
        return {module: parts for module, parts in modules.items() if needed <= parts.keys()}


def open(path: str | Path, format: str | Format | None = None, *, headers_only: bool = False) -> Checkpoint:
    """A folder, a safetensors file or a Hub id -> Checkpoint: headers read, format identified, every expert tensor accounted for. A folder that has one for
    each process of several is what they hold together.

    With `headers_only`, the weights of a Hub id stay where they are: enough to inspect it.
    Where several formats fit all declarations, a few experts' numbers are read, and decide or not.
    Raises `FormatError` where the format cannot be told and `CheckpointError` where the tensors are not what it says.
    """
    from moeglot.checkpoints.gathered import gather, require_marks

    with _without_collector():
        source = read_source(path, headers_only)
        if source.ranks:
            require_marks(source)
            return gather(source, tuple(_opened(rank, format, headers_only) for rank in source.ranks))
        return _opened(source, format, headers_only)


def _opened(source: Source, format: str | Format | None, headers_only: bool) -> Checkpoint:
    check_held(source.name, source.config)
    if online := transformed(said(source.config)):
        raise UnknownFormat(
            f"{source.name}: its weights are for activations that are transformed as the model computes",
            f"{online}; no weight holds that",
            "decode it with the library that wrote it, or take a checkpoint whose transforms lie in the weights (R1 and R2 of SpinQuant)",
        )
    identification = identify(source, format)
    if len(identification.candidates) > 1 and not headers_only:
        identification = _ask_the_numbers(source, identification)
    checkpoint = Checkpoint(source, identification.settled(source.name), identification)
    found = list(islice(checkpoint.problems(), 100))
    if found:
        first = found[0]
        if len(found) > 1 and isinstance(first, TensorMismatch):
            more = f"{len(found) - 1}{'+' if len(found) == 100 else ''} more"
            raise TensorMismatch(f"{first.wrong} ({more})", first.known, first.do)
        raise first
    return checkpoint


def _ask_the_numbers(source: Source, found: Identification) -> Identification:
    """Where several formats fit all declarations: the one that the numbers fit, if they contradict all others."""
    candidates = [Checkpoint(source, form, found) for form in found.candidates]
    if any(next(candidate.problems(), None) for candidate in candidates):
        return found
    n, why = decide(candidates) or (None, "nor can the numbers tell")
    return replace(found, format=None if n is None else found.candidates[n], evidence=(*found.evidence, why))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Headers of 50 000 tensors are millions of small objects and no garbage; looking for some takes a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
