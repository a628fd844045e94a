"""A state dict that decodes itself: tensors under transformers' names, each made from the checkpoint's bytes when it is asked for and not before.

What `from_pretrained(None, config=..., state_dict=...)` asks of a tensor is what it asks of a safetensors slice: a shape, a dtype, `to`, and an index
(https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/core_model_loading.py, `spawn_materialize`; the same in 4.57 and 5.5).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.dense import DecodedTensor, DenseTensor
from moeglot.dtypes import DTYPES, WEIGHT_DTYPES, DType
from moeglot.encoded import Encoded
from moeglot.encodings.plain import Plain
from moeglot.errors import BadNumbers, MoeglotError
from moeglot.floats import values
from moeglot.formats import of_family
from moeglot.planning.plan import Plan
from moeglot.planning.steps import Step


@dataclass(eq=False)
class Lazy:
    """A tensor that is made when it is indexed. `reads`: how often that was; `refusal`: why it could not be made, which the caller may swallow."""

    name: str
    shape: torch.Size
    stored: DType
    make: Callable[[], torch.Tensor] = field(repr=False)
    some: Callable[[range], torch.Tensor] | None = field(default=None, repr=False)
    """Makes only these entries of the first axis, where each comes from bytes of its own."""
    reads: int = 0
    refusal: MoeglotError | None = None

    device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.torch

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """As in a safetensors header: `"BF16"`."""
        return self.stored.name

    def to(self, *args: Any, **kwargs: Any) -> Lazy:
        """Itself: whoever indexes it moves and casts what comes out."""
        return self

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            self.reads += 1
            first, *others = index if isinstance(index, tuple) else (index,)
            if self.some and isinstance(first, slice):
                whole = (slice(None), *others)
                return self.some(range(self.shape[0])[first])[whole]
            return self.make()[index]
        except MoeglotError as error:
            self.refusal = error
            raise


def state_dict(plan: Plan, dtype: DType) -> dict[str, Lazy]:
    """Every tensor of a plan's target by name: experts in `dtype`, the others in the type that they are stored in, or `dtype` if they are quantized."""
    experts = {lazy.name: lazy for step in plan.steps for lazy in _experts(plan.source, step, dtype)}
    return experts | {name: _others(name, parts, dtype) for name, parts in plan.dense.items()}


def expert_names(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the experts."""
    sizes = plan.source.sizes
    return {
        step.line.keys(step.layer, expert)["value"]: step.line.expert_shape(sizes) if step.line.per_expert else step.line.shape(sizes)
        for step in plan.steps
        for expert in (range(sizes["e"]) if step.line.per_expert else (None,))
    }


def _experts(source: Checkpoint, step: Step, dtype: DType) -> list[Lazy]:
    line, sizes = step.line, source.sizes
    if line.per_expert:
        shape = torch.Size(line.expert_shape(sizes))
        return [Lazy(line.keys(step.layer, expert)["value"], shape, dtype, partial(_slice, source, step, expert, dtype)) for expert in range(sizes["e"])]
    some = partial(_stacked, source, step, dtype)
    return [Lazy(line.keys(step.layer)["value"], torch.Size(line.shape(sizes)), dtype, lambda: some(range(sizes["e"])), some)]


def idle_rows(plan: Plan, modules: Mapping[str, tuple[int, ...]], dtype: DType) -> dict[str, Lazy]:
    """Name -> zeros, for experts without numbers of which the live modules hold some matrices all the same, which nothing reads. `modules`: name -> shape."""
    family, sizes = plan.target.family, plan.source.sizes
    idle = range(sizes["e"], sizes["e"] + family.idle_experts(plan.source.config))
    stacked = [line for form in of_family(family) if form.is_plain for line in form.stored if not line.per_expert and idle]
    lines = [(line, modules.get(line.keys(layer)["value"], (0,))[0]) for line in stacked for layer in plan.source.layers]
    held = {role for line, rows in lines if rows == idle.stop for role in line.roles}
    found = {}
    for step in plan.steps:
        shape = step.line.expert_shape(sizes)
        for name in [step.line.keys(step.layer, expert)["value"] for expert in idle if held >= set(step.line.roles)]:
            found[name] = Lazy(name, torch.Size(shape), dtype, partial(torch.zeros, shape, dtype=dtype.torch, device="cpu"))
    return found


def _slice(source: Checkpoint, step: Step, expert: int, dtype: DType) -> torch.Tensor:
    """One expert's slice in the target's axes; each stored tensor that it comes from is read and decoded once."""
    roles: dict[str, Encoded] = {}
    for line in source.format.stored:
        if set(line.roles) & set(step.line.roles):
            roles |= source.expert(line, step.layer, expert)
    found = step.line.join(lambda role: values(roles[role].decode(dtype.torch))).parts["value"]
    if Plain(dtype.name).check({"value": found}):
        raise BadNumbers(
            f"{step.line.keys(step.layer, expert)['value']}, expert {expert}: holds numbers that {dtype.torch_name} cannot",
            source.known,
            "load it in bfloat16 or float32",
        )
    return found


def _stacked(source: Checkpoint, step: Step, dtype: DType, experts: range) -> torch.Tensor:
    """The tensor of these experts, filled one at a time; no others are read."""
    line, sizes = step.line, {**source.sizes, "e": len(experts)}
    whole = torch.empty(line.shape(sizes), dtype=dtype.torch, device="cpu")
    each = whole.view(len(experts), *line.expert_shape(sizes))
    for place, expert in zip(each, experts, strict=True):
        place.copy_(_slice(source, step, expert, dtype))
    if line.is_matrix and not bool(whole.any()):
        raise BadNumbers(
            f"{line.keys(step.layer)['value']}: every number of every expert is zero",
            f"layer {step.layer} of {source.source.name}: that is a placeholder, not a weight",
            "fetch the files again from their producer, or save the model again",
        )
    give_back()
    return whole


def give_back() -> None:
    """Have glibc give what decoding freed back to the system: each of the loader's threads has a heap of its own, which would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def _others(name: str, parts: tuple[DenseTensor, ...], dtype: DType) -> Lazy:
    rows = sum(part.shape[0] for part in parts) if len(parts) > 1 else 0
    shape = (rows, *parts[0].shape[1:]) if rows else parts[0].shape

    def make() -> torch.Tensor:
        """A tensor of its own: nothing in a model may hang on a mapped file."""
        found = [part.read() for part in parts]
        whole = torch.cat(found) if len(found) > 1 else found[0] if isinstance(parts[0], DecodedTensor) else found[0].clone()
        if whole.ndim and parts[0].dtype in WEIGHT_DTYPES and (problem := Plain(parts[0].dtype).check({"value": whole})):
            raise BadNumbers(f"{name}: {problem}", f"it is stored as {parts[0].origin}", "fetch the file again from its producer")
        if dtype.torch == torch.float16 and parts[0].dtype in WEIGHT_DTYPES and Plain(dtype.name).check({"value": whole.to(dtype.torch)}):
            raise BadNumbers(f"{name}: holds numbers that float16 cannot", f"it is stored as {parts[0].origin}", "load it in bfloat16 or float32")
        return whole

    return Lazy(name, torch.Size(shape), DTYPES[parts[0].dtype], make)


def refusal(state: Mapping[str, Lazy]) -> MoeglotError | None:
    """The first refusal of a tensor to be made."""
    return next((lazy.refusal for lazy in state.values() if lazy.refusal), None)
