"""What is worth knowing of a folder that is not wrong: bytes that could be saved, numbers that look absurd, and which loaders would misread it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from moeglot import ropes
from moeglot.checkpoint import Checkpoint
from moeglot.coding import WEIGHT, method, said
from moeglot.dtypes import DTYPES, WEIGHT_DTYPES
from moeglot.encodings.bnb4 import BNB4
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.plain import Plain
from moeglot.gathered import Gathered
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


def lint(checkpoint: Checkpoint, *, sample: bool = True) -> tuple[Finding, ...]:
    """Every finding, from headers and, with `sample`, from a few experts; of what several processes hold together, those of each, told once."""
    if isinstance(checkpoint, Gathered):
        return tuple({(finding.about, finding.what): finding for rank in checkpoint.ranks for finding in lint(rank, sample=sample)}.values())
    checks: list[Callable[[Checkpoint], Iterator[Finding]]] = [_unquantized, _orphans, _mixed, _unaligned, _strides, _loaders]
    if sample:
        checks.append(_numbers)
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
    four = declared.get("load_in_4bit") or "4" in str(declared.get("quant_algo", "")) or method(declared) in ("mxfp4", "bitsandbytes")
    bits = 4 if four or any(line.encoding.kind.endswith(("4", "nf4")) for line in c.format.stored) else 8
    saved = held - sum(prod(c.source.entries[key].shape) * bits // 8 for key in keys)
    layers = dict.fromkeys(layer for layer, _ in plain)
    whose = "the experts" if len(layers) == len(c.layers) else f"those of {len(layers)} of {len(c.layers)} layers"
    stored = f"config.json says {method(declared)}, {whose} are {c.encoding(plain[0][1], plain[0][0]).name}"
    what = f"{stored}: {held / 1e9:.2f} GB, of which {bits} bits a number would save {saved / 1e9:.2f} GB"
    yield Finding("experts are not quantized", what, {"bytes": held, "could_save": saved, "quant_method": method(declared)})


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
    carried = c.format.family.carried_layers(c.config)
    here = [key for key in c.others if ".experts." in key and _is_mtp(key, carried)]
    other = sorted({_template(key) for key in here if not c.format.match(key)})
    if other:
        yield Finding(
            "mixed layouts", f"layers for multi-token prediction store their experts as {other[0]}, the others as {c.format.stored[0].key}", {"keys": other}
        )
    declared = {c.source.entries[key].dtype for key in here if c.format.match(key)}
    main = {c.source.entries[key].dtype for line in c.format.lines(c.layers[0]) for key in line.keys(c.layers[0], 0).values()}
    if declared - main:
        yield Finding(
            "mixed layouts", f"layers for multi-token prediction have experts of {' and '.join(sorted(declared))}, the others of {' and '.join(sorted(main))}"
        )


def _is_mtp(key: str, carried: range) -> bool:
    found = re.search(r"\.layers\.(\d+)\.", key)
    return key.startswith("mtp.") or ".mtp." in key or bool(found and int(found[1]) in carried)


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

    for layer in dict.fromkeys((c.layers[0], c.layers[-1])):
        for line in _matrices(c):
            largest = {}
            for expert in sorted({0, c.sizes["e"] // 2, c.sizes["e"] - 1}):
                stored = c.stored(line, layer, expert)
                key = f"{next(iter(line.keys(layer, expert).values()))}, expert {expert}"
                if problem := stored.encoding.check(stored.parts):
                    yield Finding("numbers", f"{key}: {problem}", {"layer": layer, "expert": expert})
                    continue
                roles = c.split(line, stored).values()
                largest[expert] = max(float(rows.decode(torch.float32).abs().max()) for role in roles for rows in role.row_blocks())
            yield from _absurd(line, layer, largest)


def _absurd(line: Stored, layer: int, largest: Mapping[int, float]) -> Iterator[Finding]:
    for expert, size in largest.items():
        least = min(largest.values())
        if size == 0:
            yield Finding("numbers", f"{line.key}, layer {layer}, expert {expert}: all weights are zero", {"layer": layer, "expert": expert})
        elif size > LOUD or size > APART * least > 0:
            what = f"{line.key}, layer {layer}, expert {expert}: the largest weight is {size:.3g}, elsewhere {least:.3g}; a scale is wrong or missing"
            yield Finding("numbers", what, {"layer": layer, "expert": expert, "largest": size})


# --- loaders ---------------------------------------------------------------------------------------------------------------------------


def _loaders(c: Checkpoint) -> Iterator[Finding]:
    for defect in DEFECTS:
        if defect.holds(c):
            yield Finding(f"misread by {defect.reader}", defect.what, {"reader": defect.reader})
    if wrong := list(ropes.otherwise(c)):
        told = " and ".join(f"takes {key} {found}, where the file says {meant}" for key, found, meant in wrong)
        what = f"it does not know rope_parameters, {told}, and computes other logits"
        yield Finding("misread by transformers 4.57", what, {"reader": "transformers 4.57", "takes": {key: found for key, found, _ in wrong}})


@dataclass(frozen=True)
class Defect:
    """A reader that takes such a folder wrongly, as measured with that release."""

    reader: str
    what: str
    holds: Callable[[Checkpoint], bool] = field(compare=False)


def _coded(c: Checkpoint, *names: str) -> bool:
    return any(line.encoding.name in names for line in c.format.stored)


def _square(c: Checkpoint) -> bool:
    return c.sizes["h"] in (c.sizes["i"], 2 * c.sizes["i"])


def _ragged(c: Checkpoint) -> bool:
    shapes = [(line.expert_shape(c.sizes), line.encoding) for line in c.format.stored]
    return any(isinstance(e, FP8) and all(e.block) and any(n % b for n, b in zip(shape[-2:], e.block, strict=True)) for shape, e in shapes)


def _across_rows(c: Checkpoint) -> bool:
    """Runs of 4-bit codes that go on in the next row, in rows of a length that a kernel for AVX512 takes."""
    widths = [(line.expert_shape(c.sizes)[-1], line.encoding) for line in c.format.stored]
    return any(isinstance(e, BNB4) and n % 16 == 0 and n % e.blocksize for n, e in widths)


def _stacked(c: Checkpoint) -> bool:
    return not any(line.per_expert for line in c.format.stored)


DEFECTS = (
    Defect(
        "transformers 4.57",
        "its modules have one matrix for each expert: it finds the stacked tensors unexpected, leaves the experts random and only warns",
        lambda c: c.format.reads == "transformers 5",
    ),
    Defect(
        "transformers 4.57",
        "it does not know num_local_experts in this family and takes its default number of experts",
        lambda c: (
            c.source.config.get("num_local_experts") is not None
            and c.format.family.sizes["e"][0] == "num_experts"
            and c.source.config.get("num_experts") is None
        ),
    ),
    Defect("transformers 4.57", "in float32 or float16 the forward of dequantized MXFP4 crashes; bfloat16 is right", lambda c: _native(c)),
    Defect(
        "transformers 5.5",
        "asked for float32 or float16 it leaves the experts bfloat16 without a word; its save_pretrained then loses them",
        lambda c: _native(c),
    ),
    Defect(
        "transformers 5.23",
        "save_pretrained after loading writes bfloat16 under the names of blocks, without scales; save_original_format=False is right",
        lambda c: _native(c),
    ),
    Defect(
        "transformers 5.5", "on a CPU it drops the FP8 scales: after .to(bfloat16) the experts are too large by their inverse", lambda c: _coded(c, "fp8-block")
    ),
    Defect(
        "transformers 5.23",
        "dequantizing FP8 with a ragged last block raises, or divides the scales over the wrong rows (192 rows: 10 % off, silently)",
        _ragged,
    ),
    Defect(
        "transformers 5.23",
        "on a CPU it decodes no stacked experts: it leaves FP8's scales aside, or the experts random, and only warns of unexpected tensors",
        lambda c: _stacked(c) and c.format.coding is not None and not _coded(c, "nf4", "fp4"),
    ),
    Defect(
        "transformers",
        "it knows FP8 with `weight_scale_inv` alone: it leaves these scales aside as unexpected tensors, or refuses; vLLM and `moeglot.load` read it",
        lambda c: c.format.coding is not None and c.format.coding.name == "autofp8",
    ),
    Defect(
        "transformers 5.23",
        "without amd-quark it refuses; with it, it decodes no experts: it takes FP8 codes for weights, or leaves the experts random, and warns of scales",
        lambda c: c.format.coding is not None and method(said(c.source.config)) == "quark",
    ),
    Defect(
        "transformers 5.23",
        "it dequantizes NVFP4 experts without their global scale, so that they are too large by it, without a word",
        lambda c: _coded(c, "nvfp4:compressed-tensors"),
    ),
    Defect(
        "transformers 5.23",
        "it refuses packed experts that are not quantized everywhere: it looks for codes in the layers that config.json leaves alone too",
        lambda c: bool(c.format.unlike) and any("packed" in line.names and line.names["packed"] != WEIGHT for line in c.format.stored),
    ),
    Defect("transformers 5.5", "it takes the packed bytes of 4-bit experts for weights", lambda c: _coded(c, "nf4", "fp4") and not _stacked(c)),
    Defect("transformers 5.23", "it refuses 4-bit experts that are stored one by one (size mismatch)", lambda c: _coded(c, "nf4", "fp4") and not _stacked(c)),
    Defect(
        "bitsandbytes 0.50",
        "on a CPU with AVX512 it decodes rows that are no whole number of blocks under the wrong scales, without a word",
        _across_rows,
    ),
    Defect(
        "transformers 5",
        "it decides by shape whether to transpose the stacked experts, and with H = I or H = 2 I takes them wrongly",
        lambda c: c.format.family.name == "qwen3-vl-moe" and _stacked(c) and _square(c),
    ),
)
"""Measured with transformers 4.57.6, 5.5.4 and 5.23.0 and bitsandbytes 0.50.2 on a CPU."""


def _native(c: Checkpoint) -> bool:
    return (
        c.format.family.name == "gpt-oss"
        and method(said(c.source.config)) == "mxfp4"
        and any(dtype not in WEIGHT_DTYPES for line in _matrices(c) for dtype in line.encoding.parts[0].dtypes)
    )
