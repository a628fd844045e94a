"""Structure: is every tensor of a format there, once, with the dtype and shape that the format derives from config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from operator import itemgetter
from typing import Any

from moeglot.codings.coding import WEIGHT, leaves_alone, said
from moeglot.codings.rules import Quantization, telling_apart
from moeglot.dtypes import WEIGHT_DTYPES
from moeglot.encoding import agree
from moeglot.encodings.plain import Plain
from moeglot.errors import MoeglotError, TensorMismatch
from moeglot.family import Config
from moeglot.files.shards import Entry
from moeglot.files.source import Source
from moeglot.format import Format, holder
from moeglot.formats import of_family
from moeglot.layout import Sizes, Stored
from moeglot.share import SHARE

AT_ONCE = 1024
"""Tensors of one line that are looked at together: config.json may claim any number of experts, and costs no memory by it."""
_declared: Callable[[Any], Any] = itemgetter(Entry._fields.index("dtype"), Entry._fields.index("shape"))


def structure_problems(source: Source, form: Format, sizes: Sizes, layers: tuple[int, ...], config: Config, known: str) -> Iterator[MoeglotError]:
    """Every way in which the tensors are not what the format says, each as an error that names one tensor."""
    yield from _unlike_experts(source, form, sizes, layers, known)
    left = dict(source.entries)
    for line, part, keys in form.expert_keys(layers, sizes):
        dtypes, shape = part.dtypes, line.part_shape(part, sizes)
        while some := [*islice(keys, AT_ONCE)]:
            there = [*map(left.pop, some, repeat(None))]
            if there[0] and there[0].dtype in dtypes:
                dtypes = (there[0].dtype,)  # a layer has one type for all of its experts
            if None not in there and all(dtype in dtypes and agree(shape, stored) for dtype, stored in {*map(_declared, there)}):
                continue
            for key, entry in zip(some, there, strict=True):
                if odd := _otherwise(key, form, source, known):
                    yield odd
                elif entry and entry.dtype in part.dtypes and entry.dtype not in dtypes:
                    yield _mixed(entry, dtypes[0], known)
                elif entry:
                    yield from _tensor_problems(entry, line, part.name, sizes, form, known)
                else:
                    yield _missing(key, line, part.name, source, form, layers, known)
    carried = form.family.carried_layers(config)
    stems = {_stem(line) for line in form.all_lines}
    for key in left:
        if (found := form.match(key)) and found[2] in carried:
            continue
        below = {number for stem in stems if (number := _layer_under(key, stem)) is not None} - set(carried)
        if (found or below) and not form.dense_line(key):
            yield TensorMismatch(
                f"{key}: extra, {form.name} has no such tensor",
                f"{known}; it has layers {runs(layers)} and {sizes['e']} experts",
                "if config.json is wrong, take the producer's; if the format is another, pass --format",
            )


def _mixed(entry: Entry, other: str, known: str) -> TensorMismatch:
    return TensorMismatch(
        f"{entry.name}: {entry.dtype}, and experts before it in this layer are {other}",
        f"each layer is moved with one type for all of its experts; {known}",
        "store them alike: the wider type loses nothing",
    )


def _unlike_experts(source: Source, form: Format, sizes: Sizes, layers: tuple[int, ...], known: str) -> Iterator[TensorMismatch]:
    """Experts of which a rule says otherwise than of the first of their layer, though their tensors may look alike."""
    for layer in layers if form.coding else ():
        for line in form.lines(layer):
            rules = telling_apart(said(source.config), holder(line, layer)) if line.per_expert and not line.is_plain else None
            for expert in range(1, min(sizes["e"], len(source.entries))) if rules else ():
                if odd := _unlike(line, layer, expert, form, rules or {}, known):
                    yield odd


def _otherwise(key: str, form: Format, source: Source, known: str) -> TensorMismatch | None:
    """Where quantization_config says something else of this expert than of the first of its layer."""
    line, _, layer, expert = (form.coding and form.match(key)) or (None, "", 0, None)
    return _unlike(line, layer, expert, form, said(source.config), known) if line and expert else None


def _unlike(line: Stored, layer: int, expert: int, form: Format, declared: Quantization, known: str) -> TensorMismatch | None:
    if not form.coding:
        return None
    module, first = line.module(layer, expert), line.module(layer)
    here, there = ("left alone" if leaves_alone(declared, name) else str(form.coding.read(declared, name) or "quantized") for name in (module, first))
    if here == there:
        return None
    return TensorMismatch(
        f"{module}: quantization_config says that it is {here}, and {first} {there}",
        f"{known}; in one format the experts of a layer are stored alike",
        f"quantize all experts of the layer {'with' if 'left alone' in (here, there) else 'alike, with'} the producer's tool, or none of them",
    )


def _missing(key: str, line: Stored, part: str, source: Source, form: Format, layers: tuple[int, ...], known: str) -> TensorMismatch:
    siblings = [key.removesuffix(line.names[part]) + line.names[other.name] for other in line.encoding.parts if other.name != part]
    alone = [name for name in siblings if name in source.entries]
    why = f"{alone[0]} is there and means nothing without it; " if alone else ""
    plain = key.removesuffix(line.names[part]) + WEIGHT
    if form.coding and form.coding.kept and not alone and plain in source.entries and source.entries[plain].dtype in WEIGHT_DTYPES:
        return TensorMismatch(
            f"{key}: missing, and {plain} is there, not quantized",
            f"{known}; quantization_config does not name this module in {form.coding.kept}",
            f"if it is meant to be so, add it to {form.coding.kept} in config.json, as its producer should have",
        )
    share = f"; what one process holds is read where the safetensors header says {SHARE}" if form.by_rank and not source.share else ""
    return TensorMismatch(
        f"{key}: missing",
        f"{why}{known}; it has experts in layers {runs(layers)}",
        f"fetch the missing shard, or the producer's config.json if that is wrong{share}",
    )


def _tensor_problems(entry: Entry, line: Stored, part: str, sizes: Sizes, form: Format, known: str) -> Iterator[TensorMismatch]:
    spec = next(p for p in line.encoding.parts if p.name == part)
    if entry.dtype not in spec.dtypes:
        yield TensorMismatch(f"{entry.name}: {form.name} needs {' or '.join(spec.dtypes)}, the file has {entry.dtype}", known, _other_format(form, entry))
        return
    shape = line.part_shape(spec, sizes)
    if not agree(shape, entry.shape):
        yield TensorMismatch(f'{entry.name}: read as "{line.axes}" needs {list(shape)}, the file has {list(entry.shape)}', known, _other_format(form, entry))


def _other_format(form: Format, entry: Entry) -> str:
    others = [other.name for other in of_family(form.family) if other != form and not (form.coding and other.coding) and other.match(entry.name)]
    if others:
        return f"if the file was written by another producer, pass --format {' or '.join(others)}"
    matched = form.match(entry.name)
    if entry.dtype not in WEIGHT_DTYPES and matched and isinstance(matched[0].encoding, Plain):
        return "this looks quantized in a way that the format does not declare; `moeglot formats` shows what is known"
    return "check config.json against the producer's; moeglot takes no size from a shape"


def check_place(layers: tuple[int, ...], experts: int, known: Callable[[], str], layer: int, expert: int = 0) -> None:
    """Raises `TensorMismatch` for a layer or an expert that is not there: bytes of others lie where it would be."""
    if layer not in layers or isinstance(layer, (bool, float)):  # True == 1.0 == 1, and no key has that name
        raise TensorMismatch(f"layer {layer!r} has no experts", f"experts are in layers {layers}; {known()}", "choose one of these, an int")
    if expert not in range(experts) or isinstance(expert, (bool, float)):
        raise TensorMismatch(f"layer {layer} has no expert {expert!r}", f"it has {experts}; {known()}", f"choose one from 0 to {experts - 1}")


def _stem(line: Stored) -> str:
    """What all keys of the experts begin with, up to the last dot before the name."""
    key = line.key + next(iter(line.names.values()))
    return key.split("{expert}")[0] if line.per_expert else key[: key.rindex(".") + 1]


def _layer_under(key: str, stem: str) -> int | None:
    """The number of the layer, if the key begins as the stem does."""
    before, _, after = stem.partition("{layer}")
    if not key.startswith(before):
        return None
    number, _, rest = key[len(before) :].partition(".")
    return int(number) if number.isdecimal() and ("." + rest).startswith(after) else None


def runs(layers: Sequence[int]) -> str:
    """Numbers that rise, in few words: `0 to 35`, `1, 3, 5`, `0, 1, 4 to 60`."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    if len(found) == 1 and len(layers) > 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 4 else ", ".join(map(str, run)) for run in found)
