"""One layer in every encoding on a device that is no CPU, by every backend, forward and backward: how far each is from the reference on the CPU, as JSON.

    python elsewhere_steps.py FOLDER [DEVICE]

Without a device, on one that only torch has (`elsewhere`), by the backends that need no GPU. A program, since autograd makes a thread for each device that is
there when a process first goes backward, and no later.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from elsewhere import two_devices
from synthetic import write_checkpoint

import moeglot
from moeglot.integrations.transformers_native import held_format, held_lines
from moeglot.kernels import backend as kernels
from moeglot.nn import Experts, add_lora

BACKENDS = ("auto", "eager", "grouped", "batched", "reference")
ENCODINGS = (
    "plain", "mxfp4", "mxfp8", "fp8-block", "fp8-channel", "fp8-tensor", "nvfp4", "nvfp4:compressed-tensors",
    "int4:32", "int4:channel", "int4:32:asymmetric", "int8-channel:asymmetric", "int8-pack:32", "nf4", "nf4:nested", "fp4",
)  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def adapted(base: moeglot.Checkpoint, encode: str) -> Experts:
    module = Experts.of(base, 0, lines=None if encode == "plain" else held_lines(base, held_format(base, encode)))
    torch.manual_seed(0)
    add_lora(module, 4, 8)
    for lora in module.adapters.values():
        torch.nn.init.normal_(lora.b)
    return module


def step(module: Experts, device: str, backend: str) -> list[torch.Tensor]:
    """The output; and that of a step that trains, with the gradients of tokens, routing weights and factors."""
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(9)])  # the third lives elsewhere
    hidden, weights = torch.randn(9, 64), torch.rand(9, 2)
    module, hidden, index, weights = deepcopy(module).to(device), hidden.to(device), index.to(device), weights.to(device)
    module.backend = backend
    with torch.no_grad():
        alone = module(hidden, index, weights)
    out = module(hidden.requires_grad_(), index, weights.requires_grad_())
    out.square().sum().backward()
    factors = [factor for lora in module.adapters.values() for factor in lora.parameters()]
    return [alone.cpu(), out.detach().cpu(), *(one.grad.cpu() for one in (hidden, weights, *factors))]


if __name__ == "__main__":
    folder, device, names = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None, BACKENDS
    if device:
        names += ("triton",)
    else:
        kernels.has_triton = lambda: False
        with two_devices():
            pass  # both are there before a step goes backward
    write_checkpoint(folder, "qwen3-moe/hub", {"h": 64, "i": 32, "e": 2}, dtype=torch.float32)
    base, found = moeglot.open(folder), {}
    for encode in ENCODINGS:
        module = adapted(base, encode)
        expected = step(module, "cpu", "reference")
        with nullcontext((device, "")) if device else two_devices() as (one, _):
            for name in names:
                found[f"{encode} {name}"] = max(relative(*both) for both in zip(step(module, one, name), expected, strict=True))
    print(json.dumps(found), flush=True)
    os._exit(0)  # the thread of a device that is none never ends
