"""What a target gets: which of its formats is meant, in which encoding each line is written, and what quantization_config then says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.config import declared_dtype
from moeglot.checkpoints.dense import DenseTensor
from moeglot.checkpoints.divided import divided
from moeglot.codings import CODINGS
from moeglot.codings.coding import BESIDE, WEIGHT, by_compressed_tensors, leaves_alone, said
from moeglot.codings.rules import AUTO_ROUND, method, sparing
from moeglot.codings.served import cache_scheme, is_static
from moeglot.dtypes import WEIGHT_DTYPES, by_torch_name
from moeglot.encoding import Encoding
from moeglot.encodings import NAMES
from moeglot.encodings import by_name as by_encoding_name
from moeglot.encodings.plain import Plain
from moeglot.errors import Contradiction, UsageError
from moeglot.factors import aliases
from moeglot.format import Format, holder
from moeglot.formats import by_name, of_family
from moeglot.layout import Stored
from moeglot.planning.left_alone import BY_HOLDER, experts_alone, fused
from moeglot.share import Share

CODING_NAMES = frozenset(coding.name for coding in CODINGS)


def encoding_named(name: str) -> Encoding:
    """`--encode NAME`; raises `UsageError`, which knows the names of variants, too."""
    known = name in CODING_NAMES and name.partition(":")[0] not in {one.partition(":")[0] for one in NAMES}
    if known:
        raise UsageError(
            f"{name!r} is a variant of a format, and no encoding",
            "an encoding says how numbers are coded, a variant also what the file calls their parts",
            f"pass --to FORMAT+{name}, such as qwen3-moe/hub+{name}, and leave --encode out",
        )
    return by_encoding_name(name)


def variant(target: Format, wanted: Encoding | None) -> Format:
    """The format that is meant by a plain one and an encoding that is not plain."""
    if wanted is None or isinstance(wanted, Plain) or not target.is_plain:
        return target
    coded = [form for form in of_family(target.family) if form.coding and form.layout == target.name and form.coding.encoding.kind == wanted.kind]
    coded = [form for form in coded if form.coding and not form.coding.spelled]
    named = [form for form in coded if form.coding and form.coding.name == wanted.name]
    coded = named or [form for form in coded if form.coding and form.coding.encoding.name == wanted.name] or coded
    if len(coded) > 1:
        names = ", ".join(form.name for form in coded)
        raise UsageError(f"{target.name} stores {wanted.name} in {len(coded)} ways", f"known: {names}", f"pass --to {coded[0].name}, or another of these")
    return coded[0] if coded else target


def own(form: Format, wanted: Encoding | None) -> Format:
    """The layout that a checkpoint has, for its own encoding or for another; raises `UsageError` if it has none for that."""
    if wanted is None:
        return by_name(form.name)  # what this file left open is open again
    layout = next((other for other in of_family(form.family) if other.name == form.layout), form)
    found = variant(layout, wanted)
    if found.is_plain == isinstance(wanted, Plain):
        return found
    able = [variant(other, wanted) for other in of_family(form.family) if not other.coding and other.alone == form.alone and other.is_plain]
    able = [other for other in able if other.is_plain == isinstance(wanted, Plain)]
    able = [other for other in able if other.transformers] or able
    if len(able) != 1:
        names = ", ".join(other.name for other in able) or "none"
        raise UsageError(f"{form.name} cannot hold {wanted}", f"formats of {form.family.name} that can: {names}", "pass --to with one of these")
    return able[0]


def short_of(source: Checkpoint, target: Format) -> int:
    """For how many experts without numbers transformers' modules have rows of gate and up, too, where the target stacks those that have some."""
    return 0 if all(line.per_expert for line in target.stored) else target.family.idle_experts(source.config)


def refuse_short(source: Checkpoint, target: Format) -> None:
    """Raises `UsageError` for stacked experts that transformers would load no fewer of."""
    if idle := short_of(source, target):
        known = (
            f"config.json says {target.family.idle} = {idle}; the experts module of transformers 5 has rows for these, too, which no file has and nothing reads"
        )
        able = [form.name for form in of_family(target.family) if form.is_plain and not short_of(source, form)]
        do = f"pass --to {able[0]}, which moeglot.load and transformers 4.57 read"
        raise UsageError(f"transformers would not load {target.name} of this model", known, do)


