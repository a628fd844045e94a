"""Share: which part of a model one process of several holds in Megatron-Core's four kinds of parallelism, and the mark by which a file says so.

https://github.com/NVIDIA/Megatron-LM/tree/core_v0.16.1/megatron/core: `transformer/moe/moe_layer.py` (`local_expert_indices`), `parallel_state.py`
(`expert_tensor_parallel_size` is `tensor_model_parallel_size` where nobody sets it), `transformer/transformer_block.py` (`get_num_layers_to_build`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypedDict, TypeVar

from moeglot.errors import Contradiction, UsageError

T = TypeVar("T")

SHARE = "moeglot.share"
"""Key of the mark in a safetensors header: the tensors are those of one process, layers and experts numbered from 0."""
RANK = r"rank (\d{1,9}) of (\d{1,9})"
MARK = re.compile(rf"tp {RANK}, etp {RANK}, pp {RANK}, ep {RANK}(?:, (\d{{1,9}}) words)?")
EXPERTS_ALONE = re.compile(RANK)
"""How the first marks named a rank: they knew of expert parallelism alone."""


class Asked(TypedDict, total=False):
    """What a user may ask for, by the names that `plan` and `convert` take."""

    tp_rank: int | None
    tp_size: int | None
    etp_rank: int | None
    etp_size: int | None
    pp_rank: int | None
    pp_size: int | None
    ep_rank: int | None
    ep_size: int | None
    padded_vocab_size: int | None


@dataclass(frozen=True)
class Rank:
    """Process `rank`, counted from 0, of the `size` that divide something among themselves: runs of equal length, in the order of the processes."""

    rank: int = 0
    size: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def of(self, count: int, what: str = "experts", kind: str = "ep") -> range:
        """Which of `count` things this process has; raises `UsageError` where they cannot be divided evenly."""
        if count % self.size:
            other = ", or write a torch_dist checkpoint" if kind in ("tp", "pp") else ""
            do = f"choose a divisor of {count} as {kind}_size{other}"
            raise UsageError(f"{count} {what} on {self.size} processes", "each holds as many as the others", do)
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)


@dataclass(frozen=True)
class Share:
    """The place of one process: in tensor, expert tensor, pipeline and expert parallelism. `words`: the rows of the whole embedding, if some are padding."""

    tp: Rank = Rank()
    etp: Rank = Rank()
    pp: Rank = Rank()
    ep: Rank = Rank()
    words: int | None = None

    @classmethod
    def asked(
        cls,
        *,
        tp_rank: int | None = None,
        tp_size: int | None = None,
        etp_rank: int | None = None,
        etp_size: int | None = None,
        pp_rank: int | None = None,
        pp_size: int | None = None,
        ep_rank: int | None = None,
        ep_size: int | None = None,
        padded_vocab_size: int | None = None,
        **unknown: object,
    ) -> Share | None:
        """What a user asks for, None for the whole model; raises `UsageError` for a rank that is not one of several, where it is left open who divides
        the matrices of experts, and for what nobody asks for.
        """
        if unknown:
            raise UsageError(f"{', '.join(unknown)}: no such option", f"beside its own there are {', '.join(Asked.__annotations__)}", "help(moeglot.convert)")
        said = {"tp": (tp_rank, tp_size), "etp": (etp_rank, etp_size), "pp": (pp_rank, pp_size), "ep": (ep_rank, ep_size)}
        ranks = {kind: _asked(kind, *pair) for kind, pair in said.items() if pair != (None, None)}
        if not ranks and padded_vocab_size is None:
            return None
        if (tp := ranks.get("tp", Rank())).size > 1 and "etp" not in ranks:
            raise UsageError(
                f"--tp-size {tp.size} without --etp-size",
                "Megatron-Core divides each expert's matrices by expert_tensor_parallel_size, which is tensor_model_parallel_size where nobody sets it",
                f"pass --etp-size 1, or --etp-rank {tp.rank} --etp-size {tp.size}",
            )
        if padded_vocab_size is not None and (not isinstance(padded_vocab_size, int) or padded_vocab_size < 1 or padded_vocab_size % tp.size):
            known = f"each of {tp.size} processes has as many rows as the others"
            do = f"pass a multiple of {tp.size}" if tp.size > 1 else "pass a whole number of at least 1"
            raise UsageError(f"--padded-vocab-size {padded_vocab_size!r}", known, do)
        return cls(**ranks, words=padded_vocab_size)

    @classmethod
    def declared(cls, marks: Iterable[Mapping[str, str]]) -> Share | None:
        """What the metadata of all shards says, None if nothing; raises `Contradiction` where they disagree, or say what no share is."""
        said = {mark.get(SHARE) for mark in marks} or {None}
        if said == {None}:
            return None
        if len(said) > 1:
            told = " and ".join(sorted(text or "nothing" for text in said))
            raise Contradiction("the shards are those of different processes", f"their headers say {SHARE} = {told}", "pass the shards of one")
        text = str(said.pop())
        alone, found = EXPERTS_ALONE.fullmatch(text), MARK.fullmatch(text)
        numbers = [0, 1, 0, 1, 0, 1, *map(int, alone.groups())] if alone else [int(n) for n in found.groups() if n] if found else []
        ranks = [Rank(*pair) for pair in zip(numbers[:8:2], numbers[1:8:2], strict=True)]
        if not ranks or any(one.rank >= one.size for one in ranks):
            known = "moeglot writes 'tp rank R of N, etp rank R of N, pp rank R of N, ep rank R of N', each R below its N"
            raise Contradiction(f"the safetensors header says {SHARE} = {text}", known, "write the file again")
        tp, etp, pp, ep = ranks
        return cls(tp, etp, pp, ep, *numbers[8:])

    @property
    def ranks(self) -> dict[str, Rank]:
        """By the short names of the four kinds."""
        return {"tp": self.tp, "etp": self.etp, "pp": self.pp, "ep": self.ep}

    @property
    def is_whole(self) -> bool:
        """Nothing is divided."""
        return all(rank.size == 1 for rank in self.ranks.values())

    @property
    def mark(self) -> str:
        """All of it, as a file says it."""
        return self._told(self.ranks)

    def __str__(self) -> str:
        """What is divided among several, for people."""
        return self._told({kind: rank for kind, rank in self.ranks.items() if rank.size > 1}) or str(Rank())

    def _told(self, ranks: Mapping[str, Rank]) -> str:
        return ", ".join([f"{kind} {rank}" for kind, rank in ranks.items()] + ([f"{self.words} words"] if self.words else []))

    def sizes(self, whole: Mapping[str, int]) -> dict[str, int]:
        """Letter -> size in the whole model -> letter -> size here; raises `UsageError` where they cannot be divided evenly."""
        experts, inner = self.ep.of(whole["e"]), self.etp.of(whole["i"], "rows of an expert's gate", "etp")
        return {**whole, "e": len(experts), "i": len(inner)}

    def padded_words(self, vocabulary: int) -> range:
        """Which rows of the embedding, padding among them, this process has; raises `UsageError` where there are fewer than words, or no even number."""
        rows = self.words or vocabulary
        if rows < vocabulary:
            raise UsageError(
                f"{rows} rows of padded vocabulary", f"config.json says vocab_size = {vocabulary}", f"pass --padded-vocab-size {vocabulary} or more"
            )
        if rows % self.tp.size:
            known = f"each has as many rows of the embedding as the others; config.json says vocab_size = {vocabulary}"
            do = f"pass --padded-vocab-size with the rows that Megatron's run has, a multiple of {self.tp.size}"
            raise UsageError(f"{rows} words on {self.tp.size} processes", known, do)
        return self.tp.of(rows)

    def stage(self, layers: int) -> range:
        """The numbers that this process's layers have among all; raises `UsageError` where they cannot be divided evenly."""
        return self.pp.of(layers, "layers", "pp")


