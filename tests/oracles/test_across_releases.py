"""A checkpoint that the newest transformers saved, in an older one: through moeglot it computes the same; read directly, it does not.

The newest release saves in its own environment (`make test` makes it, before `make matrix` comes here); this one loads.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import families
import pytest
import torch
import transformers
from reading import relative
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

import moeglot
from moeglot.formats import FAMILIES, PLAIN
from moeglot.inspection import ropes
from moeglot.integrations.transformers import VERSION, model_class

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).parents[2]
NEWEST = Path(os.environ.get("MOEGLOT_NEWEST", ROOT / ".venv" / "bin" / "python"))
LIMIT = 1e-5
KNOWN = [family for family in FAMILIES if family.model_types[0] in CONFIG_MAPPING and not families.why_not(family)]
OTHER_CODE = {((4, 57), "nllb-moe"): "its router weighs the second expert otherwise than the newest release's"}
"""(release, family) -> why the same weights compute something else there; each expert must still compute the same."""

if VERSION >= (5, 0):
    pytest.skip("transformers 5 reads what transformers 5 saves, as far as it knows the family", allow_module_level=True)
if not NEWEST.exists():
    pytest.skip(f"{NEWEST} is not there: `make test` makes it", allow_module_level=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """FOLDER/FAMILY as the newest release saves it, with the logits that it computes."""
    folder = tmp_path_factory.mktemp("saved")
    command = [str(NEWEST), str(ROOT / "tests" / "oracles" / "save_models.py"), str(folder), *(family.name for family in KNOWN)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("src", "tests"))}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return folder


def computed(folder) -> tuple[torch.Tensor | str, dict]:
    """The logits that this release arrives at by itself, or its error; and the keys that it finds missing or unexpected."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model, info = model_class(config).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        return families.logits(model.float().eval()), {kind: keys for kind, keys in info.items() if keys}
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}", {}


@pytest.mark.parametrize("family", KNOWN, ids=[family.name for family in KNOWN])
def test_it_loads_and_computes_the_same(family, saved, tmp_path):
    expected = load_file(saved / family.name / "logits.pt")["logits"]
    source = moeglot.open(saved / family.name)
    target = next(form for form in PLAIN if form.family == family and form.is_plain and form.reads == "any transformers")
    assert moeglot.convert(source, target.name, tmp_path / "out").report.verdict == "holds"
    found, wrong = computed(tmp_path / "out")
    assert not wrong
    assert isinstance(found, torch.Tensor), found
    if (VERSION, family.name) in OTHER_CODE:
        assert moeglot.verify(tmp_path / "out", "transformers").verdict == "holds"
        return
    assert relative(found, expected) <= LIMIT
    assert relative(families.logits(moeglot.load(saved / family.name, "float32")), expected) <= LIMIT


def test_read_directly_most_of_them_compute_something_else(saved):
    """The power of the test above: another base of the rotary embeddings, another number of experts."""
    off = {}
    for family in KNOWN:
        found, wrong = computed(saved / family.name)
        expected = load_file(saved / family.name / "logits.pt")["logits"]
        off[family.name] = wrong or isinstance(found, str) or relative(found, expected) > 100 * LIMIT
    right = {"jamba", "switch-transformers"}  # without rotary embeddings
    assert {name for name, differs in off.items() if not differs} <= right
    assert len(off) > 20


def test_the_ropes_that_this_release_takes():
    """What `inspect` says of it is what its own config classes hold, where config.json says nothing."""
    for model_type in ropes.THETAS:
        config = CONFIG_MAPPING[model_type]().get_text_config()
        found = {key: getattr(config, key, default) for key, default in {"rope_theta": None, "partial_rotary_factor": 1.0, "rope_scaling": None}.items()}
        assert ropes.taken(model_type) == found, model_type
    known = {model_type for family in KNOWN for model_type in family.model_types if model_type in CONFIG_MAPPING}
    without = {kind for kind in known if getattr(CONFIG_MAPPING[kind]().get_text_config(), "rope_theta", None) is None}
    assert known - ropes.THETAS.keys() == without


@pytest.mark.parametrize("family", ["gpt-oss", "mixtral", "qwen3-moe", "glm4-moe", "ernie4-5-moe", "qwen3-vl-moe", "granitemoe"])
def test_inspect_tells_a_rope_that_this_release_misreads_and_no_other(family, saved, tmp_path):
    """Judged by what its own classes make of the newest release's file."""
    source = moeglot.open(saved / family)
    shutil.copytree(saved / family, tmp_path / "default")
    told = json.loads((tmp_path / "default" / "config.json").read_text())
    part = told.get("text_config", told)
    default = ropes.taken(told["model_type"])
    part["rope_parameters"] = {**part["rope_parameters"], "rope_theta": default["rope_theta"]}
    (tmp_path / "default" / "config.json").write_text(json.dumps(told))
    for folder, theta in ((saved / family, families.THETA), (tmp_path / "default", default["rope_theta"])):
        loaded = transformers.AutoConfig.from_pretrained(folder).get_text_config()
        misread = loaded.rope_theta != theta
        assert misread == ("rope_theta" in {key for key, *_ in ropes.otherwise(moeglot.open(folder))})
        assert misread == (folder == source.source.home)
