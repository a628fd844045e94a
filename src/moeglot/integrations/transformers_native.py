"""Native loading: which modules of which releases `moeglot.nn.Experts` can stand in for, what each of them is asked, and how they are swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from moeglot.axes import written
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.codings import CODINGS
from moeglot.codings.coding import WEIGHT, leaves_alone, said
from moeglot.encoding import Encoding
from moeglot.encodings import by_name
from moeglot.encodings.plain import Plain
from moeglot.errors import UsageError
from moeglot.files.foreign import HELD
from moeglot.format import Format
from moeglot.formats import of_family
from moeglot.integrations import transformers_peft
from moeglot.integrations.transformers import READS, VERSION
from moeglot.integrations.transformers_state import Lazy, expert_names
from moeglot.layout import Stored
from moeglot.nn.module import Experts
from moeglot.planning.plan import Plan

INSTALLED = f"transformers {transformers.__version__}"
DECODED = "leave native out: moeglot.load then decodes the experts into the library's own modules"


class _Nothing(torch.Tensor):
    """Zeros of any shape in the memory of one, for what is about to be replaced; 4.57 asks for contiguous memory, and here there is none to give."""

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype) -> _Nothing:
        return torch.zeros((), dtype=dtype, device="cpu").expand(shape).as_subclass(cls)

    def contiguous(self, *_: Any, **__: Any) -> _Nothing:
        return self


class EachItsOwn(Experts):
    """Llama 4's block hands every expert its own copy of the tokens, weighted already: [e t, h] -> [e t, h].

    A token that was not routed to an expert is there as zeros, of which its experts make zeros, without a gradient: they are skipped.
    """

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        index = torch.arange(self.num_experts, device=flat.device, dtype=torch.int64).repeat_interleave(len(flat) // self.num_experts)
        index = torch.where(flat.any(-1), index, self.num_experts).unsqueeze(-1)
        found: torch.Tensor = super().forward(flat, index, torch.ones_like(index, dtype=flat.dtype))
        return found.view(hidden_states.shape)


class ScoresOfAll(Experts):
    """gpt-oss in transformers 4.57 hands the routing weights of all experts, [t, e], and gets its batch axis back."""

    def forward(self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(hidden_states, router_indices, routing_weights.gather(1, router_indices))
        return found


def kind_of(module: torch.nn.Module, name: str) -> type[Experts]:
    """The class that can take a module's place; raises `UsageError` where none can."""
    called = type(module).__name__
    if VERSION < (5, 0):
        if called == "GptOssExperts":
            return ScoresOfAll
        raise _refused(f"{name}: {called} of {INSTALLED} computes each expert by itself", "there, gpt-oss alone has one module for all experts")
    if called == "Llama4TextExperts":
        return EachItsOwn
    if getattr(module, "zero_expert_num", 0):
        raise _refused(f"{name}: some ids of {called} mean that a token stays as it is", "moeglot.nn.Experts skips ids that are no expert")
    if "top_k_index" in forward_names(module) or hasattr(module, "is_transposed"):
        return Experts
    raise _refused(f"{name}: {called} is asked in a way of its own", "known is forward(hidden_states, top_k_index, top_k_weights)")


def forward_names(module: torch.nn.Module) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(module.forward).parameters)


def _refused(what: str, known: str) -> UsageError:
    return UsageError(what, known, DECODED)


# --- what is held ----------------------------------------------------------------------------------------------------------------------


Lines = tuple[tuple[Stored, Encoding], ...]


def held_format(checkpoint: Checkpoint, encode: str) -> Format:
    """What holds this checkpoint's experts in an encoding; raises `UsageError` where they are quantized already, or would not be."""
    wanted, source = by_name(encode), checkpoint.format
    if isinstance(wanted, Plain):
        raise UsageError(
            f"encode={encode!r} is no quantization", "plain experts are held as they are on disk", "leave encode out, or pass 'mxfp4', 'fp8-block' or 'nf4'"
        )
    if not source.is_plain:
        raise UsageError(
            f"nothing to encode as {encode}: the experts are quantized already", checkpoint.known, "leave encode out; they are held as they are on disk"
        )
    form = format_of(source, wanted)
    for line in form.stored:
        _check_holdable(line, checkpoint, encode)
    return form


def _check_holdable(line: Stored, checkpoint: Checkpoint, encode: str) -> None:
    """Raises `UsageError` where a part has entries of several projections at once, and another is said of each projection by itself."""
    own = [part.name for part in line.encoding.parts if part.is_single and not (part.shared or part.joint)]
    if own and not line.movable(line.encoding, checkpoint.sizes):
        raise UsageError(
            f"{line.short} of {checkpoint.format.name} cannot be held as {encode}: what is packed would belong to {' and '.join(line.roles)} at once",
            f'it lies as "{line.axes}", its parts have blocks of several rows, and each of {" and ".join(line.roles)} has a {own[0]} of its own',
            f"choose another encoding, or moeglot convert --encode {encode} to a format with a tensor for each projection, and load that",
        )


def held_lines(checkpoint: Checkpoint, form: Format) -> Lines:
    """The lines of a format, and what holds each; vectors stay in the float type that they have on disk."""
    plain = checkpoint.experts(checkpoint.layers[0])
    return tuple((line, plain[line.roles[0]].encoding if line.is_plain else line.encoding) for line in form.stored)


def format_of(source: Format, wanted: Encoding) -> Format:
    """What holds a plain layout's experts in an encoding: a producer's format, if one stores them so; else his names on the upright matrices."""
    form = _producers(source, wanted) or _upright(source, wanted)
    return form.with_encodings(lambda line: line.encoding.like(wanted))


