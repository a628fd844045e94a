"""Training on the bundled model: the same curve whatever the base's encoding, resumed runs that give the same bytes, and stock PEFT that computes the same."""

import errno
import json
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from devices import DEVICE
from reading import relative
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

import moeglot
from moeglot.cli import tune as cli_tune
from moeglot.cli.main import app
from moeglot.demo import BUNDLED
from moeglot.errors import BadNumbers, BrokenFile, HalfAdapter, MoeglotError, OutputExists, UsageError
from moeglot.integrations.transformers import VERSION
from moeglot.nn import add_lora, experts_of, load_adapter
from moeglot.nn.data import Data, Rows, read
from moeglot.nn.moments import gather
from moeglot.nn.tune import Recipe, _Run, tune
from moeglot.reports import curves
from moeglot.survival import Survival

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

TEXT = Path(__file__).parents[2] / "LICENSE"
once = pytest.mark.skipif(VERSION < (5, 23), reason="nothing in it depends on the release: it runs with the newest")
RECIPE = Recipe(steps=24, batch=2, length=64, rate=2e-3, warmup=3, r=4, save_every=8)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Path:
    moeglot.convert(BUNDLED, "gpt-oss/transformers", folder := tmp_path_factory.mktemp("tune") / "bf16")
    return folder


class Few:
    """A run of a few steps on a little text."""

    recipe = Recipe(steps=6, batch=1, length=16, r=2, warmup=1, save_every=2)

    def __init__(self, folder: Path) -> None:
        self.data = folder / "few.txt"
        self.data.write_text(TEXT.read_text()[:2000])
        self.folder = folder / "whole"
        self.record = trained(BUNDLED, self.folder, recipe=self.recipe, data=self.data)[1]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Few:
    return Few(tmp_path_factory.mktemp("few"))


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(BUNDLED)


def trained(base, out, encode=None, recipe=RECIPE, data=TEXT, **options):
    model = moeglot.load(base, "float32", native=True, encode=encode)
    return model, tune(model, tokenizer(), data, out, recipe, base=str(base), **options)


@once
def test_the_curve_is_the_same_whatever_encodes_the_base(bf16, tmp_path):
    """bfloat16 and MXFP4 hold the same numbers here; FP8 and NF4 are off by what they round, which moves a curve less than a step of it does."""
    found = {
        "bfloat16": trained(bf16, tmp_path / "1")[1],
        "mxfp4": trained(BUNDLED, tmp_path / "2")[1],
        "fp8-block": trained(bf16, tmp_path / "3", "fp8-block")[1],
        "nf4": trained(bf16, tmp_path / "4", "nf4")[1],
    }
    right = torch.tensor(found["bfloat16"].losses)
    moved = float(right.diff().abs().mean())
    for name, record in found.items():
        off = (torch.tensor(record.losses) - right).abs()
        assert float(off.max()) <= {"bfloat16": 0, "mxfp4": 1e-4}.get(name, 0.5 * moved), name
        assert record.after < record.before - 0.5
        assert sum(record.losses[-4:]) / 4 < record.before - 0.5
    assert found["nf4"].losses != found["bfloat16"].losses
    other = trained(BUNDLED, tmp_path / "5", recipe=Recipe(**{**vars(RECIPE), "seed": 1}))[1]
    assert float((torch.tensor(other.losses) - right).abs().max()) > 0.5 * moved  # other rows in each step: the comparison can fail


class Killed(Exception):
    pass


