"""Which format is this, and how do we know: the user, our own mark, config.json, key names and dtypes, in this order; never a guess."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moeglot.checkpoints.config import hub_config
from moeglot.checkpoints.declared import First, apart, first_tensors, is_declared, lines_there, refuted, settled, unknown
from moeglot.codings.coding import said as quantization
from moeglot.codings.coding import told
from moeglot.encoding import agree
from moeglot.errors import AmbiguousFormat, Contradiction, UnknownFormat
from moeglot.family import dig
from moeglot.files.identity import SOURCE
from moeglot.files.source import Source, read_source
from moeglot.format import Format
from moeglot.formats import PLAIN, by_name, of_family, variants
from moeglot.layout import Sizes, Stored
from moeglot.share import SHARE, Share

MARK = "moeglot.format"
"""Key of our mark in a safetensors header; `moeglot.share` and `moeglot.source` are those of files that are one process's."""
NO_CONFIG = "there is no config.json"
LISTED = 6
"""Formats that a refusal says no to one by one; of more, those whose names of tensors are not in the file go without saying."""


Read = dict[str, tuple[Sizes, tuple[int, ...]]]
"""Layout -> the sizes and layers in config.json, which its quantized variants read alike."""


@dataclass(frozen=True)
class Refutation:
    """Why something is not a format. `by`: what speaks against it; if only shapes or config.json do, its names and dtypes are all there; "quantization":
    they are, and what is declared is no coding that we know; "strange": some are, and it is none, or not one for all roles; "declared": some are, and it is
    this one; "asked": nothing does, but only its producer can say that it is this one.
    """

    by: Literal["container", "family", "names", "dtypes", "shapes", "config.json", "quantization", "strange", "declared", "asked"]
    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class Identification:
    """`format`, or None with the `candidates` that remain; `evidence` for it and what was `ruled_out`, each with its reason."""

    format: Format | None
    evidence: tuple[str, ...]
    candidates: tuple[Format, ...]
    ruled_out: Mapping[str, Refutation]

    def _first(self, by: str) -> tuple[str, Refutation] | None:
        return next(((form, refutation) for form, refutation in self.ruled_out.items() if refutation.by == by), None)

    def settled(self, name: str) -> Format:
        """The format; raises `AmbiguousFormat` or `UnknownFormat` with what to type."""
        if self.format:
            return self.format
        if self.candidates:
            names = [form.name for form in self.candidates]
            raise AmbiguousFormat(
                f"{name}: the format is {' or '.join(names)}",
                "neither config.json, key names nor dtypes decide; " + "; ".join(self.evidence),
                f"ask its producer, then pass --format {names[0]} (or another of these)",
            )
        if NO_CONFIG in self.evidence:
            raise UnknownFormat(
                f"{name}: there is no config.json", "it says what the model is and how large it is", "put the producer's config.json beside the tensors"
            )
        kinds = ("shapes",) if self._first("declared") else ("shapes", "config.json")  # what is declared is nearer than what has the same names
        found = {form: refutation for form, refutation in self.ruled_out.items() if refutation.by in kinds}
        near = {form: refutation for form, refutation in found.items() if not by_name(form).asked}
        if len(near) == 1:
            (form, refutation), *_ = near.items()
            fits = [f"pass --format {form} if its producer {why}; else " for form, why in self.ruled_out.items() if why.by == "asked"]
            raise Contradiction(
                f"{name}: config.json and the tensors contradict each other: {refutation}",
                f"key names and dtypes are those of {form}; {'; '.join(self.evidence)}",
                f"{''.join(fits)}take config.json from the producer; "
                "if it is right, the file is in no format that moeglot knows, and no size is taken from a shape",
            )
        if strange := self._first("quantization") or self._first("strange"):
            form, why = strange
            alike = f"key names and dtypes are those of {form}" if why.by == "quantization" else f"the modules are named as in {form.partition('+')[0]}"
            raise UnknownFormat(
                f"{name}: the experts are quantized in a way that moeglot does not know",
                f"{why}; {alike}; {'; '.join(self.evidence)}",
                "if config.json lacks something, take the producer's: no size is taken from a shape; else have its own library decode it first",
            )
        if said := self._first("declared"):
            raise Contradiction(
                f"{name}: config.json and the tensors contradict each other: {said[1]}",
                f"quantization_config declares what {said[0]} has, and some of its tensors are there; {'; '.join(self.evidence)}",
                "take config.json from the producer; if it is right, fetch the file again",
            )
        known = {form: refutation for form, refutation in self.ruled_out.items() if refutation.by not in ("container", "family")}
        if len(known) > LISTED:  # those with the right names are the nearest
            known = {form: refutation for form, refutation in known.items() if refutation.by != "names"} or dict(list(known.items())[:LISTED])
        if fitting := next((form for form, refutation in known.items() if refutation.by == "asked"), None):
            wrong = f"{name}: names and shapes are those of {fitting}, and nothing says that it is that"
            raise UnknownFormat(wrong, "; ".join(self.evidence), f"pass --format {fitting} if its producer {known[fitting]}")
        if known:
            raise UnknownFormat(
                f"{name}: the experts are stored in no format that moeglot knows",
                "; ".join((*self.evidence, *(f"not {form}: {why}" for form, why in known.items()))),
                "run `moeglot formats` for what is known; docs/add-a-format.md shows how to declare another",
            )
        families = ", ".join(dict.fromkeys(f"{kind} ({form.family.name})" for form in PLAIN for kind in form.family.model_types))
        raise UnknownFormat(
            f"{name}: a family that moeglot does not know",
            f"{'; '.join(self.evidence)}; known model types: {families}",
            "pass --format if it is stored as one of these; docs/add-a-format.md shows how to declare a family",
        )


