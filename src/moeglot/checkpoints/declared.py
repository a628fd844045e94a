"""What quantization_config says of a format's lines: how each is coded, in which layers it is left alone, and which tensors there are then of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeglot.checkpoints.config import hub_config
from moeglot.codings import CODINGS
from moeglot.codings.coding import WEIGHT, Coding, brief, leaves_alone, of_modules, said, told_of
from moeglot.codings.rules import AUTO_ROUND, method
from moeglot.encoding import Encoding
from moeglot.errors import Contradiction
from moeglot.factors import aliases
from moeglot.family import Family
from moeglot.files.shards import Entry
from moeglot.files.source import Source
from moeglot.format import Format
from moeglot.formats import by_name
from moeglot.layout import Sizes, Stored

First = Mapping[tuple[tuple[str, ...], str], Entry]
"""(roles, part) of a line -> the first tensor that there is of it."""


OF_LINEARS = ("bitsandbytes", "quark", "gptq", "awq", *AUTO_ROUND)
"""Libraries that quantize Linear modules alone."""


def first_tensors(form: Format, source: Source, layers: tuple[int, ...], sizes: Sizes, every: bool = False) -> First:
    """(roles, part) -> its tensor in the first layer that has one, of the first expert that has one; with `every`, of optional parts too.

    A coded line is not looked for in layers whose experts quantization_config leaves alone.
    """
    found: dict[tuple[tuple[str, ...], str], Entry] = {}
    declared = said(source.config)
    for line in form.stored:
        wanted = line.names if every else line.suffixes
        suffixes = {part: suffix for part, suffix in wanted.items() if source.has_like(line.key + suffix)}
        needed = line.suffixes.keys() & suffixes.keys()  # what is nowhere is not looked for in every layer
        for layer in layers if suffixes else ():
            if form.coding and not line.is_plain and leaves_alone(declared, line.module(layer)):
                continue
            for expert in range(min(sizes["e"], len(source.entries)) if line.per_expert else 1):  # of more, none has all of its tensors
                stem = line.stem(layer, expert)
                for part, suffix in suffixes.items():
                    if stem + suffix in source.entries:
                        found.setdefault((line.roles, part), source.entries[stem + suffix])
                if all((line.roles, part) in found for part in needed):
                    break
            if all((line.roles, part) in found for part in needed):
                break
    return found


def lines_there(form: Format, source: Source, layers: tuple[int, ...], first: First) -> tuple[Stored, ...]:
    """The format's lines without those that quantization_config leaves alone in every layer, as long as some other line is coded."""
    declared, held = said(source.config), {roles for roles, _ in first}
    if not form.coding or not any(line.roles in held for line in form.stored if not line.is_plain):
        return form.stored

    def is_alone(line: Stored) -> bool:
        return not line.is_plain and line.roles not in held and all(leaves_alone(declared, line.module(layer)) for layer in layers)

    return tuple(line for line in form.stored if not is_alone(line))


def refuted(form: Format, lines: tuple[Stored, ...], source: Source, layers: tuple[int, ...], first: First) -> str | None:
    """What quantization_config says against this format."""
    declared = said(source.config)
    if form.coding:
        if any(_declared(form, line, declared, first) is None for line in lines if not line.is_plain):
            return f"quantization_config does not say that the experts are {form.coding.name}: it says {brief(declared)}"
        return None
    used = method(declared)
    expected = form.config.quantization["quant_method"] if form.config.quantization else None
    alone = [any(leaves_alone(declared, line.module(layer)) for line in form.stored) for layer in layers]
    if not used or used == expected or all(alone):
        return None
    if not any(line.per_expert for line in form.stored) and (used in OF_LINEARS or (of_modules(declared) and not any(alone))):
        return None  # they quantize Linear modules, and leave stacked experts as they are without a word
    return f"quantization_config.quant_method is {declared['quant_method']}, the tensors are not quantized that way"


def unknown(form: Format, lines: tuple[Stored, ...], source: Source, first: First) -> str | None:
    """How a line is declared to be quantized, where no coding is declared so; None if it is one that we know, or nothing is declared."""
    declared = said(source.config)
    for line in lines if form.coding and method(declared) else ():
        module = _module(form, line, first)
        if not line.is_plain and not leaves_alone(declared, module) and not any(coding.read(declared, module) for coding in CODINGS):
            names = [coding.name for coding in CODINGS if coding.write(coding.encoding, ())["quant_method"] == method(declared)]
            return f"quantization_config says {told_of(declared, module)}; of {method(declared)} moeglot decodes {', '.join(names) or 'nothing'}"
    return None


