"""What a Hub id does: a server on this machine answers the Hub's API for one repository, and we ask it through the real huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import moeglot

NAME = "owner/name"
COMMIT = hashlib.sha1(NAME.encode()).hexdigest()
BUNDLED = Path(str(resources.files("moeglot"))) / "bundled" / "king-james"


@dataclass
class Hub:
    """One repository and every request for it. `broken`: hang up on whoever asks what the repository holds."""

    files: Mapping[str, bytes]
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken: bool = False
    url: str = ""

    def fetched(self) -> list[str]:
        """The files whose bytes or sizes were asked for, each once."""
        paths = [path.partition("/resolve/")[2] for _, path in self.requests]
        return sorted({path.partition("/")[2] for path in paths if path})


class Answers(BaseHTTPRequestHandler):
    """The part of https://huggingface.co/docs/hub/api that snapshot_download asks for, in huggingface_hub 0.36 and 2.4."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.broken and path.startswith("/api/"):
            self.close_connection = True
        elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main", f"/api/models/{NAME}/revision/{COMMIT}"):
            self._json({"_id": "1", "id": NAME, "modelId": NAME, "sha": COMMIT, "private": False, "siblings": [{"rfilename": name} for name in self.hub.files]})
        elif path in (f"/api/models/{NAME}/tree/main", f"/api/models/{NAME}/tree/{COMMIT}"):
            self._json([{"type": "file", "path": name, "size": len(data), "oid": _etag(data)} for name, data in self.hub.files.items()])
        elif (found := re.fullmatch(rf"/{NAME}/resolve/(?:main|{COMMIT})/(.+)", path)) and found[1] in self.hub.files:
            self._file(self.hub.files[found[1]])
        elif path.startswith((f"/{NAME}/", f"/api/models/{NAME}/")):
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif "private" in path:
            self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, data: bytes) -> None:
        known = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            self._send(206, data[first : last + 1], {**known, "Content-Range": f"bytes {first}-{last}/{len(data)}"})
        else:
            self._send(200, data, known)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A test's output is no place for an access log."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The bundled model with what else a repository may hold: pickles, another format in a subfolder, a picture."""
    files = {path.name: path.read_bytes() for path in BUNDLED.iterdir() if path.is_file()}
    held = Hub({**files, "pytorch_model.bin": b"no pickle at all", "original/model.safetensors": b"too large to fetch for nothing", "plot.png": b"png"})
    handler = type("OneRepository", (Answers,), {"hub": held})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        held.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield held
        server.shutdown()
        thread.join()


OPEN = """
import json, sys, moeglot
try:
    c = moeglot.open(sys.argv[1], headers_only=len(sys.argv) > 2)
except moeglot.MoeglotError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
else:
    others = [path.name for path in c.source.others()] if len(sys.argv) == 2 else []
    told = {"name": c.source.name, "format": c.format.name, "sizes": c.sizes, "folder": str(c.source.folder), "reference": c.source.reference, "others": others}
    print(json.dumps({**told, "evidence": c.evidence, "tensors": {entry.name: (entry.dtype, entry.shape) for entry in c.source.entries.values()}}))
"""


def _open(name: str, home: Path, url: str, headers_only: bool = False, **more: str) -> dict[str, object]:
    """What `moeglot.open(name)` finds in a process of its own: huggingface_hub reads its environment once, when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGINGFACE_")) and not key.upper().endswith("_PROXY")}
    told = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    command = [sys.executable, "-c", OPEN, name, *["headers"] * headers_only]
    done = subprocess.run(command, env={**kept, **told}, cwd=home, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def _refused(found: Mapping[str, object], name: str, reason: str) -> None:
    """A CheckpointError of three lines: which name, huggingface_hub's reason, what to do."""
    assert found["error"] == "CheckpointError"
    wrong, known, do = str(found["text"]).split("\n")
    assert wrong.startswith(f"{name}: ")
    assert "neither a path here nor a repository" in wrong
    assert known.startswith("  huggingface_hub says: ")
    assert reason in known
    assert "hf auth login" in do


def test_a_hub_id_is_opened_like_a_folder(hub: Hub, tmp_path: Path) -> None:
    here = moeglot.open(BUNDLED)
    there = _open(NAME, tmp_path, hub.url)
    assert (there["name"], there["format"], there["sizes"]) == (NAME, "gpt-oss/openai", here.sizes)
    assert (there["reference"], here.source.reference) == (NAME, str(BUNDLED))
    assert there["evidence"] == list(here.evidence)
    assert there["tensors"] == {entry.name: [entry.dtype, list(entry.shape)] for entry in here.source.entries.values()}
    assert there["others"] == sorted(path.name for path in here.source.others())
    folder = Path(str(there["folder"]))
    assert (folder.name, folder.parent.name) == (COMMIT, "snapshots")
    assert (folder / "model.safetensors").is_symlink(), "no link into blobs/: this test would not show that such links are accepted"
    assert (folder / "model.safetensors").resolve().parent.name == "blobs"
    assert (folder / "model.safetensors").read_bytes() == (BUNDLED / "model.safetensors").read_bytes()


