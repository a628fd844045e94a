"""docs/add-a-format.md, followed to the letter in a copy of the package. `python tests/test_add_a_format_page.py` writes there anew what its commands print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint
from test_refusals_page import blocks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add-a-format.md"
RIGHT = '("up", "gate"), "e h (i p)"'
INSPECT, VERIFY = "inspect saved", "verify saved --against hub"
SHOWN = {(INSPECT, 0): None, (INSPECT, 1): RIGHT, (VERIFY, 0): RIGHT, (VERIFY, 1): '("gate", "up"), "e h (p i)"'}
"""Each run on the page -> what the spec says of w13 in it, None where there is no spec yet."""


def make(folder: Path) -> None:
    """A Qwen3-MoE as the Hub has it, the same as Acme's trainer saves it, and a copy of the package."""
    write_checkpoint(folder / "hub", "qwen3-moe/hub", {"e": 4, "h": 64, "i": 64}, dtype=torch.bfloat16)
    shutil.copytree(folder / "hub", folder / "saved")
    tensors = load_file(folder / "hub" / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (torch.stack([tensors[f"{stem}{e}.{role}_proj.weight"].T for e in range(4)]) for role in ("gate", "up", "down"))
        both = torch.empty(4, 64, 128, dtype=torch.bfloat16)
        both[..., 0::2], both[..., 1::2] = up, gate
        kept |= {stem + "w13": both, stem + "w2": down.contiguous()}
    save_file(kept, folder / "saved" / "model.safetensors", {"format": "pt"})
    for part in ("src/moeglot", "docs", "tests/environments"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("README.md", "tests/test_architecture.py"):
        shutil.copy(ROOT / file, folder / file)
    init = folder / "src" / "moeglot" / "formats" / "__init__.py"
    (folder / "before.py").write_text(init.read_text())
    init.write_text(
        init.read_text().replace("import (\n", "import (\n    acme,\n").replace("    *gpt_oss.FORMATS,\n", "    *gpt_oss.FORMATS,\n    *acme.FORMATS,\n")
    )
    shutil.copy(init, folder / "after.py")


def run(folder: Path, w13: str | None, *command: str) -> subprocess.CompletedProcess[str]:
    formats = folder / "src" / "moeglot" / "formats"
    spec = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "ACME =" in block)
    assert RIGHT in spec
    (formats / "acme.py").write_text(spec.replace(RIGHT, w13 or RIGHT))
    shutil.copy(folder / ("after.py" if w13 else "before.py"), formats / "__init__.py")
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def printed(folder: Path, key: tuple[str, int]) -> str:
    found = run(folder, SHOWN[key], "-m", "moeglot", *key[0].split())
    refusal = re.search(r"^[A-Z]\w+: .*\n  .*\n  .*\n", found.stderr, re.MULTILINE)
    return refusal[0] if refusal else found.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("acme")
    make(made)
    return made


@pytest.mark.parametrize("key", SHOWN, ids=lambda key: f"{key[0]} {key[1]}")
def test_the_page_shows_what_a_run_prints(key, folder):
    assert blocks(PAGE.read_text())[key][2] == printed(folder, key)


def test_a_spec_is_checked_when_it_is_imported(folder):
    told = run(folder, '("up", "gate"), "e h i"', "-m", "moeglot", "formats").stderr.splitlines()[-1]
    assert f"```\n{told}\n```" in PAGE.read_text()


def test_the_formats_page_asks_what_a_new_reader_is_checked_against(folder):
    found = run(folder, RIGHT, "docs/generate.py")
    assert (found.returncode, "qwen3-moe/acme" in found.stderr, "DOCUMENTED" in found.stderr) == (1, True, True), found.stderr
    generate = folder / "docs" / "generate.py"
    generate.write_text(generate.read_text().replace("DOCUMENTED = {\n", 'DOCUMENTED = {\n    "Acme\'s trainer": "its own documentation",\n'))
    assert run(folder, RIGHT, "docs/generate.py").returncode == 0
    assert "Read by Acme's trainer. Checked against its own documentation." in (folder / "docs" / "formats.md").read_text()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        for key in SHOWN:
            page = PAGE.read_text()
            block = blocks(page)[key]
            PAGE.write_text(page[: block.start(2)] + printed(Path(name), key) + page[block.end(2) :])
