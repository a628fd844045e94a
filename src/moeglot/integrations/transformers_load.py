"""A live transformers model from any checkpoint: which of the family's layouts the installed version's modules hold, and whether all of it arrived.

One way for 4.57, 5.5 and 5.23, on any device and in any float type: the concrete class, a config without `quantization_config`, and the documented
`state_dict=` of `from_pretrained`. Nothing is patched, and no private attribute is used to load.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.dtypes import DType, by_torch_name
from moeglot.errors import MoeglotError, NotVerified, UsageError
from moeglot.experts import Expert
from moeglot.files.source import read_json
from moeglot.format import Format
from moeglot.formats import of_family
from moeglot.integrations import transformers_native, transformers_options, transformers_parallel, transformers_placement
from moeglot.integrations.transformers import BUILDING, READS, experts_of, in_our_words, key_name, model_class
from moeglot.integrations.transformers_state import Lazy, expert_names, give_back, idle_rows, refusal, state_dict
from moeglot.planning.plan import Plan, plan
from moeglot.planning.targets import float_type, short_of
from moeglot.share import Rank
from moeglot.verification.certificate import write_json

SHOWN = 3
LOADED = ("float32", "bfloat16", "float16")
"""The float types that a model computes in."""
INSTALLED = f"transformers {transformers.__version__}"


@dataclass(frozen=True)
class Native:
    """How the experts stay encoded: as on disk or as `encode` says, except in the modules of `kept`; computed by `backend`."""

    encode: str | None = None
    kept: tuple[str, ...] = ()
    backend: str = "auto"


def load(
    path: Checkpoint | str | Path,
    dtype: str | torch.dtype | None,
    device: str | torch.device | int | None,
    format: str | Format | None,
    options: Mapping[str, Any],
    native: Native | None = None,
    share: Rank | None = None,
) -> Any:
    """See `moeglot.load`."""
    transformers_options.check(options)
    for place in (device, *_devices(options.get("device_map"))):
        _check_device(place)
    checkpoint = path if isinstance(path, Checkpoint) else open(path, format)
    mine = share.of(checkpoint.sizes["e"]) if share else None
    kind = _dtype(checkpoint, dtype)
    config = config_of(checkpoint)
    cls = model_class(config)
    with torch.device("meta"), BUILDING, in_our_words(checkpoint):
        empty = cls(config)
    if not native:
        _check_numbers(checkpoint, empty)
    modules = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    chosen = layout(checkpoint, modules, kind)
    state = state_dict(chosen, kind) | idle_rows(chosen, modules, kind)
    places = {name: options[name] for name in transformers_placement.PLACING if native and name in options}
    if native:
        transformers_native.check(chosen, modules, empty, native.encode, native.kept)
        _check_native(chosen, modules, device, places, share)
        transformers_native.hollow(chosen, state)
    placement = {} if native else transformers_parallel.options(share) if share else _placement(device, options)
    if share and not native and (device is not None or options.keys() & placement.keys()):
        raise UsageError("device, with ep_size", "each process has the device that transformers gives it", "leave device and distributed_config out")
    own = {name: value for name, value in options.items() if name not in places}
    given = {**own, **placement, "dtype": kind.torch, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with BUILDING, transformers_options.named(own, checkpoint.known):
            model, info = cls.from_pretrained(None, config=config, state_dict=dict(state), **given)
    finally:  # whatever the library makes of it, the cause is what a tensor refused
        if refused := refusal(state):
            raise refused
    _check(checkpoint, chosen, state, model, info)
    _check_dtypes(kind, model)
    _finish(checkpoint, model)
    if native:
        transformers_native.swap(checkpoint, chosen, model, native.encode, native.kept, native.backend, mine)
        transformers_placement.place(model, device, places)
    if share:
        transformers_parallel.require_divided(model, expert_names(chosen), share.size)
    if share and native:
        for layer in checkpoint.layers:
            module = model.get_submodule(transformers_native.path_of(chosen, layer))
            transformers_parallel.dispatch(share, module, torch.device(device or "cpu"))
    checkpoint.source.check_unchanged()
    give_back()
    return model


def _check_native(chosen: Plan, modules: Mapping[str, tuple[int, ...]], device: Any, places: Mapping[str, Any], share: Rank | None) -> None:
    """Raises `UsageError` where encoded experts cannot go."""
    if "device_map" not in places:
        return
    if share:
        raise UsageError(f"device_map={places['device_map']} with ep_size", "each process has a device of its own", "pass device=")
    _one_of(device, places)
    transformers_placement.check(places["device_map"], [transformers_native.path_of(chosen, layer) for layer in chosen.source.layers], modules)


def _check_numbers(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Raises `UsageError` where the modules compute with other numbers than config.json says: gpt-oss's before 5.23 have their own."""
    for layer, (module, *_) in experts_of(model).items():
        said = Expert.of(checkpoint.format.family, checkpoint.config, layer).numbers
        for name, number in said.items():
            if (found := getattr(module, name, None) or number) != number:
                wrong = f"{INSTALLED} computes {checkpoint.format.family.name} with {name} {found:g}, config.json says {number:g}"
                known = f"its {type(module).__name__} has a number of its own; the experts of layer {layer} would answer otherwise, without a word"
                raise UsageError(wrong, known, "pass native=True, install a newer transformers (5.23 reads it), or check config.json against the producer's")


