"""Where a checkpoint lies: a folder, a safetensors file, a URL of a store or a Hub id; which of its files may be read at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from moeglot.codings.coding import MODELOPT_FILE
from moeglot.codings.hf_quant_config import told_beside
from moeglot.codings.said_again import check_again
from moeglot.errors import BrokenFile, CheckpointError
from moeglot.files import hub
from moeglot.files.digests import CERTIFICATE
from moeglot.files.foreign import PICKLES, check_adapter, check_root, refuse_file, refuse_none, refuse_two
from moeglot.files.identity import declared, identity
from moeglot.files.mapped import check_unchanged
from moeglot.files.remote import Location, Remote, here, location
from moeglot.files.shards import Entry, describe, parse, read_header
from moeglot.files.torch_dist.reading import DESCRIPTION, METADATA, is_torch_dist, read_entries
from moeglot.share import Share

INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
"""The one folder below a checkpoint that belongs to its tokenizer."""
MOST = 100_000
"""Shards that are counted: a name may claim any number, and costs no memory by it."""
NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


def _without_digits(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass").translate(None, b"0123456789")


@dataclass(frozen=True)
class Source:
    """The files of one checkpoint, headers read: tensors by name, config.json, the marks in the headers, and the files beside them."""

    name: str
    folder: Location
    shards: tuple[Location, ...] = field(repr=False)
    entries: Mapping[str, Entry] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    metadata: tuple[Mapping[str, str], ...] = field(repr=False)
    single: bool = False
    torch_dist: Literal["", "stacked", "single"] = ""
    """It is a folder of torch.distributed.checkpoint, not of safetensors, and that is how its experts lie there."""
    masters: tuple[str, ...] = field(default=(), repr=False)
    """Keys of more exact weights that a training run left beside these, and that are not read."""
    ranks: tuple[Source, ...] = field(default=(), repr=False)
    """What each of its folders holds, if it has one for each process of several, and nothing itself."""

    def check_unchanged(self) -> None:
        """Raises `BrokenFile` unless its files are those that were opened."""
        check_unchanged(found for entry in self.entries.values() for found in entry.files)
        if self.shards and _config(self.home) not in ({}, self.config):
            raise BrokenFile("config.json: not what it was when it was read", "somebody has written it meanwhile", "start again, once nobody does")

    @property
    def home(self) -> Location:
        """Where config.json and what is carried over lie."""
        return self.ranks[0].folder if self.ranks else self.folder

    @property
    def reference(self) -> str:
        """By what other libraries find it again: its Hub id, or the folder."""
        return self.name if hub.HUB_ID.fullmatch(self.name) and not Path(self.name).exists() else str(self.home)

    def has_like(self, template: str) -> bool:
        """Some tensor has this name, whatever the numbers in it: `{layer}` and `{expert}` are such."""
        return _without_digits(template.format(layer="", expert="")) in self._outlines

    @cached_property
    def _outlines(self) -> frozenset[bytes]:
        return frozenset(map(_without_digits, self.entries))

    @cached_property
    def share(self) -> Share | None:
        """Whose experts these are, if not all; raises `Contradiction` where the marks are none."""
        return Share.declared(self.metadata)

    @cached_property
    def identity(self) -> str | None:
        """Of which source it is: what one process holds says it, if anything does, and all else is one itself."""
        return declared(self.metadata) if self.share else identity(self.shards, self.entries)

    @cached_property
    def nbytes(self) -> int:
        return sum([entry.end - entry.start for entry in self.entries.values()])

    def others(self) -> Iterator[Location]:
        """Files that are carried over as they are: tokenizer, templates, licence; no weights, no index, no config.json, nothing of ours."""
        for path in _listed(self.home) if not self.single else []:
            named = path.name == DESCRIPTION or path.name.endswith((".safetensors.index.json", ".bin.index.json"))
            weights = named or path.suffix in (".safetensors", ".distcp", *PICKLES)
            if path.is_file() and not weights and path.name not in ("config.json", CERTIFICATE) and not path.name.startswith("."):
                yield _inside(path, _root(self.home))
            elif path.name == TEMPLATES and path.is_dir():
                yield from (_inside(one, _root(self.home)) for one in _listed(path) if one.suffix == ".jinja")


def read_source(path: str | Path, headers_only: bool = False) -> Source:
    """Folder, safetensors file, URL or Hub id -> its headers and config; raises `CheckpointError`.

    A Hub id is fetched by huggingface_hub: whole, or with `headers_only` just what `inspect` needs, so that no tensor can be read.
    """
    local = here(location(path))
    if isinstance(local, Remote):
        local.refresh()
    if local.is_file():
        if local.suffix != ".safetensors":
            raise refuse_file(local)
        check_adapter(str(path), local.parent, [local.name])
        return replace(_read(str(path), local.parent, (local,), headers_only), single=True)
    if isinstance(local, Remote) and not local.is_dir():
        raise CheckpointError(f"{path}: nothing is there", "the store has no such file or folder", "check the URL")
    if not local.is_dir() and headers_only:
        try:
            return _remote(str(path))
        except CheckpointError:
            if (cached := hub.cached(str(path))) is None:
                raise
            local = cached  # as without `headers_only`: what was fetched before is enough where nobody answers
    if not local.is_dir():
        local = hub.fetch(str(path))
    if isinstance(local, Path) and is_torch_dist(local):
        if beside := next((one.name for one in _listed(local) if one.suffix == ".safetensors"), None):
            raise refuse_two(str(path), beside)
        return _read_torch_dist(str(path), local)
    shards = tuple(_shards(local, _root(local)))
    check_adapter(str(path), local, [shard.name for shard in shards])
    if shards:
        return _read(str(path), local, shards, headers_only)
    check_root(str(path), local)
    if folders := _folders(local):
        return _read_ranks(str(path), local, folders, headers_only)
    raise refuse_none(str(path), local, INDEX)


def _folders(folder: Location) -> tuple[Location, ...]:
    """The folders of a folder, if some hold weights; of what begins with a dot, none."""
    found = tuple(path for path in _listed(folder) if path.is_dir() and not path.name.startswith("."))
    return found if any(path.suffix in (".safetensors", *PICKLES) for inner in found for path in inner.iterdir()) else ()


def _read_ranks(name: str, folder: Location, folders: tuple[Location, ...], headers_only: bool) -> Source:
    """What each process of several holds, in a folder of its own."""
    ranks = []
    for one in folders:
        if not (shards := tuple(_shards(one, _root(one)))):
            raise refuse_none(f"{name.rstrip('/')}/{one.name}", one, INDEX)
        ranks.append(_read(f"{name.rstrip('/')}/{one.name}", one, shards, headers_only))
    entries = {f"{rank.folder.name}/{key}": entry for rank in ranks for key, entry in rank.entries.items()}
    return Source(name, folder, tuple(shard for rank in ranks for shard in rank.shards), entries, ranks[0].config, (), ranks=tuple(ranks))


def _read_torch_dist(name: str, folder: Path) -> Source:
    metadata = _inside(folder / METADATA, _root(folder))
    entries, files, experts, masters = read_entries(folder)
    shards = (metadata, *(_inside(file, _root(folder)) for file in files))
    return Source(name, folder, shards, entries, _config(folder), (), torch_dist=experts, masters=masters)


def _remote(name: str) -> Source:
    """A Hub repository of which only config.json and the safetensors headers were fetched."""
    config, headers = hub.fetch_headers(name)
    shards = {file: Path(file) for file in sorted(headers)}
    entries = {key: entry for file, (tensors, _) in sorted(headers.items()) for key, entry in describe(shards[file], tensors, 0).items()}
    return Source(name, Path(name), tuple(shards.values()), entries, config, tuple(headers[file][1] for file in shards))


def _root(folder: Location) -> Path:
    """The folder that files may not leave (a store has no links); in huggingface_hub's cache, snapshots link to the blobs of their own repository."""
    if isinstance(folder, Remote):
        return Path()
    return folder.resolve().parent.parent if in_cache(folder) else folder.resolve()