@once
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_killed_run_goes_on_to_the_same_bytes(dropout, tmp_path):
    recipe = Recipe(**{**vars(RECIPE), "steps": 12, "save_every": 4, "dropout": dropout})

    def kill(done: int, steps: int, loss: float) -> None:
        if done == 7:
            raise Killed

    _, whole = trained(BUNDLED, tmp_path / "whole", recipe=recipe)
    with pytest.raises(Killed):
        trained(BUNDLED, tmp_path / "killed", recipe=recipe, step=kill)
    assert not (tmp_path / "killed" / "adapter").exists()
    with pytest.raises(OutputExists):
        trained(BUNDLED, tmp_path / "killed", recipe=recipe)
    with pytest.raises(UsageError, match=r"another recipe\n.* says {'rate': 0.\d+}\n"):
        trained(BUNDLED, tmp_path / "killed", recipe=Recipe(**{**vars(recipe), "rate": 1e-4}), resume=True)
    (tmp_path / "text.txt").write_text(TEXT.read_text()[::-1])
    with pytest.raises(UsageError, match="begun with another data"):
        trained(BUNDLED, tmp_path / "killed", recipe=recipe, data=tmp_path / "text.txt", resume=True)
    _, again = trained(BUNDLED, tmp_path / "killed", recipe=recipe, resume=True)
    assert again.losses == whole.losses
    assert (again.before, again.after) == (whole.before, whole.after)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@once
def test_no_gradient_is_longer_than_one(few, tmp_path):
    """What the optimizer is given, over all factors together."""
    lengths: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: lengths.append(float(torch.cat([of.grad.flatten() for group in optimizer.param_groups for of in group["params"]]).norm()))
    )
    try:
        trained(BUNDLED, tmp_path / "out", recipe=few.recipe, data=few.data)
    finally:
        hook.remove()
    assert len(lengths) == few.recipe.steps
    assert 0.99 < max(lengths) < 1.0001