def shared(source: Checkpoint, target: Format, share: Share | None) -> Checkpoint:
    """The source, or what of it the share that is asked for holds; raises `UsageError` where the target is for whole models, or has no such file."""
    if not (mine := share or source.share):
        return source
    if not target.by_rank and share and share.words and share.is_whole:
        fills = "; Megatron-Core fills up what its own model has more" if target.container else ""
        known = f"it has as many rows as config.json says{fills}; the state dict of a process is padded"
        raise UsageError(f"{target.name} with --padded-vocab-size {share.words}", known, "leave --padded-vocab-size out")
    if not target.by_rank:
        names = ", ".join(form.name for form in of_family(target.family) if form.by_rank) or f"none of {target.family.name}'s formats"
        wrong = f"{target.name} with what {share} holds alone" if share else f"{source.source.name} has what {source.share} holds alone"
        whole = "every process reads its own part from one torch_dist checkpoint" if target.container else f"readers of {target.name} want the whole model"
        do = "leave the ranks and sizes out" if share else "pass the folder that holds the folders of all ranks, or the whole model that it comes from"
        raise UsageError(wrong, f"{whole}; a process has a state dict of its own in: {names}", f"{do}, or pass --to with one of those that are named here")
    return divided(source, mine, target)


def arranged(source: Checkpoint, target: Format) -> Format:
    """The target with what a quantized source leaves alone left alone too, layer by layer, where the target's config can say so."""
    target = target.sized(source.sizes)
    if not (target.coding and target.coding.kept and source.format.coding):
        return target
    plain, unlike = by_name(target.layout).sized(source.sizes).stored, {}
    for layer in source.format.unlike:
        roles = {role for line in source.format.lines(layer) if line.is_plain for role in line.roles}
        lines = tuple(other if roles >= set(line.roles) else line for line, other in zip(target.stored, plain, strict=True))
        if any(line.is_plain != other.is_plain for line, other in zip(lines, target.stored, strict=True)):
            unlike[layer] = lines
    return replace(target, unlike=unlike)


def keeping(source: Checkpoint, target: Format, touched: Callable[[Stored, int], bool]) -> Format:
    """The target with the lines of experts that are `touched` in a layer left in floats, the plain layout if that is all of them; raises `UsageError` if
    its config cannot say so.
    """
    if not (target.coding and target.coding.kept):
        able = [form.name for form in of_family(target.family) if form.coding and form.coding.kept]
        do = f"pass --to {able[0]}, for example" if able else "leave --keep-touched out, or pass --encode bf16"
        raise UsageError(f"{target.name} cannot leave some experts in floats", "its config.json has no list of modules that are not quantized", do)
    plain = by_name(target.layout).sized(source.sizes).stored
    unlike = dict(target.unlike)
    for layer in source.layers:
        lines = tuple(other if touched(line, layer) else line for line, other in zip(target.lines(layer), plain, strict=True))
        if lines != target.stored:
            unlike[layer] = lines
    if all(line.is_plain for layer in source.layers for line in unlike.get(layer, target.stored)):
        return by_name(target.layout).sized(source.sizes)
    return replace(target, unlike=unlike)


