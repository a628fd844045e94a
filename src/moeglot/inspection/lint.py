"""What is worth knowing of a folder that is not wrong: bytes that could be saved, numbers that look absurd, and which loaders would misread it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.checkpoints.gathered import Gathered
from moeglot.checkpoints.profiles import spread
from moeglot.codings.coding import said
from moeglot.codings.rules import Quantization, mapping, method
from moeglot.dtypes import DTYPES, WEIGHT_DTYPES
from moeglot.encoded import Encoded
from moeglot.encodings.plain import Plain
from moeglot.errors import BadNumbers
from moeglot.inspection import ropes
from moeglot.inspection.defects import DEFECTS
from moeglot.layout import Stored

ALIGNMENT = 16
"""Bytes: what vector loads and grouped GEMMs want of addresses and of rows."""
PAGE = 4096
"""Bytes: smaller tensors, single scales for example, are copied before they are used."""
LOUD = 1e3
"""A weight larger than this is no weight of a trained model."""
APART = 100.0
"""The largest weights of two experts of one layer do not differ by this factor."""


@dataclass(frozen=True)
class Finding:
    """`what` is the case, in one line; `figures` for machines."""

    about: str
    what: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def lint(checkpoint: Checkpoint | str | Path, *, sample: bool = True) -> tuple[Finding, ...]:
    """Every finding, from headers and, with `sample`, from a few experts; of what several processes hold together, those of each, told once."""
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open(checkpoint)
    if isinstance(checkpoint, Gathered):
        return tuple({(finding.about, finding.what): finding for rank in checkpoint.ranks for finding in lint(rank, sample=sample)}.values())
    checks: list[Callable[[Checkpoint], Iterator[Finding]]] = [_unquantized, _masters, _orphans, _mixed, _unaligned, _strides, _loaders]
    if sample:
        checks += [_numbers, _apart]
    return tuple(finding for check in checks for finding in check(checkpoint))


# --- bytes and names ---------------------------------------------------------------------------------------------------------------------


def _matrices(c: Checkpoint) -> list[Stored]:
    return [line for line in c.format.stored if line.is_matrix]


def _unquantized(c: Checkpoint) -> Iterator[Finding]:
    declared = said(c.source.config)
    plain = [(layer, line) for layer in c.layers for line in c.format.lines(layer) if line.is_plain and line.is_matrix]
    if not declared or not plain:
        return
    keys = [key for layer, line in plain for expert in (range(c.sizes["e"]) if line.per_expert else (0,)) for key in line.keys(layer, expert).values()]
    held = sum(c.source.entries[key].nbytes for key in keys)
    bits = 4 if _says_four_bits(declared) or any(line.encoding.kind.endswith("4") for line in c.format.stored) else 8
    saved = held - sum(prod(c.source.entries[key].shape) * bits // 8 for key in keys)
    layers = dict.fromkeys(layer for layer, _ in plain)
    whose = "the experts" if len(layers) == len(c.layers) else f"those of {len(layers)} of {len(c.layers)} layers"
    stored = f"config.json says {method(declared)}, {whose} are {c.encoding(plain[0][1], plain[0][0]).name}"
    what = f"{stored}: {held / 1e9:.2f} GB, of which {bits} bits a number would save {saved / 1e9:.2f} GB"
    yield Finding("experts are not quantized", what, {"bytes": held, "could_save": saved, "quant_method": method(declared)})


def _says_four_bits(declared: Quantization) -> bool:
    """In the words of bitsandbytes, GPTQ, AWQ and AutoRound, compressed-tensors, ModelOpt, and MXFP4's own."""
    weights = [mapping(mapping(group).get("weights")) for group in mapping(declared.get("config_groups")).values()]
    bits = {declared.get("bits"), declared.get("w_bit"), *(said.get("num_bits") for said in weights)}
    return 4 in bits or bool(declared.get("load_in_4bit")) or "4" in str(declared.get("quant_algo")) or method(declared) == "mxfp4"


def _orphans(c: Checkpoint) -> Iterator[Finding]:
    """Scales and packed codes outside the experts without the tensor that they belong to."""
    names = c.source.entries.keys()
    for key in c.others:
        if not key.endswith(SUFFIXES):
            continue
        for suffix, others in SIBLINGS.items():
            stem = key.removesuffix(suffix)
            here = [stem + other for other in others if stem + other in names]
            if stem != key and not here:
                yield Finding("orphan tensor", f"{key} is there, and none of {', '.join(stem + other for other in others)}", {"tensor": key})
            elif stem != key and "scale" in suffix and (plain := c.source.entries[here[0]].dtype) in WEIGHT_DTYPES:
                yield Finding("unused scales", f"{key} is there, and {here[0]} is {plain}, which no scale belongs to", {"tensor": key})


def _masters(c: Checkpoint) -> Iterator[Finding]:
    """What an optimizer keeps in float32 of weights of 16 bits."""
    held = {entry.dtype for entry in c.source.entries.values()} - {"F32", "F64"}
    if c.source.masters and held:
        count, own = len(c.source.masters), " and ".join(sorted(held))
        what = f"{count} tensors such as {c.source.masters[0]} hold weights in float32; the model's own are read, which are {own}"
        yield Finding("more exact weights", what, {"tensors": count})


SIBLINGS = {
    ".weight_scale_inv": (".weight",),
    ".weight_scale": (".weight", ".weight_packed"),
    ".weight_packed": (".weight_scale",),
    "_blocks": ("_scales",),
    "_scales": ("_blocks",),
}