def _dtype(checkpoint: Checkpoint, dtype: str | torch.dtype | None) -> DType:
    """The float type to load in; without a word, the one that config.json declares."""
    found = by_torch_name(str(dtype).removeprefix("torch.") if dtype not in (None, "auto") else float_type(checkpoint))
    if found.torch_name not in LOADED:
        known = f"a model is loaded in {', '.join(LOADED)}"
        raise UsageError(f"dtype {found.torch_name}: no model computes in it", known, "pass dtype='bfloat16' or 'float32'")
    return found


def config_of(checkpoint: Checkpoint) -> Any:
    """The config under the Hub's keys, which every version reads, as the installed one understands a file of it; not quantized."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", checkpoint.config)
        with in_our_words(checkpoint):
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def layout(checkpoint: Checkpoint, modules: Mapping[str, tuple[int, ...]], dtype: DType) -> Plan:
    """The checkpoint in the layout of the live modules, so that nothing is left to convert; if none is theirs, in the Hub's, which the library converts.

    `modules`: name -> shape of the live tensors.
    """
    plans = [plan(checkpoint, form.name, encode=dtype.torch_name) for form in layouts(checkpoint.format) if not short_of(checkpoint, form)]
    if not plans:
        raise UsageError(
            f"{INSTALLED} reads no format of {checkpoint.format.family.name} that {checkpoint.format.name} can become",
            checkpoint.known,
            "install another version of transformers",
        )
    for found in plans:
        if all(modules.get(name) == shape for name, shape in expert_names(found).items()):
            return found
    return plans[-1]


def layouts(source: Format) -> list[Format]:
    """The plain layouts of a family that the installed version reads, those of version 5's own modules first.

    Qwen3-VL's has the Hub's names and other axes; given the Hub's, version 5 turns a tensor or not by its shape, and a square fits both ways.
    """
    plain = [form for form in of_family(source.family) if form.transformers in READS and form.is_plain]
    return sorted((form for form in plain if form.alone == source.alone), key=lambda form: READS.index(form.transformers))


def _placement(device: str | torch.device | int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    if device is None:
        return {}
    _one_of(device, options)
    return {} if torch.device(device) == torch.device("cpu") else {"device_map": {"": device}}


def _devices(device_map: Any) -> Sequence[Any]:
    """The CUDA devices that a device_map names; whether its other places are any, whoever places the model says."""
    places = [*device_map.values()] if isinstance(device_map, Mapping) else [device_map]
    return [place for place in places if str(place).startswith("cuda")]


def _check_device(device: str | torch.device | int | None) -> None:
    """Raises `UsageError` for a device that is none, or that holds no numbers."""
    if device is None:
        return
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is none that torch knows", str(error).split("\n")[0], "pass cpu, cuda or cuda:1, or leave it out") from error
    count = torch.cuda.device_count()
    if found.type == "meta":
        raise UsageError("device 'meta' holds no numbers", "a model without all its tensors is not returned", "name a device that computes")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise UsageError(f"there is no device {device!r}", f"torch {torch.__version__} sees {count or 'no'} CUDA devices", "leave it out: the CPU computes")


def _one_of(device: Any, options: Mapping[str, Any]) -> None:
    if device is not None and "device_map" in options:
        raise UsageError(f"device={device} and device_map={options['device_map']}", "both say where the model goes", "pass one of them")


# --- did all of it arrive? -------------------------------------------------------------------------------------------------------------


def _check(checkpoint: Checkpoint, chosen: Plan, state: Mapping[str, Lazy], model: Any, info: Mapping[str, Any]) -> None:
    """Raises where a tensor is missing, left over, not of its module's shape, never read, or a placeholder."""
    if refused := refusal(state):
        raise refused
    for kind, found in info.items():
        names = sorted(map(key_name, found))
        if kind == "unexpected_keys":
            names = [name for name in names if not checkpoint.format.family.is_carried(name, checkpoint.config)]
        if names:
            raise _partial(checkpoint, f"{len(names)} {kind.replace('_', ' ')}", names)
    experts = expert_names(chosen).keys()
    if unread := [name for name in state if name in experts and not state[name].reads]:
        raise _partial(checkpoint, f"{len(unread)} tensors of experts that it never read", unread)
    places = getattr(model, "hf_device_map", {})
    tensors = (*model.named_parameters(), *model.named_buffers())
    placeholders = [name for name, tensor in tensors if tensor.is_meta and not transformers_placement.is_offloaded(name, places)]
    if placeholders:
        raise _partial(checkpoint, f"{len(placeholders)} placeholders without numbers (meta device)", placeholders)