def _asked(kind: str, rank: int | None, size: int | None) -> Rank:
    """One of the four kinds; of one process, the rank goes without saying."""
    rank = 0 if rank is None and size == 1 else rank
    if rank is None or size is None:
        given, missing = (f"--{kind}-rank", f"--{kind}-size") if size is None else (f"--{kind}-size", f"--{kind}-rank")
        raise UsageError(f"{given} without {missing}", "a process is one of several, and has a number among them", f"pass {missing} too")
    if not isinstance(rank, int) or not isinstance(size, int):
        raise UsageError(f"{kind}_rank = {rank!r}, {kind}_size = {size!r}", "both are whole numbers", f"pass {kind}_rank=0, {kind}_size=1, for example")
    if size < 1 or not 0 <= rank < size:
        known = f"ranks are counted from 0, so that the last of {size} is {size - 1}" if size > 0 else "there is at least one process"
        do = f"pass --{kind}-rank 0 to {size - 1}" if size > 0 else f"pass --{kind}-size 1 or more"
        raise UsageError(f"--{kind}-rank {rank} --{kind}-size {size}", known, do)
    return Rank(rank, size)


def held_sizes(sizes: Mapping[str, int], share: Share | None) -> dict[str, int]:
    """Letter -> size, as config.json says of a model -> those of files whose header declares a share; raises `Contradiction` where both cannot be."""
    return _believed(share, lambda mine: mine.sizes(sizes)) if share else dict(sizes)


def held_layers(layers: tuple[int, ...], count: int, share: Share | None) -> tuple[int, ...]:
    """Of these layers among `count`, those of a share, by the numbers that they have in its files; raises `Contradiction` where both cannot be."""
    if not share:
        return layers
    stage = _believed(share, lambda mine: mine.stage(count))
    return tuple(n - stage.start for n in layers if n in stage)


def _believed(share: Share, find: Callable[[Share], T]) -> T:
    """What a mark and config.json say together."""
    try:
        return find(share)
    except UsageError as error:
        known = f"the safetensors header says {SHARE} = {share.mark}, and config.json how many there are"
        raise Contradiction(error.wrong, known, "take config.json from the producer") from error