def apart(form: Format, source: Source, layers: tuple[int, ...]) -> str | None:
    """How the roles of an expert are declared to be quantized, where this coding has some of them and no coding has all."""
    declared, found = said(source.config), dict[str, dict[str, Encoding]]()
    for line in form.stored if form.coding and method(declared) else ():
        module = next((module for layer in layers if not leaves_alone(declared, module := line.module(layer))), None)
        if module and not line.is_plain:
            found[module] = {coding.name: encoding for coding in CODINGS if (encoding := coding.read(declared, module))}
    if not form.coding or not all(found.values()) or not any(form.coding.name in codings for codings in found.values()):
        return None
    if set.intersection(*map(set, found.values())):
        return None
    told = ", ".join(f"{module} as {next(iter(codings.values()))} ({next(iter(codings))})" for module, codings in found.items())
    return f"quantization_config declares {told}; in one format all matrices of an expert are coded in one way"


def is_declared(form: Format, lines: tuple[Stored, ...], source: Source, first: First) -> bool:
    """quantization_config says of every coded line that it is coded as in this format, and tensors of it are there."""
    if not form.coding or not first:
        return False
    return all(_declared(form, line, said(source.config), first) for line in lines if not line.is_plain)


def _module(form: Format, line: Stored, first: First) -> str:
    """The module that the first tensor of a line belongs to."""
    entry = next((entry for (roles, _), entry in first.items() if roles == line.roles), None)
    found = form.match(entry.name) if entry else None
    return line.module(found[2]) if found else line.module(0)


def dense_encoding(quantization: Mapping[str, Any], coding: Coding, module: str, family: Family) -> Encoding | None:
    """What it declares for a module that is no expert, under its name on the Hub or under that in memory, where quantizers find it; None if these disagree."""
    names = (name.removesuffix(WEIGHT) for name in aliases(module + WEIGHT, family))
    found = {encoding for name in names if (encoding := coding.declares(quantization, name))}
    return found.pop() if len(found) == 1 else None


def _declared(form: Format, line: Stored, quantization: Mapping[str, Any], first: First) -> Encoding | None:
    assert form.coding
    return form.coding.declares(quantization, _module(form, line, first))


def settled(form: Format, source: Source) -> Format:
    """The format with the encodings that config.json declares and the file's tensors settle, in the layers that it does not leave alone."""
    if not form.coding and len(form.family.groups) == 1:
        return form
    config, declared = hub_config(source.config, form), said(source.config)
    sizes, layers = form.family.held_sizes(config, source.share), form.family.held_layers(config, source.share)
    form = form.sized(sizes)
    if not form.coding:
        return form
    first = first_tensors(form, source, layers, sizes, every=True)

    def settle(line: Stored) -> Encoding:
        found = {part: (entry.dtype, entry.shape) for (roles, part), entry in first.items() if roles == line.roles}
        encoding = _declared(form, line, declared, first) or line.encoding
        return encoding.as_stored(found, line.leading) if found.keys() >= {part.name for part in encoding.parts} else encoding

    return replace(form, unlike=_unlike(form, declared, layers, sizes)).with_encodings(settle)


def _unlike(form: Format, quantization: Mapping[str, Any], layers: tuple[int, ...], sizes: Sizes) -> dict[int, tuple[Stored, ...]]:
    """Layer -> its lines, for the layers that quantization_config leaves alone, in part or in whole."""
    assert form.coding
    plain = by_name(form.layout).sized(sizes).stored
    found, before = {}, dict[tuple[str, ...], Encoding]()
    for layer in layers:
        lines = tuple(other if leaves_alone(quantization, line.module(layer)) else line for line, other in zip(form.stored, plain, strict=True))
        if any(line.is_plain != other.is_plain for line, other in zip(lines, form.stored, strict=True)):
            found[layer] = lines
        for line in lines:
            encoding = None if line.is_plain else form.coding.read(quantization, line.module(layer))
            if line.is_plain or (encoding and before.setdefault(line.roles, encoding) == encoding):
                continue
            here, there = (str(encoding), str(before[line.roles])) if encoding else ("another coding", form.name)
            raise Contradiction(
                f"{line.module(layer)} is declared as {here}, and such of layers before it as {there}",
                f"config.json says {told_of(quantization, line.module(layer))}; in one format a matrix is coded alike in all layers that are quantized",
                "convert such layers with the producer's tool first",
            )
    return found