def _check_dtypes(kind: DType, model: Any) -> None:
    """Raises `NotVerified` for parameters in another float type: some that must not be narrow are float32 in any model."""
    wrong = {name: tensor.dtype for name, tensor in model.named_parameters() if tensor.is_floating_point() and tensor.dtype not in (kind.torch, torch.float32)}
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise NotVerified(
            f"{INSTALLED} builds the model with {len(wrong)} parameters in another dtype than {kind.torch_name}, first {name} in {dtype}",
            "while it builds a model it sets torch's default dtype for the whole process, and another thread has set it meanwhile",
            "load it again while no other thread builds a model or sets the default dtype",
        )


def _partial(checkpoint: Checkpoint, what: str, names: list[str]) -> MoeglotError:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    writer = checkpoint.source.config.get("transformers_version")
    other = writer and f"transformers {writer}" != INSTALLED
    return NotVerified(
        f"{INSTALLED} builds the model with {what}: {', '.join(names[:SHOWN])}{more}",
        checkpoint.known + (f"; config.json was written by transformers {writer}, whose modules may have other names" if other else ""),
        f"{'load it with that release, or ' if other else ''}check config.json against the producer's; a model without all its tensors is not returned",
    )


def _finish(checkpoint: Checkpoint, model: Any) -> None:
    """What lies beside the weights and belongs to a model: how it generates, and where it comes from, which the library forgets."""
    model.config.name_or_path = checkpoint.source.reference
    beside = checkpoint.source.home / "generation_config.json"
    if model.can_generate() and not checkpoint.source.single and beside.is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_dict(read_json(beside))
        except (TypeError, ValueError) as error:
            known = " ".join(str(error).split())
            raise UsageError(
                f"generation_config.json: {INSTALLED} does not take it", known, "correct it, or remove it: it says nothing of the weights"
            ) from error
