"""A checkpoint on S3's protocol, spoken by s3fs to a server of moto on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from counting import READ, total, upload
from reading import tree
from synthetic import write_checkpoint

import moeglot
from moeglot.errors import BrokenFile, CheckpointError

s3fs = pytest.importorskip("s3fs")
server_of = pytest.importorskip("moto.server")

TO = "gpt-oss/transformers"


class CountingS3(s3fs.S3FileSystem):
    """s3fs, each read told."""

    protocol = "counted-s3"

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return s3fs.S3FileSystem._strip_protocol(path.replace("counted-s3://", "s3://"))

    async def _cat_file(self, path: str, version_id: Any = None, start: int | None = None, end: int | None = None) -> bytes:
        found: bytes = await super()._cat_file(path, version_id, start, end)
        READ.append((path.rsplit("/", 1)[-1], len(found)))
        return found


fsspec.register_implementation("counted-s3", CountingS3, clobber=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("s3") / "source", "gpt-oss/openai", {"e": 8}, layers=2, shards=2)


@pytest.fixture(scope="module")
def bucket(source: Path) -> Iterator[str]:
    server = server_of.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}.items():
            environment.setenv(name, value)
        endpoint = {"endpoint_url": f"http://{host}:{port}"}
        fsspec.config.conf |= {"s3": endpoint, "counted-s3": endpoint}  # as FSSPEC_S3_ENDPOINT_URL says it
        fs = fsspec.filesystem("s3")
        fs.mkdir("models")
        upload(fs, source, "models/gpt-oss")
        yield "models/gpt-oss"
    server.stop()


def test_a_conversion_from_s3_is_that_from_a_disk(bucket: str, source: Path, tmp_path: Path) -> None:
    moeglot.convert(source, TO, tmp_path / "disk")
    moeglot.convert(f"s3://{bucket}", TO, tmp_path / "s3")
    assert tree(tmp_path / "s3") == tree(tmp_path / "disk")


def test_an_output_on_s3_is_that_on_a_disk(bucket: str, source: Path, tmp_path: Path) -> None:
    """From the store to the store; then its temporary name is gone."""
    moeglot.convert(source, TO, tmp_path / "disk", shard_size=60_000)
    moeglot.convert(f"s3://{bucket}", TO, "s3://models/made/out", shard_size=60_000)
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    found = {path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in fs.find("models/made")}
    assert found == tree(tmp_path / "disk")
    assert not fs.exists("models/made/out.partial")
    assert moeglot.verify("s3://models/made/out", str(source)).verdict == "holds"


def test_a_folder_of_templates_goes_to_s3(source: Path, bucket: str, tmp_path: Path) -> None:
    with_templates = Path(shutil.copytree(source, tmp_path / "source"))
    (with_templates / "additional_chat_templates").mkdir()
    (with_templates / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    moeglot.convert(with_templates, TO, "s3://models/templates/out")
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    assert fs.cat_file("models/templates/out/additional_chat_templates/rag.jinja") == b"{{ messages }}"
    assert not fs.find("models/templates/out.partial")


def test_a_source_that_is_replaced_on_s3(bucket: str, source: Path, tmp_path: Path) -> None:
    """s3fs remembers what it listed; it is asked again."""
    fs = fsspec.filesystem("s3")
    upload(fs, source, "models/replaced")
    found = moeglot.open("s3://models/replaced")
    shard = max(source.glob("*.safetensors"))
    key = f"models/replaced/{shard.name}"
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(key, shard.read_bytes()[:-1] + b"x")  # as another process does
    with pytest.raises(BrokenFile, match="not the file any more"):
        moeglot.convert(found, TO, tmp_path / "out")
    assert moeglot.verify(moeglot.open("s3://models/replaced")).verdict == "holds", "opened again, it is the new one"


def test_looking_reads_headers_alone(bucket: str, source: Path) -> None:
    READ.clear()
    found = moeglot.open(f"counted-s3://{bucket}")
    weights = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in source.glob("*.safetensors"))
    assert total() == weights + sum((source / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))
    READ.clear()
    assert found.experts(0)["down"][3].parts.keys() == {"packed", "scale"}
    assert total() == 64 * 64 // 2 + 64 * 64 // 32


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    with pytest.raises(CheckpointError):
        moeglot.open("s3://nobody/nothing")