def test_only_what_is_read_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """No pickle, no second copy of the weights in a subfolder, no picture."""
    _open(NAME, tmp_path, hub.url)
    assert hub.fetched() == sorted(path.name for path in BUNDLED.iterdir() if path.is_file())
    assert not list(tmp_path.rglob("*.bin"))


def test_a_second_open_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    first = _open(NAME, tmp_path, hub.url)
    hub.requests.clear()
    assert _open(NAME, tmp_path, hub.url) == first
    assert not hub.fetched()
    assert _open(NAME, tmp_path, hub.url, HF_HUB_OFFLINE="1") == first


def test_inspect_without_a_network(hub: Hub, tmp_path: Path) -> None:
    """What an earlier command fetched is enough; a snapshot without weights, which `inspect` leaves behind, is not."""
    _refused(_inspected(tmp_path, hub.url, HF_HUB_OFFLINE="1"), NAME, "")
    first = _inspected(tmp_path, hub.url)
    _refused(_inspected(tmp_path, hub.url, HF_HUB_OFFLINE="1"), NAME, "")
    _open(NAME, tmp_path, hub.url)
    assert _inspected(tmp_path, hub.url, HF_HUB_OFFLINE="1") == first


def _inspected(home: Path, url: str, **more: str) -> dict[str, object]:
    return _open(NAME, home, url, headers_only=True, **more) | {"folder": ""}


def test_a_folder_of_that_name_comes_first(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / NAME).symlink_to(BUNDLED, target_is_directory=True)
    assert _open(NAME, tmp_path, hub.url)["folder"] == str(tmp_path / NAME)
    assert not hub.requests


def test_a_link_that_leaves_the_repository_is_refused(hub: Hub, tmp_path: Path) -> None:
    """Links into blobs/ of the same repository are the cache's own; others are not."""
    folder = Path(str(_open(NAME, tmp_path, hub.url)["folder"]))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(BUNDLED / "model.safetensors")
    found = _open(NAME, tmp_path, hub.url)
    assert found["error"] == "BrokenFile"
    assert "model.safetensors: a link that leaves its folder" in str(found["text"])


@pytest.mark.parametrize(("name", "reason"), [("owner/nowhere", "404"), ("owner/private", "401")])
def test_an_unknown_repository(hub: Hub, tmp_path: Path, name: str, reason: str) -> None:
    """The Hub answers 401 to strangers, so that they cannot tell what is private from what is not there."""
    _refused(_open(name, tmp_path, hub.url), name, reason)


def test_nobody_answers(tmp_path: Path) -> None:
    _refused(_open(NAME, tmp_path, "http://127.0.0.1:9"), NAME, "")


def test_no_network_is_wanted(hub: Hub, tmp_path: Path) -> None:
    _refused(_open(NAME, tmp_path, hub.url, HF_HUB_OFFLINE="1"), NAME, "outgoing traffic has been disabled")
    assert not hub.requests


def test_the_server_hangs_up(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    _refused(_open(NAME, tmp_path, hub.url), NAME, "")


def test_a_repository_of_pickles(hub: Hub, tmp_path: Path) -> None:
    """They are not even fetched, so the message must name the repository: its folder's name is only a commit."""
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith(".safetensors")}
    found = _open(NAME, tmp_path, hub.url)
    assert "pytorch_model.bin" not in hub.fetched()
    assert found["error"] in ("CheckpointError", "PickleRefused")
    wrong, _, _ = str(found["text"]).split("\n")
    assert wrong.startswith(f"{NAME}: ")


def test_inspect_fetches_headers_alone(hub: Hub, tmp_path: Path) -> None:
    """Two range requests for the weights, of a hundredth of their bytes or less in a real model; the report is that of the folder."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGINGFACE_")) and not key.upper().endswith("_PROXY")}
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "moeglot.cli.main", "inspect", "--json"]
    there = subprocess.run([*command, NAME], env={**kept, **told}, capture_output=True, text=True, check=True)
    here = subprocess.run([*command, str(BUNDLED)], capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) | {"path": ""} == json.loads(here.stdout) | {"path": ""}
    assert not list(tmp_path.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 20_000


def test_a_revision_is_fetched_by_whoever_wants_it() -> None:
    with pytest.raises(moeglot.UsageError, match="no revision is taken") as found:
        moeglot.open("owner/model@v1.0")
    assert "hf download owner/model --revision v1.0" in str(found.value)
