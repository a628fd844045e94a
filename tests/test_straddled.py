"""Roles that are decoded one at a time, against the slice that is decoded as a whole and then taken apart."""

from __future__ import annotations

import pytest
import torch

from moeglot import straddled
from moeglot.encoded import Encoded
from moeglot.encodings import by_name
from moeglot.floats import values
from moeglot.layout import Stored
from moeglot.straddled import Straddled

AXES = ("e (p i) h", "e (i p) h", "e h (p i)", "e h (i p)")


@pytest.mark.parametrize("numbers", [1, 200, 1 << 20])
@pytest.mark.parametrize(("h", "i"), [(40, 40), (40, 20), (20, 40), (9, 7), (9, 1), (1, 9)])
@pytest.mark.parametrize("axes", AXES)
def test_a_role_alone_is_the_role_of_the_whole(axes: str, h: int, i: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straddled, "NUMBERS", numbers)
    torch.manual_seed(0)
    line, sizes = Stored("layers.{layer}.gate_up", ("gate", "up"), axes), {"e": 2, "h": h, "i": i}
    encoding = by_name("fp8-block")
    shape = line.expert_shape(sizes)
    given = torch.randn(shape)
    stored = Encoded(encoding, encoding.encode(given), tuple(shape))
    assert not line.movable(encoding, sizes)
    whole, alone = line.split(values(stored.decode(torch.float32))), Straddled(line, stored)
    assert list(alone) == ["gate", "up"]
    assert len(alone) == 2
    for role in ("up", "gate"):
        expected = whole[role].parts["value"]
        assert alone[role].shape == (i, h)
        assert torch.equal(alone[role].parts["value"], expected)
    assert not torch.equal(alone["gate"].parts["value"], alone["up"].parts["value"])
    with pytest.raises(KeyError):
        alone["down"]