@once
@pytest.mark.parametrize("moment", ["the first evaluation", "a checkpoint", "the last evaluation", "nothing is written"])
def test_a_run_goes_on_from_whatever_an_interrupt_leaves(moment, few, tmp_path, monkeypatch):
    recipe, whole, out = few.recipe, few.record, tmp_path / "out"

    def interrupt(self, *_):
        if moment != "the last evaluation" or self.record.losses:
            raise KeyboardInterrupt
        return whole.before

    if moment == "nothing is written":
        out.mkdir()
        (out / "tune.json.partial").write_text("{")
    else:
        monkeypatch.setattr(_Run, "save" if moment == "a checkpoint" else "held_out", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(BUNDLED, out, recipe=recipe, data=few.data)
        monkeypatch.undo()
    _, again = trained(BUNDLED, out, recipe=recipe, data=few.data, resume=True)
    assert (again.losses, again.before, again.after) == (whole.losses, whole.before, whole.after)
    assert not list(out.rglob("*partial*"))


def test_a_folder_of_others_is_no_run(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UsageError, match="no run to resume"):
        trained(BUNDLED, tmp_path, recipe=Recipe(steps=1, batch=1, length=16, r=2), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@once
@pytest.mark.parametrize("why", ["a factor", "the rate"])
def test_a_run_that_diverges_stops_at_once_and_keeps_what_was_good(why, few, tmp_path):
    recipe = Recipe(**{**vars(few.recipe), "rate": 1e37 if why == "the rate" else 1e-3})
    model = moeglot.load(BUNDLED, "float32", native=True)

    def poison(done: int, steps: int, loss: float) -> None:
        if why == "a factor" and done == 3:
            next(iter(experts_of(model).values())).lora["first"].b.data.fill_(float("inf"))

    with pytest.raises(BadNumbers, match=r"(?s)^step (2|4) of 6: .*float32.*a smaller --rate") as caught:
        tune(model, tokenizer(), few.data, tmp_path / "out", recipe, base=str(BUNDLED), step=poison)
    record = json.loads((tmp_path / "out" / "tune.json").read_text(), parse_constant=pytest.fail)
    assert record["diverged"] == len(record["losses"]) + 1 == (4 if why == "a factor" else 2)
    assert record["after"] is None
    kept = [path.name for path in tmp_path.glob("out/checkpoints/*")]
    assert kept == (["step-2"] if why == "a factor" else [])
    assert (kept or ["no checkpoint"])[0] in str(caught.value)
    assert not list(tmp_path.rglob("*partial*"))
    assert not (tmp_path / "out" / "adapter").exists()
    if why == "a factor":
        _, again = trained(BUNDLED, tmp_path / "out", recipe=recipe, data=few.data, resume=True)
        assert (again.losses, again.diverged, again.losses[:3]) == (few.record.losses, None, record["losses"])


@once
def test_losses_are_means_over_what_is_learned(bf16, tmp_path):
    """transformers' own loss of the same labels; the micro-batches have different numbers of them."""
    lines = [line for line in TEXT.read_text().split("\n") if len(line) > 40][:60]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": line[: 3 + n % 30], "completion": line[3 + n % 30 :]}) for n, line in enumerate(lines)))
    recipe = Recipe(steps=1, batch=2, accumulate=3, length=32, r=2)
    _, record = trained(bf16, tmp_path / "out", recipe=recipe, data=data)
    rows, dense = read(data, tokenizer(), recipe.length, recipe.held_out), moeglot.load(bf16, "float32")
    assert len({some.learned for some in rows.batch(0, 6, 0).split(2)}) > 1
    with torch.no_grad():
        for found, some in ((record.losses[0], rows.batch(0, 6, 0)), (record.before, rows.held_out)):
            right = float(dense(input_ids=some.tokens, labels=some.labels).loss)
            assert abs(found - right) <= 1e-5 * right
            assert abs(found - float(dense(input_ids=some.tokens, labels=some.tokens).loss)) > 1e-2 * right


@once
def test_what_is_measured_is_spread_over_what_is_held_out(tmp_path):
    out = tmp_path / "out"
    _, record = trained(BUNDLED, out, recipe=Recipe(steps=1, batch=1, length=8, r=2, held_out=0.5))
    held_out = len(read(TEXT, tokenizer(), 8, 0.5).held_out)
    assert record.measured == json.loads((out / "tune.json").read_text())["measured"] == {"rows": 64, "of": held_out}
    for rows in (64, 65, 100, 1000):
        numbered = Rows(torch.arange(rows).view(-1, 1), torch.arange(rows).view(-1, 1))
        found = Data(numbered, numbered, "").sample(64).tokens.flatten()
        assert float((found - (torch.arange(64) + 0.5) * rows / 64).abs().max()) <= 1
        assert len(found.unique()) == 64
    assert torch.equal(Data(numbered, numbered, "").sample(2000).tokens, numbered.tokens)
    assert sorted(Data(numbered, numbered, "").batch(0, len(numbered), (1 << 64) - 1).tokens.flatten()) == sorted(numbered.tokens.flatten())


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0])
def test_values_that_mean_nothing_are_refused_before_any_work(alpha, tmp_path):
    with pytest.raises(UsageError, match="alpha is finite"):
        add_lora(torch.nn.Module(), alpha=alpha)
    for options in (["--alpha", str(alpha)], ["--rate", "nan"], ["--rank", "0"]):
        found = CliRunner().invoke(app, ["tune", str(tmp_path / "none"), "--data", str(TEXT), "--out", str(tmp_path / "out"), *options])
        assert found.exit_code
        assert "none" not in str(found.exception), "the base was looked at first"
    for options in ({"r": 0}, {"r": -1}, {"rate": float("inf")}, {"seed": 1 << 64}):
        with pytest.raises(UsageError):
            Recipe(**options)


@pytest.mark.parametrize(("modules", "told"), [(("q_proj", "foo"), "no module is called foo"), (("norm",), "PEFT does not adapt norm")])
def test_modules_that_are_none_are_named_with_those_that_are(modules, told, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match=rf"(?s){told}.*k_proj, lm_head, o_proj, q_proj"):
        trained(BUNDLED, tmp_path / "out", recipe=Recipe(steps=1, length=16, modules=modules))
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_saved_is_not_trained(tmp_path):
    pytest.importorskip("peft")
    model = moeglot.load(BUNDLED, "float32")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    with pytest.raises(HalfAdapter, match="embeddings are one tensor"):
        trained(tmp_path / "tied", tmp_path / "out", recipe=Recipe(steps=1, length=16, modules=("lm_head",)))
    assert not (tmp_path / "out").exists()


