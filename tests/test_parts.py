"""A conversion in parts: by several processes, at once or one after the other, to the bytes of a conversion by one."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from adapters import WRITERS, Job
from reading import tree
from synthetic import write_checkpoint

import moeglot
from moeglot import OutputExists, Unfinished, UsageError
from moeglot.conversion.parts import Part, parted
from moeglot.conversion.work import Work

TO, SHARD_SIZE = "gpt-oss/transformers", 60_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("parts") / "source", "gpt-oss/openai", {"e": 8, "h": 64, "i": 64}, layers=2, shards=2)


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The output of one process."""
    out = tmp_path_factory.mktemp("local") / "out"
    moeglot.convert(source, TO, out, shard_size=SHARD_SIZE)
    assert len(list(out.glob("*.safetensors"))) > 3
    return tree(out)


@pytest.fixture
def plan(source: Path) -> moeglot.Plan:
    return moeglot.plan(source, TO, shard_size=SHARD_SIZE)


# --- which units -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_every_unit_is_in_one_part(count: int, plan: moeglot.Plan) -> None:
    of_each = parted(plan, count)
    assert len(of_each) == count
    assert Counter(unit.key for units in of_each for unit in units) == Counter(unit.key for unit in plan.units)
    shares = [sum(unit.nbytes for unit in units) for units in of_each]
    assert max(shares) <= sum(shares) / count + max(unit.nbytes for unit in plan.units)


def test_two_parts_share_no_file_but_the_one_where_they_meet(plan: moeglot.Plan) -> None:
    file_of = {name: shard.file for shard in plan.shards for name in shard.offsets}

    def files(units: tuple[Any, ...]) -> set[str]:
        names = [unit.outputs[0] for unit in units]
        return {file_of[name] for name in names}

    first, second, third = (files(units) for units in parted(plan, 3))
    assert len(first & second) <= 1
    assert len(second & third) <= 1
    assert not first & third


ARRAY = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "6"}


@pytest.mark.parametrize(
    ("text", "environment", "found"),
    [
        ("2/8", {}, Part(2, 8)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "2"}, Part(1, 2)),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "6"}, Part(4, 4)),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "3", "RANK": "1", "WORLD_SIZE": "2"}, Part(2, 2)),
    ],
)
def test_which_part_a_process_is(text: str, environment: dict[str, str], found: Part) -> None:
    assert Part.of(text, environment) == found


