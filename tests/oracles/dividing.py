"""One process of expert parallelism, for test_parallel.py: loads its share of each checkpoint in turn and says what it computed, held and needed, as files."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed

import moeglot
from moeglot.errors import NotVerified, UsageError
from moeglot.integrations import transformers_load
from moeglot.integrations.transformers_parallel import require_divided
from moeglot.nn import Experts

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def anonymous() -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


class Peak:
    """The most anonymous memory that this process had while it watched, and what it had at the end, beyond what it had before."""

    def __enter__(self) -> Peak:
        self.base, self.most, self.kept, self.going = anonymous(), 0, 0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.going:
            self.most = max(self.most, anonymous() - self.base)
            time.sleep(0.001)

    def __exit__(self, *_: Any) -> None:
        self.going = False
        self.thread.join()
        gc.collect()
        self.kept = anonymous() - self.base


def _library(path: str) -> Any:
    """The release's own expert parallelism, as its documentation asks for it before 5.23."""
    from transformers.distributed import DistributedConfig

    asked = {"tp_plan": "auto", "distributed_config": DistributedConfig(enable_expert_parallel=True)}
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **asked)


def _refused(path: str, model: torch.nn.Module, size: int) -> str | None:
    """What the guard says of a model."""
    config = transformers_load.config_of(moeglot.open(path))
    with torch.device("meta"):  # the library's own names and shapes; no number is read
        empty = transformers.AutoModelForCausalLM.from_config(config)
    names = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items() if ".experts." in name}
    try:
        require_divided(model, names, size)
    except NotVerified as error:
        return error.wrong
    return None


def _saved(model: torch.nn.Module, out: Path, job: dict[str, Any]) -> str | None:
    """Why the model is not saved."""
    try:
        if "save" in job:
            moeglot.save(model, out, to=job["save"])
    except UsageError as error:
        return error.wrong
    return None


def main(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    moeglot.load(jobs[0]["warm"], native="library" not in jobs[0])  # what is imported at the first use is no part of the measure
    for job in jobs:
        done(job, distributed.get_rank(), distributed.get_world_size())
    distributed.barrier()
    distributed.destroy_process_group()


def done(job: dict[str, Any], rank: int, size: int) -> None:
    out = Path(job["out"])
    with Peak() as peak:
        path = job["paths"][rank % len(job["paths"])]
        model = _library(path) if job.get("library") else moeglot.load(path, ep_size=size, ep_rank=rank, **job["options"])
    if job.get("grad"):
        model.get_input_embeddings().weight.requires_grad_(True)
    with torch.set_grad_enabled(bool(job.get("grad"))):
        logits = model(input_ids=torch.tensor(job["tokens"])).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    if job.get("grad"):
        logits.square().mean().backward()
        grad = model.get_input_embeddings().weight.grad
        torch.save(grad.full_tensor() if hasattr(grad, "full_tensor") else grad, out / f"grad-{rank}.pt")
    torch.save(logits.detach(), out / f"logits-{rank}.pt")
    held = {name: module.num_experts for name, module in model.named_modules() if isinstance(module, Experts) or name.endswith("experts")}
    told = {"peak": peak.most, "kept": peak.kept, "held": held}
    told |= {"refused": _refused(path, model, size), "saved": _saved(model, out / f"saved-{rank}", job)}
    (out / f"told-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