def quantization(source: Checkpoint, target: Format, dense: Mapping[str, tuple[DenseTensor, ...]], stays: bool) -> dict[str, Any]:
    """quantization_config of the output: the source's own if the quantization `stays`, else as the target's producer writes it."""
    if not target.coding:
        return {"quantization_config": _sparing(source, target, dict(said(source.source.config)), dense)} if stays else {}
    declared = dict(said(source.source.config))
    reader = method(declared) if stays else producer(target)
    experts = experts_alone(source, target, reader)
    if stays:
        if unsaid := [module for module in experts if not leaves_alone(declared, module)]:
            declared = sparing(declared, target.coding.kept, unsaid)
        return {"quantization_config": declared, **{key: declared[key] for key in BESIDE if key in source.source.config}}
    matrices = [(key, parts[0].name) for key, parts in dense.items() if key.endswith(WEIGHT) and len(parts[0].shape) == 2]
    named = {name: None for key, hub in matrices for name in (key, *aliases(hub, target.family)[1:])}  # readers look for modules, some by disk names
    others = [name.removesuffix(WEIGHT) for name in named]
    kept = [*experts, *others, *fused(others, reader)]
    encoding = next(line.encoding for layer in source.layers for line in target.lines(layer) if not line.is_plain)
    scheme = cache_scheme(declared, reader)
    return {"quantization_config": {**target.coding.write(encoding, kept), **({"kv_cache_scheme": scheme} if scheme else {})}}


def producer(target: Format) -> str:
    """For which library its quantization_config is, "" where it has none of ours."""
    return str(target.coding.write(target.coding.encoding, ())["quant_method"]) if target.coding else ""


def rounds_inputs(source: Checkpoint, target: Format) -> bool:
    """What its encodings carry, a scale of activations, means in the target what it means in the source: there or here, nothing else is declared."""
    mine, theirs, declared = source.format.coding, target.coding, said(source.source.config)
    if not (mine and theirs) or mine.name == theirs.name:
        return bool(mine and theirs)
    coded = [(line, layer) for layer in source.layers for line in source.format.lines(layer) if not line.is_plain]
    return theirs.inputs and all(source.encoding(line, layer).carried and is_static(declared, line.module(layer)) for line, layer in coded)


def _sparing(source: Checkpoint, target: Format, declared: dict[str, Any], dense: Mapping[str, tuple[DenseTensor, ...]]) -> dict[str, Any]:
    """quantization_config that leaves the target's plain experts alone where each is a module: of stacked ones it need not speak."""
    lines = {layer: [line for line in target.lines(layer) if line.per_expert] for layer in source.layers}
    told = [line.module(layer, expert) for layer, each in lines.items() for line in each for expert in range(source.sizes["e"])]
    if all(leaves_alone(declared, module) for module in told):
        return declared
    stems = sorted({holder(line, layer) for layer, each in lines.items() for line in each})
    if by_compressed_tensors(declared):
        key, names = "ignore", [f"re:{re.escape(stem)}\\..*" for stem in stems]
    elif method(declared) == "modelopt":
        key, names = "ignore", [f"{stem}.*" for stem in stems]
    elif method(declared) in ("gptq", *AUTO_ROUND):
        return sparing(declared, "", stems if method(declared) in BY_HOLDER else told)
    else:
        key, names = "llm_int8_skip_modules" if method(declared) == "bitsandbytes" else "modules_to_not_convert", stems
        if not declared.get(key):  # a list that is there is all that is left alone, the output layer among it
            names += [
                name.removesuffix(WEIGHT)
                for name, (part, *_) in dense.items()
                if name.endswith(WEIGHT) and part.dtype in WEIGHT_DTYPES and len(part.shape) == 2
            ]
    return sparing(declared, key, names)


def keeps(source: Checkpoint, target: Format, wanted: Encoding | None) -> bool:
    """The quantization stays as it is, so that matrices that are no experts stay quantized too."""
    mine, theirs = source.format.coding, target.coding
    if not mine and not theirs and source.format.is_plain and target.is_plain:
        if isinstance(wanted, Plain) or target.closed or target.config.only:
            return False  # a float type was asked for, or the target has names for floats alone
        return bool(said(source.source.config))  # of what is no expert, whether we can read it or not
    declared = bool(said(source.source.config))  # a live model may declare nothing: what is no expert is decoded in it
    return bool(mine and theirs and declared and mine.name == theirs.name and _kinds(source.format, source) >= _kinds(target, source))


def _kinds(form: Format, source: Checkpoint) -> set[tuple[object, ...]]:
    """How its quantized roles are coded: their encoding, and the types of its parts; not how long a text among them is."""
    coded = {(role, line.encoding) for layer in source.layers for line in form.lines(layer) if not line.is_plain for role in line.roles}
    return {(role, encoding.name, *((part.name, part.dtypes) for part in encoding.parts)) for role, encoding in coded}


