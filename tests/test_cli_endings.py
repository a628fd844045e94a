"""How commands end that do not reach their end: nothing is overwritten, the system's refusals and Ctrl-C are told, and names are shown as they are."""

import html
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from synthetic import write_checkpoint
from terminal import shown

import moeglot
from moeglot.demo import BUNDLED
from moeglot.verification.fingerprint import Fingerprint

RUN = [sys.executable, "-m", "moeglot"]
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""A superuser may read and write whatever its permissions say."""
needs_permissions = pytest.mark.skipif(bool(UNPRIVILEGED) and not shutil.which("setpriv"), reason="a superuser, and no setpriv")


def run(*arguments, status=0, before=(), **options):
    found = subprocess.run([*before, *RUN, *map(str, arguments)], capture_output=True, text=True, **options)
    assert found.returncode == status, (found.stdout, found.stderr)
    assert "Traceback" not in found.stderr
    return found


def refused(*arguments, error, status=2, **elsewhere):
    """The three lines of a refusal, which are the same as JSON. `elsewhere`: how to start a process for it, which prints JSON alone."""
    if elsewhere:
        return json.loads(run(*arguments, "--json", status=status, **elsewhere).stdout)
    told = json.loads(here(*arguments, "--json", status=status)[0])
    assert (told["error"], told["exit_status"]) == (error, status)
    assert here(*arguments, status=status)[1] == f"{error}: {told['wrong']}\n  {told['known']}\n  {told['do']}\n"
    return told


def here(*arguments, status):
    """(standard output, standard error) of a command in this process."""
    from moeglot.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["moeglot", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert (ended.value.code or 0) == status, (out.getvalue(), err.getvalue())
    return out.getvalue(), err.getvalue()


@pytest.fixture
def small(tmp_path):
    return write_checkpoint(tmp_path / "small", "qwen3-moe/hub")


REPORTS = ("inspect {m} --html {f}", "verify {m} --html {f}", "convert {m} out --to x --html {f}", "merge {m} lora out --html {f}")


@pytest.mark.parametrize("arguments", [*REPORTS, "moments {m} t -o {f}"])
def test_a_report_overwrites_nothing(arguments, small, tmp_path):
    """Told before the work: neither the checkpoint nor anything else need be there."""
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    before = (small / "config.json").read_bytes()
    for there in (small / "config.json", small, tmp_path / "link"):
        told = refused(*arguments.format(m=tmp_path / "not-there", f=there).split(), error="OutputExists")
        assert told["wrong"] == f"{there} exists"
    assert (small / "config.json").read_bytes() == before
    told = refused(*arguments.format(m=tmp_path / "not-there", f=tmp_path / "no" / "f").split(), error="UsageError")
    assert "there is no folder" in told["wrong"]


def test_a_fingerprint_is_saved_once(small, tmp_path):
    found = moeglot.fingerprint(small)
    found.save(tmp_path / "print.json")
    with pytest.raises(moeglot.OutputExists):
        found.save(tmp_path / "print.json")
    with pytest.raises(moeglot.UsageError, match="there is no folder"):
        found.save(tmp_path / "no" / "print.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["print.json", "small"]


def test_a_file_that_does_not_fit_leaves_nothing(small, tmp_path):
    """The system allows no file so large, as on a full disk."""

    def least():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # Python would keep the part that fits, and every later process would fail on it
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    told = refused("fingerprint", small, "-o", tmp_path / "print.json", error="OSError", preexec_fn=least)
    assert f"{tmp_path / 'print.json'} could not be" in told["wrong"]
    assert "File too large" in told["known"]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@needs_permissions
def test_what_the_system_does_not_let_us_read(small, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (small / name).chmod(0)
        told = refused("inspect", small, error="PermissionError", before=UNPRIVILEGED)
        assert f"{small / name} could not be" in told["wrong"]
        assert told["known"] == "the system says: Permission denied"
        (small / name).chmod(0o644)
    (small / "config.json").unlink()
    (small / "config.json").mkdir()
    assert "Is a directory" in refused("inspect", small, error="IsADirectoryError")["known"]


@needs_permissions
def test_a_folder_that_takes_no_new_files(small, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    told = refused("fingerprint", tmp_path / "not-there", "-o", tmp_path / "locked" / "f.json", error="UsageError", before=UNPRIVILEGED)
    assert "takes no new files" in told["wrong"]
    refused("convert", small, tmp_path / "locked" / "out", "--to", "qwen3-moe/transformers-5", error="PermissionError", before=UNPRIVILEGED)


def test_output_that_nobody_can_keep(small):
    with open("/dev/full", "w") as full:
        found = subprocess.run([*RUN, "inspect", small], stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2
    assert "No space left on device" in found.stderr
    assert found.stderr.count("\n") == 3
    with open("/dev/full", "w") as full:
        found = subprocess.run([*RUN, "inspect", small, "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr.count("\n")) == (2, 3)
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *map(str, RUN), "inspect", str(small)], stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        found = subprocess.run([*RUN, "inspect", small], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", BUNDLED, "{}/out", "--to", "gpt-oss/transformers"), "interrupted; the same command with --resume goes on with what was written\n"),
        (("convert", BUNDLED, "{}/out", "--to", "gpt-oss/transformers", "--part", "1/1"), "interrupted; the same command goes on with what was written\n"),
        (("verify", BUNDLED, "--against", BUNDLED), "interrupted\n"),
    ],
)
def test_ctrl_c(arguments, words, tmp_path):
    """A pipe in place of a file keeps the command waiting where it reads."""
    source = tmp_path / "m"
    shutil.copytree(BUNDLED, source)
    os.mkfifo(source / "hf_quant_config.json")
    arguments = [str(source if a is BUNDLED else a).format(tmp_path) for a in arguments]
    process = subprocess.Popen(
        [*RUN, *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    end = _other_end(source / "hf_quant_config.json", process)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    os.close(end)
    assert (process.returncode, err) == (130, words)


def _other_end(pipe, process):
    """The end of a pipe that a process reads, as soon as it does."""
    while process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("name", ["a b [v2]", "x[/b]", "[red]x", "n\udcff"])
def test_a_name_is_shown_as_it_is(name, small, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    folder = small.rename(tmp_path / name)
    as_it_is = os.fsencode(name) if "\udcff" not in name else b"n\\udcff"
    assert as_it_is in shown([*RUN, "inspect", folder, "--html", tmp_path / "page.html"], "dumb", 300, errors=False)
    assert as_it_is.decode() in html.unescape((tmp_path / "page.html").read_text())
    assert json.loads(run("inspect", folder, "--json").stdout)["path"] == str(folder)


def test_a_terminal_that_knows_ascii_alone(small):
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert r"64 \xd7 64" in run("inspect", small, env=narrow).stdout
    renamed = small.rename(small.with_name("größe"))
    assert json.loads(run("inspect", renamed, "--json", env=narrow).stdout)["path"] == str(renamed)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["experts"].update({"0.0": [1.0]}),
        lambda told: told["experts"].update({"0.0": [float("nan")] * 9}),
        lambda told: told["experts"].update({"zero": [0.0] * 9}),
        lambda told: told.update(experts=[]),
        lambda told: told.update(sizes=[1]),
        lambda told: told.update(sizes={}),
        lambda told: told.update(sizes={"e": "8", "h": 64, "i": 64}),
        lambda told: told.update(family=3),
    ],
)
def test_a_file_that_is_almost_a_fingerprint(change, small, tmp_path):
    told = moeglot.fingerprint(small).as_json()
    assert Fingerprint.load(_saved(tmp_path / "good.json", told)).experts
    change(told)
    with pytest.raises(moeglot.UsageError, match="not a fingerprint"):
        moeglot.verify(small, _saved(tmp_path / "bad.json", told))


def _saved(path, told):
    path.write_text(json.dumps(told))
    return path


def test_labels_of_a_plot_lie_apart():
    """Two losses that are nearly the same, as after a short run."""
    from moeglot.reports.curves import drawn

    for losses, levels in (
        ([2.0, 1.0], {"before": 1.5, "after": 1.5001}),
        ([2.0, 1.0], {"before": 1.0, "after": 1.0}),
        ([3.0], {"a": 1.0, "b": 1.0, "c": 1.01}),
    ):
        heights = sorted(float(found) for found in re.findall(r'y="([\d.]+)"[^>]*#b3261e', drawn("", losses, levels)))
        assert len(heights) == len(levels)
        assert all(lower - upper >= 12 for upper, lower in itertools.pairwise(heights))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", ""), ["'' is no path"]),
        (("convert", BUNDLED, "", "--to", "gpt-oss/transformers"), ["'' is no path"]),
        (("compare", BUNDLED, ""), ["'' is no path"]),
        (("adapter", "inspect", "", "--base", BUNDLED), ["'' is no path"]),
        (("adapter", "inspect", BUNDLED / "config.json", "--base", BUNDLED), ["a file", "an adapter is a folder", f"pass the folder that it is in: {BUNDLED}"]),
        (("moments", BUNDLED, "text.txt", "-o", "m.json"), ["m.json: not named .safetensors", "pass -o m.safetensors"]),
        (("run", BUNDLED, "--prompt", "And", "--prompt", "But"), ["2 prompts", "once for each"]),
        (("run", BUNDLED, "--prompt", "And", "--convention", "peft"), ["--adapter"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--convention", "peft"), ["--adapter"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--threshold", "0.5"), ["--adapter"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--dry-run", "--html", "r.html"), ["--html r.html with --dry-run", "leave one"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--part", "1/2", "--html", "r.html"), ["--html r.html with --part 1/2", "--finalize"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--part", ""), ["'' is no part", "--part 1/8"]),
        (("run", BUNDLED, "--prompt", "And", "--encode", ""), ["'' is not an encoding"]),
        (("run", BUNDLED, "--prompt", "And", "--convention", ""), ["--adapter"]),
        (("merge", BUNDLED, "lora", "out", "--dry-run", "--html", "r.html"), ["--html r.html with --dry-run", "leave one"]),
        (("convert", BUNDLED, "out", "--to", "gpt-oss/openai", "--keep-touched", "bf16"), ["--adapter"]),
    ],
)
def test_what_cannot_be_meant(arguments, words):
    told = here(*arguments, status=2)[1]
    assert told.count("\n") == 3
    assert all(word in told for word in words), told


def test_what_python_may_pass(small, tmp_path):
    assert (
        moeglot.plan(moeglot.open(small), "qwen3-moe/hub", shard_size="1MB").shards
        == moeglot.plan(moeglot.open(small), "qwen3-moe/hub", shard_size=10**6).shards
    )
    wrong = {"lossy": True, "shard_size": "big", "encode": 32, "workers": "2", "engine": "ray", "format": 3}
    for name, value in wrong.items():
        with pytest.raises(moeglot.UsageError, match=f"{name}|big"):
            moeglot.convert(small, "qwen3-moe/hub", tmp_path / "out", **{name: value})
    for name, value in {"shard_size": 1.5, "encode": "", "workers": 0, "convention": "peft", "threshold": 0.5, "keep_touched": "bf16"}.items():
        with pytest.raises(moeglot.UsageError):
            moeglot.convert(small, "qwen3-moe/hub", tmp_path / "out", **{name: value})
    for value in (float("nan"), 1.5, -0.1, "0.5"):
        with pytest.raises(moeglot.UsageError, match=r"threshold.*\n.*\n.*0 to 1"):
            moeglot.write_part(moeglot.plan(small), tmp_path / "out", "1/1", threshold=value)
    with pytest.raises(moeglot.UsageError, match="no rounding"):
        moeglot.plan(small, round=None)
    for ranks in ({"tp_rank": "0", "tp_size": "1"}, {"ep_rank": 0.0, "ep_size": 2}, {"padded_vocab_size": "64"}, {"padded_vocab_size": -5}):
        with pytest.raises(moeglot.UsageError, match="whole number"):
            moeglot.plan(small, "qwen3-moe/megatron-te", **ranks)
    with pytest.raises(moeglot.UsageError, match="is not a format"):
        moeglot.plan(small, "")
    for count in (0, -1, None, 1.5, "2"):
        with pytest.raises(moeglot.UsageError, match="workers"):
            moeglot.verify(small, workers=count)
        with pytest.raises(moeglot.UsageError, match="workers"):
            moeglot.compare(small, small, workers=count)
    for path in (None, "a\0b"):
        with pytest.raises(moeglot.UsageError, match="is no path"):
            moeglot.open(path)
        with pytest.raises(moeglot.UsageError, match="is no path"):
            moeglot.convert(small, "qwen3-moe/hub", path)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_stays_where_it_is(small, tmp_path, monkeypatch):
    """Whatever lies under the same name where the process goes later, it is another."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copytree(small, tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    checkpoint, made = moeglot.open("model"), moeglot.plan("model", "qwen3-moe/transformers-5")
    monkeypatch.chdir(tmp_path / "b")
    assert moeglot.verify(checkpoint).verdict == "holds"
    moeglot.write_part(made, "out", "1/1")
    assert moeglot.finalize(made, "out").report.verdict == "holds"
    assert checkpoint.source.name == "model"
    write_checkpoint(Path("model"), "qwen3-moe/hub", {"e": 4, "h": 64, "i": 64})
    assert moeglot.compare(checkpoint, small).verdict == "holds"


