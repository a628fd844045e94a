"""Which readers take which folders wrongly, each as measured with that release."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.codings.coding import WEIGHT, said
from moeglot.codings.rules import method
from moeglot.dtypes import WEIGHT_DTYPES
from moeglot.encoding import Encoding
from moeglot.encodings.bnb4 import BNB4
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.int4 import INT4
from moeglot.encodings.int8 import INT8
from moeglot.family import dig


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


def _has_zero_points(encoding: Encoding) -> bool:
    return (isinstance(encoding, INT8) and not (encoding.symmetric or encoding.zeros)) or (isinstance(encoding, INT4) and encoding.zero)


def _in_bytes(encoding: Encoding) -> bool:
    """As compressed-tensors has INT8, not Quark."""
    return isinstance(encoding, INT8) and encoding.container == "bytes" and not encoding.zeros


def _stacked(c: Checkpoint) -> bool:
    return not any(line.per_expert for line in c.format.stored)


DEFECTS = (
    Defect(
        "transformers 4.57",
        "its modules have one matrix for each expert: it finds the stacked tensors unexpected, leaves the experts random and only warns",
        lambda c: c.format.transformers == "5" and _stacked(c),
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
        "transformers 5.5",
        "it and 4.57 compute with alpha 1.702 and limit 7 whatever config.json says, without a word; `moeglot.load` refuses it there, but for native=True",
        lambda c: (
            c.format.family.name == "gpt-oss" and any(dig(c.config, key) not in (None, usual) for key, usual in c.format.family.activation.numbers.values())
        ),
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
    Defect(
        "transformers 5.23",
        "it refuses INT4 and INT8 experts with zero points: compressed-tensors' modules for experts have none",
        lambda c: any(_has_zero_points(line.encoding) for line in c.format.stored),
    ),
    Defect(
        "transformers 5.23",
        "it refuses experts whose INT8 numbers are a byte each (int-quantized): of whole numbers it decodes packed ones; `moeglot.load` reads it",
        lambda c: not _stacked(c) and any(_in_bytes(line.encoding) for line in c.format.stored),
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
    Defect(
        "transformers 5.24",
        "its modules name attention's matrices otherwise than 5.23's, which wrote these: it leaves attention random and only warns",
        lambda c: c.format.name in ("inkling2/transformers-5", "inkling2-text/transformers-5"),
    ),
    Defect(
        "transformers 5.24",
        "a forward of Llama4ForConditionalGeneration raises AttributeError (image_outputs); Llama4ForCausalLM runs",
        lambda c: "Llama4ForConditionalGeneration" in (c.source.config.get("architectures") or ()),
    ),
)
"""Measured with transformers 4.57.6, 5.5.4, 5.23.0 and 5.24.0 and bitsandbytes 0.50.2 on a CPU."""


def _native(c: Checkpoint) -> bool:
    return (
        c.format.family.name == "gpt-oss"
        and method(said(c.source.config)) == "mxfp4"
        and any(dtype not in WEIGHT_DTYPES for line in c.format.stored if line.is_matrix for dtype in line.encoding.parts[0].dtypes)
    )
