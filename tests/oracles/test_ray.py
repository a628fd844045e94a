"""A conversion as tasks of a real Ray cluster of three nodes: to the bytes of a local one, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from reading import tree
from synthetic import write_checkpoint

import moeglot
from moeglot.planning.steps import ExpertUnit, Unit

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from moeglot.integrations import ray as engine_of  # noqa: E402

TO, SHARD_SIZE, TASK = "gpt-oss/transformers", 60_000, 20_000
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "memory": 2_000_000_000}
SECONDS = 600


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ray") / "source", "gpt-oss/openai", {"e": 8, "h": 64, "i": 64}, layers=2, shards=2)


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    moeglot.convert(source, TO, out, shard_size=SHARD_SIZE)
    return tree(out)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes of one processor each, of which the first has the driver; a node that is silent for some four seconds is dead."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"period_ms": "500", "timeout_ms": "500", "failure_threshold": "8"}.items():
            environment.setenv(f"RAY_health_check_{name}", value)
        found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        for _ in range(2):
            found.add_node(**NODE)
        found.wait_for_nodes()
        ray.init(address=found.address, logging_level="error", log_to_driver=False)
        yield found
        ray.shutdown()
        found.shutdown()


# --- watching --------------------------------------------------------------------------------------------------------------------------


def processes() -> Iterator[tuple[int, int, str]]:
    """(pid, parent's pid, title)"""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                yield int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1]), title
            except OSError:
                continue


def busy(raylets: set[int]) -> set[int]:
    """The workers of these raylets that are in the middle of a task of ours."""
    return {pid for pid, parent, title in processes() if parent in raylets and title.startswith("ray::_carry_out")}


def stopped_in_a_task(raylets: set[int], killed: Sequence[int] = ()) -> int:
    """A worker, stopped by a signal while it had a task: it cannot report before it dies."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        for pid in busy(raylets) - set(killed):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.01)  # until all of its threads have stopped
            if pid in busy(raylets):
                return pid
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError("no worker had a task")


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def convert(source: Path, out: Path, disturb: Callable[[], None] | None = None) -> list[tuple[int, int]]:
    """Convert with Ray; `disturb` runs beside it, and must come to its end before the conversion does. Returns what the progress was."""
    told: list[tuple[int, int]] = []
    failed: list[BaseException] = []

    def beside() -> None:
        try:
            if disturb:
                disturb()
        except BaseException as error:  # whatever it is, the test must see it
            failed.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        moeglot.convert(
            source,
            TO,
            out,
            shard_size=SHARD_SIZE,
            engine=engine_of.engine(task=TASK),
            progress=lambda what, done, total: told.append((done, total)) if what == "writing" else None,
        )
    finally:
        thread.join()
    if failed:
        raise failed[0]
    return told


# --- tests -----------------------------------------------------------------------------------------------------------------------------


def test_tasks_of_three_nodes(cluster: Cluster, source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """One progress for the whole job, in bytes."""
    told = convert(source, tmp_path / "out")
    assert tree(tmp_path / "out") == local
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1]
    assert len(told) > 30


def test_a_worker_is_killed(cluster: Cluster, source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """By its pid, in the middle of a task, three times."""
    killed: list[int] = []

    def disturb() -> None:
        for _ in range(3):
            pid = stopped_in_a_task({raylet(node) for node in cluster.list_all_nodes()}, killed)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    convert(source, tmp_path / "out", disturb)
    assert len(set(killed)) == 3
    assert tree(tmp_path / "out") == local


def test_without_retries_a_killed_worker_is_the_end_of_the_run_and_resume_goes_on(
    cluster: Cluster, source: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """What shows that the retries did it."""
    thread = threading.Thread(target=lambda: os.kill(stopped_in_a_task({raylet(node) for node in cluster.list_all_nodes()}), signal.SIGKILL))
    thread.start()
    with pytest.raises(moeglot.Unfinished, match="given up"):
        moeglot.convert(source, TO, tmp_path / "out", shard_size=SHARD_SIZE, engine=engine_of.engine(task=TASK, retries=0))
    thread.join()
    assert not (tmp_path / "out").exists()
    moeglot.convert(source, TO, tmp_path / "out", shard_size=SHARD_SIZE, engine=engine_of.engine(task=TASK), resume=True)
    assert tree(tmp_path / "out") == local


def test_a_refusal_of_a_task_is_the_refusal_of_the_conversion(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    """In its own words: numbers that are lost, found while writing."""
    plan = moeglot.plan(write_checkpoint(tmp_path / "plain", "qwen3-moe/hub"), "qwen3-moe/hub", encode="fp8-block")
    from moeglot.conversion.work import Work

    work = Work(tmp_path / "out")
    with work.session(plan, resume=False):
        lossy: list[Unit] = [unit for unit in plan.units if isinstance(unit, ExpertUnit)]
        with pytest.raises(moeglot.LossRefused, match="changes"):
            list(engine_of.engine()(plan, work.files, lossy, False))


def test_a_task_asks_for_its_memory(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    """More than any node has is never scheduled; this one fits, and is what the largest expert needs."""
    plan = moeglot.plan(source, TO)
    assert engine_of.memory_of(plan) == 300_000_000 + 4 * 4 * (2 * 64 * 64)
    assert engine_of.memory_of(plan) < NODE["memory"]


def test_a_task_that_fits_on_no_node_is_refused(cluster: Cluster, source: Path, tmp_path: Path) -> None:
    """Ray itself would wait for a larger node."""
    with pytest.raises(moeglot.UsageError, match="no node of the cluster has a processor and 5,000,000,000 bytes"):
        moeglot.convert(source, TO, tmp_path / "out", engine=engine_of.engine(memory=5_000_000_000))


def test_the_command_line(cluster: Cluster, source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """With a relative path, on a cluster that runs already."""
    command = [sys.executable, "-m", "moeglot.cli.main", "convert", source.name, str(tmp_path / "out"), "--to", TO, "--shard-size", f"{SHARD_SIZE}B"]
    ran = subprocess.run([*command, "--engine", "ray", "--ray-address", cluster.address], capture_output=True, text=True, cwd=source.parent, timeout=SECONDS)
    assert ran.returncode == 0, ran.stderr
    assert tree(tmp_path / "out") == local


def test_a_node_is_killed(cluster: Cluster, source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """With a task in the middle, which nobody can finish there; the driver's node stays."""
    node = cluster.list_all_nodes()[-1]

    def disturb() -> None:
        worker = stopped_in_a_task({raylet(node)})
        cluster.remove_node(node, allow_graceful=False)
        os.kill(worker, signal.SIGKILL)  # it is stopped, and cannot see that its node is gone

    convert(source, tmp_path / "out", disturb)
    assert tree(tmp_path / "out") == local
    until = time.monotonic() + SECONDS
    while (alive := len([1 for found in ray.nodes() if found["Alive"]])) > 2 and time.monotonic() < until:
        time.sleep(0.1)  # until the head has noticed
    assert alive == 2
