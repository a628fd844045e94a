"""No number depends on what torch's default dtype or default device happens to be, in this process or in another thread of it: bit for bit."""

from __future__ import annotations

from pathlib import Path

import default_steps
import pytest
from defaults import OTHERS, under


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("default")
    default_steps.prepare(found)
    return found


@pytest.mark.parametrize("default", [*OTHERS, "changing", "meta"])
def test_a_default_changes_no_bit(default, folder):
    """While it is another, and what is kept for the life of the process once it is torch's own again: one process a default, whatever step asks first."""
    expected, found = (under(folder, one, "coded", "files", "modules") for one in ("float32", default))
    for when in ("during", "after"):
        assert expected[when]
        assert not [name for name, bits in expected[when].items() if "Error" in bits]
        wrong = {name: found[when][name] for name, bits in expected[when].items() if found[when][name] != bits}
        assert not wrong, f"{when}: {len(wrong)} of {len(expected[when])}: {wrong}"