def in_cache(folder: Location) -> bool:
    """It is a snapshot of a repository in huggingface_hub's cache."""
    if isinstance(folder, Remote):
        return False
    repository = folder.resolve().parent.parent
    return folder.resolve().parent.name == "snapshots" and repository.name.startswith("models--") and (repository / "blobs").is_dir()


def _shards(folder: Location, root: Path) -> Iterator[Location]:
    if (index := folder / INDEX).is_file():
        names = sorted(set(_weight_map(_inside(index, root)).values()))
        if "model.safetensors" not in names and (folder / "model.safetensors").exists():
            wrong = f"model.safetensors lies beside {INDEX}, which does not name it"
            raise BrokenFile(wrong, "transformers reads that file, others what the index names", "remove the one that is stale")
        yield from (_inside(folder / _plain(name), root) for name in names)
        return
    single = folder / "model.safetensors"
    found = [single] if single.exists() or os.path.lexists(str(single)) else [path for path in _listed(folder) if path.suffix == ".safetensors"]
    _check_numbers([path.name for path in found])
    yield from (_inside(path, root) for path in found)


def _check_numbers(names: Sequence[str]) -> None:
    """Without an index, the names of shards say how many there are; raises `BrokenFile` where one is missing."""
    there: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if found := NUMBERED.fullmatch(name):
            there.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (stem, count), numbers in there.items():
        first = 0 if 0 in numbers else 1  # whoever counts from 0 may mean the last number by the second; those before it are there either way
        if missing := sorted(set(range(first, min(count, MOST) + first)) - numbers):
            wrong = f"{stem}: {len(missing)} of {count} files are missing, first number {missing[0]}"
            raise BrokenFile(wrong, f"the names say how many there are, and there is no {INDEX}", "fetch the missing files, or the index")