SUFFIXES = tuple(SIBLINGS)


def _mixed(c: Checkpoint) -> Iterator[Finding]:
    """Layers for multi-token prediction whose experts are stored otherwise than the others."""
    here = [key for key in c.others if ".experts." in key and (".mtp." in f".{key}" or c.format.family.is_carried(key, c.config))]
    other = sorted({_template(key) for key in here if not c.format.match(key)})
    if other:
        yield Finding(
            "mixed layouts", f"layers for multi-token prediction store their experts as {other[0]}, the others as {c.format.stored[0].key}", {"keys": other}
        )
    declared = {c.source.entries[key].dtype for key in here if c.format.match(key)}
    main = {c.source.entries[key].dtype for layer in c.layers for line in c.format.lines(layer) for key in line.keys(layer, 0).values()}
    if declared - main:
        yield Finding(
            "mixed layouts", f"layers for multi-token prediction have experts of {' and '.join(sorted(declared))}, the others of {' and '.join(sorted(main))}"
        )


def _template(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{n}", key)


def _unaligned(c: Checkpoint) -> Iterator[Finding]:
    odd = [e.name for e in c.source.entries.values() if e.start % ALIGNMENT and e.end - e.start >= PAGE and e.name not in c.others]
    if odd:
        yield Finding("not aligned", f"{len(odd)} tensors of experts do not start at a multiple of {ALIGNMENT} bytes, first {odd[0]}", {"tensors": len(odd)})


def _strides(c: Checkpoint) -> Iterator[Finding]:
    for line in _matrices(c):
        encoding = c.encoding(line, c.layers[0])
        row = line.expert_shape(c.sizes)[-1] * (DTYPES[encoding.parts[0].dtypes[0]].size if isinstance(encoding, Plain) else 2)
        if row % ALIGNMENT:
            what = f"{line.key}: a row is {row} bytes in 16 bits, no multiple of {ALIGNMENT}; torch's grouped_mm refuses it, and transformers 5 crashes"
            yield Finding("rows not aligned", what, {"row_bytes": row})


# --- numbers -----------------------------------------------------------------------------------------------------------------------------


def _numbers(c: Checkpoint) -> Iterator[Finding]:
    """Scales that are zero, NaN or placeholders, and weights of a size that training does not give, in a few experts of the first and last layer."""
    import torch

    for layer in spread(c.layers, 2):
        for line in (line for line in c.format.lines(layer) if line.is_matrix):
            largest = {}
            for expert in spread(range(c.sizes["e"]), 3):
                try:
                    roles = c.expert(line, layer, expert).values()
                except BadNumbers as error:
                    yield Finding("numbers", error.wrong, {"layer": layer, "expert": expert})
                    continue
                largest[expert] = max(float(rows.decode(torch.float32).abs().max()) for role in roles for rows in role.row_blocks())
            yield from _absurd(line, layer, largest)


def _absurd(line: Stored, layer: int, largest: Mapping[int, float]) -> Iterator[Finding]:
    least = min((size for size in largest.values() if size), default=0.0)
    for expert, size in largest.items():
        if size == 0:
            yield Finding("numbers", f"{line.key}, layer {layer}, expert {expert}: all weights are zero", {"layer": layer, "expert": expert})
        elif size > LOUD or size > APART * least:
            others = f", elsewhere {least:.3g}" if size > least else ""
            what = f"{line.key}, layer {layer}, expert {expert}: the largest weight is {size:.3g}{others}; a scale is wrong or missing"
            yield Finding("numbers", what, {"layer": layer, "expert": expert, "largest": size})


def _apart(c: Checkpoint) -> Iterator[Finding]:
    """Gate and up of an expert without one global for both, in a few experts of the first and last layer."""
    for layer in spread(c.layers, 2):
        coded = {role: line for line in c.format.lines(layer) if line.common for role in line.roles}
        for expert in spread(range(c.sizes["e"]), 3) if len(coded) > 1 else ():
            matrices = {role: c.split(line, c.stored(line, layer, expert))[role] for role, line in coded.items()}
            wholes = {role: float(matrix.parts[_single(matrix)].max()) for role, matrix in matrices.items()}
            if len(set(wholes.values())) > 1:
                told = ", ".join(f"{role} {value:.4g}" for role, value in wholes.items())
                what = f"layer {layer}, expert {expert}: different globals ({told}); vLLM and TensorRT-LLM take one for both, and compute with other weights"
                yield Finding("globals of gate and up", what, {"layer": layer, "expert": expert, "globals": wholes})
                return


def _single(matrix: Encoded) -> str:
    """The part that the encoding has one entry of for a matrix."""
    return next(part.name for part in matrix.encoding.parts if part.is_single)


# --- loaders ---------------------------------------------------------------------------------------------------------------------------


def _loaders(c: Checkpoint) -> Iterator[Finding]:
    for defect in DEFECTS:
        if defect.holds(c):
            yield Finding(f"misread by {defect.reader}", defect.what, {"reader": defect.reader})
    if wrong := list(ropes.otherwise(c)):
        told = " and ".join(f"takes {key} {found}, where the file says {meant}" for key, found, meant in wrong)
        what = f"it does not know rope_parameters, {told}, and computes other logits"
        yield Finding("misread by transformers 4.57", what, {"reader": "transformers 4.57", "takes": {key: found for key, found, _ in wrong}})
