"""Expert parallelism of live models: whether it is there, how transformers' own strategies bring ours their tokens, and the proof that a model is divided.

https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/distributed/expert_parallel.py: an experts module holds `num_experts` experts, stacked
on the first axis; `forward(hidden, top_k_index, top_k_weights)` is asked with local ids, and skips the id `num_experts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import distributed

from moeglot.errors import NotVerified, UsageError
from moeglot.integrations.transformers import VERSION
from moeglot.nn.module import Experts
from moeglot.share import Rank

FIRST = (5, 23)
MEASURED = {
    (5, 0): "there, a gpt-oss whose experts are divided computes something else, without an error (cosine .74 with the whole model, in 5.5.4)",
    (0, 0): "there, every process holds all experts, whatever it is asked for, without an error (measured in 4.57.6)",
}
"""From which release on -> what its own expert parallelism does."""


def share_of(rank: int | None, size: int) -> Rank:
    """That of this process; raises `UsageError` where the release is wrong, or where the processes are others than those of torch.distributed."""
    if VERSION < FIRST:
        known = next(text for version, text in MEASURED.items() if version <= VERSION)
        raise UsageError(f"no expert parallelism with transformers {transformers.__version__}", known, "install transformers 5.23 or newer")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise UsageError(
            "expert parallelism without processes",
            "torch.distributed is not initialized",
            "run under torchrun and call torch.distributed.init_process_group",
        )
    mine, all_ = distributed.get_rank(), distributed.get_world_size()
    if size != all_ or rank not in (None, mine):
        raise UsageError(
            f"ep_rank={rank}, ep_size={size}",
            f"torch.distributed says that this is process {mine} of {all_}",
            f"pass ep_size={all_}, and leave ep_rank out",
        )
    return Rank(mine, size)


def options(share: Rank) -> dict[str, Any]:
    """For `from_pretrained`: all processes have one batch, attention is divided as the model's plan says, and whole experts are."""
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=share.size, tp_plan="auto", ep_size=share.size)}


def dispatch(share: Rank, module: Experts, device: torch.device) -> None:
    """Have transformers' strategy bring the tokens of one batch, which all processes have, to this process's experts, and their answers back."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import EpDispatchExpertsParallel

    if type(module) is not Experts:
        raise UsageError(f"no expert parallelism for {module.family}", "its block asks its experts in a way of its own", "leave ep_size out, or native")
    mesh = init_device_mesh(device.type, (share.size,), mesh_dim_names=("ep",))
    EpDispatchExpertsParallel().install_forward(module, ep_mesh=mesh, tp_mesh=mesh)


def require_divided(model: torch.nn.Module, experts: Mapping[str, tuple[int, ...]], size: int) -> None:
    """Raises `NotVerified` unless each of `size` processes holds its share of the experts and no more, and its modules know that they do.

    `experts`: name -> shape [e, ...] of each tensor of the experts, undivided. It asks what memory holds, not what the library says that it did.
    """
    parameters = dict(model.named_parameters())
    for name, (count, *_) in experts.items():
        module = model.get_submodule(name.rpartition(".")[0])
        held, said = _held(module, parameters.get(name)), getattr(module, "num_experts", None)
        if held != {count // size} or said != count // size or count % size:
            raise NotVerified(
                f"{name}: this process holds {max(held)} of {count} experts, and {size} processes were to divide them",
                f"its module goes by {said} experts, in transformers {transformers.__version__}",
                "nothing is divided that is not proven to be; use transformers 5.23 or newer, or leave ep_size out",
            )


def _held(module: torch.nn.Module, parameter: Any) -> set[int]:
    """How many experts memory holds, of one tensor or of each of a native module's."""
    if isinstance(module, Experts):
        every = [(line, part) for line in module.lines for part in line.encoding.parts if not part.shared]
        return {len(line.get_buffer(f"part_{part.name}")) for line, part in every}
    return {len(parameter.to_local() if hasattr(parameter, "to_local") else parameter)}