def _producers(source: Format, wanted: Encoding) -> Format | None:
    """The format that this layout has in the encoding, or that the family has at all; none if nobody stores it so."""
    forms = [form for form in of_family(source.family) if any(line.encoding.kind == wanted.kind for line in form.stored)]
    near = [form for form in forms if form.coding and form.layout == source.name] or [form for form in forms if not form.coding and not form.config.only]
    exact = [form for form in near if any(line.encoding.name == wanted.name for line in form.stored)]
    return next(iter(exact or near), None)


def _upright(source: Format, wanted: Encoding) -> Format:
    stacked = any(not line.per_expert or (line.is_matrix and not line.key.endswith(WEIGHT)) for line in source.stored)
    codings = [coding for coding in CODINGS if coding.encoding.kind == wanted.kind and (coding.stacked or not stacked)]
    coding = next((coding for coding in codings if coding.encoding.name == wanted.name), next(iter(codings), None))
    if coding is None:
        raise UsageError(f"{wanted} has no names for the tensors of {source.name}", source.about, "convert the checkpoint first, with moeglot convert --encode")
    return source.holding(tuple(replace(line, axes=upright_axes(line), shaped="") for line in source.stored)).coded(coding)


def upright_axes(line: Stored) -> str:
    """The axes of a line with its matrix turned to [out, in], where it is a matrix that lies the other way."""
    if line.upright or not line.is_matrix:
        return line.axes
    turned = line.expert_groups[::-1]
    return written(turned if line.per_expert else (("e",), *turned))


# --- loading ---------------------------------------------------------------------------------------------------------------------------


def hollow(chosen: Plan, state: dict[str, Lazy]) -> None:
    """In a state dict, put one number in place of each tensor of the experts: a view of their shapes that takes no memory."""
    for name, shape in expert_names(chosen).items():
        lazy = state[name]
        lazy.make = partial(_Nothing.of, shape, lazy.dtype)


def swap(checkpoint: Checkpoint, chosen: Plan, model: Any, encode: str | None, kept: Sequence[str], backend: str, experts: range | None = None) -> None:
    """Put `moeglot.nn.Experts` in place of every experts module; raises `UsageError` where that cannot be, or if `encode` finds nothing.

    `experts`: those of each layer that it holds, by default all.
    """
    form = checkpoint.format if encode is None else held_format(checkpoint, encode)
    lines = None if encode is None else held_lines(checkpoint, form)
    converted = 0
    for layer in checkpoint.layers:
        name = path_of(chosen, layer)
        old = model.get_submodule(name)
        mine = lines if not leaves_alone({"modules_to_not_convert": kept}, name) else None
        converted += mine is not None
        new = kind_of(old, name).of(checkpoint, layer, lines=mine, experts=experts, backend=backend)
        new.post_expert_norm = getattr(old, "post_expert_norm", None)
        new.form, new.beside = (form if mine else checkpoint.format).name, chosen.target.name
        new.declared = {} if mine else dict(said(checkpoint.source.config))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(old.training))
        if checkpoint.format.transformers not in READS or not _as_others_save(new, name):
            model.config.quantization_config = {HELD: f"experts in memory, in {new.form}; `moeglot.save` writes a checkpoint"}
    model._weight_conversions = []  # of the modules that are gone: save_pretrained undoes them, would rename adapters and turn what lies as on disk
    transformers_peft.follow(model)
    if encode and not converted:
        raise UsageError(
            f"encode={encode!r} converted nothing",
            f"modules_to_not_convert names all of {len(checkpoint.layers)} layers: {', '.join(kept)}",
            "name fewer modules",
        )


def _as_others_save(new: Experts, name: str) -> bool:
    """`save_pretrained` writes these experts as they lie in the checkpoint that they came from: plain, and in memory under its names."""
    names = zip(new.stored(), new.relative(), strict=True)
    return not new.is_encoded and all(key == f"{name}.{relative}" for (key, _), (relative, _) in names)


def path_of(chosen: Plan, layer: int) -> str:
    """The module that holds a layer's experts."""
    paths = {step.line.key.format(layer=layer).rpartition(".")[0] for step in chosen.steps if not step.line.per_expert}
    if len(paths) != 1:
        raise _refused(f"{INSTALLED} has no one module for the experts of {chosen.source.format.family.name}", f"its layout is {chosen.target.name}")
    return paths.pop()


def check(chosen: Plan, modules: Mapping[str, tuple[int, ...]], empty: torch.nn.Module, encode: str | None, kept: Sequence[str]) -> None:
    """Before anything is read: every layer has a module whose place can be taken, what is to be encoded has whole blocks, what is kept is there."""
    lines = () if encode is None else held_lines(chosen.source, held_format(chosen.source, encode))
    for line, part in [(line, part) for line, encoding in lines for part in encoding.parts]:
        line.part_shape(part, chosen.source.sizes)
    for name in kept:
        if not any(leaves_alone({"modules_to_not_convert": [name]}, module) for module, _ in empty.named_modules()):
            known = f"one of its modules is {path_of(chosen, chosen.source.layers[0])}; a name, a part of one between dots, or a pattern with * is meant"
            raise UsageError(f"modules_to_not_convert names {name}, and the model has no such module", known, "check the spelling")
    if any(modules.get(name) != shape for name, shape in expert_names(chosen).items()) and VERSION >= (5, 0):
        raise _refused(f"{INSTALLED} has no module in a layout of {chosen.source.format.family.name} that moeglot knows", chosen.source.known)
    for layer in chosen.source.layers[:1]:
        if VERSION < (5, 0) and any(step.line.per_expert for step in chosen.steps):
            raise _refused(
                f"{INSTALLED} computes each expert of {chosen.source.format.family.name} by itself", "there, gpt-oss alone has one module for all experts"
            )
        name = path_of(chosen, layer)
        kind_of(empty.get_submodule(name), name)