def test_stock_peft_computes_what_was_trained(bf16, tmp_path):
    peft = pytest.importorskip("peft")
    trained(BUNDLED, tmp_path / "out", recipe=Recipe(**{**vars(RECIPE), "steps": 6, "modules": ("q_proj", "v_proj"), "checkpointing": True}))
    ids = torch.tensor([tokenizer()("This License does not grant permission")["input_ids"]])
    live = load_adapter(moeglot.load(BUNDLED, "float32", native=True), tmp_path / "out" / "adapter").eval()
    convention = moeglot.open_adapter(tmp_path / "out" / "adapter", BUNDLED).convention.name
    assert convention == "peft"
    theirs = tmp_path / "theirs"
    from test_peft import READER

    moeglot.convert_adapter(moeglot.open_adapter(tmp_path / "out" / "adapter", BUNDLED), READER, theirs)
    dense = transformers.AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32).eval()
    with torch.no_grad():
        before, expected = dense(input_ids=ids).logits, live(input_ids=ids).logits
        stock = peft.PeftModel.from_pretrained(dense, theirs).eval()
        assert relative(stock(input_ids=ids).logits, expected) <= 1e-5
    assert relative(before, expected) > 1e-2


@once
def test_a_merged_model_computes_what_was_trained_up_to_what_the_merge_reports(tmp_path):
    """Dense, read by transformers: all of it in float32; elsewhere as much of the change of the logits as the report says of the change of the weights."""
    trained(BUNDLED, tmp_path / "out")
    adapter, ids = tmp_path / "out" / "adapter", torch.tensor([tokenizer()(TEXT.read_text()[:2000])["input_ids"]])
    shares = {}
    with torch.no_grad():
        base = moeglot.load(BUNDLED, "float32")(input_ids=ids).logits
        change = load_adapter(moeglot.load(BUNDLED, "float32", native=True), adapter).eval()(input_ids=ids).logits - base
        for encode, rounding in (("float32", "nearest"), ("bfloat16", "nearest"), (None, "nearest"), (None, "delta")):
            out = tmp_path / f"{encode}-{rounding}"
            certificate = moeglot.merge(BUNDLED, adapter, out, encode=encode, round=rounding, threshold=0)
            found = moeglot.load(out, "float32")(input_ids=ids).logits - base
            rec = sum(certificate.survived.values(), Survival()).rec
            shares[encode, rounding] = rec, float((found * change).sum() / (change * change).sum()), relative(found, change)
    assert shares["float32", "nearest"][2] <= 1e-5
    for rec, share, off in (shares["bfloat16", "nearest"], shares[None, "delta"]):
        assert rec >= 0.95
        assert abs(share - 1) <= 0.05
        assert off <= 0.25
    rec, share, off = shares[None, "nearest"]
    assert max(rec, share) < 0.6 < 0.5 + off  # most of it is lost, and the report says so