def identify(path: Source | str | Path, format: str | Format | None = None) -> Identification:
    """Ask the user, our mark, the producer's marks. Raises `Contradiction` where two declarations disagree."""
    source = path if isinstance(path, Source) else read_source(path, headers_only=True)
    source = source.ranks[0] if source.ranks else source
    if format is not None:
        form = settled(by_name(format), source)
        return Identification(form, (f"--format {form.name}",), (form,), {})
    marks = {mark[MARK] for mark in source.metadata if MARK in mark}
    if len(marks) > 1:
        raise Contradiction(f"the shards name {len(marks)} formats", f"their headers say {sorted(marks)}", "they come from different runs; convert again")
    read: Read = {}
    ruled_out = {form.name: refutation for form in PLAIN if (refutation := _refutation(form, source, read) or _unasked(form))}
    layouts = [form for form in PLAIN if form.name not in ruled_out or ruled_out[form.name].by not in ("container", "family")]
    known = [*layouts, *(variant for form in layouts for variant in variants(form))]
    ruled_out |= {form.name: refutation for form in known[len(layouts) :] if (refutation := _refutation(form, source, read))}
    if marks:
        form = by_name(marks.pop())
        if form.name in ruled_out and ruled_out[form.name].by != "asked":
            raise Contradiction(
                f"the safetensors header says {form.name}, the files contradict it",
                str(ruled_out[form.name]),
                "the folder was changed after moeglot wrote it; pass --format if you know what it is now",
            )
        return Identification(settled(form, source), (f"the safetensors header says {MARK} = {form.name}",), (form,), ruled_out)
    if sum(form.name not in ruled_out for form in known) > 1:
        ruled_out |= {form.name: refutation for form in known if form.name not in ruled_out and (refutation := _misnamed(form, source))}
    candidates = tuple(settled(form, source) for form in known if form.name not in ruled_out)
    evidence = tuple(_producer_marks(source, candidates))
    return Identification(candidates[0] if len(candidates) == 1 else None, evidence, candidates, ruled_out)


def written_marks(form: Format, share: Share | None, source: Source) -> dict[str, str]:
    """What we say in the header of each safetensors file that we write. `source`: what it is made of."""
    return {MARK: form.name, **({SHARE: share.mark} if share else {}), **({SOURCE: source.identity} if share and source.identity else {})}


def _producer_marks(source: Source, candidates: tuple[Format, ...]) -> Iterator[str]:
    if not source.config:
        yield NO_CONFIG
    elif model_type := source.config.get("model_type"):
        yield f"config.json says model_type = {model_type}"
    else:
        yield "config.json has no model_type"
    if dig(source.config, "quantization_config.quant_method"):
        yield told(quantization(source.config))
    if source.torch_dist:
        yield ".metadata has a key for each expert" if source.torch_dist == "single" else ".metadata is that of torch.distributed.checkpoint"
    for form in candidates[:1]:
        yield from (f"config.json says {key} = {value}" for key, value in form.config.told.items() if value is not None)
        lines = [(line, line.encoding.parts[0].name) for line in form.all_lines]  # a line that is left alone everywhere has no tensor
        key = next(key for line in lines for key in source.entries if (found := form.match(key)) and found[:2] == line)
        yield f"{key} is {source.entries[key].dtype} {list(source.entries[key].shape)}"


