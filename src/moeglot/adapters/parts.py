"""The parts of an adapter: pairs of tensors for experts, factors of other modules, and tensors that it replaces as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moeglot.adapters.config import CONFIG, PREFIX, AdapterFiles
from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.conventions import Convention
from moeglot.errors import BadNumbers, HalfAdapter, TensorMismatch, UnsupportedAdapter
from moeglot.factors import Place, aliases, stacked_form, take
from moeglot.family import dig
from moeglot.files.shards import Entry

if TYPE_CHECKING:
    import torch

Factors = tuple["torch.Tensor", "torch.Tensor"]
LINEAR, EMBEDDING, BIAS = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"), "lora_B.bias"
"""What follows a module's name, for the first factor [r, in] and the second. https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py"""
KINDS = {**dict(zip(LINEAR, "ab", strict=True)), **dict(zip(EMBEDDING, "ab", strict=True)), BIAS: "bias"}
"""The same -> which part of a module's change it is."""

TIES = ("tie_word_embeddings", "text_config.tie_word_embeddings")
INPUT, OUTPUT = EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, eq=False)
class Pair:
    """Two stored tensors, and what they hold. `scale`: what their product is multiplied by."""

    convention: Convention
    place: Place
    a: Entry
    b: Entry
    rank: int
    scale: float
    sizes: Mapping[str, int] = field(repr=False)

    def raw(self, role: str, expert: int) -> Factors:
        """(left [out, r], right [r, in]) as stored: any float dtype, unscaled, views where strides allow it."""
        left, right = take(self.convention, self.place, self.sizes, (self.a.read(), self.b.read()), role, expert)
        return left, right

    def factors(self, role: str, expert: int) -> Factors:
        """(left [out, r], right [r, in]) in float32, the scale in left; raises `BadNumbers`."""
        left, right = self.raw(role, expert)
        return _scaled(left, right, self.scale, f"{self.place.name}, expert {expert}, {role}")


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float, what: str) -> Factors:
    import torch

    from moeglot.kernels.finite import all_finite

    left, right = left.to(torch.float32) * scale, right.to(torch.float32)
    if not (all_finite(left) and all_finite(right)):
        raise _diverged(f"{what}: the factors are not finite", scale)
    return left, right


def _diverged(wrong: str, scale: float) -> BadNumbers:
    return BadNumbers(wrong, f"the scale is {scale:g}", "the training diverged; ask for an earlier checkpoint")


@dataclass(frozen=True)
class Dense:
    """LoRA of a module that is no expert, under its Hub name; `alias`: what the adapter calls it. An embedding's factors lie the other way round."""

    name: str
    alias: str
    a: Entry
    b: Entry
    scale: float
    bias_entry: Entry | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def keys(self, module: str) -> tuple[str, str, str]:
        """What the tensors of a, b and the bias are called for a module of that name."""
        a, b = EMBEDDING if self.embedding else LINEAR
        return f"{PREFIX}{module}.{a}", f"{PREFIX}{module}.{b}", f"{PREFIX}{module}.{BIAS}"

    def stored(self, module: str) -> Iterator[tuple[str, Entry]]:
        """Its tensors as they are, under the keys of that module."""
        for key, entry in zip(self.keys(module), (self.a, self.b, self.bias_entry), strict=True):
            if entry:
                yield key, entry

    def raw(self) -> Factors:
        """(left [out, r], right [r, in]) as stored, unscaled."""
        a, b = self.a.read(), self.b.read()
        return (a.mT, b.mT) if self.embedding else (b, a)

    def factors(self) -> Factors:
        """(left [out, r], right [r, in]) in float32, the scale in left; raises `BadNumbers`."""
        return _scaled(*self.raw(), self.scale, self.alias)

    def bias(self) -> torch.Tensor | None:
        """The change of the module's bias in float32, where lora_bias was on; raises `BadNumbers`."""
        import torch

        if not self.bias_entry:
            return None
        found = self.bias_entry.read().to(torch.float32) * self.scale
        if not bool(found.isfinite().all()):
            raise _diverged(f"{self.alias}: the bias of its factors is not finite", self.scale)
        return found

    def changes(self, module: str) -> Iterator[tuple[str, Factors]]:
        """Hub name of each tensor of that module that changes -> (left [out, r], right [r, in]); of a bias, [out, 1] and [1, 1]."""
        import torch

        yield module + ".weight", self.factors()
        if (bias := self.bias()) is not None:
            yield module + ".bias", (bias.unsqueeze(1), torch.ones(1, 1, dtype=torch.float32, device="cpu"))


