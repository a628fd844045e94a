"""Share: which experts of each layer one process of several holds under expert parallelism, and the mark by which a file says that it has no others.

https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/transformer/moe/moe_layer.py (`local_expert_indices`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moeglot.errors import Contradiction, UsageError

SHARE = "moeglot.share"
"""Key of the mark in a safetensors header: the experts are those of one process, numbered from 0."""


@dataclass(frozen=True)
class Share:
    """The experts of process `rank` among `size`: runs of equal length, in the order of the processes."""

    rank: int
    size: int

    @classmethod
    def asked(cls, rank: int | None, size: int | None) -> Share | None:
        """What a user asks for, None for all experts; raises `UsageError` for a rank that is not one of several."""
        if rank is None and size is None:
            return None
        if rank is None or size is None:
            given, missing = ("--ep-rank", "--ep-size") if size is None else ("--ep-size", "--ep-rank")
            raise UsageError(f"{given} without {missing}", "a process is one of several, and has a number among them", f"pass {missing} too")
        if size < 1 or not 0 <= rank < size:
            known = f"ranks are counted from 0, so that the last of {size} is {size - 1}" if size > 0 else "there is at least one process"
            raise UsageError(f"--ep-rank {rank} --ep-size {size}", known, f"pass --ep-rank 0 to {size - 1}" if size > 0 else "pass --ep-size 1 or more")
        return cls(rank, size)

    @classmethod
    def declared(cls, marks: Iterable[Mapping[str, str]]) -> Share | None:
        """What the metadata of all shards says, None if nothing; raises `Contradiction` where they disagree, or say what no share is."""
        said = {mark.get(SHARE) for mark in marks} or {None}
        if said == {None}:
            return None
        if len(said) > 1:
            told = " and ".join(sorted(text or "nothing" for text in said))
            raise Contradiction("the shards hold the experts of different processes", f"their headers say {SHARE} = {told}", "pass the shards of one")
        text = str(said.pop())
        found = re.fullmatch(r"rank (\d{1,9}) of (\d{1,9})", text)
        if not found or int(found[1]) >= int(found[2]):
            raise Contradiction(f"the safetensors header says {SHARE} = {text}", "moeglot writes 'rank R of N', R below N", "write the file again")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def experts(self, count: int) -> range:
        """The experts of this process, of `count` in a layer; raises `UsageError` where they cannot be divided evenly."""
        if count % self.size:
            raise UsageError(f"{count} experts on {self.size} processes", "each holds as many as the others", f"choose a divisor of {count} as ep_size")
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)


def held(sizes: Mapping[str, int], share: Share | None) -> dict[str, int]:
    """The sizes that config.json says of a model -> those of what files hold whose header declares a share; raises `Contradiction` where both cannot be."""
    if share and sizes["e"] % share.size:
        known = f"the safetensors header says {SHARE} = {share}, config.json {sizes['e']} experts"
        raise Contradiction(f"{sizes['e']} experts are not divided evenly among {share.size} processes", known, "take config.json from the producer")
    return {**sizes, "e": len(share.experts(sizes["e"]))} if share else dict(sizes)