def _weight_map(index: Location) -> dict[str, str]:
    now = index.stat()
    return _read_weight_map(index, getattr(now, "st_ino", 0), now.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_weight_map(index: Location, inode: int, changed: int) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or {*map(type, found.values())} != {str}:
        raise BrokenFile(f"{INDEX}: no weight_map", "it maps each tensor to its file, as huggingface_hub writes it", "fetch the index again")
    return found


def _plain(name: str) -> str:
    if name != Path(name).name or name in (".", "..") or not name.endswith(".safetensors"):
        raise BrokenFile(f"{INDEX} names {name!r}", "a shard is a .safetensors file in the index's own folder", "fetch the index again from its producer")
    return name


def _listed(folder: Location) -> list[Location]:
    """What lies in a folder, by name."""
    return sorted(folder.iterdir(), key=lambda path: path.name)


def _inside(path: Location, root: Path) -> Location:
    if not path.exists():
        known = f"{INDEX} names it as a shard" if (path.parent / INDEX).is_file() else "it is a link to nothing"
        raise BrokenFile(f"{path.name}: missing", known, "fetch it again from its producer")
    if isinstance(path, Path) and not path.resolve().is_relative_to(root):
        raise BrokenFile(f"{path.name}: a link that leaves its folder", f"it points to {path.resolve()}", "put the file itself there if you trust it")
    return path


def read_json(path: Location) -> dict[str, Any]:
    """A JSON object, each key once; raises `BrokenFile`."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path.name}: not JSON", str(error), "fetch it again from its producer") from error
    if not isinstance(value, dict):
        raise BrokenFile(f"{path.name}: no JSON object", f"it is a {type(value).__name__}", "fetch it again from its producer")
    return value


def _read(name: str, folder: Location, shards: tuple[Location, ...], headers_only: bool) -> Source:
    headers, metadata = zip(*(read_header(shard, ask_library=not headers_only) for shard in shards), strict=True)
    entries: dict[str, Entry] = {}
    for found in headers:
        entries.update(found)
    if len(entries) < sum(map(len, headers)):
        one, other, twice = next((a, b, a.keys() & b.keys()) for a, b in combinations(headers, 2) if a.keys() & b.keys())
        raise BrokenFile(
            f"{min(twice)}: stored twice, in {one[min(twice)].path.name} and {other[min(twice)].path.name}",
            f"{len(twice)} tensors are in both files",
            "delete the stale one, or pass a single file",
        )
    _check_index(folder, {shard.name: found for shard, found in zip(shards, headers, strict=True)})
    return Source(name, folder, shards, entries, _config(folder, entries), metadata)


def _config(folder: Location, tensors: Mapping[str, Entry] | None = None) -> dict[str, Any]:
    def read(name: str) -> dict[str, Any]:
        return read_json(_inside(folder / name, _root(folder))) if (folder / name).exists() else {}

    config = told_beside(read("config.json"), read(MODELOPT_FILE), tensors)
    check_again(config, read)
    return config


def _check_index(folder: Location, files: Mapping[str, Mapping[str, Entry]]) -> None:
    """Index and shards agree, tensor by tensor, if these shards are the ones that the index names. `files`: the name of each -> its tensors."""
    if not (folder / INDEX).is_file() or set((said := _weight_map(folder / INDEX)).values()) != files.keys():
        return
    if len(said) != sum(map(len, files.values())) or any({*map(said.get, found)} - {file} for file, found in files.items()):
        held = {name: file for file, found in files.items() for name in found}
        wrong = sorted(name for name in said.keys() | held.keys() if said.get(name) != held.get(name))
        name = wrong[0]
        raise BrokenFile(
            f"{INDEX} puts {name} in {said.get(name, 'no file')}",
            f"it is in {held.get(name, 'no file')}; {len(wrong)} tensors disagree",
            "fetch the index and the shards again, together",
        )