@pytest.mark.parametrize(
    ("text", "environment", "match"),
    [
        ("0/8", {}, "is no part"),
        ("9/8", {}, "is no part"),
        ("8", {}, "is no part"),
        ("auto", {}, "no launcher says which part"),
        ("auto", {"RANK": "1"}, "no launcher says which part"),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "9"}, "has gaps"),
        ("auto", {"RANK": "3", "WORLD_SIZE": "2"}, "4/2 is no part"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "0"}, "1/0 is no part"),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "9"}, "is no part"),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "5"}, "-1/4 is no part"),
    ],
)
def test_what_is_no_part(text: str, environment: dict[str, str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Part.of(text, environment)


# --- processes -------------------------------------------------------------------------------------------------------------------------


def command(source: Path, out: Path, *more: str) -> list[str]:
    return ["-m", "moeglot.cli.main", "convert", str(source), str(out), "--to", TO, "--shard-size", f"{SHARD_SIZE}B", "--workers", "1", *more]


def test_two_processes_of_torchrun(source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """Both begin at the same time in a folder that is not there yet."""
    out, torchrun = tmp_path / "out", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run([*torchrun, *command(source, out, "--part", "auto")], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert "part 1/2 is written" in ran.stdout
    assert "part 2/2 is written" in ran.stdout
    assert "writing" in ran.stderr
    assert not out.exists()
    subprocess.run([sys.executable, *command(source, out, "--finalize")], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
    assert tree(out) == local
    assert not Work(out).folder.exists()


def test_eight_parts_at_once(source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """More than there are cores; each may find the folder in any state that another leaves it in."""
    out, count = tmp_path / "out", 8
    forks = []
    import torch  # noqa: F401  # once, before the forks

    plan = moeglot.plan(source, TO, shard_size=SHARD_SIZE)
    for n in range(count):
        if not (child := os.fork()):
            try:
                moeglot.write_part(plan, out, Part(n + 1, count), workers=1)
                os._exit(0)
            finally:
                os._exit(1)
        forks.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in forks] == [0] * count
    moeglot.finalize(plan, out)
    assert tree(out) == local


# --- what is missing, twice, at the wrong time ------------------------------------------------------------------------------------------


def test_a_part_that_is_missing_is_named(plan: moeglot.Plan, local: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Unfinished, match="no part of"):
        moeglot.finalize(plan, out)
    assert not list(tmp_path.iterdir())
    moeglot.write_part(plan, out, "2/4")
    with pytest.raises(Unfinished, match="parts 1/4, 3/4, 4/4 are not finished"):
        moeglot.finalize(plan, out)
    moeglot.write_part(plan, out, "4/4")
    moeglot.write_part(plan, out, "1/4")
    with pytest.raises(Unfinished, match="part 3/4 is not finished"):
        moeglot.finalize(plan, out)
    moeglot.write_part(plan, out, "3/4")
    moeglot.finalize(plan, out)
    assert tree(out) == local


def test_a_part_that_was_killed_is_missing(plan: moeglot.Plan, local: dict[str, bytes], tmp_path: Path) -> None:
    """Its journal ends in half a line: that unit is not on disk, whatever the file holds."""
    out = tmp_path / "out"
    for n in (1, 2):
        moeglot.write_part(plan, out, f"{n}/2")
    journal = Work(out).folder / "journal-2-of-2"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-10])
    with pytest.raises(Unfinished, match="part 2/2 is not finished"):
        moeglot.finalize(plan, out)
    moeglot.write_part(plan, out, "2/2")
    assert journal.read_bytes() == whole
    moeglot.finalize(plan, out)
    assert tree(out) == local


def test_a_part_run_twice_changes_nothing(plan: moeglot.Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moeglot.write_part(plan, out, "1/2")
    before = tree(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (Work(out).files).iterdir()}
    moeglot.write_part(plan, out, "1/2")
    assert tree(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in (Work(out).files).iterdir()} == times, "nothing was even written again"


def test_the_rest_can_be_done_at_once(plan: moeglot.Plan, source: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    moeglot.write_part(plan, out, "2/3")
    told: list[int] = []
    moeglot.convert(source, TO, out, shard_size=SHARD_SIZE, resume=True, progress=lambda what, done, total: told.append(done) if what == "writing" else None)
    assert told[0] > sum(unit.nbytes for unit in Part(2, 3).units(plan)), "the part's units are not written again"
    assert tree(out) == local


def test_progress_is_of_the_whole_job(plan: moeglot.Plan, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    total = sum(unit.nbytes for unit in plan.units)
    moeglot.write_part(plan, tmp_path / "out", "2/2")
    moeglot.write_part(plan, tmp_path / "out", "1/2", progress=lambda what, done, of: told.append((done, of)))
    assert {of for _, of in told} == {total}
    assert told[-1] == (total, total)


def test_another_division_is_refused(plan: moeglot.Plan, tmp_path: Path) -> None:
    moeglot.write_part(plan, tmp_path / "out", "1/2")
    before = tree(tmp_path)
    with pytest.raises(OutputExists, match="was begun in 2 parts"):
        moeglot.write_part(plan, tmp_path / "out", "2/3")
    assert tree(tmp_path) == before


def test_a_part_of_another_plan_is_refused(plan: moeglot.Plan, source: Path, tmp_path: Path) -> None:
    moeglot.write_part(plan, tmp_path / "out", "1/2")
    before = tree(tmp_path)
    with pytest.raises(OutputExists, match="belongs to another conversion"):
        moeglot.write_part(moeglot.plan(source, "gpt-oss/original"), tmp_path / "out", "2/2")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("held", "how"), [("journal", fcntl.LOCK_SH), ("journal-1-of-2", fcntl.LOCK_EX)])
def test_a_part_that_is_being_written_is_waited_for(held: str, how: int, plan: moeglot.Plan, tmp_path: Path) -> None:
    """Nobody finalizes or starts over under a part, and nobody writes it a second time at once; another part may go on."""
    out = tmp_path / "out"
    for n in (1, 2):
        moeglot.write_part(plan, out, f"{n}/2")
    attempts: dict[str, Callable[[], object]] = {
        "journal": lambda: moeglot.finalize(plan, out),
        "journal-1-of-2": lambda: moeglot.write_part(plan, out, "1/2"),
    }
    with (Work(out).folder / held).open("a") as file:
        fcntl.flock(file, how)
        with pytest.raises(OutputExists, match=f"holds its {held}"):
            attempts[held]()
        if how == fcntl.LOCK_EX:  # as a part that is being written has its own
            with pytest.raises(OutputExists, match=f"is being written\n.*holds its {held}, "):
                moeglot.convert(plan.source, TO, out, shard_size=SHARD_SIZE)
        moeglot.write_part(plan, out, "2/2")


def test_no_part_while_one_process_does_all(plan: moeglot.Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Work(out).session(plan, resume=False), pytest.raises(OutputExists, match="another moeglot holds its journal"):
        moeglot.write_part(plan, out, "1/2")


def test_wrong_bytes_of_a_part_do_not_hold(plan: moeglot.Plan, tmp_path: Path) -> None:
    """The journal says that they are there; the output is read again all the same."""
    out = tmp_path / "out"
    for n in (1, 2):
        moeglot.write_part(plan, out, f"{n}/2")
    shard = sorted(Work(out).files.glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.seek(-3000, os.SEEK_END)
        file.write(bytes(2000))
    with pytest.raises(moeglot.MoeglotError):
        moeglot.finalize(plan, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("--part", "1/2", "--finalize"), "--part and --finalize"),
        (("--engine", "dask"), "--engine dask"),
        (("--ray-address", "host:6379"), "--ray-address without --engine ray"),
        (("--engine", "ray", "--part", "1/2"), "--engine ray in parts"),
        *([] if find_spec("ray") else [(("--engine", "ray"), "needs Ray")]),
    ],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], wrong: str, source: Path, tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, *command(source, tmp_path / "out", *options)], capture_output=True, text=True)
    assert ran.returncode == 2
    assert wrong in ran.stderr
    assert not list(tmp_path.iterdir())


def test_a_merge_in_parts(source: Path, tmp_path: Path) -> None:
    """What survived of an adapter is summed over the journals of all parts."""
    adapter = WRITERS["PEFT"][2](Job("gpt-oss", 8, 64, 64, 4, layers=2)).save(tmp_path / "adapter")
    options: dict[str, Any] = {"adapter": moeglot.open_adapter(adapter, moeglot.open(source), "peft"), "encode": "bf16", "shard_size": SHARD_SIZE}
    moeglot.convert(source, TO, tmp_path / "local", allow_loss=True, **options)
    plan, out = moeglot.plan(source, TO, **options), tmp_path / "out"
    for n in (3, 1, 2):
        moeglot.write_part(plan, out, f"{n}/3", allow_loss=True)
    moeglot.finalize(plan, out)
    assert tree(out) == tree(tmp_path / "local")
    shutil.rmtree(out)


@pytest.mark.parametrize(("file", "text"), [("parts", "garbage"), ("journal-1-of-2", '{"unit": 1}\n'), ("journal-1-of-2", "[]\n")])
def test_a_damaged_journal_of_a_part(file: str, text: str, plan: moeglot.Plan, tmp_path: Path) -> None:
    moeglot.write_part(plan, tmp_path / "out", "1/2")
    (tmp_path / "out.partial" / file).write_text(text)
    for go_on in (lambda: moeglot.write_part(plan, tmp_path / "out", "2/2"), lambda: moeglot.finalize(plan, tmp_path / "out")):
        with pytest.raises(OutputExists, match="this journal is damaged"):
            go_on()
