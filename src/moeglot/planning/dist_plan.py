"""What a torch_dist checkpoint needs to know of a model beside its tensors: which numbers are stacked, and which modules have an _extra_state."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.files.torch_dist.keys import Stack
from moeglot.format import Format


def stack(source: Checkpoint, target: Format) -> Stack:
    """Of layers that are alike, a torch_dist checkpoint stacks all; of those of which some have no experts, none."""
    assert target.container
    count, experts = len(source.stage), target.container.experts == "stacked"
    return Stack(count, experts and source.layers == tuple(range(count)), experts)


def states(source: Checkpoint, target: Format, dense: Collection[str]) -> Iterator[str]:
    """The modules that have an _extra_state. `dense`: the keys of what is no expert; a module that would have such tensors and has none is not there."""
    assert target.container
    there = {_module(key) for key in dense}
    named = {_module(line.key) for line in target.dense}
    for template in target.container.states:
        if "{expert}" in template:
            yield from (template.format(layer=layer, expert=expert) for layer in source.layers for expert in range(source.sizes["e"]))
            continue
        for layer in range(len(source.stage)) if "{layer}" in template else (0,):
            if template not in named or template.format(layer=layer) in there:
                yield template.format(layer=layer)


def _module(key: str) -> str:
    return key.rpartition(".")[0]