def encoding_of(source: Checkpoint, target: Format, line: Stored, sources: tuple[Encoding, ...], wanted: Encoding | None) -> Encoding:
    if not line.is_matrix:
        return widest(line, sources)
    if not line.is_plain:
        if wanted and wanted.kind != line.encoding.kind:
            raise cannot_hold(target, line.encoding, wanted)
        found = line.encoding.like(wanted) if wanted else line.encoding
        mine, theirs = source.format.coding, target.coding
        same = mine is not None and theirs is not None and mine.name == theirs.name  # its own blocks, too, whatever a new file would get
        lent = {line.encoding.like(encoding) if same else encoding.lent(line.encoding) for encoding in sources}
        return lent.pop() if len(lent) == 1 and not wanted else found
    if isinstance(wanted, Plain):
        return wanted
    if wanted and not target.coding:
        raise cannot_hold(target, line.encoding, wanted)
    if all(isinstance(encoding, Plain) for encoding in sources):
        return widest(line, sources)
    return Plain(float_type(source))


def float_type(source: Checkpoint) -> str:
    """The float type to decode to, as config.json names it."""
    named = by_torch_name(declared_dtype(source.config) or "bfloat16").name
    return named if named in WEIGHT_DTYPES else "BF16"


def dtype_note(source: Checkpoint, floats: set[str]) -> dict[str, str]:
    """The float type that config.json declares, if the experts' changed; `floats`: in which they are written."""
    before = declared_dtype(source.config)
    if len(floats) != 1 or before in floats:
        return {}
    if before == "float32" and any(tensor.dtype == "F32" and len(tensor.shape) == 2 for tensor in source.dense.values()):
        return {}  # matrices that are no experts stay float32, and who loads the model would round them
    return {"dtype" if "dtype" in source.config else "torch_dtype": min(floats)}


def widest(line: Stored, sources: tuple[Encoding, ...]) -> Encoding:
    """The one of the sources' float types that holds them all."""
    for candidate in sources:
        if all(source.fits_in(candidate) for source in sources):
            return candidate
    names = " and ".join(sorted({source.name for source in sources}))
    raise Contradiction(f"{line.key}: its roles come as {names}", "one tensor has one dtype, and neither holds the other", "pass --encode float32")


def in_floats(target: Format) -> list[str]:
    """The layouts with matrices in floats that stand for a quantized format: its own, or those that most software reads, or all."""
    forms = [form for form in of_family(target.family) if form.is_plain and not form.asked and form.alone == target.alone]
    own = [form for form in forms if form.name == target.layout]
    return [form.name for form in own or [form for form in forms if form.transformers] or forms]


def _codes(form: Format, wanted: Encoding) -> bool:
    return not (form.coding and form.coding.spelled) and any(line.encoding.name == wanted.name for line in form.stored)


def cannot_hold(target: Format, has: Encoding, wanted: Encoding) -> UsageError:
    able = in_floats(target) if isinstance(wanted, Plain) else [form.name for form in of_family(target.family) if _codes(form, wanted)]
    do = f"pass --to {' or '.join(able)}" if able else f"leave --encode out; no format of {target.family.name} that we know holds {wanted.name}"
    return UsageError(
        f"{target.name} cannot hold {wanted}", f"it stores experts as {'any float type' if isinstance(has, Plain) else has.name} ({target.source})", do
    )


def twin(source: Checkpoint, line: Stored, layer: int, encoding: Encoding) -> Stored | None:
    for mine in (source.line(one, layer) for one in source.format.stored):
        alike = mine.per_expert == line.per_expert or not encoding.is_joint
        if mine.roles == line.roles and mine.expert_groups == line.expert_groups and alike:
            here = source.encoding(mine, layer)
            if here.name == encoding.name and {part.name for part in here.parts} >= {part.name for part in encoding.parts} and here.recodes(encoding):
                return mine
    return None
