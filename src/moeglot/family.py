"""Family: what an expert computes, which layers have experts, and where config.json says how large they are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moeglot.errors import Contradiction
from moeglot.layout import SECOND
from moeglot.share import Share, held_layers, held_sizes

Config = Mapping[str, Any]
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def dig(config: Config, path: str) -> Any:
    """`dig(config, "rope_scaling.factor")`, or None; a number is a place in a list."""
    value: Any = config
    for key in path.split("."):
        if isinstance(value, (list, tuple)) and key.isdecimal():
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Activation:
    """What stands between the first and the second matrix of an expert; `experts.py` computes each kind.

    swiglu: act(gate) * up. ungated: act(up). clamped-swiglu: gate <= limit, |up| <= limit, then gate * sigmoid(alpha * gate) * (up + 1).
    limited-swiglu: gate <= limit, |up| <= limit, then act(gate) * up. capped-swiglu: act(gate) <= limit, |up| <= limit, then their product.
    softcapped-swiglu: cap(gate) * sigmoid(gate) * cap(up), where cap(x) = c * tanh(x / c), with c = gate_cap and c = up_cap.
    `function`: config key of the activation's name (None: no key says it) and its default; `numbers`: name -> (config key, default).
    A number that config.json gives as a list has one entry for each layer; 0 and null are no limit.
    """

    kind: str
    function: tuple[str | None, str] = ("hidden_act", "silu")
    numbers: Mapping[str, tuple[str, float]] = field(default_factory=dict)


MAX_LAYERS = 10_000  # a config.json that claims more is not believed, so that a claim costs no memory


@dataclass(frozen=True)
class SparseLayers:
    """Which layers have experts, by the config keys (dotted for nested ones) that say so. A rule whose key config.json lacks does not apply.

    `count`: how many layers there are. `kinds`: one word or number a layer, in a list or a string; the first key that is there decides alone,
    and the layers whose word is in `sparse` have experts. `listed`: the layers that have experts, as a list or as "3,4,5"; decides alone.
    `first`: how many dense layers come first, and the family's default; `last`: the last layer that has experts, -1 for the last of all.
    `every`: layer n has experts if (n + 1) % every = 0; `period` and `offset` (a key, or the number itself): if n % period = offset % period.
    `dense`: the layers that have none.
    """

    count: str = "num_hidden_layers"
    kinds: tuple[str, ...] = ()
    sparse: tuple[str | int, ...] = ("sparse", "moe", "hash_moe", "E", 1)
    listed: str | None = None
    first: tuple[str, int] | None = None
    last: str | None = None
    every: str | None = None
    period: str | None = None
    offset: str | int | None = None
    dense: str | None = None

    def layers(self, config: Config) -> tuple[int, ...]:
        """Raises `Contradiction` if config.json names no layer, or in a way that is not usable."""
        kinds = next((value for key in self.kinds if isinstance(value := dig(config, key), (list, tuple, str))), None)
        count = dig(config, self.count)
        if count is None and kinds is not None:
            count = len(kinds)
        usable = isinstance(count, int) and count <= MAX_LAYERS and (kinds is None or len(kinds) >= count)
        found = self._found(config, count, kinds) if usable else ()
        if not found:
            keys = (self.count, *self.kinds, self.listed, self.first and self.first[0], self.last, self.every, self.period, self.offset, self.dense)
            said = {key: value for key in keys if isinstance(key, str) and ((value := dig(config, key)) is not None or key == self.count)}
            raise Contradiction("config.json names no layer with experts", f"it says {said}", "take config.json from the producer")
        return found

    def _found(self, config: Config, count: int, kinds: Sequence[Any] | None) -> tuple[int, ...]:
        if kinds is not None:
            return tuple(n for n, kind in enumerate(kinds[:count]) if kind in self.sparse)
        if (listed := dig(config, self.listed) if self.listed else None) is not None:
            words = listed.split(",") if isinstance(listed, str) else listed
            usable = isinstance(words, (list, tuple)) and all(str(word).strip().isdecimal() for word in words)
            return tuple(sorted({n for n in map(int, words) if n < count})) if usable else ()
        dense = (dig(config, self.dense) if self.dense else None) or ()
        first, last = self._number(config, self.first and self.first[0], self.first[1] if self.first else 0), self._number(config, self.last, -1)
        every, period, offset = (self._number(config, key, default) for key, default in ((self.every, 1), (self.period, 1), (self.offset, 0)))
        if None in (first, last, every, period, offset) or every < 1 or period < 1 or not isinstance(dense, (list, tuple)):
            return ()
        end = count if last == -1 else min(count, last + 1)
        return tuple(n for n in range(first, end) if (n + 1) % every == 0 and n % period == offset % period and n not in dense)

    def _number(self, config: Config, key: str | int | None, default: int) -> Any:
        """The whole number that a key gives or is, the default if it is not there, None if it is something else."""
        if isinstance(key, int):
            return key
        value = dig(config, key) if key else None
        return default if value is None else value if isinstance(value, int) else None


@dataclass(frozen=True)
class Family:
    """What an expert computes, and where config.json says how large it is.

    `sizes`: letter -> the config keys (dotted for nested ones) that may hold it, the Hub's own first; they are names of one fact, except for the
    letters in `first_wins`, where the first key that is there decides. Letters beyond e, h and i size what is no expert.
    `carried`: config keys that say how many layers for multi-token prediction follow the others; they are carried over as they are.
    `words`: config key -> a word that transformers 5 writes in its list -> the release's word, which every version reads. `parts`: config key -> the
    only keys that the readers of that part know, where they refuse any other. `elsewhere`: a part that config.json may lack -> the parts and keys that then
    say the same, or none where its keys are at the top.
    `idle`: the config key of how many more ids the router has, which stand for experts without numbers: a token that is sent there stays as it is.
    `second`: which layers have the second group of experts, where a rule of its own says so; they must be the same layers.
    `unverified`: why nobody could compare this family with a real module or file, if so.
    """

    name: str
    model_types: tuple[str, ...]
    roles: tuple[str, ...]
    activation: Activation
    sizes: Mapping[str, tuple[str, ...]]
    sparse: SparseLayers = SparseLayers()
    source: str = ""
    first_wins: tuple[str, ...] = ()
    carried: tuple[str, ...] = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    idle: str = ""
    second: SparseLayers | None = None
    unverified: str = ""

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """What the names of the roles of each group of experts in a layer begin with."""
        return ("", SECOND) if any(role.startswith(SECOND) for role in self.roles) else ("",)

    def layers(self, config: Config) -> tuple[int, ...]:
        """Numbers of the layers that have experts; raises `Contradiction` if config.json names none, or others for the two groups."""
        found = self.sparse.layers(config)
        if self.second and (others := self.second.layers(config)) != found:
            raise Contradiction(
                f"{self.name}: the two groups of experts are in different layers",
                f"config.json says {found} and {others}",
                "such a model cannot be told in this format; every release that we know has them in the same layers",
            )
        return found

    def count(self, config: Config) -> int:
        """How many layers the model has, with and without experts."""
        return int(dig(config, self.sparse.count))

    def idle_experts(self, config: Config) -> int:
        """How many ids stand for experts without numbers."""
        found = dig(config, self.idle) if self.idle else None
        return found if isinstance(found, int) else 0

    def held_layers(self, config: Config, share: Share | None) -> tuple[int, ...]:
        """Numbers of the layers that have experts in the files of one process, or of all; raises `Contradiction` where share and config cannot both be."""
        layers = self.layers(config)
        return held_layers(layers, self.count(config), share) if share else layers

    def held_sizes(self, config: Config, share: Share | None) -> dict[str, int]:
        """As `read_sizes`, for the files of one process, or of all; raises `Contradiction` where share and config cannot both be."""
        return held_sizes(self.read_sizes(config), share)

    def carried_layers(self, config: Config) -> range:
        """Numbers of the layers after the last one, for multi-token prediction."""
        count = dig(config, self.sparse.count)
        extra = next((n for key in self.carried if isinstance(n := dig(config, key), int)), 0)
        return range(count, count + min(extra, MAX_LAYERS)) if isinstance(count, int) else range(0)

    def is_carried(self, name: str, config: Config) -> bool:
        """A tensor or module belongs to one of `carried_layers`, which no module of transformers has."""
        layer = LAYER.search(name)
        return layer is not None and int(layer[1]) in self.carried_layers(config)

    def read_sizes(self, config: Config) -> dict[str, int]:
        """letter -> size; raises `Contradiction` if a size is missing or if two keys for one size disagree."""
        sizes = {}
        for letter, keys in self.sizes.items():
            found = {key: value for key in keys if (value := dig(config, key)) is not None}
            found = dict([*found.items()][:1]) if letter in self.first_wins else found
            if not found or any(not isinstance(n, int) or n < 1 for n in found.values()):
                raise Contradiction(
                    f"config.json does not say how large axis {letter} is",
                    f"{self.name} keeps it in {' or '.join(keys)}; found: {found or 'nothing'}",
                    "add the key from the producer's config.json; moeglot takes no size from a shape",
                )
            if len(set(found.values())) > 1:
                raise Contradiction(
                    f"config.json gives axis {letter} two sizes",
                    f"it says {found}",
                    "remove the wrong key; moeglot takes no size from a shape",
                )
            sizes[letter] = next(iter(found.values()))
        return sizes
