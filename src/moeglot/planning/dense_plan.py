"""Which tensors that are no experts go where: under which name, joined in which order, none left and none used twice."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.dense import DecodedTensor, DenseTensor, HubTensor
from moeglot.checkpoints.divided import Divided
from moeglot.checkpoints.hub_names import CHECK
from moeglot.codings.coding import said
from moeglot.codings.served import cache_scheme, has_cache, is_of_cache
from moeglot.errors import TensorMismatch
from moeglot.family import dig
from moeglot.files.shards import Slot
from moeglot.format import HEAD_DIM, Dense, Format
from moeglot.planning.merging import Change
from moeglot.planning.targets import float_type, producer
from moeglot.share import Rank, Share


def dense_tensors(
    source: Checkpoint, target: Format, dtype: str | None, change: Change | None, stays: bool, words: int | None = None
) -> dict[str, tuple[DenseTensor, ...]]:
    """Key in the target -> the Hub tensors whose rows it holds. `stays`: quantized ones stay so. `words`: how many rows the embedding of the whole model is to
    have, if padding is added.
    """
    left = dict[str, DenseTensor](source.dense) if stays else source.decoded(dtype or float_type(source))
    left = change.dense(left) if change else left
    if not stays and has_cache(declared := said(source.source.config)) and not cache_scheme(declared, producer(target)):
        left = {name: tensor for name, tensor in left.items() if not is_of_cache(name)}  # scales of what the target's config.json does not declare
    made: dict[str, tuple[DenseTensor, ...]] = {}
    taken: list[tuple[Dense, dict[str, str]]] = []
    for line, braces in _lines(source, left, target):
        if target.closed and int(braces.get("layer", 0)) >= len(source.stage):
            continue  # a layer for multi-token prediction, or one that config.json does not know
        names = [name.format(**braces) for name in line.hub]
        found = [left.pop(name) for name in names if name in left]
        if len(found) != len(names):
            raise TensorMismatch(
                f"{line.key.format(**braces)} needs {', '.join(set(names) - {tensor.name for tensor in found})}",
                f"{target.name} always has it ({target.source}); {source.known}",
                "choose another target format",
            )
        if len({(tensor.dtype, tensor.shape[1:]) for tensor in found}) > 1:
            raise TensorMismatch(f"{names[0]} and its siblings differ in dtype or columns", source.known, "choose another target format")
        if length := line.contradicted(source.config, found[0].shape):
            raise TensorMismatch(f"{found[0].name}: {list(found[0].shape)}, and config.json says {length}", source.known, CHECK)
        _check_heads(source, line, found)
        made[line.key.format(**braces)] = tuple(_padded(source, line, tensor, words) if words and line.padded else tensor for tensor in found)
        taken.append((line, braces))
    if left and (target.config.only or target.closed):
        more = f" ({len(left) - 1} more)" if len(left) > 1 else ""
        raise TensorMismatch(f"{next(iter(left))}: {target.name} has no place for it{more}", f"its names: {target.source}", "choose another target format")
    if target.closed:
        _check_layers(source, target, taken)
    for form in (source.format, target):
        _check_ends(source, form, {part.name for parts in made.values() for part in parts} | left.keys())
    return made | {name: (tensor,) for name, tensor in left.items()}


def left_aside(source: Checkpoint) -> dict[str, dict[str, int]]:
    """Stored tensor -> how many `rows` of it hold no word, as config.json counts them, so that nobody reads them, and `of` how many."""
    whole = source.whole if isinstance(source, Divided) else source
    padded = [tensor for tensor in whole.dense.values() if (line := whole.format.dense_line(tensor.origin)) and line[0].padded]
    rows = {tensor.origin: (tensor.shape[0], tensor.entry.shape[0]) for tensor in padded if not whole.share}
    return {key: {"rows": there - meant, "of": there} for key, (meant, there) in rows.items() if meant < there}


def _check_layers(source: Checkpoint, target: Format, taken: list[tuple[Dense, dict[str, str]]]) -> None:
    """Raises `TensorMismatch` for a tensor that some layers have, and another of their kind lacks."""
    found: dict[tuple[Dense, str], set[int]] = {}
    for line, braces in taken:
        if "layer" in braces:
            found.setdefault((line, braces.get("rest", "")), set()).add(int(braces["layer"]))
    for (line, rest), there in found.items():
        kind = [layer for layer in range(len(source.stage)) if not line.only or (layer in source.layers) == (line.only == "sparse")]
        if lacking := [layer for layer in kind if layer not in there]:
            wrong = f"{line.hub[0].format(layer=source.number(lacking[0]), rest=rest)}: missing, and layer {source.number(min(there))} has it"
            which = {"": "", "sparse": " with experts", "dense": " without experts"}[line.only]
            raise TensorMismatch(wrong, f"{target.name} has it in every layer{which} ({target.source}); {source.known}", "fetch the missing shard")


def _check_ends(source: Checkpoint, form: Format, there: Collection[str]) -> None:
    """Raises `TensorMismatch` for the embedding, the last norm or the output, where a format knows their names and they are not there."""
    pp = source.share.pp if source.share else Rank()
    for line in form.dense:
        here = not line.stage or pp.rank == (0 if line.stage == "first" else pp.size - 1)
        if line.needed and here and line.hub[0] not in there and not (line.unless and dig(source.config, line.unless) is True):
            said = f"; config.json says {line.unless} = {dig(source.config, line.unless)}" if line.unless else ""
            known = f"{form.name} has it as {line.key}{said}; {source.known}"
            raise TensorMismatch(f"{line.hub[0]}: missing", known, "fetch the missing shard, or the producer's config.json if that is wrong")


def _padded(source: Checkpoint, line: Dense, tensor: DenseTensor, words: int) -> DenseTensor:
    """Words, or what predicts them, with as many rows more as this process is to have."""
    rows = len(Share(source.share.tp if source.share else Rank(), words=words).padded_words(int(dig(source.config, line.padded))))
    return tensor.part(tensor.name, 0, range(rows)) if rows > tensor.shape[0] and isinstance(tensor, HubTensor | DecodedTensor) else tensor


def _check_heads(source: Checkpoint, line: Dense, tensors: list[DenseTensor]) -> None:
    """Raises `TensorMismatch` if the rows of tensors that take turns are not as many as config.json's heads say."""
    if not line.heads:
        return
    rows = tuple(tensor.shape[0] for tensor in tensors)
    shares, groups = line.shares(source.config, sum(rows), source.tp), line.groups(source.config, source.tp)
    if shares is None or rows != tuple(groups * share for share in shares):
        told = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in tensors)
        said = ", ".join(f"{key} = {dig(source.config, key)}" for key in dict.fromkeys((*line.heads, HEAD_DIM)))
        raise TensorMismatch(f"{told}: their rows are not those of the heads", f"config.json says {said}", CHECK)


def _lines(source: Checkpoint, names: Iterable[str], target: Format) -> Iterator[tuple[Dense, dict[str, str]]]:
    """Each line of the target with what stands in its braces: for every tensor that it takes, and for what the target cannot do without."""
    found = [taken for name in names if (taken := target.from_hub(name, source.layers))]
    if target.config.only:
        found += [(line, {"layer": str(layer)} if "{layer}" in line.key else {}) for line in target.dense for layer in source.layers]
    seen = set()
    for line, braces in found:
        if (key := line.key.format(**braces)) not in seen:
            seen.add(key)
            yield line, braces


def dense_slot(key: str, parts: tuple[DenseTensor, ...]) -> Slot:
    first = parts[0].shape
    return Slot(key, parts[0].dtype, first if len(parts) == 1 else (sum(part.shape[0] for part in parts), *first[1:]))