def _refutation(form: Format, source: Source, read: Read) -> Refutation | None:
    """Why this cannot be the format, or None. `read`: what config.json says, of the layouts that were asked before."""
    model_type = source.config.get("model_type")
    if form.config.only:
        if missing := [key for key in form.config.names.values() if key not in source.config]:
            return Refutation("family", f"config.json has no {missing[0]}")
    elif model_type not in form.family.model_types:
        return Refutation("family", f"model_type is {model_type}, not {' or '.join(form.family.model_types)}")
    if (form.container.experts if form.container else "") != source.torch_dist:
        if source.torch_dist and not form.container and not _refutation(form, replace(source, torch_dist=""), read):
            return Refutation("asked", "had torch.distributed.checkpoint save the model")
        return Refutation("container", f"its experts lie {form.container.experts} in a torch_dist folder" if form.container else "it lies in safetensors files")
    if source.share and not form.by_rank:
        return Refutation("container", f"the safetensors header says {SHARE} = {source.share.mark}, and {form.name} is for whole models")
    if form.layout not in read:
        config = hub_config(source.config, form)
        read[form.layout] = form.family.held_sizes(config, source.share), form.family.held_layers(config, source.share)
    sizes, layers = read[form.layout]
    form = form.sized(sizes)
    first = first_tensors(form, source, layers, sizes)
    lines = lines_there(form, source, layers, first)
    for line in lines:
        for part in line.encoding.parts:
            entry = first.get((line.roles, part.name))
            if entry and entry.dtype in part.dtypes:
                continue
            if first and (why := unknown(form, lines, source, first) or apart(form, source, layers)):
                return Refutation("strange", why)
            told = is_declared(form, lines, source, first)
            if not entry:
                return Refutation("declared" if told else "names", f"no tensor is named {line.key}{line.names[part.name]}")
            turned = "" if line.upright or not quantization(source.config) else "; of matrices that lie [in, out], no codes are read"
            return Refutation("declared" if told else "dtypes", f"{entry.name} is {entry.dtype}, not {' or '.join(part.dtypes)}{turned}")
    if wrong := next((key for key, value in form.config.told.items() if source.config.get(key) != value), None):
        return Refutation("config.json", f"{wrong} is {source.config.get(wrong)}, not {form.config.told[wrong]}")
    if why := unknown(form, lines, source, first):
        return Refutation("quantization", why)
    if why := refuted(form, lines, source, layers, first):
        return Refutation("config.json", why)
    fits = settled(form, source)
    there = tuple(line for line in fits.stored if any(line.roles == mine.roles for mine in lines))
    return _shape_refutation(there, sizes, first_tensors(fits, source, layers, sizes) if form.coding else first)


def _unasked(form: Format) -> Refutation | None:
    return Refutation("asked", form.asked) if form.asked else None


def _misnamed(form: Format, source: Source) -> Refutation | None:
    """Why this cannot be the format if only the names of tensors that are no experts tell: one has a name that it has only elsewhere."""
    others = [other for other in of_family(form.family) if other != form]
    for key in source.entries:
        if form.match(key) or form.dense_line(key):
            continue
        if form.from_hub(key) or any((line := other.dense_line(key)) and line[0].hub != (line[0].key,) and not other.from_hub(key) for other in others):
            return Refutation("names", f"{key} has another name there")
    return None


def _shape_refutation(lines: tuple[Stored, ...], sizes: Sizes, first: First) -> Refutation | None:
    for line in lines:
        for part in line.encoding.parts:
            if (entry := first.get((line.roles, part.name))) is None:
                return Refutation("declared", f"no tensor is named {line.key}{line.names[part.name]}")
            if not agree(shape := line.part_shape(part, sizes), entry.shape):
                return Refutation("shapes", f'{entry.name} is {list(entry.shape)}; "{line.axes}" needs {list(shape)}')
    return None
