"""Adapters as each writer documents them: random tensors by his own layout, and the change that his formula gives, in float64; no code of ours.

Sources are those of the conventions in `src/moeglot/conventions.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Changes = dict[tuple[int, str, int], torch.Tensor]
"""(layer, role, expert) -> [out, in]."""
PREFIX = "base_model.model."
PATHS = {
    "gpt-oss": "model.layers.{layer}.mlp.experts",
    "qwen3-moe": "model.layers.{layer}.mlp.experts",
    "mixtral": "model.layers.{layer}.mlp.experts",
}


@dataclass
class Adapter:
    """What lies in the folder, and what it changes."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    changes: Changes = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        save_file({key: tensor.float().contiguous() for key, tensor in self.tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder


@dataclass
class Job:
    """The base, and what to make for it."""

    family: str
    e: int
    h: int
    i: int
    rank: int
    alpha: float = 6.0
    layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def number(self, *shape: int) -> torch.Tensor:
        """Numbers that float32 holds, so that saving them changes nothing."""
        return (torch.randn(shape, generator=self.random) / 4).double()

    def path(self, layer: int) -> str:
        return PREFIX + PATHS[self.family].format(layer=layer)

    def cut(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up from rows of both: they alternate in gpt-oss, and lie one after the other elsewhere."""
        return (both[0::2], both[1::2]) if self.family == "gpt-oss" else (both[: self.i], both[self.i :])

    def config(self, **more: Any) -> dict[str, Any]:
        return {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "target_modules": [], **more}


def _record(job: Job, made: Adapter, layer: int, which: str, expert: int, change: torch.Tensor) -> None:
    if which == "down":
        made.changes[layer, "down", expert] = change
    else:
        made.changes[layer, "gate", expert], made.changes[layer, "up", expert] = job.cut(change)


def _sides(job: Job) -> Iterator[tuple[str, str, int, int]]:
    """(which, wrapper, in, out): gate_up is wrapped first."""
    yield "gate_up", ".base_layer", job.h, 2 * job.i
    yield "down", "", job.i, job.h


def _wrapped(packing: str, turned: bool) -> Callable[[Job], Adapter]:
    def make(job: Job) -> Adapter:
        made = Adapter(config=job.config(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
        for layer in range(job.layers):
            for which, wrapper, n_in, n_out in _sides(job):
                rows, columns = (n_out, n_in) if turned else (n_in, n_out)
                a, b = job.number(job.rank * job.e, rows), job.number(columns, job.rank * job.e)
                made.tensors[f"{job.path(layer)}{wrapper}.lora_A.weight"], made.tensors[f"{job.path(layer)}{wrapper}.lora_B.weight"] = a, b
                for e in range(job.e):
                    a_e = a.view(job.e, job.rank, rows)[e]
                    b_e = b.view(columns, job.rank, job.e)[:, :, e] if packing == "rank_major" else b.view(columns, job.e, job.rank)[:, e]
                    change = job.scale * (b_e @ a_e)
                    _record(job, made, layer, which, e, change.T if turned else change)
        return made

    return make


def megatron_bridge(job: Job) -> Adapter:
    """The A slot is the experts' B, transposed, one after the other, and the B slot their A; full names, no peft_version."""
    made = Adapter()
    for layer in range(job.layers):
        for which, wrapper, n_in, n_out in _sides(job):
            b = [job.number(n_out, job.rank) for _ in range(job.e)]
            a = [job.number(job.rank, n_in) for _ in range(job.e)]
            made.tensors[f"{job.path(layer)}{wrapper}.lora_A.weight"] = torch.cat([b_e.T for b_e in b])
            made.tensors[f"{job.path(layer)}{wrapper}.lora_B.weight"] = torch.cat([a_e.T for a_e in a], dim=1)
            for e in range(job.e):
                _record(job, made, layer, which, e, job.scale * (b[e] @ a[e]))
    names = [f"{job.path(layer).removeprefix(PREFIX)}.{name}" for layer in range(job.layers) for name in ("gate_up_proj", "down_proj")]
    made.config = job.config(target_parameters=names)
    return made


def _per_expert(names: Mapping[str, str], path: str, one_right: bool = False) -> Callable[[Job], Adapter]:
    """One Linear an expert and role: B A. `one_right`: gate and up have the same A."""

    def make(job: Job) -> Adapter:
        made = Adapter(config=job.config(target_modules=sorted(names.values())))
        for layer in range(job.layers):
            for e in range(job.e):
                shared = job.number(job.rank, job.h)
                for role, name in names.items():
                    n_out, n_in = (job.h, job.i) if role == "down" else (job.i, job.h)
                    b, a = job.number(n_out, job.rank), shared if one_right and role != "down" else job.number(job.rank, n_in)
                    stem = f"{PREFIX}{path.format(layer=layer)}.{e}.{name}"
                    made.tensors[f"{stem}.lora_A.weight"], made.tensors[f"{stem}.lora_B.weight"] = a.clone(), b
                    made.changes[layer, role, e] = job.scale * (b @ a)
        return made

    return make


def unsloth_bnb(job: Job) -> Adapter:
    """One Linear an expert for gate and up together, its rows alternating."""
    made = Adapter(config=job.config(target_modules=["gate_up_projs", "down_projs"]))
    for layer in range(job.layers):
        for e in range(job.e):
            for which, _, n_in, n_out in _sides(job):
                b, a = job.number(n_out, job.rank), job.number(job.rank, n_in)
                stem = f"{job.path(layer)}.{which}_projs.{e}"
                made.tensors[f"{stem}.lora_A.weight"], made.tensors[f"{stem}.lora_B.weight"] = a, b
                _record(job, made, layer, which, e, job.scale * (b @ a))
    made.config["target_modules"] = "model\\.layers\\.\\d+\\.mlp\\.experts\\.(gate_up|down)_projs\\.\\d+"
    return made


def _three(names: Mapping[str, str], shared: str = "") -> Callable[[Job], Adapter]:
    """A [e, r, in] and B [e, out, r] for each role. `shared`: "outer" has one A for gate and up and one B for down, as SGLang serves them."""

    def make(job: Job) -> Adapter:
        made = Adapter(config=job.config(target_modules=sorted(names.values())))
        for layer in range(job.layers):
            for role, name in names.items():
                n_out, n_in = (job.h, job.i) if role == "down" else (job.i, job.h)
                a = job.number(1 if shared and role != "down" else job.e, job.rank, n_in)
                b = job.number(1 if shared and role == "down" else job.e, n_out, job.rank)
                made.tensors[f"{job.path(layer)}.{name}.lora_A.weight"], made.tensors[f"{job.path(layer)}.{name}.lora_B.weight"] = a, b
                for e in range(job.e):
                    made.changes[layer, role, e] = job.scale * (b[min(e, len(b) - 1)] @ a[min(e, len(a) - 1)])
        return made

    return make


def automodel(job: Job) -> Adapter:
    """A [e, in, r], B [e, r, out], x A B; gate is the first half. The experts' rank is another than the config's."""
    made = Adapter(config=job.config(r=4 * job.rank, target_modules=[]))
    for layer in range(job.layers):
        for which, leaf, n_in, n_out in (("gate_up", "gate_and_up", job.h, 2 * job.i), ("down", "down", job.i, job.h)):
            a, b = job.number(job.e, n_in, job.rank), job.number(job.e, job.rank, n_out)
            made.tensors[f"{job.path(layer)}.lora_{leaf}_A"], made.tensors[f"{job.path(layer)}.lora_{leaf}_B"] = a, b
            for e in range(job.e):
                change = job.scale * (a[e] @ b[e]).T
                if which == "down":
                    made.changes[layer, "down", e] = change
                else:
                    made.changes[layer, "gate", e], made.changes[layer, "up", e] = change[: job.i], change[job.i :]
    return made


HUB = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
MOE, SPARSE = "model.layers.{layer}.mlp.experts", "model.layers.{layer}.block_sparse_moe.experts"
ALL, QWEN = ("gpt-oss", "qwen3-moe", "mixtral"), ("qwen3-moe",)

WRITERS: dict[str, tuple[str, tuple[str, ...], Callable[[Job], Adapter]]] = {
    "PEFT": ("peft", ALL, _wrapped("rank_major", False)),
    "PEFT 0.18 on [e, out, in]": ("peft-turned", ALL, _wrapped("rank_major", True)),
    "unsloth_zoo before 2026.9.6": ("grouped", ALL, _wrapped("grouped", False)),
    "unsloth_zoo with PEFT 0.18": ("grouped-turned", ALL, _wrapped("grouped", True)),
    "Megatron-Bridge": ("grouped-turned", ALL, megatron_bridge),
    "vLLM's keys": ("per-expert", QWEN, _per_expert(HUB, MOE)),
    "vLLM's keys, Mixtral": ("per-expert", ("mixtral",), _per_expert(MIXTRAL, SPARSE)),
    "ms-swift": ("per-expert", QWEN, _per_expert(HUB, MOE, one_right=True)),
    "unsloth 4-bit gpt-oss": ("unsloth-bnb", ("gpt-oss",), unsloth_bnb),
    "tinker": ("tinker", ALL, _three(MIXTRAL)),
    "tinker, shared": ("tinker", ALL, _three(MIXTRAL, "outer")),
    "SGLang": ("sglang", ALL, _three(HUB)),
    "SGLang, shared outer": ("sglang", ALL, _three(HUB, "outer")),
    "Automodel": ("automodel", ("qwen3-moe", "mixtral"), automodel),
}
"""Writer -> (the convention that he writes, for which families, how)."""
