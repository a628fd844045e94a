"""Every family that the installed transformers has, as real modules: what it saves we read, what we write it loads, and both compute the same."""

import families
import pytest
import torch
import transformers
from cells import tried
from families import SIZES, logits, model_of, saved
from reading import relative
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

import moeglot
from moeglot.formats import FAMILIES, PLAIN
from moeglot.integrations.transformers import VERSION, model_class

LIMIT, POWER = 1e-5, 1e-3
KNOWN = [family for family in FAMILIES if family.model_types[0] in CONFIG_MAPPING and not families.why_not(family)]
ALL_SIZES = ("gpt-oss", "qwen3-moe", "mixtral", "qwen3-vl-moe", "llama4-text")
"""Families whose matrices lie otherwise than others', and the usual ones; of the others, all are tried square and every third at one size more."""
CASES = [(family, size) for n, family in enumerate(KNOWN) for k, size in enumerate(SIZES) if tried(n, k) or family.name in ALL_SIZES]

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(params=CASES, ids=[f"{family.name}-{size}" for family, size in CASES])
def case(request):
    family, size = request.param
    return family, size, model_of(family, size)


def load(path) -> torch.nn.Module:
    """By transformers alone; not one key missing or unexpected."""
    config = transformers.AutoConfig.from_pretrained(path)
    model, info = model_class(config).from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval()


OWN = {"qwen3.5-moe-text": ("qwen3.5-moe-text/transformers-5.5", True), "qwen3-omni-moe": ("qwen3-omni-moe/transformers-5.5", False)}
"""Family -> a format that 5.5 alone writes, and whether by default."""


@pytest.mark.skipif(not (5, 0) <= VERSION < (5, 6), reason="formats of 5.5")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", [family for family in KNOWN if family.name in OWN], ids=lambda family: family.name)
def test_formats_of_one_release(family, size, tmp_path):
    model = model_of(family, size)
    name, original = OWN[family.name]
    saved(model, tmp_path / "saved", original)
    source = moeglot.open(tmp_path / "saved")
    assert source.format.name == name
    assert moeglot.verify(source, "transformers").verdict == "holds"
    expected = logits(model)
    assert relative(logits(moeglot.load(tmp_path / "saved", "float32")), expected) <= LIMIT
    for to in [name, *([f"{family.name}/transformers-5"] if not source.format.alone else [])]:
        out = tmp_path / to.replace("/", "-")
        assert moeglot.convert(source, to, out).report.verdict == "holds"
        assert relative(logits(load(out)), expected) <= LIMIT


@pytest.mark.skipif(VERSION < (5, 23), reason="the formats in memory are those of 5.23; test_transformers.py covers the earlier releases")
def test_what_it_saves_we_read_and_what_we_write_it_loads(case, tmp_path):
    family, size, model = case
    expected = logits(model)
    sources = []
    for original in (True, False):
        folder = tmp_path / f"saved-{original}"
        saved(model, folder, original)
        source = moeglot.open(folder)
        assert source.format.family == family
        if source.format not in [other.format for other in sources]:  # else it wrote the same again
            report = moeglot.verify(source, "transformers")
            assert report.verdict == "holds", report
            sources.append(source)
    for n, form in enumerate(readable(family)):
        source = next((s for s in sources if s.format != form and not (s.format.alone or form.alone)), None) or next(s for s in sources if s.format == form)
        out = tmp_path / f"{n}"
        assert moeglot.convert(source, form.name, out).report.verdict == "holds"
        error = relative(logits(load(out)), expected)
        assert (error > POWER) if (form.name, size) in MISREAD else (error <= LIMIT), (form.name, error)


@pytest.mark.skipif(VERSION >= (5, 23), reason="there, these are asked as others are")
@pytest.mark.parametrize("name", ["aria-text", "qwen3-vl-moe"])
def test_experts_that_are_asked_in_a_way_of_their_own(name, tmp_path):
    model = model_of(next(family for family in KNOWN if family.name == name), "neither")
    model.config.to_json_file(tmp_path / "config.json")
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert moeglot.verify(tmp_path, "transformers").verdict == "holds"


FIXED = {"qwen4-exp", "qwen4-exp-text"}
"""Families whose configs refuse another activation."""


@pytest.mark.skipif(VERSION < (5, 23), reason="the modules are those of 5.23")
@pytest.mark.parametrize("family", [family for family in KNOWN if family.name not in FIXED], ids=lambda family: family.name)
def test_activations_that_no_release_has(family, tmp_path):
    """Which of a family's MLPs look at the activation that config.json names, is its class's own business."""
    saved(model_of(family, "neither", activated=True), tmp_path / "saved", True)
    expected = logits(load(tmp_path / "saved"))
    assert moeglot.verify(tmp_path / "saved", "transformers").verdict == "holds"
    assert relative(logits(moeglot.load(tmp_path / "saved", "float32")), expected) <= LIMIT
    try:
        native = moeglot.load(tmp_path / "saved", "float32", native=True)
    except moeglot.UsageError:
        return  # no module of the library lies as a layout does: tests/oracles/test_native.py names them
    assert relative(logits(native), expected) <= LIMIT


def readable(family):
    """The formats of a family that hold plain floats and that transformers 5 reads."""
    return [form for form in PLAIN if form.family == family and form.is_plain and form.reads in ("any transformers", "transformers 5")]


MISREAD = {("qwen3-vl-moe/hub", "square"), ("qwen3-vl-moe/hub", "h=2i")}
"""(format, size) that transformers itself misreads: it turns a matrix or not by its shape, and these shapes fit both ways."""
