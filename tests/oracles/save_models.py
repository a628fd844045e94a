"""Save tiny models with the installed transformers, for another release to read: `python tests/oracles/save_models.py FOLDER FAMILY ...`.

FOLDER/FAMILY holds what `save_pretrained` writes, and logits.safetensors what the model computes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import families
import transformers
from safetensors.torch import save_file

from moeglot.formats import FAMILIES


def main(folder: Path, names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family in (family for family in FAMILIES if family.name in names):
        model = families.model_of(family, "h=2i", otherwise=True)
        families.saved(model, folder / family.name, original=True)
        save_file({"logits": families.logits(model)}, folder / family.name / "logits.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
