"""Of a checkpoint of all experts, those of one process, as a checkpoint in which they are numbered from 0; no others are read, and all else is whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moeglot.checkpoint import Checkpoint
from moeglot.dense import HubTensor
from moeglot.encoding import Encoded
from moeglot.errors import UsageError
from moeglot.layout import Stored
from moeglot.shards import Entry
from moeglot.share import Share


@dataclass(frozen=True)
class Divided(Checkpoint):
    """The experts `mine` of `whole`."""

    whole: Checkpoint
    mine: Share

    @property
    def share(self) -> Share:
        return self.mine

    @cached_property
    def numbers(self) -> range:
        """The numbers that the experts have in the whole."""
        return self.mine.experts(self.whole.sizes["e"])

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {**self.whole.sizes, "e": len(self.numbers)}

    def stored(self, line: Stored, layer: int, expert: int) -> Encoded:
        return self.whole.stored(line, layer, self.numbers[expert])

    def checked(self, line: Stored, layer: int, expert: int) -> Encoded:
        return self.whole.checked(line, layer, self.numbers[expert])

    @cached_property
    def others(self) -> dict[str, Entry]:
        return self.whole.others

    @cached_property
    def dense(self) -> dict[str, HubTensor]:
        return self.whole.dense


def divided(checkpoint: Checkpoint, share: Share) -> Checkpoint:
    """The experts of a share; raises `UsageError` if the checkpoint has only those of another, or if they cannot be divided evenly."""
    if checkpoint.share == share or (share.size == 1 and not checkpoint.share):
        return checkpoint
    if checkpoint.share:
        wrong = f"{checkpoint.source.name} has the experts of {checkpoint.share}, not those of {share}"
        raise UsageError(wrong, checkpoint.known, "pass the checkpoint of the whole model")
    share.experts(checkpoint.sizes["e"])
    return Divided(checkpoint.source, checkpoint.format, checkpoint.identification, checkpoint, share)


def alongside(subject: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Of another checkpoint, what is to be compared with this one: if this has one process's experts, the same experts there."""
    return divided(other, subject.share) if subject.share else other


def whole_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """The sizes of the whole model, whoever's experts these are."""
    sizes, share = checkpoint.sizes, checkpoint.share
    return {**sizes, "e": sizes["e"] * share.size} if share else sizes


def numbers(checkpoint: Checkpoint) -> range:
    """The numbers that the experts of a checkpoint have in the whole model."""
    experts = whole_sizes(checkpoint)["e"]
    return checkpoint.share.experts(experts) if checkpoint.share else range(experts)


def share_json(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Whose experts they are, if not all: their first and last number in the whole model."""
    share, mine = checkpoint.share, numbers(checkpoint)
    return {"ep_rank": share.rank, "ep_size": share.size, "experts": [mine[0], mine[-1]]} if share else None