def test_the_command(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    lines = TEXT.read_text().split("\n\n")
    data.write_text("\n".join(json.dumps({"text": line} if n % 2 else {"prompt": line[:9], "completion": line[9:]}) for n, line in enumerate(lines)))
    options = ["--steps", "4", "--batch", "2", "--length", "32", "--rank", "2", "--dtype", "float32", "--encode", "nf4"]
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "bf16")
    words = ["tune", str(tmp_path / "bf16"), "--data", str(data), "--out", str(tmp_path / "out"), "--device", DEVICE]
    found = CliRunner().invoke(app, [*words, *options])
    assert found.exit_code == 0, (found.output, found.exception)
    assert "held out, after" in found.output
    assert " rows)" in found.output
    record = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert (record["schema"], len(record["losses"])) == ("moeglot/tune/1", 4)
    assert "<polyline" in (tmp_path / "out" / "loss.html").read_text()
    try:
        import matplotlib  # noqa: F401

        assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    except ImportError:
        assert not (tmp_path / "out" / "loss.png").exists()
    words = ["run", str(tmp_path / "bf16"), "--prompt", "This License", "--tokens", "5", "--device", DEVICE, "--adapter", str(tmp_path / "out" / "adapter")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert "This License" in ran.output
    monkeypatch.setattr(cli_tune, "load", lambda *_, **__: pytest.fail("a model was loaded first"))
    for wrong in ([], ["--out", str(tmp_path / "new"), "--data", str(tmp_path / "gone.jsonl")]):
        refused = CliRunner().invoke(app, ["tune", str(tmp_path / "bf16"), "--data", str(data), "--out", str(tmp_path / "out"), *wrong])
        assert isinstance(refused.exception, OutputExists if not wrong else MoeglotError)


JSON_FILES = {
    "data.txt": ({"text": "And God said"}, "one JSON object over several lines"),
    "data.json": ([{"text": "And God said"}] * 2, "one JSON list of 2 objects"),
    "alpaca.jsonl": ({"instruction": "And", "output": "God"}, "(?s)keys instruction, output.*rename instruction to prompt"),
    "mixed.jsonl": ({"prompt": [{"role": "user", "content": "And"}], "completion": "God"}, "prompt is a list and completion is text"),
    "null.jsonl": ({"prompt": "And", "completion": None}, "prompt is text and completion is null"),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_no_lines_of_text_is_told_apart(name, tmp_path):
    value, told = JSON_FILES[name]
    for indent in (None,) if name.endswith("l") else (1,) if name == "data.txt" else (None, 1):
        (tmp_path / name).write_text(json.dumps(value, indent=indent))
        with pytest.raises(BrokenFile, match=told):
            read(tmp_path / name, tokenizer(), 8, 0.1)


def test_utf_16_is_no_text_in_utf_8(tmp_path):
    (tmp_path / "data.txt").write_bytes(TEXT.read_text().encode("utf-16-le"))
    with pytest.raises(UsageError, match="NUL characters"):
        read(tmp_path / "data.txt", tokenizer(), 8, 0.1)


@pytest.mark.parametrize("which", ["length", "tokens"])
def test_rows_that_the_model_does_not_take_are_refused(which, tmp_path):
    model = moeglot.load(BUNDLED, "float32", native=True)
    if which == "tokens":
        model.resize_token_embeddings(600)
    model.config.max_position_embeddings = 32
    for train in (
        lambda length: tune(model, tokenizer(), TEXT, tmp_path / "out", Recipe(steps=1, length=length)),
        lambda length: gather(model, torch.full((1, length), 700), tmp_path / "m.safetensors"),
    ):
        with pytest.raises(UsageError, match="--length 32" if which == "length" else "embeddings of tokens 0 to 599"):
            train(33 if which == "length" else 32)
    assert not list(tmp_path.iterdir())


@once
@pytest.mark.parametrize("what", ["the record", "the checkpoint's record", "the checkpoint"])
def test_what_a_broken_disk_leaves_of_a_run_is_named(what, few, tmp_path):
    shutil.copytree(few.folder, out := tmp_path / "out")
    shutil.rmtree(out / "adapter")
    broken = {"the record": out, "the checkpoint's record": out / "checkpoints/step-4", "the checkpoint": out / "checkpoints/step-4"}[what]
    broken /= "state.safetensors" if what == "the checkpoint" else "tune.json"
    broken.write_bytes(broken.read_bytes()[:150])
    with pytest.raises(BrokenFile, match=f"(?s){broken}: not what a run writes.*({'another folder' if what == 'the record' else 'first step'})"):
        trained(BUNDLED, out, recipe=few.recipe, data=few.data, resume=True)
    if what != "the record":
        shutil.rmtree(out / "checkpoints/step-4")
        _, again = trained(BUNDLED, out, recipe=few.recipe, data=few.data, resume=True)
        assert (again.losses, again.after) == (few.record.losses, few.record.after)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before, kept = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    sys.dont_write_bytecode = True  # Python would keep the part of a module's that fits, and every later process would fail on it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = kept


@pytest.mark.parametrize(("size", "name"), [(20_000, "adapter_model"), (400_000, "state")])
def test_a_full_disk_is_the_systems_word(size, name, few, tmp_path):
    """What safetensors raises is no OSError, and says no path; the optimizer's state is thrice the adapter."""
    with pytest.raises(OSError, match=rf"File too large.*{name}\.safetensors") as caught, files_of_at_most(size):
        trained(BUNDLED, tmp_path / "out", recipe=few.recipe, data=few.data)
    assert caught.value.errno == errno.EFBIG


def test_a_title_may_have_a_dollar(tmp_path):
    pytest.importorskip("matplotlib")
    assert curves.png(tmp_path / "loss.png", r"a $\frac$ b_0", [2.0, 1.0], {"held out": 1.5})


def test_what_is_no_text_is_refused(tmp_path):
    words, path = tokenizer(), tmp_path / "data.jsonl"
    deep, half = f'{{"text": {"[" * 100_000}{"]" * 100_000}}}', r'{"prompt": "And \ud800", "completion": "it"}'
    for text, words_of_it in (('{"text": 1}', "text is a number"), ("[1]", "list"), ("{", "no JSON"), (deep, "no JSON"), (half, "a surrogate alone")):
        path.write_text(text)
        with pytest.raises(BrokenFile, match=f"line 1: .*{words_of_it}"):
            read(path, words, 8, 0.1)
    path.write_text('{"text": "And"}\n{"text": "And')
    with pytest.raises(BrokenFile, match=r"line 2: no JSON\n.*at character 10\n"):
        read(path, words, 8, 0.1)
    (tmp_path / "data.jsonl.bak").write_text('\n{"text": "And it came to pass"}\n')
    with pytest.raises(UsageError, match="first line is a JSON object"):
        read(tmp_path / "data.jsonl.bak", words, 8, 0.1)
    path.write_text('{"messages": [{"role": "user", "content": "And"}]}')
    with pytest.raises(UsageError, match="no chat template"):
        read(path, words, 8, 0.1)
    begin = "{% if messages[0].role != 'user' %}{{ raise_exception('users begin') }}{% endif %}"
    words.chat_template = begin + "{{ messages[0].content + '' }}{% if 1 / (2 - messages | length) %}{% endif %}"
    for row, words_of_it in {
        '{"messages": [{"role": "system", "content": "And"}]}': "line 2: the chat template.*users begin",
        '{"messages": [{"role": "user", "content": 3}]}': "line 2: the chat template.*int",
        '{"messages": ["And"]}': 'line 2: a message is str.*"role"',
        '{"messages": [{"content": "And"}]}': 'line 2: a message is keys content.*"role"',
        '{"messages": [{"from": "human", "value": "And"}]}': 'line 2: .*ShareGPT.*"role": "user"',
        '{"conversations": [{"from": "human", "value": "And"}]}': 'line 2: .*ShareGPT.*"messages"',
        '{"messages": [{"role": "user", "content": "And"}, {"role": "user", "content": "And"}]}': "line 2: the chat template.*zero",
        '{"prompt": [], "completion": []}': "line 2: no message",
        '{"messages": [{"role": "user", "content": "And"}], "tools": "["}': "line 2: the chat template",
    }.items():
        path.write_text(f'{{"text": "And"}}\n{row}')
        with pytest.raises(UsageError, match=f"(?s){words_of_it}"):
            read(path, words, 8, 0.1)
    row = {"messages": [{"role": "user", "content": "And God said"}], "chat_template_kwargs": {"return_tensors": "pt", "tokenize": False}}
    path.write_text("\n".join([json.dumps(row), r'{"text": "\ud83d\ude00"}']))  # ours are kept, and a pair is a character
    assert len(read(path, words, 4, 0.0).train)
    path.write_text(json.dumps({"text": "And God said"}))
    with pytest.raises(UsageError, match="rows of 64"):
        read(path, words, 64, 0.1)
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "none.txt", words, 8, 0.1)
    data = read(TEXT, words, 32, 0.25)
    assert abs(len(data.held_out) / (len(data.train) + len(data.held_out)) - 0.25) < 0.01
    first = torch.cat([data.batch(step, 4, 0).tokens for step in range(len(data.train) // 4)])
    assert len(first.unique(dim=0)) == len(first)  # each row once in an epoch