@dataclass(frozen=True)
class Replaced:
    """A tensor that takes the place of the base's of this Hub name, before any factors are added to it."""

    name: str
    alias: str
    entry: Entry


def read_dense(files: AdapterFiles, base: Checkpoint, keys: Sequence[str], convention: Convention | None) -> tuple[dict[str, Dense], dict[str, Replaced]]:
    """The tensors that are no factors of experts -> (Hub name of a module -> its factors, Hub name of a tensor -> what replaces it).

    Raises `HalfAdapter` for one that has no place in the base, and `TensorMismatch` for a shape that is not the base's.
    """
    weights = base.decoded("F32")
    hub = {alias: name for name in weights for alias in aliases(name, base.format.family)}
    modules: dict[str, dict[str, Entry]] = {}
    replaced: dict[str, Replaced] = {}
    for key in keys:
        module, kind = _split(key)
        if kind:
            modules.setdefault(module, {})[kind] = files.entries[key]
        elif ".original_module." not in key:  # the base's own, which PEFT keeps beside the one that was trained
            name = _replaced_name(files, key, hub)
            if name in replaced and not _same(replaced[name].entry, files.entries[key]):
                raise _twice(replaced[name].alias, key, name)
            replaced[name] = Replaced(name, key, files.entries[key])
    dense: dict[str, Dense] = {}
    for module, parts in modules.items():
        known = module
        for theirs, ours in convention.modules if convention else ():
            known = known.replace(theirs, ours)
        if known + ".weight" not in hub:
            raise _no_module(module, base)
        found = _dense(files, module, hub[known + ".weight"].removesuffix(".weight"), parts)
        _check(found, weights[found.name + ".weight"].shape, base)
        if found.name in dense:
            raise _twice(dense[found.name].alias, module, found.name)
        dense[found.name] = found
    return dense, replaced


def _no_module(module: str, base: Checkpoint) -> HalfAdapter:
    form = stacked_form(base.format.family)
    if form and form.alone and form != base.format:
        why = f"{base.known}; its modules may have other names in memory, which moeglot does not know: {form.alone}"
        do = "merge what is no expert with PEFT, and the experts' part of the adapter with moeglot; an adapter is never half applied"
        return HalfAdapter(f"{module}: adapted, and no tensor on disk is called so", why, do)
    if OUTPUT.startswith(module.rpartition(".")[2]):
        what = f"{module}: adapted, and the base's input and output embeddings are one tensor"
        return HalfAdapter(what, f"there is no {OUTPUT}; {base.known}", "train without it, or untie the base first: copy the embedding to lm_head.weight")
    do = "check that the base is the one that it was trained on; an adapter is never half applied"
    return HalfAdapter(f"{module}: adapted, and the base has no such module", base.known, do)


def _same(one: Entry, other: Entry) -> bool:
    import torch

    return one.shape == other.shape and torch.equal(one.read().float(), other.read().float())


def _twice(one: str, other: str, name: str) -> HalfAdapter:
    return HalfAdapter(f"{one} and {other} are two changes of one tensor", f"the base calls it {name}", "fetch the adapter again from its writer")


def _split(key: str) -> tuple[str, str]:
    found = re.fullmatch(rf"(.+)\.({'|'.join(map(re.escape, KINDS))})", key)
    return (found[1], found[2]) if found else (key, "")


