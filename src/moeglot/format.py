"""Format: a producer's complete way to store a model's experts, and what else it names and declares otherwise than the Hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from moeglot.codings.coding import Coding
from moeglot.encoding import Encoding, Part
from moeglot.errors import Contradiction
from moeglot.family import Config, Family, dig
from moeglot.layout import BEHIND, ROLES, Sizes, Stored

HEAD_DIM = "head_dim"
"""The config key of how many rows a head has, where config.json says it."""


@dataclass(frozen=True)
class Dense:
    """A tensor that is no expert and that this format names, or packs, unlike the family's Hub format. `{rest}` in a key stands for any remainder.

    `hub`: the Hub's keys whose rows it holds in turn; `rows`: for each, the letters or config keys whose product is its number of rows.
    `heads` instead of `rows`: for each, the config key of its number of heads. The rows then lie group by group, and in each group the share of each
    tensor in turn; there are as many groups as the last one has heads, and all heads have the same number of rows.
    `only`: it is in layers of this kind alone, those with experts or those without.
    `padded`: the config key of how many rows mean something, if the writer may add some that nothing reads.
    `tp`: what tensor parallelism divides of each Hub tensor, its rows or its columns; `between`: the config key of how many heads these are, which stay
    whole. `stage`: it is on the first or on the last stage of a pipeline alone.
    `of_head`: its rows are those of one head. `given`: the config key that says whether a model has it.
    `needed`: no model is without it, but for those whose config.json says `unless`.
    """

    key: str
    hub: tuple[str, ...]
    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    padded: str = ""
    only: Literal["", "dense", "sparse"] = ""
    tp: Literal["", "rows", "columns"] = ""
    between: str = ""
    stage: Literal["", "first", "last"] = ""
    of_head: bool = False
    given: str = ""
    needed: bool = False
    unless: str = ""

    def __post_init__(self) -> None:
        if len(self.hub) > 1 and len(self.rows or self.heads) != len(self.hub):
            raise ValueError(f"{self.key}: {len(self.hub)} tensors need as many row counts, not {self.rows or self.heads}")

    def groups(self, config: Config, tp: int = 1) -> int:
        """How many times the tensors take turns, on one of `tp` processes that divide them."""
        return self._heads(config, tp)[-1] if self.heads else 1

    def shares(self, config: Config, rows: int, tp: int = 1) -> tuple[int, ...] | None:
        """How many of a number of rows each tensor has in one group, None if the rows are no whole number of heads, or others than config.json says."""
        heads, groups, length = self._heads(config, tp), self.groups(config, tp), dig(config, HEAD_DIM)
        if rows % sum(heads) or any(n % groups for n in heads) or (isinstance(length, int) and rows != length * sum(heads)):
            return None
        return tuple(n // groups * (rows // sum(heads)) for n in heads)

    def contradicted(self, config: Config, shape: tuple[int, ...]) -> str:
        """What config.json says that a model with this tensor, in this shape, is not; or nothing."""
        if self.given and dig(config, self.given) is not True:
            return f"{self.given} = {dig(config, self.given)}"
        said = {key: dig(config, key) for key in (HEAD_DIM, "hidden_size", "num_attention_heads")}
        length, hidden, heads = said.values()
        if length is None and isinstance(hidden, int) and isinstance(heads, int) and heads:  # as every reader has it then
            length = hidden // heads
        return ", ".join(f"{key} = {value}" for key, value in said.items()) if self.of_head and isinstance(length, int) and shape != (length,) else ""

    def _heads(self, config: Config, tp: int) -> tuple[int, ...]:
        found = {key: dig(config, key) for key in self.heads}
        if wrong := [key for key, n in found.items() if not isinstance(n, int) or n < 1]:
            known = f"{self.key} holds {len(self.hub)} tensors group by group; config.json says {wrong[0]} = {found[wrong[0]]}"
            raise Contradiction("config.json does not say how many heads there are", known, f"add {wrong[0]} from the producer's config.json")
        return tuple(_divided(found[key], tp, key) for key in self.heads)

    def row_counts(self, sizes: Sizes, config: Config, tp: int = 1) -> tuple[int, ...]:
        """How many rows each tensor has, on one of `tp` processes that divide them."""
        found = {name: sizes.get(name) or dig(config, name) for names in self.rows for name in names.split()}
        if wrong := [name for name, n in found.items() if not isinstance(n, int) or n < 1]:
            known = f"{self.key} holds {len(self.hub)} tensors in turn; config.json says {wrong[0]} = {found[wrong[0]]}"
            raise Contradiction("config.json does not say how many rows a tensor has", known, f"add {wrong[0]} from the producer's config.json")
        return tuple(_divided(prod(found[name] for name in names.split()), tp if self.tp else 1, names) for names in self.rows)


def _divided(count: int, tp: int, what: str) -> int:
    if count % tp:
        raise Contradiction(
            f"{count} ({what}) on {tp} processes", "config.json says the one, the mark in the file's header the other", "take both from one run"
        )
    return count // tp


@dataclass(frozen=True)
class TorchDist:
    """A folder that torch.distributed.checkpoint reads, as Megatron-Core keeps it: layers and experts are axes of larger tensors.

    `states`: the modules that have an `_extra_state` there, an object without numbers, if a model has them; `{layer}` and `{expert}` as in a key.
    `experts`: "single" where layers and experts keep their numbers, and the gate and up of every MLP are two tensors.
    """

    states: tuple[str, ...] = ()
    experts: Literal["stacked", "single"] = "stacked"


@dataclass(frozen=True)
class ConfigForm:
    """How this format's config.json differs from the Hub's: keys by other names, constants, and keys that must not be there.

    `names`: the Hub's key (dotted for nested ones) -> the key here. `only`: nothing but the named keys exists here.
    `constants` are written here; `hub_constants` are written on the way to the Hub's form; `defaults` say what a key of the Hub means where it lacks.
    `told`: keys of the producer that alone tell this format from one with the same names and shapes, and what each says, None for nothing.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    only: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)
    hub_constants: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None


