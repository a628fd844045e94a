"""Which convention is an adapter in, and how do we know: the user, a mark, its writer's traces in adapter_config.json, shapes; never the numbers.

PEFT lays A on the first matrix axis of a stacked parameter, and from 0.19 on on the second, unless the module says `is_transposed` (gpt-oss in
transformers 5, not in 4.57). https://github.com/huggingface/peft/blob/v0.19.1/src/peft/tuners/lora/layer.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeglot.adapters.config import CONFIG, MARK, UNSLOTH_MARK, AdapterConfig
from moeglot.adapters.evidence import Clustering
from moeglot.conventions import CONVENTIONS, GROUPED_TURNED, PEFT, Convention, by_name
from moeglot.errors import AmbiguousConvention, Contradiction, UsageError
from moeglot.factors import holds, in_out, recognizes, turns_differ
from moeglot.family import Family

ALWAYS = ("layer_replication", "loftq_config", "megatron_core")
"""Keys that PEFT writes into every adapter_config.json, and Megatron-Bridge into none."""
PACKINGS = {"rank_major": False, "grouped_by_expert": True}
"""unsloth_zoo's mark -> whether the columns are grouped."""


@dataclass(frozen=True)
class Reading:
    """A convention that the names allow, and the rank of each of its pairs; or the shape that refutes it, and those before it."""

    convention: Convention
    ranks: tuple[int, ...]
    refuted: str | None


def candidates(keys: Sequence[str], family: Family) -> tuple[Convention, ...]:
    """The conventions whose names these are."""
    found = []
    for convention in CONVENTIONS:
        if holds(convention, family):
            pattern = recognizes(convention, family)
            if all(pattern.fullmatch(key) for key in keys):
                found.append(convention)
    return tuple(found)


def decide(
    name: str, readings: Sequence[Reading], config: AdapterConfig, family: Family, experts: int, asked: str | None, ask_numbers: Callable[[], Clustering | None]
) -> tuple[Convention, tuple[str, ...]]:
    """The convention and the evidence for it; raises `AmbiguousConvention` with the readings that remain, or `Contradiction`."""
    left, evidence = {reading.convention: reading for reading in readings}, list[str]()
    for why, keeps in _words(config, family, asked, left):
        kept = {convention: reading for convention, reading in left.items() if keeps(convention)}
        if len(kept) < len(left) or why.startswith("--"):
            evidence.append(why)
        left = kept
    told = tuple(evidence)
    fitting = {convention: reading for convention, reading in left.items() if not reading.refuted}
    if not fitting:
        _contradict(name, left, told)
    for convention, reading in left.items():
        if reading.refuted and len(left) > 1:
            evidence.append(f"not {convention.name}: {reading.refuted}")
    if len(readings) == 1 and not evidence:
        evidence.append("its key names are those of no other convention")
    different = _different(fitting, experts)
    if len(different) == 1:
        return different[0], tuple(evidence)
    raise _ambiguous(name, different, evidence, config, ask_numbers())


def _words(config: AdapterConfig, family: Family, asked: str | None, left: Mapping[Convention, Reading]) -> list[tuple[str, Callable[[Convention], bool]]]:
    """What is declared, the strongest word first: (who says it, which conventions it leaves)."""
    names = [convention.name for convention in left]
    if asked is not None:
        if by_name(asked).name not in names:
            raise UsageError(
                f"--convention {asked}: the key names are not that convention's", f"they are those of {', '.join(names)}", "pass one of these, or none"
            )
        marked = config.raw.get(MARK, asked)
        against = f", against {CONFIG}, which says {MARK} = {marked}" if marked != asked else ""
        return [(f"--convention {asked}{against}", lambda convention: convention.name == asked)]
    if marked := config.raw.get(MARK):
        return [(f"{CONFIG} says {MARK} = {marked}", lambda convention: convention.name == marked)]
    if not any(convention.wraps for convention in left):
        return []
    words: list[tuple[str, Callable[[Convention], bool]]] = []
    if layout := config.raw.get(UNSLOTH_MARK):
        words.append((f"{CONFIG} says {UNSLOTH_MARK} = {layout}", lambda convention: convention.grouped == PACKINGS.get(str(layout))))
    return words + _traces(config, family)


