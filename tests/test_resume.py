"""What a killed conversion leaves, and that going on with it ends in the same bytes as never having been disturbed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from adapters import WRITERS, Job
from reading import tree
from synthetic import write_checkpoint

import moeglot
from moeglot import OutputExists
from moeglot.files.digests import sha256

TO = "gpt-oss/transformers"
SHARD_SIZE, SMALL_SHARD_SIZE = 250_000, 20_000
KILLS = 6


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def options(shard_size: int) -> tuple[str, ...]:
    return "--to", TO, "--shard-size", f"{shard_size}B", "--workers", "2"


def start(source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """The command line in a process of its own; its progress comes on standard error, a line for each tenth."""
    return command("convert", source, out, *options(SHARD_SIZE), *more)


def command(*given: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "moeglot.cli.main", *map(str, given)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    """The lines of progress of a process that must succeed."""
    lines = process.communicate(timeout=600)[1].splitlines()
    assert process.returncode == 0, "\n".join(lines)
    return lines


def killed(process: subprocess.Popen[str], out: Path, lines: int, delay: float) -> bool:
    """SIGKILL so many seconds after so many lines of progress (after none: as soon as there is a journal); False if the output had its name before."""
    assert process.stderr
    if lines:
        seen = [process.stderr.readline() for _ in range(lines)]
        assert all(seen), "".join(seen)
    else:
        wait_for(lambda: (partial(out) / "journal").exists(), process)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    return partial(out).exists()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("resume") / "source", "gpt-oss/openai", {"e": 8, "h": 128, "i": 128}, layers=2, shards=2)
    (folder / "tokenizer.json").write_text('{"carried": "over"}')
    return folder


@dataclass(frozen=True)
class Undisturbed:
    """A conversion that nobody disturbed: its files, how many lines of progress it printed, the files of its source."""

    files: dict[str, bytes]
    lines: int
    source: dict[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    before, out = tree(source), tmp_path_factory.mktemp("undisturbed") / "out"
    lines = finish(start(source, out))
    files = tree(out)
    assert len([name for name in files if name.endswith(".safetensors")]) > 3, "several shards, or the test proves little"
    assert {"moeglot.json", "config.json", "model.safetensors.index.json", "tokenizer.json"} < files.keys()
    assert not partial(out).exists()
    assert tree(source) == before
    return Undisturbed(files, len(lines), before)


def assert_the_same(out: Path, source: Path, undisturbed: Undisturbed) -> None:
    found = tree(out)
    assert found.keys() == undisturbed.files.keys()
    assert [name for name in found if found[name] != undisturbed.files[name]] == []
    assert not partial(out).exists()
    assert tree(source) == undisturbed.source


# --- killed from outside, at random ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", range(KILLS))
def test_killed_anywhere_and_resumed(nth: int, source: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """One point in each sixth of a run, from the journal's first line to the certificate; every third one is killed again while it resumes."""
    draw, out = random.Random(nth), tmp_path / "out"
    lines, delay = draw.randint(nth * undisturbed.lines // KILLS, (nth + 1) * undisturbed.lines // KILLS), draw.uniform(0, 0.03)
    while not killed(start(source, out), out, lines, delay):
        shutil.rmtree(out)
        lines -= 1
    if nth % 3 == 2:
        assert killed(start(source, out, "--resume"), out, draw.randint(1, 5), 0)
    finish(start(source, out, "--resume"))
    assert_the_same(out, source, undisturbed)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic:7"])
def test_a_merge_killed_and_resumed(rounding: str, source: Path, tmp_path: Path) -> None:
    """Killed three times on its way: an expert that was merged before a kill is not merged once more, and chance falls as it would have."""
    made = WRITERS["PEFT"][2](Job("gpt-oss", 8, 128, 128, 4, layers=2))
    given = "merge", source, made.save(tmp_path / "adapter"), tmp_path / "out"
    more = "--convention", "peft", "--round", rounding, "--threshold", "0", "--workers", "2"
    before, lines = tree(source), len(finish(command(*given[:3], tmp_path / "whole", *more)))
    random_lines = random.Random(rounding)
    assert killed(command(*given, *more), tmp_path / "out", random_lines.randint(1, lines // 2), 0.01)
    for _ in range(2):
        assert killed(command(*given, *more, "--resume"), tmp_path / "out", random_lines.randint(0, 2), 0.01)
    finish(command(*given, *more, "--resume"))
    found, whole = tree(tmp_path / "out"), tree(tmp_path / "whole")
    assert found.keys() == whole.keys()
    assert [name for name in found if found[name] != whole[name]] == []
    assert tree(source) == before
    merged = sum(found[name] != before.get(name) for name in found if name.endswith(".safetensors"))
    assert merged, "the adapter changes something"


# --- killed at each of its effects on the disk -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dying:
    """A server that runs the command line in fresh processes and lets them die at their n-th effect on what lies beside OUT."""

    process: subprocess.Popen[str]

    def convert(self, source: Path, out: Path, at: int | None = None, resume: bool = False) -> tuple[int, int]:
        """(exit status, effects)"""
        argv = ["convert", str(source), str(out), *options(SMALL_SHARD_SIZE), *(["--resume"] if resume else [])]
        job = {"argv": argv, "under": str(out.parent), "at": at}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told["status"], told["effects"]


@pytest.fixture(scope="module")
def dying() -> Iterator[Dying]:
    command = [sys.executable, str(Path(__file__).with_name("dying.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Dying(process)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough to be converted a hundred times."""
    return write_checkpoint(tmp_path_factory.mktemp("small") / "source", "gpt-oss/openai", {"e": 2}, layers=1)


@pytest.fixture(scope="module")
def effects(dying: Dying, small: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many effects a conversion of the small checkpoint has."""
    status, count = dying.convert(small, tmp_path_factory.mktemp("effects") / "out")
    assert status == 0
    assert count > 50, "every write, and every file made, renamed or removed"
    return count


@pytest.fixture(scope="module")
def calm(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The small checkpoint, converted in this process."""
    before, out = tree(small), tmp_path_factory.mktemp("calm") / "out"
    moeglot.convert(small, TO, out, shard_size=SMALL_SHARD_SIZE)
    assert len(list(out.glob("*.safetensors"))) > 3
    return Undisturbed(tree(out), 0, before)


LAST = 8
"""moeglot.json, the rename and the clean-up are among the last effects."""


@pytest.mark.parametrize("nth", range(6 + 12 + LAST))
def test_killed_at_an_effect_and_resumed(nth: int, dying: Dying, small: Path, effects: int, calm: Undisturbed, tmp_path: Path) -> None:
    """The first six effects, the last eight, and twelve between them; a write is cut in half."""
    between = sorted(random.Random(0).sample(range(7, effects - LAST + 1), 12))
    at, out = [*range(1, 7), *between, *range(effects - LAST + 1, effects + 1)][nth], tmp_path / "out"
    assert dying.convert(small, out, at)[0] == -signal.SIGKILL
    assert dying.convert(small, out, resume=True)[0] == 0, f"resumed after effect {at} of {effects}"
    assert_the_same(out, small, calm)


def other_byte(out: Path) -> None:
    with min(out.glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def zeros(out: Path) -> None:
    """What a machine that stopped may leave of a file whose bytes it never sent to its disk."""
    shard = min(out.glob("*.safetensors"))
    shard.write_bytes(bytes(shard.stat().st_size))


def gone(out: Path) -> None:
    min(out.glob("*.safetensors")).unlink()


def other_config(out: Path) -> None:
    (out / "config.json").write_text("{}")


@pytest.mark.parametrize("before_the_last", [1, 0], ids=["with its journal", "without"])
@pytest.mark.parametrize("damage", [other_byte, other_config, zeros, gone])
def test_killed_before_its_clean_up_and_changed_since(
    damage: Callable[[Path], None], before_the_last: int, dying: Dying, small: Path, effects: int, calm: Undisturbed, tmp_path: Path
) -> None:
    """The output has its name, and is not what was verified any more: nobody may say that it holds without having read it."""
    out = tmp_path / "out"
    assert dying.convert(small, out, effects - before_the_last)[0] == -signal.SIGKILL
    assert out.exists()
    damage(out)
    before = tree(out)
    anybodys = before_the_last == 0 and damage in (zeros, gone)  # nothing says any more that it was this conversion's
    assert dying.convert(small, out, resume=True)[0] == (2 if anybodys else 1)
    with pytest.raises(OutputExists if anybodys else moeglot.NotVerified, match="overwrites nothing" if anybodys else "is not what was verified") as found:
        resume(small, out)
    assert tree(out) == before
    assert anybodys or found.value.do == f"remove {out} and {partial(out)}, and begin again"
    shutil.rmtree(out)
    shutil.rmtree(partial(out))
    resume(small, out)
    assert_the_same(out, small, calm)


def test_all_is_on_the_disk_before_it_has_its_name(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, each folder and what the journal says; then the name, and only then is the journal removed."""
    order: list[str] = []

    def told(name: str) -> None:
        inner: Callable[..., Any] = getattr(os, name)

        def call(*given: Any, **more: Any) -> Any:
            order.append(f"{name} {os.readlink(f'/proc/self/fd/{given[0]}') if name == 'fsync' else given[0]}")
            return inner(*given, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "unlink"):
        told(name)
    out = tmp_path / "out"
    moeglot.convert(small, TO, out, shard_size=SMALL_SHARD_SIZE)
    named = order.index(f"rename {partial(out) / 'checkpoint'}")
    folder = partial(out) / "checkpoint"
    assert {f"fsync {folder / name}" for name in tree(out)} | {f"fsync {folder}", f"fsync {partial(out) / 'journal'}"} <= set(order[:named])
    assert order[named + 1 :][:2] == [f"fsync {tmp_path}", f"unlink {partial(out) / 'journal'}"]


# --- states of the work folder ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_done(dying: Dying, small: Path, effects: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT.partial of a conversion that was killed while it wrote."""
    out = tmp_path_factory.mktemp("half") / "out"
    assert dying.convert(small, out, effects * 2 // 3)[0] == -signal.SIGKILL
    return partial(out)


@pytest.fixture
def out(half_done: Path, tmp_path: Path) -> Path:
    """OUT of a conversion that was killed while it wrote; a copy for each test."""
    shutil.copytree(half_done, tmp_path / "out.partial")
    return tmp_path / "out"


def resume(source: Path, out: Path, to: str = TO, **other: Any) -> None:
    moeglot.convert(source, to, out, resume=True, **{"shard_size": SMALL_SHARD_SIZE, **other})


def test_a_torn_journal_line_is_no_line(small: Path, calm: Undisturbed, out: Path) -> None:
    journal = partial(out) / "journal"
    whole = journal.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    journal.write_bytes(whole[: (last + len(whole)) // 2])
    resume(small, out)
    assert_the_same(out, small, calm)


def test_what_the_journal_does_not_name_is_written_again(small: Path, calm: Undisturbed, out: Path) -> None:
    """A unit whose bytes are on disk only in part has no line; here all such lines are gone, and all bytes are wrong."""
    journal, shards = partial(out) / "journal", sorted((partial(out) / "checkpoint").glob("*.safetensors"))
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    for shard in shards:
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        with shard.open("r+b") as file:
            file.seek(header)
            file.write(b"\xff" * (shard.stat().st_size - header))
    resume(small, out)
    assert_the_same(out, small, calm)


def test_killed_between_rename_and_clean_up(small: Path, calm: Undisturbed, half_done: Path, out: Path) -> None:
    """The output has its name, the journal is still there: nothing is left to do but to remove it."""
    journal = partial(out) / "journal"
    resume(small, out)
    partial(out).mkdir()
    note = json.dumps({"certified": sha256(out / "moeglot.json")}) + "\n"
    told = (half_done / "journal").read_bytes()
    journal.write_bytes(told[: told.rfind(b"\n") + 1] + note.encode())
    resume(small, out)
    assert_the_same(out, small, calm)


def test_an_output_that_the_journal_does_not_certify_is_somebodys(small: Path, half_done: Path, out: Path, tmp_path: Path) -> None:
    """The files of a half-done run were removed, and another conversion's output lies at OUT."""
    shutil.rmtree(partial(out) / "checkpoint")
    moeglot.convert(small, TO, tmp_path / "other")
    (tmp_path / "other").rename(out)
    before, journal = tree(out), (partial(out) / "journal").read_bytes()
    with pytest.raises(OutputExists, match="overwrites nothing"):
        resume(small, out)
    assert tree(out) == before
    assert (partial(out) / "journal").read_bytes() == journal


def test_an_empty_work_folder_beside_the_output_of_another_model(small: Path, calm: Undisturbed, tmp_path: Path) -> None:
    """It is not said to be the output of this one; nor is what was merged. Of the model that it was made of, it is."""
    other = write_checkpoint(tmp_path / "source", "gpt-oss/openai", {"e": 2}, layers=1, seed=1)
    out = tmp_path / "out"
    moeglot.convert(other, TO, out, shard_size=SMALL_SHARD_SIZE)
    partial(out).mkdir()
    with pytest.raises(OutputExists, match="overwrites nothing"):
        resume(small, out)
    certificate = (out / "moeglot.json").read_text()
    (out / "moeglot.json").write_text(certificate.replace("{", '{"merge": {},', 1))
    with pytest.raises(OutputExists, match="overwrites nothing"):
        resume(other, out)
    (out / "moeglot.json").write_text(certificate)
    resume(other, out)
    assert not partial(out).exists()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("lose", [Path.unlink, truncate, lambda path: path.write_bytes(bytes(path.stat().st_size))], ids=["gone", "cut", "zeros"])
def test_files_that_lost_bytes_are_not_gone_on_with(lose: Callable[[Path], None], small: Path, out: Path) -> None:
    """What the journal says of them is not so any more, and no number of attempts would end otherwise."""
    lose(max((partial(out) / "checkpoint").glob("*.safetensors")))
    with pytest.raises(OutputExists, match="is missing, or is not as long") as found:
        resume(small, out)
    assert f"remove {partial(out)}" in str(found.value)


def test_what_is_written_wrong_by_an_earlier_run_is_told(small: Path, out: Path) -> None:
    """The journal says that it is written: what a machine that stopped never sent to its disk."""
    shard = min((partial(out) / "checkpoint").glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size - 500)
        file.write(bytes(500))
    with pytest.raises(moeglot.NotVerified, match=r"remove .* and begin again"):
        resume(small, out)


DAMAGE = {
    "torn": '{"unit": "x", "lo\n',
    "no line": "[1]\n",
    "row": '{"unit": "x", "loss": [0]}\n',
    "text": '{"unit": "x", "loss": ["a", {}]}\n',
    "none": '{"unit": 1}\n',
}


@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_journal(line: str, small: Path, out: Path) -> None:
    journal = partial(out) / "journal"
    text = journal.read_text()
    journal.write_text(text[: text.rfind("\n") + 1] + line)
    with pytest.raises(OutputExists, match="this journal is damaged"):
        resume(small, out)


@pytest.mark.parametrize("name", [".", "file/out"])
def test_a_place_where_nothing_can_be_written(small: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises((OutputExists, moeglot.UsageError)):
        moeglot.convert(small, TO, name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_finished_output_is_not_resumed(small: Path, calm: Undisturbed, out: Path) -> None:
    """With no work folder beside it, an OUT that exists is somebody's."""
    resume(small, out)
    with pytest.raises(OutputExists, match="overwrites nothing"):
        resume(small, out)
    assert_the_same(out, small, calm)


def stopped(pid: int) -> bool:
    """Every thread of the process: a signal reaches them one after the other."""
    return all("State:\tT" in (task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


def test_a_second_process_is_refused(source: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The first is stopped while it writes; the second may neither start over nor resume."""
    out = tmp_path / "out"
    first = start(source, out)
    journal = partial(out) / "journal"
    wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 4, first)
    os.kill(first.pid, signal.SIGSTOP)
    wait_for(lambda: stopped(first.pid), first)
    try:
        before = tree(partial(out))
        with pytest.raises(OutputExists, match="another moeglot holds its journal"):
            resume(source, out, shard_size=SHARD_SIZE)
        with pytest.raises(OutputExists, match=r"is being written\n.*another moeglot holds its journal.*\n  wait for it"):
            moeglot.convert(source, TO, out, shard_size=SHARD_SIZE)
        assert tree(partial(out)) == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
    finish(first)
    assert_the_same(out, source, undisturbed)


@pytest.mark.parametrize("other", [{"to": "gpt-oss/original"}, {"shard_size": 2 * SMALL_SHARD_SIZE}, {"encode": "float32"}], ids=str)
def test_resume_repeats_the_first_command_or_is_refused(other: dict[str, Any], small: Path, out: Path) -> None:
    before = tree(partial(out))
    with pytest.raises(OutputExists, match="belongs to another conversion"):
        resume(small, out, **other)
    assert tree(partial(out)) == before
    assert not out.exists()


def test_a_source_that_changed_is_refused(small: Path, out: Path, tmp_path: Path) -> None:
    changed = tmp_path / "source"
    shutil.copytree(small, changed)
    shard = next(changed.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = tree(partial(out))
    with pytest.raises(OutputExists, match="belongs to another conversion"):
        resume(changed, out)
    assert tree(partial(out)) == before


def test_an_output_that_appeared_meanwhile_is_refused(small: Path, out: Path) -> None:
    """The work folder is ours, OUT is not: neither may be touched."""
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    before = tree(out.parent)
    with pytest.raises(OutputExists, match="overwrites nothing"):
        resume(small, out)
    assert tree(out.parent) == before


def test_without_resume_what_is_there_is_refused(small: Path, out: Path) -> None:
    before = tree(partial(out))
    with pytest.raises(OutputExists, match="pass --resume"):
        moeglot.convert(small, TO, out, shard_size=SMALL_SHARD_SIZE)
    assert tree(partial(out)) == before
    assert not out.exists()


def test_where_no_file_can_be_locked(small: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no other process that is in the way."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    for work in (lambda: moeglot.convert(small, TO, out.with_name("other")), lambda: resume(small, out)):
        with pytest.raises(moeglot.OutputError, match=r"no file can be locked\n.*Function not implemented\n.*another disk") as refused:
            work()
        assert type(refused.value) is moeglot.OutputError


def test_a_folder_of_somebody_else_is_refused(small: Path, tmp_path: Path) -> None:
    """Files, and no journal that would say who wrote them."""
    folder = partial(tmp_path / "out") / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputExists, match="files and no journal"):
        resume(small, tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == b"mine"


def test_whatever_decides_the_bytes_is_in_the_digest(small: Path, tmp_path: Path) -> None:
    """Also where names, sizes and config.json of the output are the same."""
    adapters = [WRITERS["tinker"][2](Job("gpt-oss", 2, 64, 64, 3, layers=1, seed=seed)).save(tmp_path / f"adapter{seed}") for seed in range(2)]
    moments = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in moments:
        path.write_bytes(b"moments")
    roundings = ["nearest", "stochastic:1", "stochastic:2", "delta", *(f"gptq:{path}" for path in moments)]
    ways: list[dict[str, Any]] = [{"encode": "mxfp4"}, {"encode": "mxfp4:ocp"}]
    ways += [{"adapter": adapter, "round": rounding} for adapter in adapters for rounding in roundings]
    digests = [moeglot.plan(small, "gpt-oss/openai", **way).digest for way in ways]
    assert len({*digests}) == len(ways)
