"""A Hub id: which files of a repository huggingface_hub fetches for us, and what of them is enough to look at it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from moeglot.codings.coding import MODELOPT_FILE
from moeglot.codings.hf_quant_config import told_beside
from moeglot.codings.said_again import check_again
from moeglot.errors import CheckpointError, UsageError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*"]
"""What is fetched; never a pickle. Folders inside a repository hold the same model for other readers, and are left out."""

Header = tuple[Mapping[str, Mapping[str, Any]], Mapping[str, str]]
"""(tensor -> its description, metadata) as in a safetensors header."""


def is_fetched(file: str) -> bool:
    """A file of a repository is one that `fetch` asks for."""
    return "/" not in file and any(fnmatchcase(file, pattern) for pattern in FILES)


def fetch(name: str) -> Path:
    """owner/name -> the folder of its files in huggingface_hub's cache; raises `CheckpointError`."""
    with _refusals(name):
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*/*"]))


def fetch_headers(name: str) -> tuple[dict[str, Any], dict[str, Header]]:
    """owner/name -> (config.json, file -> its header), by range requests; no weights travel."""
    with _refusals(name):
        import huggingface_hub

        config, beside = _json(name, "config.json"), _json(name, MODELOPT_FILE)
        files = huggingface_hub.get_safetensors_metadata(name).files_metadata
        headers: dict[str, Header] = {
            file: ({key: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets} for key, t in found.tensors.items()}, found.metadata)
            for file, found in files.items()
        }
        config = told_beside(config, beside, {key: tensor for found in files.values() for key, tensor in found.tensors.items()})
        check_again(config, partial(_json, name))
        return config, headers


def cached(name: str) -> Path | None:
    """owner/name -> the folder of its files in huggingface_hub's cache, if weights are among them; nothing is asked of the network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES, ignore_patterns=["*/*"], local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("*.safetensors")) else None


def _json(name: str, file: str) -> dict[str, Any]:
    """A file of a repository, {} if it has none of this name."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found: dict[str, Any] = json.loads(Path(huggingface_hub.hf_hub_download(name, file)).read_text(encoding="utf-8"))
    except EntryNotFoundError:
        return {}
    return found


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """huggingface_hub's errors in our three lines; what is here is no repository."""
    if os.path.lexists(name):
        known = "it is a device, a pipe or a socket" if os.path.exists(name) else "it is a link to nothing"
        raise UsageError(f"{name}: neither a file nor a folder", known, "check the path")
    if at := re.fullmatch(rf"({HUB_ID.pattern})@([^@]+)", name):
        do = f"fetch it with `hf download {at[1]} --revision {at[2]} --local-dir FOLDER`, and pass FOLDER"
        raise UsageError(f"{name}: no such file or folder, and no revision is taken", "of a repository on the Hub, moeglot asks for its main branch", do)
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{name}: no such file or folder", "it is no Hub id (owner/name) either", "check the path")
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    # Of requests or of httpx, whichever this huggingface_hub is built on: the parent of what goes wrong below its own errors.
    transport = next(parent for parent in HfHubHTTPError.__mro__ if parent.__name__ == "HTTPError")
    try:
        yield
    except (transport, NotASafetensorsRepoError, SafetensorsParsingError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{name}: neither a path here nor a repository that could be fetched",
            f"huggingface_hub says: {reason}",
            "check the spelling; for a private repository run `hf auth login`; without a network pass a folder",
        ) from error