def _dense(files: AdapterFiles, module: str, name: str, parts: Mapping[str, Entry]) -> Dense:
    kinds = {KINDS[kind]: entry for kind, entry in parts.items()}
    if missing := [kind for kind in ("a", "b") if kind not in kinds]:
        raise HalfAdapter(f"{module}: lora_{missing[0].upper()} is missing", "a change needs both factors", "fetch the adapter again from its writer")
    embedding = any("embedding" in kind for kind in parts)
    return Dense(name, module, kinds["a"], kinds["b"], files.config.scale(module, kinds["a"].shape[0]), kinds.get("bias"), embedding)


def _check(dense: Dense, shape: tuple[int, ...], base: Checkpoint) -> None:
    a, b = dense.a.shape, dense.b.shape
    out, inner = (a[-1], b[0]) if dense.embedding else (b[0], a[-1])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (out, inner) != tuple(shape):
        raise TensorMismatch(
            f"{dense.alias}: factors {list(a)} and {list(b)}, the base's weight is {list(shape)}",
            base.known,
            "check that the base is the one that the adapter was trained on",
        )


def _replaced_name(files: AdapterFiles, key: str, hub: Mapping[str, str]) -> str:
    """The Hub name of a tensor that the config says was trained as a whole."""
    name = key.replace(".modules_to_save", "").replace(".base_layer", "")
    if name.endswith(OUTPUT) and name not in hub:  # of a base that has one tensor for both
        name = next((of for of in hub if of.endswith(INPUT)), name)
    module, _, leaf = name.rpartition(".")
    told = files.config.saves(name) or ("bias" in leaf and files.config.biases != "none") or module.endswith(("embed_tokens", "lm_head"))
    if name not in hub or not told or "lora_" in key:
        raise HalfAdapter(
            f"{key}: no part of the change that {CONFIG} describes",
            "it holds no factor of a module that the base has" if name not in hub else "modules_to_save and bias do not name it",
            "check that the base is the one that it was trained on; an adapter is never half applied",
        )
    return hub[name]


def check_replaced(replaced: Mapping[str, Replaced], base: Checkpoint) -> None:
    """Raises `UnsupportedAdapter` for a tensor that was resized."""
    weights = base.decoded("F32")
    for name, found in replaced.items():
        if tuple(found.entry.shape) != tuple(weights[name].shape):
            raise UnsupportedAdapter(
                f"{found.alias} is {list(found.entry.shape)}, the base's is {list(weights[name].shape)}",
                "the vocabulary was resized, which no change of weights expresses",
                "resize the base first, with transformers' resize_token_embeddings",
            )


def check_ties(dense: Mapping[str, Dense], replaced: Mapping[str, Replaced], base: Checkpoint) -> None:
    """Raises `UnsupportedAdapter` for a change of an embedding that is the output as well: live it changes one of the two, merged it would change both."""
    import torch

    weights = base.decoded("F32")
    said = next((tied for path in TIES if (tied := dig(base.config, path)) is not None), None)
    stored = any(name.endswith(OUTPUT) for name in weights)
    if said is False or (said is None and stored):  # transformers leaves out what is the default of a model: no output of its own is the sign of it
        return
    changed = [found.alias for name, found in dense.items() if found.embedding or name.endswith("lm_head")]
    for name, found in replaced.items():  # PEFT adds a copy of the base's
        if name.endswith(EMBEDDINGS) and not torch.equal(found.entry.read().float(), weights[name].read().float()):
            changed.append(found.alias)
    if changed:
        raise UnsupportedAdapter(
            f"{changed[0]} is changed, and the base's input and output embeddings are one tensor",
            f"{'config.json says tie_word_embeddings' if said else f'there is no {OUTPUT}'}; the adapter changes one use of it, a merge would change both",
            "untie the base first: copy the embedding to lm_head.weight and set tie_word_embeddings to false; or train without the embedding",
        )