def test_what_python_may_pass_in_the_place_of_names(small, tmp_path):
    """A Format for its name and a checkpoint for its path; what is neither is told in a line."""
    hub = next(form for form in moeglot.formats() if form.name == "qwen3-moe/hub")
    opened = moeglot.open(small, hub)
    assert moeglot.plan(opened, hub).digest == moeglot.plan(small, "qwen3-moe/hub").digest
    assert moeglot.lint(small) == moeglot.lint(opened)
    for value in (opened, opened.source, hub, moeglot.plan(opened, hub)):
        assert len(repr(value)) < 300
    tensor, made = opened.experts(opened.layers[0])["down"], moeglot.plan(opened, hub)
    for attempt in (
        lambda: tensor[0:2],
        lambda: moeglot.verify(opened, 3),
        lambda: moeglot.open(opened),
        lambda: moeglot.write_part(made, tmp_path / "out", (2, 2)),
    ):
        with pytest.raises(moeglot.UsageError) as refused:
            attempt()
        assert len(str(refused.value)) < 600
    for layer in ("0", 0.0, False, -1):
        with pytest.raises(moeglot.TensorMismatch, match=f"layer {layer!r} has no experts"):
            opened.experts(layer)


def test_a_link_to_nothing_is_no_repository(tmp_path, monkeypatch):
    """Nobody is asked for it, though its path reads as owner/name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to("nowhere")
    for path, known in (("models/link", "link to nothing"), ("/dev/null", "device")):
        for attempt in (moeglot.open, lambda path: moeglot.open(path, headers_only=True), lambda path: moeglot.open_adapter(path, BUNDLED)):
            with pytest.raises(moeglot.UsageError, match=f"neither a file nor a folder\n.*{known}"):
                attempt(path)


@pytest.mark.parametrize("source", ["hub", "mxfp4"])
def test_what_lies_beside_an_expert_is_none(source, small):
    """In a tensor of all experts, the bytes before the first and after the last are those of other tensors."""
    opened = moeglot.open({"hub": small, "mxfp4": BUNDLED}[source])
    line, layer = opened.format.stored[0], opened.layers[0]
    for read in (opened.stored, opened.checked, opened.expert):
        for expert in (-1, opened.sizes["e"], False, 0.0):
            with pytest.raises(moeglot.TensorMismatch, match=f"layer {layer} has no expert {expert!r}"):
                read(line, layer, expert)
        with pytest.raises(moeglot.TensorMismatch, match="layer 99 has no experts"):
            read(line, 99, 0)
