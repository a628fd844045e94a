"""The formats that we know; a new family is one file here and its name in `PLAIN`."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache

from moeglot.codings import CODINGS
from moeglot.errors import UsageError
from moeglot.family import Family
from moeglot.format import Format
from moeglot.formats import (
    dbrx,
    deepseek_v4,
    encoder_decoder,
    ernie_vl,
    fused,
    gate_up_down,
    gpt_oss,
    granite,
    linear_attention,
    megatron,
    nemotron_h,
    nested,
    others,
    privacy_filter,
    remote,
    text_only,
    w1_w3_w2,
)

PLAIN: tuple[Format, ...] = (
    *gpt_oss.FORMATS,
    *dbrx.FORMATS,
    *deepseek_v4.FORMATS,
    *encoder_decoder.FORMATS,
    *ernie_vl.FORMATS,
    *fused.FORMATS,
    *gate_up_down.FORMATS,
    *granite.FORMATS,
    *linear_attention.FORMATS,
    *nemotron_h.FORMATS,
    *nested.FORMATS,
    *others.FORMATS,
    *privacy_filter.FORMATS,
    *remote.FORMATS,
    *text_only.FORMATS,
    *w1_w3_w2.FORMATS,
    *megatron.FORMATS,
)
"""Every layout as its producer stores it, without what other libraries make of it."""

FAMILIES: tuple[Family, ...] = tuple({form.family.name: form.family for form in PLAIN}.values())


_variants: dict[str, tuple[Format, ...]] = {}


def variants(form: Format) -> tuple[Format, ...]:
    """A plain layout with its matrices quantized, in every way that is known: `"qwen3-moe/hub+fp8-block"`; made when they are asked for."""
    if form.name not in _variants:
        codings = CODINGS if form.is_plain and not form.closed and not form.asked else ()
        _variants[form.name] = tuple(form.coded(coding) for coding in codings if coding.codes(form.family.name, form.stored))
    return _variants[form.name]


def formats() -> tuple[Format, ...]:
    """Every format that moeglot knows: every layout, and its quantized variants."""
    return (*PLAIN, *(variant for form in PLAIN for variant in variants(form)))


def by_name(name: str | Format) -> Format:
    """`"gpt-oss/openai"`, or the Format of that name -> the Format, with what a file settles open; raises `UsageError` with the names that are known."""
    name = name.name if isinstance(name, Format) else name
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is not a format", "a format is named by text", "`moeglot formats` says what each one is")
    for form in PLAIN:
        if form.name == name:
            return form
        if name.startswith(form.name + "+"):
            for variant in variants(form):
                if variant.name == name:
                    return variant
    family, _, layout = name.partition("/")
    near = {form.name.partition("/")[2]: form.name for form in formats() if form.family.name == family}
    layout_of = next((form for form in PLAIN if name.startswith(form.name + "+")), None)
    if layout_of:
        told = f"variants of {layout_of.name}: {', '.join(form.coding.name for form in variants(layout_of) if form.coding) or 'none'}"
        near = {form.coding.name: form.name for form in variants(layout_of) if form.coding}
        typed = name.partition("+")[2]
        meant = [one for one in near if typed and one.startswith(typed)] or get_close_matches(typed, near, 1)
        ask = f"pass --to {' or '.join(near[one] for one in meant)}; " if meant else ""
        raise UsageError(f"{name!r} is not a format", told, f"{ask}`moeglot formats` says what each one is")
    if near:
        told = "known: " + ", ".join(form.name for form in PLAIN if form.family.name == family)
        meant = get_close_matches(layout, near, 1)
    else:
        told = f"known are {len(PLAIN)} layouts of {len(FAMILIES)} families"
        near = {form.name: form.name for form in formats()}
        meant = get_close_matches(name, near, 1)
    ask = "".join(f"did you mean {near[one]}? " for one in meant)
    raise UsageError(f"{name!r} is not a format", f"{told}, and what quantizing makes of them", f"{ask}`moeglot formats` says what each one is")


def layouts_of(family: Family) -> list[Format]:
    """Those of them that quantize nothing: asked for each tensor that an adapter may name."""
    return [form for form in _layouts_of(family.name) if form.family == family]


@cache
def _layouts_of(family: str) -> tuple[Format, ...]:
    return tuple(form for form in PLAIN if form.family.name == family)


def of_family(family: Family) -> tuple[Format, ...]:
    """The formats in which this family is stored."""
    layouts = layouts_of(family)
    return (*layouts, *(variant for form in layouts for variant in variants(form)))
