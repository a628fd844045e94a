"""config.json is part of a format: the same facts under the Hub's keys, which every transformers reads, and under the producer's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moeglot.codings.coding import BESIDE
from moeglot.errors import Contradiction
from moeglot.family import Config, Family, dig
from moeglot.format import ConfigForm, Format

BOOKKEEPING = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype", "transformers_version", "use_cache"),
        *(
            "initializer_range",
            "initializer_factor",
            "output_router_logits",
            "router_aux_loss_coef",
            "aux_loss_alpha",
            "router_z_loss_coef",
            "router_jitter_noise",
        ),
        *("attention_dropout", "hidden_dropout", "dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "dropout_rate", "classifier_dropout"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
    }
)
"""Keys of config.json that say who wrote a checkpoint, how it is trained and where a text ends; one token computes the same without them."""

WHOLE = ("architectures", "audio_config", "auto_map", "model_type", "transformers_version", "vision_config")
"""Keys at the top of config.json that are of no language model, though its keys may be there, too."""


def hub_config(config: Config, form: Format) -> dict[str, Any]:
    """config.json of this format -> the same facts under the keys of the family's Hub release (transformers 4 reads them, and so does 5)."""
    spec, hub = form.config, _copied(dict(config))
    if spec.only:
        hub = {}
        for path, value in spec.hub_constants.items():
            _put(hub, path, value)
        for path, key in spec.names.items():
            if key in config:
                _put(hub, path, config[key])
    for part in (hub, hub.get("text_config")):
        if isinstance(part, dict):
            for key in ("quantization_config", "compression_config", *BESIDE):
                part.pop(key, None)
    for key in spec.told:
        hub.pop(key, None)
    _gather(hub, form.family)
    _rename_rope(hub)
    _rename_words(hub, form.family)
    return _rename_sizes(hub, form.family)


def _copied(said: Any) -> Any:
    """As `copy.deepcopy`, of what JSON can say: it is done for each layout that a folder may have."""
    if isinstance(said, dict):
        return {key: _copied(value) for key, value in said.items()}
    return [_copied(item) for item in said] if isinstance(said, list) else said


def _gather(hub: dict[str, Any], family: Family) -> None:
    """A part whose keys are elsewhere is put together as its reader does; where they were they stay, for readers that look there alone."""
    for part, places in family.elsewhere.items():
        if hub.get(part) is None:
            found = {key: value for key, value in hub.items() if (key in places if places else key not in WHOLE)}
            parts = [value if key in places and isinstance(value, dict) else {key: value} for key, value in found.items()]
            hub.update({part: _copied({key: value for said in parts for key, value in said.items()})} if parts else {})


def _rename_words(hub: dict[str, Any], family: Family) -> None:
    """transformers 5 has words of its own for kinds of layers, adds keys of its own to every part, and writes infinity as a mapping; 4 refuses these."""
    for path, words in family.words.items():
        if isinstance(said := dig(hub, path), list):
            _put(hub, path, [words.get(word, word) for word in said])
    for path, keys in family.parts.items():
        if isinstance(part := dig(hub, path), dict):
            _put(hub, path, {key: value for key, value in part.items() if key in keys})
    for key, value in hub.items():
        if isinstance(value, list) and any(isinstance(item, dict) and item.keys() == {"__float__"} for item in value):
            hub[key] = [float(item["__float__"]) if isinstance(item, dict) else item for item in value]


def _rename_rope(hub: dict[str, Any]) -> None:
    """transformers 5 keeps `rope_parameters`; 4 reads `rope_theta`, `partial_rotary_factor` and `rope_scaling`. So does 5, but where these say "default" it
    takes the default of the model's class, and some classes do not look at them: `rope_parameters` stays, which 4 does not look at.
    """
    for part in hub.values():
        if isinstance(part, dict):
            _rename_rope(part)
    rope = hub.get("rope_parameters")
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return  # one set for each kind of layer: 4 has no names for those
    scaling = dict(rope)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in scaling:
            hub[key] = scaling.pop(key)
    hub["rope_scaling"] = None if scaling in ({}, {"rope_type": "default"}) else scaling


def _rename_sizes(hub: dict[str, Any], family: Family) -> dict[str, Any]:
    for letter, (first, *others) in family.sizes.items():
        for key in others if letter not in family.first_wins else ():
            value = dig(hub, key)
            if value is not None and dig(hub, first) in (None, value):
                _put(hub, first, value)
                _drop(hub, key)
            _rename_in_text(hub, key.rpartition(".")[2], first.rpartition(".")[2])
    return hub


def _rename_in_text(part: dict[str, Any], key: str, first: str) -> None:
    """Other language models in the same file (Qwen3-Omni's talker) call the same fact by the same names."""
    for name, inner in part.items():
        if isinstance(inner, dict):
            if name == "text_config" and key in inner and inner.get(first) in (None, inner[key]):
                inner[first] = inner.pop(key)
            _rename_in_text(inner, key, first)


def _drop(target: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        target = target[parent]
    del target[last]


def write_config(hub: Config, form: Format) -> dict[str, Any]:
    """A config in the Hub's form -> config.json of this format; raises `Contradiction` where the format has no place for a fact."""
    spec = form.config
    if not spec.only:
        told = {key: value for key, value in spec.told.items() if value is not None}
        return {**hub, **spec.constants, **told, **({"quantization_config": dict(spec.quantization)} if spec.quantization else {})}
    _check_constants(hub, spec, form)
    found = {key: dig(hub, path) for path, key in spec.names.items()}
    given = {spec.names[path]: value for path, value in spec.defaults.items()}
    return {key: given.get(key) if value is None else value for key, value in found.items() if value is not None or key in given}


def _check_constants(hub: Config, spec: ConfigForm, form: Format) -> None:
    for path, value in spec.hub_constants.items():
        said = dig(hub, path)
        if said is not None and said != value:
            raise Contradiction(
                f"config.json says {path} = {said!r}; {form.name} has no place for it",
                f"its reader takes {value!r} for granted ({form.source})",
                "choose another target format",
            )


def _put(target: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value


def differing(mine: Config, theirs: Config, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value here, value there) of two configs in the Hub's form, where both say something and not the same; what no model computes with is left out."""
    for key in [key for key in mine if key in theirs and key not in BOOKKEEPING and not (path and key == "model_type")]:
        here, there = mine[key], theirs[key]
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from differing(here, there, f"{path}{key}.")
        elif None not in (here, there) and here != there:
            yield f"{path}{key}", here, there


def against_default(mine: Config, theirs: Config, family: Family) -> Iterator[tuple[str, Any, Any]]:
    """As `differing`, of what experts compute with, where one config alone says it: the other means the family's default."""
    said = family.activation
    for key, default in (said.function, *said.numbers.values()):
        here, there = (dig(config, key) if key else None for config in (mine, theirs))
        if key and (here is None) != (there is None):
            value = here if there is None else there
            each = [one or float("inf") for one in value] if isinstance(value, list) else [value]  # 0 and null are no limit
            if any(one != default for one in each):
                yield key, default if here is None else here, default if there is None else there


def alone(mine: Config, theirs: Config, path: str = "") -> Iterator[str]:
    """The keys that one of two configs in the Hub's form says and the other does not, whatever the other's reader takes then."""
    for key in [key for key in {**mine, **theirs} if key not in BOOKKEEPING]:
        here, there = mine.get(key), theirs.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from alone(here, there, f"{path}{key}.")
        elif (here is None) != (there is None):
            yield f"{path}{key}"


def declared_dtype(config: Config) -> str | None:
    """config.json's own word on its float type."""
    return config.get("dtype") or config.get("torch_dtype")
