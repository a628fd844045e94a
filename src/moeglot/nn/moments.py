"""Second moments of the experts' inputs over a text: what GPTQ needs to know of the data, for `--round gptq:FILE`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moeglot.checks import Progress
from moeglot.errors import UsageError
from moeglot.files import newfile
from moeglot.nn.data import check_fits
from moeglot.nn.module import Experts, experts_in
from moeglot.planning.merging import moments_key

MARK = "moeglot.moments"


class Moments:
    """Sums of x xᵀ, float32 [in, in], for the tokens that reached each expert and for what its down matrix multiplied."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}

    def watch(self, module: Experts, hidden: torch.Tensor, index: torch.Tensor) -> None:
        """hidden [t, h], index int [t, k]: adds what a call of an experts module gives to each expert that is in it."""
        for expert in torch.unique(index).tolist():
            if 0 <= expert < module.num_experts:
                given, number = hidden[(index == expert).any(-1)].float(), module.lines[0].first + expert
                self._add(moments_key(module.layer, number, "up"), given)
                self._add(moments_key(module.layer, number, "down"), _inner(module, expert, given))

    def _add(self, key: str, given: torch.Tensor) -> None:
        found = given.mT @ given
        self.sums[key] = self.sums[key] + found if key in self.sums else found
        self.tokens[key] = self.tokens.get(key, 0) + len(given)


def _inner(module: Experts, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    roles = {role: encoded for line in module.lines for role, encoded in line.roles(expert).items()}
    return module.expert.activate({role: module.expert.linear(roles.__getitem__, tokens, role) for role in module.expert.first})


@contextmanager
def _watching(model: Any, moments: Moments) -> Iterator[None]:
    modules = experts_in(model).values()
    for module in modules:
        module.watched_by = moments.watch
    try:
        yield
    finally:
        for module in modules:
            module.watched_by = None


def gather(model: Any, rows: torch.Tensor, out: str | Path, progress: Progress | None = None) -> Moments:
    """Let a model with encoded experts (`moeglot.load(native=True)`) read `rows` of tokens [n, length], and write the second moments to `out`.

    The file is safetensors: `layers.N.experts.E.hidden` float32 [h, h] and `.intermediate` [i, i]; experts that no token reached have none.
    Raises `UsageError` if they would not fit in memory or the model does not take such rows, `OutputExists`.
    """
    out = Path(out)
    newfile.check(out, "out")
    _check_memory(model)
    check_fits(model, rows)
    moments = Moments()
    with _watching(model, moments), torch.inference_mode():
        for n, row in enumerate(rows):
            model(input_ids=row.unsqueeze(0).to(model.device))
            if progress:
                progress("gathering", n + 1, len(rows))
    reached = {key.replace("layers.", "tokens.layers."): str(count) for key, count in moments.tokens.items()}
    with newfile.making(out) as part, newfile.by_library(out):
        save_file({key: tensor.cpu().contiguous() for key, tensor in moments.sums.items()}, part, {MARK: "1", "tokens": str(rows.numel()), **reached})
    return moments


def _check_memory(model: Any) -> None:
    modules = experts_in(model).values()
    needed = sum(4 * module.num_experts * (module.sizes["h"] ** 2 + module.sizes["i"] ** 2) for module in modules)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.8 * there:
        raise UsageError(
            f"second moments of all experts take {needed / 1e9:.0f} GB, this machine has {there / 1e9:.0f} GB",
            f"[in, in] in float32 for {sum(module.num_experts for module in modules)} experts",
            "use a larger machine, or --round delta, which needs no data",
        )