RELEASES: Mapping[str, Literal["any", "5", "5.5"]] = {"any transformers": "any", "transformers 5": "5", "transformers 5.5": "5.5"}
"""What `Format.reads` says of transformers; any other text is another reader's name."""


@dataclass(frozen=True)
class Format:
    """A producer's complete way to store a checkpoint of one family: the experts line by line, and what else it names differently.

    `alone`: why the tensors that are no experts cannot be told in the Hub's form, if so; such a format is read, verified and written as itself only.
    `asked`: what its producer did that only shapes tell from another format, if so; it is then read only if --format or our mark says so.
    `closed`: it names every tensor that it can hold, and a tensor of another name is refused. `container`: what the tensors lie in, if not safetensors.
    `says_transposed`: its module in transformers says `is_transposed`: the parameters lie [e, in, out], and PEFT >= 0.19 knows.
    `wrapped`: PEFT wraps its modules; not those that an expert has only to be quantized and served.
    `by_rank`: each process of several has such files of its own, its layers and experts numbered from 0; `Dense.tp` says what else is divided.
    `unlike`: layer -> its lines, where a checkpoint stores it otherwise than `stored` says: quantization_config leaves its experts alone.
    Law: write∘read is the identity on bytes.
    """

    name: str
    family: Family
    stored: tuple[Stored, ...]
    source: str
    about: str
    dense: tuple[Dense, ...] = ()
    config: ConfigForm = ConfigForm()
    reads: str = "any transformers"
    alone: str = ""
    coding: Coding | None = None
    unlike: Mapping[int, tuple[Stored, ...]] = field(default_factory=dict)
    closed: bool = False
    container: TorchDist | None = None
    asked: str = ""
    by_rank: bool = False
    says_transposed: bool = False
    wrapped: bool = True

    def __post_init__(self) -> None:
        held = sorted(role for line in self.stored for role in line.roles)
        if held != sorted(self.family.roles) or not set(held) <= set(ROLES):
            raise ValueError(f"{self.name}: {self.family.name} has roles {sorted(self.family.roles)}, the lines hold {held}")
        if self.says_transposed and not self.is_in_out:
            raise ValueError(f"{self.name}: its module says is_transposed, its lines {[line.axes for line in self.stored]}")

    def __repr__(self) -> str:
        return f"Format({self.name!r})"

    def sized(self, sizes: Sizes) -> Format:
        """This format with the numbers of the experts of a second group known."""
        lines = tuple(replace(line, offset=sizes["e"]) if line.offset == BEHIND else line for line in self.stored)
        return replace(self, stored=lines) if lines != self.stored else self

    def holding(self, lines: tuple[Stored, ...]) -> Format:
        """This format with other lines; what holds them [out, in] is no module that says `is_transposed`."""
        found = replace(self, stored=lines, says_transposed=False)
        return replace(found, says_transposed=self.says_transposed and found.is_in_out)

    @property
    def layout(self) -> str:
        """The name of the layout whose matrices are quantized here, its own where `coded` quantized none."""
        return self.name.removesuffix(f"+{self.coding.name}") if self.coding else self.name

    @property
    def is_plain(self) -> bool:
        """Nothing in it is quantized."""
        return all(line.is_plain for line in self.stored)

    @property
    def transformers(self) -> Literal["any", "5", "5.5", ""]:
        """Which releases of transformers read it."""
        return RELEASES.get(self.reads, "")

    @property
    def is_in_out(self) -> bool:
        """Its matrices lie [in, out]."""
        return self.stored[0].expert_groups[0] == ("h",)

    def coded(self, coding: Coding) -> Format:
        """This layout with its matrices as a producer quantizes them."""
        lines = tuple(coding.line(line) for line in self.stored)
        return replace(self, name=f"{self.name}+{coding.name}", stored=lines, coding=coding, about=f"{self.about}; {coding.about}", source=coding.source)

    def with_encodings(self, settle: Callable[[Stored], Encoding]) -> Format:
        """This format with the encodings of its coded lines settled by a file."""

        def settled(lines: tuple[Stored, ...]) -> tuple[Stored, ...]:
            return tuple(line if line.is_plain else replace(line, encoding=settle(line)) for line in lines)

        return replace(self, stored=settled(self.stored), unlike={layer: settled(lines) for layer, lines in self.unlike.items()})

    def lines(self, layer: int) -> tuple[Stored, ...]:
        """How a layer's experts are stored."""
        return self.unlike.get(layer, self.stored)

    @cached_property
    def all_lines(self) -> tuple[Stored, ...]:
        """Every line that some layer has."""
        return tuple({(line.roles, line.key, line.is_plain): line for lines in (self.stored, *self.unlike.values()) for line in lines}.values())

    @cached_property
    def _patterns(self) -> tuple[tuple[Stored, str, re.Pattern[str]], ...]:
        return tuple((line, part, _pattern(line.key + suffix)) for line in self.all_lines for part, suffix in line.suffixes.items())

    def match(self, key: str) -> tuple[Stored, str, int, int | None] | None:
        """key -> (line, part, layer, expert), or None for a tensor that is no expert."""
        for line, part, pattern in self._patterns:
            if found := pattern.fullmatch(key):
                groups = found.groupdict()
                return line, part, int(groups["layer"]), int(groups["expert"]) if "expert" in groups else None
        return None

    def dense_line(self, key: str) -> tuple[Dense, dict[str, str]] | None:
        """The first `Dense` line of a key of this format, and what stands in its braces."""
        return next(((line, found.groupdict()) for line, pattern, _ in self._dense_patterns if (found := pattern.fullmatch(key))), None)

    def from_hub(self, key: str, sparse: tuple[int, ...] | None = None) -> tuple[Dense, dict[str, str]] | None:
        """The first `Dense` line that takes a tensor of this Hub name, and what stands in its braces. `sparse`: the layers with experts, if they matter."""
        for line, _, hub in self._dense_patterns:
            for one in hub:
                found = one.fullmatch(key)
                if found and not (line.only and sparse is not None and (int(found["layer"]) in sparse) != (line.only == "sparse")):
                    return line, found.groupdict()
        return None

    @cached_property
    def _dense_patterns(self) -> tuple[tuple[Dense, re.Pattern[str], tuple[re.Pattern[str], ...]], ...]:
        return tuple((line, _pattern(line.key), tuple(map(_pattern, line.hub))) for line in self.dense)

    def expert_keys(self, layers: tuple[int, ...], sizes: Sizes) -> Iterator[tuple[Stored, Part, Iterator[str]]]:
        """Every key that the experts of these layers have, a line and a part at a time: (line, part, the keys of its experts in order)."""
        for layer in layers:
            for line in self.lines(layer):
                before, _, after = line.key.replace("{layer}", str(layer)).partition("{expert}")
                for part in line.encoding.parts:
                    numbers = range(line.offset, line.offset + sizes["e"]) if line.per_expert else ("",)
                    yield line, part, _numbered(before, numbers, after + line.names[part.name])

    def line_of(self, role: str) -> Stored:
        return next(line for line in self.stored if role in line.roles)


def _numbered(before: str, numbers: Iterable[int | str], after: str) -> Iterator[str]:
    return (f"{before}{number}{after}" for number in numbers)


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for name in ("layer", "expert"):
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>0|[1-9][0-9]*)")
    return re.compile(pattern.replace(re.escape("{rest}"), "(?P<rest>.+)"))


def holder(line: Stored, layer: int) -> str:
    """The module that holds the experts of a layer, each a module or a tensor of its own."""
    return line.key.partition("{expert}")[0].rpartition(".")[0].format(layer=layer)
