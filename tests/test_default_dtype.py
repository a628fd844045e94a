"""No number depends on what torch's default dtype or default device happens to be, in this process or in another thread of it: bit for bit."""

from __future__ import annotations

import default_steps
from defaults import under


def test_a_default_changes_no_bit(tmp_path):
    """While it is another, and what is kept for the life of the process once it is torch's own again: one process a default, whatever step asks first."""
    default_steps.prepare(tmp_path)
    expected, *others = ((one, under(tmp_path, one, "coded", "files", "modules")) for one in ("float32", "bfloat16", "changing", "meta"))
    for when, steps in expected[1].items():
        assert steps
        assert not [name for name, bits in steps.items() if "Error" in bits]
        wrong = {f"{default}: {name}": found[when][name] for default, found in others for name, bits in steps.items() if found[when][name] != bits}
        assert not wrong, f"{when}: {len(wrong)} of {len(steps)}: {wrong}"
