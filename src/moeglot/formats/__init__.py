"""The formats that we know, as one tuple; a new family is one file here and its name in `FORMATS`."""

from __future__ import annotations

from difflib import get_close_matches

from moeglot.codings import CODINGS
from moeglot.errors import UsageError
from moeglot.format import Family, Format
from moeglot.formats import (
    dbrx,
    deepseek_v4,
    fused,
    gate_up_down,
    gpt_oss,
    granite,
    linear_attention,
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
)
"""Every layout as its producer stores it, without what other libraries make of it."""

CODED = tuple(form.coded(coding) for form in PLAIN if form.is_plain for coding in CODINGS if coding.codes(form.family.name, form.stored))
FORMATS: tuple[Format, ...] = (*PLAIN, *CODED)
"""Every layout, and every plain one with its matrices quantized: `"qwen3-moe/hub+fp8-block"`."""

FAMILIES: tuple[Family, ...] = tuple({form.family.name: form.family for form in FORMATS}.values())


def formats() -> tuple[Format, ...]:
    """Every format that moeglot knows."""
    return FORMATS


def by_name(name: str) -> Format:
    """`"gpt-oss/openai"` -> its Format; raises `UsageError` with the names that are known."""
    for form in FORMATS:
        if form.name == name:
            return form
    near = [form.name for form in FORMATS if form.family.name == name.partition("/")[0]] or get_close_matches(name, [form.name for form in FORMATS])
    known = "known: " + ", ".join(near) if near else f"known are {len(PLAIN)} layouts of {len(FAMILIES)} families, and their quantized variants"
    raise UsageError(f"{name!r} is not a format", known, "run `moeglot formats` for what each one is")


def of_family(family: Family) -> tuple[Format, ...]:
    """The formats in which this family is stored."""
    return tuple(form for form in FORMATS if form.family == family)
