"""Which arguments of `from_pretrained` `load` does not pass on, since it settles them itself or nothing would come of them; and what to type instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moeglot.errors import UsageError

CHECKPOINT = "the config and the tensors come from the checkpoint"
FETCHED = "moeglot reads a folder, or has huggingface_hub fetch a Hub id"
FETCH = "pass a folder; `hf download ID --local-dir FOLDER{}` fetches one"
OURS = {
    **dict.fromkeys(("config", "state_dict", "output_loading_info", "ignore_mismatched_sizes"), (CHECKPOINT, "leave it out")),
    "torch_dtype": (CHECKPOINT, "leave it out; dtype= says the float type"),
    **dict.fromkeys(("quantization_config", "load_in_4bit", "load_in_8bit"), (CHECKPOINT, "leave it out; native=True keeps what is encoded, encode= encodes")),
    **dict.fromkeys(("gguf_file", "from_tf", "from_flax", "weights_only"), ("moeglot reads safetensors", "leave it out, and pass the folder that holds them")),
    "use_safetensors": ("moeglot reads safetensors, and never a pickle", "leave it out"),
    "subfolder": (FETCHED, "pass the folder itself, PATH/SUBFOLDER; `hf download ID --local-dir FOLDER` fetches all of a repository"),
    "variant": (FETCHED, "pass the file itself, PATH/model.VARIANT.safetensors"),
    "key_mapping": ("the names are those of the format", "leave it out; format= says which format it is"),
    "generation_config": ("generation_config.json beside the weights says it", "leave it out, and set model.generation_config afterwards"),
    **dict.fromkeys(("adapter_kwargs", "adapter_name"), (CHECKPOINT, "leave it out; moeglot.nn.load_adapter(model, path) adds an adapter afterwards")),
    **{name: (FETCHED, FETCH.format(f" --{name.replace('_', '-')} ...")) for name in ("revision", "cache_dir", "token")},
    "use_auth_token": (FETCHED, FETCH.format(" --token ...")),
    "force_download": (FETCHED, FETCH.format(" --force-download")),
    "local_files_only": (FETCHED, "set HF_HUB_OFFLINE=1 in the environment, or pass a folder"),
    "proxies": (FETCHED, "set HTTPS_PROXY in the environment, or pass a folder"),
}
"""Argument of `from_pretrained` -> why it is not passed on, and what to type instead."""


def check(options: Mapping[str, Any]) -> None:
    """Raises `UsageError` for the first that is not passed on, and for a map that names nothing."""
    if options.get("device_map") == {}:
        raise UsageError("device_map names no place", "it is empty", "name every module, or '' for all; or leave it out: the CPU computes")
    if taken := sorted(OURS.keys() & options.keys()):
        raise UsageError(f"{taken[0]} is settled by moeglot.load", *OURS[taken[0]])


@contextmanager
def named(options: Mapping[str, Any], known: str) -> Iterator[None]:
    """Raises `UsageError` where the library takes an option for one of the class, as it does with what config.json says."""
    try:
        yield
    except TypeError as error:
        if wrong := next((name for name in options if f"__init__() got an unexpected keyword argument '{name}'" in str(error)), None):
            raise UsageError(
                f"{wrong} is no argument of from_pretrained",
                f"what a model is, config.json says; {known}",
                "leave it out; where config.json should say it, change a copy of the folder",
            ) from error
        raise
