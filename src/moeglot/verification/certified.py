"""Whether a folder still holds what moeglot.json in it certifies, each file that it names, to the byte; and of which files it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checks import Check, Verdict
from moeglot.files import hub
from moeglot.files.digests import CERTIFICATE, sha256
from moeglot.files.remote import Location
from moeglot.files.source import TEMPLATES, Source, in_cache

PROSE = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*.md")
"""The files that people read and no program does: whoever edits a model card has the same model."""
TOKENIZER = (
    *("tokenizer*.json", "tekken.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja", "*processor_config.json"),
)
"""What a tokenizer or a processor saves."""
LOOKED_FOR = (*TOKENIZER, "*.py", "*config.json", "params.json", "*.index.json")
"""The files that readers look for by name: one that was added changes what they do."""
NAMED = 4
"""Files that a detail names."""


def stated(folder: Location, *keys: str) -> dict[str, Any]:
    """The object under these keys in a folder's moeglot.json; raises `OSError`, and `ValueError` where there is none."""
    try:
        found = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{' '.join(keys) or 'it'} is no object")
    return found


def as_certified(checkpoint: Checkpoint) -> list[Check]:
    """Every file that moeglot.json names is there and is the one that it certifies, and readers find no other; nothing where there is no moeglot.json."""
    found = []
    for source in checkpoint.source.ranks or (checkpoint.source,):
        if isinstance(said := _said(source), str):
            return [_check("cannot tell", said)]
        found.append((source, said))
    if not any(said for _, said in found):
        return []
    place = "{0.folder.name}/" if checkpoint.source.ranks else ""
    changed, told, count = list[str](), list[str](), 0
    for source, said in found:
        for name, wrong, harmless in _differing(source, said):
            (told if harmless else changed).append(f"{place.format(source)}{name.encode('utf-8', 'backslashreplace').decode()} {wrong}")
            count -= harmless and name in said
        count += len(said)
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        return [_check("does not hold", f"{', '.join(changed[:NAMED])}{more} ({len(changed)} of {count})", len(changed))]
    if bare := [source.folder.name for source, said in found if not said]:
        return [_check("cannot tell", f"{bare[0]} has no {CERTIFICATE}, so nothing says what its files were ({len(bare)} of {len(found)} folders)")]
    but = f"; {', '.join(told[:NAMED])}" if told else ""
    return [_check("holds", f"{count} file{'s' * (count != 1)}, to the byte{but}", 0)]


def _check(verdict: Verdict, detail: str, changed: int | None = None) -> Check:
    return Check("values", verdict, "as certified", detail, {} if changed is None else {"changed": changed})


def _differing(source: Source, said: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
    """(file, what is wrong with it, whether the model is the same). Of a repository in huggingface_hub's cache, what is not fetched is not missed."""
    for name, digest in said.items():
        path, prose = source.home / name, _among(name, PROSE)
        if _is_file(path):
            if sha256(path) != digest:
                yield name, f"is not as {CERTIFICATE} certifies it{', which no program reads' * prose}", prose
        elif not in_cache(source.home) or hub.is_fetched(name):
            yield name, f"is missing{', which no program reads' * prose}", prose
    bare = not any(_among(name, TOKENIZER) for name in said)  # a live model's: whoever saves its tokenizer beside it does as `save` says
    shards = {path.name for path in source.shards}
    for name in sorted(path.name for path in source.home.iterdir()) if said else ():
        if name not in said and (name in shards or _among(name, LOOKED_FOR)) and (source.home / name).is_file():
            yield name, f"is not in {CERTIFICATE}", bare and _among(name, TOKENIZER)


def _among(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_file(path: Location) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long is no file's
        return False


def _said(source: Source) -> Mapping[str, str] | str:
    """File -> the sha256 that a certificate states for it, none where there is no certificate; or why that cannot be told."""
    if source.single or not (source.home / CERTIFICATE).exists():
        return {}
    try:
        said = stated(source.home, "output", "sha256")
    except (OSError, ValueError) as error:
        return f"{CERTIFICATE} cannot be read ({type(error).__name__}), so nothing says what the files were"
    names = [(PurePosixPath(name), digest) for name, digest in said.items()]
    if not said or not all(isinstance(digest, str) and str(name.parent) in (".", TEMPLATES) and name.name != ".." for name, digest in names):
        return f"{CERTIFICATE} certifies no files of this folder"
    return said


# --- what an output was made of ------------------------------------------------------------------------------------------------------


def source_files(checkpoint: Checkpoint) -> dict[str, Location]:
    """Name in a certificate -> file, of those that a conversion reads: shards, unless they hold what other processes have as well, and config.json."""
    source, of_rank = checkpoint.source, "{0.parent.name}/{0.name}" if checkpoint.source.ranks else "{0.name}"
    shards = source.shards if checkpoint.share == source.share else ()
    return {of_rank.format(path): path for path in (*shards, *(path for path in [source.home / "config.json"] if path.exists()))}


def edited_rank(checkpoint: Checkpoint, hashes: Mapping[Location, str]) -> str | None:
    """Of the folders of several processes, the first shard, by its name, that the certificate beside it says was another. `hashes`: what they are."""
    for rank in checkpoint.source.ranks:
        if not isinstance(said := _said(rank), str):
            edited = (path.name for path in rank.shards if path in hashes and said.get(path.name, hashes[path]) != hashes[path])
            if name := next(edited, None):
                return f"{rank.folder.name}/{name}"
    return None


def made_of(checkpoint: Checkpoint, out: Location, headers: Mapping[str, bytes]) -> bool:
    """`out` has these shards, and its moeglot.json says that they were made of this checkpoint's files, which are hashed, and of nothing else."""
    if not checkpoint.source.shards or checkpoint.share != checkpoint.source.share or not all(begins(out / name, header) for name, header in headers.items()):
        return False
    try:
        merged, said = "merge" in stated(out), stated(out, "source", "sha256")
    except (OSError, ValueError):
        return False
    files = source_files(checkpoint)
    return not merged and said.keys() == files.keys() and all(said[name] == sha256(path) for name, path in files.items())


def begins(path: Location, header: bytes) -> bool:
    """The file is there and has this header."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header
