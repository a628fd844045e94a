"""A checkpoint that the newest transformers saved, in an older one: through moeglot it computes the same; read directly, it does not.

The newest release saves in its own environment (`make test` makes it, before `make matrix` comes here); this one loads.
"""

import os
import subprocess
from pathlib import Path

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

import moeglot
from moeglot.formats import FAMILIES, PLAIN
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


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


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