def _traces(config: AdapterConfig, family: Family) -> list[tuple[str, Callable[[Convention], bool]]]:
    """What writers leave in adapter_config.json without meaning to."""
    version, by_peft = config.raw.get("peft_version"), any(key in config.raw for key in ALWAYS)
    if version is None and not by_peft and config.parameters and all(re.search(r"\.layers\.\d+\.", f".{target}") for target in config.parameters):
        return [
            (f"{CONFIG} has no peft_version and full names in target_parameters, as Megatron-Bridge writes it", lambda convention: convention == GROUPED_TURNED)
        ]
    on_second = config.since(19)
    if on_second is None or turns_differ(family):
        return []
    if on_second and _is_fused_by_peft(config):
        return [(f"{CONFIG} has the rank_pattern that PEFT >= 0.19 makes of an adapter with one module an expert", lambda convention: convention == PEFT)]
    if on_second and in_out(family):
        return []
    side = "in" if on_second or in_out(family) else "out"
    order = "[e, in, out]" if in_out(family) else "[e, out, in]"
    return [(f"{CONFIG} says peft_version = {version}, which lays A on the {side} axis of {order}", lambda convention: convention.turned == (side == "out"))]


def _is_fused_by_peft(config: AdapterConfig) -> bool:
    """PEFT made one parameter of two modules, and writes for it twice the rank and twice the alpha of the others; a user's own pattern is another.

    https://github.com/huggingface/peft/blob/v0.19.1/src/peft/utils/transformers_weight_conversion.py
    """
    r, ranks, alphas = config.raw.get("r"), config.raw.get("rank_pattern") or {}, config.raw.get("alpha_pattern") or {}
    fused = [rf".*\.{name}" for name in config.parameters if "." not in name]
    return isinstance(r, int) and any(ranks.get(pattern) == 2 * r and alphas.get(pattern) == 2 * config.alpha for pattern in fused)


def _different(fitting: Mapping[Convention, Reading], experts: int) -> list[Convention]:
    """One convention for each reading that gives other factors: with one rank or one expert, both packings are the same."""
    found: dict[tuple[object, ...], Convention] = {}
    for convention, reading in fitting.items():
        same = convention.wraps and (experts == 1 or set(reading.ranks) == {1})
        found.setdefault((convention.turned, convention.wraps) if same else (convention,), convention)
    return list(found.values())


def _contradict(name: str, left: Mapping[Convention, Reading], evidence: tuple[str, ...]) -> None:
    if not left:
        raise Contradiction(
            f"{name}: what {CONFIG} says of the convention contradicts itself", "; ".join(evidence), "pass --convention with what its writer says"
        )
    refuted = next(iter(left.values()))
    raise Contradiction(
        f"{name}: {refuted.refuted}",
        f"read as {', '.join(convention.name for convention in left)}{', because ' if evidence else ''}{'; '.join(evidence)}",
        "check that the base is the one it was trained on; if it is, its writer is another than the config says: pass --convention",
    )


def _ambiguous(name: str, left: Sequence[Convention], evidence: Sequence[str], config: AdapterConfig, numbers: Clustering | None) -> AmbiguousConvention:
    names = [convention.name for convention in left]
    known = [f"{convention.name}: {convention.about.partition(':')[0]}" for convention in left]
    known += evidence or [f"no mark in {CONFIG} decides, and no shape"]
    if "unsloth_fixed" in (config.raw.get("auto_mapping") or {}):
        known.append(f"{CONFIG} has unsloth's trace (auto_mapping.unsloth_fixed)")
    if len({convention.grouped for convention in left}) > 1:
        known.append(f"the numbers do not decide, but say: {numbers}" if numbers else "the numbers say nothing")
    return AmbiguousConvention(
        f"{name}: its tensors can be read as {' or '.join(names)}, and these are different changes",
        "; ".join(known),
        f"ask its writer, then pass --convention {names[0]} (or another of these)",
    )
