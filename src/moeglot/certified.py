"""Whether a folder still holds what moeglot.json in it certifies: each file that it names, to the byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath

from moeglot import hub
from moeglot.checkpoint import Checkpoint
from moeglot.checks import Check
from moeglot.digests import CERTIFICATE, sha256
from moeglot.remote import Location
from moeglot.source import TEMPLATES, Source, in_cache

PROSE = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
"""With what ends in .md, the files that people read and no program does: whoever edits a model card has the same model."""
NAMED = 4
"""Files that a detail names."""


def as_certified(checkpoint: Checkpoint) -> list[Check]:
    """Every file that moeglot.json names is there, and is the one that it certifies; nothing where there is no moeglot.json."""
    sources = [source for source in checkpoint.source.ranks or (checkpoint.source,) if not source.single and (source.home / CERTIFICATE).exists()]
    changed, edited, count = list[str](), list[str](), 0
    for source in sources:
        said = _said(source.home / CERTIFICATE)
        if isinstance(said, str):
            return [Check("values", "cannot tell", "as certified", said)]
        count += len(said)
        for name, wrong in _differing(source, said):
            prose, shown = name.endswith(".md") or name.startswith(PROSE), name.encode("utf-8", "backslashreplace").decode()
            (edited if prose else changed).append(f"{source.folder.name + '/' if checkpoint.source.ranks else ''}{shown} {wrong}")
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        return [Check("values", "does not hold", "as certified", f"{', '.join(changed[:NAMED])}{more} ({len(changed)} of {count})", {"changed": len(changed)})]
    but = f"; {', '.join(edited[:NAMED])}, which no program reads" if edited else ""
    told = f"{count - len(edited)} file{'s' * (count - len(edited) != 1)}, to the byte{but}"
    return [Check("values", "holds", "as certified", told, {"changed": 0})] if sources else []


def _differing(source: Source, said: Mapping[str, str]) -> list[tuple[str, str]]:
    """File -> what is wrong with it. Of a repository in huggingface_hub's cache, what is not fetched is not missed."""
    found = [(path.name, f"is not in {CERTIFICATE}") for path in source.shards if path.name not in said]
    for name, digest in said.items():
        path = source.home / name
        if path.is_file():
            found += [(name, f"is not as {CERTIFICATE} certifies it")] * (sha256(path) != digest)
        elif not in_cache(source.home) or hub.is_fetched(name):
            found.append((name, "is missing"))
    return found


def _said(path: Location) -> Mapping[str, str] | str:
    """File -> the sha256 that a certificate states for it; or why that cannot be told."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["output"]["sha256"]
        names = [(PurePosixPath(name), digest) for name, digest in said.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{CERTIFICATE} cannot be read ({type(error).__name__}), so nothing says what the files were"
    if not said or not all(isinstance(digest, str) and str(name.parent) in (".", TEMPLATES) and name.name != ".." for name, digest in names):
        return f"{CERTIFICATE} certifies no files of this folder"
    return dict(said)
