"""Numbers at the ends of what types hold: what is written is what was rounded, and figures say what float64 says."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from adapters import WRITERS, Job
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot.checkpoints.evidence import weigh
from moeglot.encodings import by_name
from moeglot.errors import BadNumbers
from moeglot.experts import relative_error
from moeglot.floats import squares
from moeglot.folding import Piece, fold
from moeglot.kernels import fp8
from moeglot.kernels.finite import all_finite
from moeglot.nn import Experts
from moeglot.rounding import Rounding

SIZES = {"e": 4, "h": 64, "i": 64}


def changed(folder: Path, change, name: str = r"\.experts\.", dtype: torch.dtype = torch.bfloat16, sizes=SIZES) -> Path:
    """A checkpoint of Qwen3-MoE whose matrices of experts are what `change(key, tensor)` makes of them."""
    write_checkpoint(folder, "qwen3-moe/hub", sizes, 2, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {key: change(key, tensor).to(dtype).contiguous() for key, tensor in tensors.items() if re.search(name, key)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["nearest", "stochastic", "delta"])
@pytest.mark.parametrize("name", ["nf4:nested", "fp4:nested"])
def test_what_is_written_under_nested_scales_is_what_was_rounded(name, kind):
    """One row outgrows its scales, so that all of them are coded anew; the largest of each 256 lie in rows that the change leaves alone."""
    encoding, (rows, columns) = by_name(name), (256, 1024)
    torch.manual_seed(0)
    given = torch.randn(rows, columns) * 0.02
    given[::16, ::64] = 0.12
    parts = encoding.encode(given)
    weight = encoding.decode(parts, torch.float32)
    left, right = torch.randn(rows, 8) * 0.002, torch.randn(8, columns) / 8**0.5
    left[::16] = 0
    left[1] *= 30
    piece = Piece(weight, left, right, lambda tensor: tensor, (0, "gate", 0))
    found, survived = fold(encoding, parts, (rows, columns), {"": piece}, lambda role: role(""), Rounding(kind), lambda *_: None, True)
    written, change = encoding.decode(found, torch.float32).double() - weight.double(), (left @ right).double()
    assert survived[""].clipped
    assert survived[""].changed == int((written != 0).sum())
    assert survived[""].rec == pytest.approx(float((written * change).sum() / change.square().sum()), rel=1e-4)


@pytest.mark.parametrize("size", [1e-26, 1e-22, 1.0, 1e20])
def test_a_loss_is_the_same_whatever_the_size(size, tmp_path):
    source = changed(tmp_path / "a", lambda _, tensor: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * size, dtype=torch.float32)
    certificate = moeglot.convert(source, "qwen3-moe/hub", tmp_path / "out", encode="bfloat16", allow_loss=True)
    errors = [step["relative_error"] for step in certificate.document["steps"].values() if not step["exact"]]
    assert errors
    assert all(1.6e-3 < error < 1.8e-3 for error in errors)


@pytest.mark.parametrize("size", [1e-26, 1.0, 1e19])
def test_survival_is_the_same_whatever_the_size(size):
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * size
    change = torch.randn(64, 64) * 1e-3 * size
    stored = weight + change * (torch.rand(64, 64) < 0.5)
    found = moeglot.survival.Survival.of(weight, change, stored)
    moved = stored.double() - weight.double()
    assert found.rec == pytest.approx(float((moved * change.double()).sum() / change.double().square().sum()), rel=1e-4)
    assert 0.3 < found.rec < 0.7


@pytest.mark.parametrize("kind", ["nearest", "delta", "stochastic"])
def test_an_adapter_of_which_one_expert_has_zeros(kind, tmp_path):
    base = write_checkpoint(tmp_path / "base", "qwen3-moe/hub", SIZES, 2)
    job = Job("qwen3-moe", 4, 64, 64, 3)
    made = WRITERS["vLLM's keys"][2](job)
    for key in made.tensors:
        if ".experts.1." in key and "lora_A" in key:
            made.tensors[key] = torch.zeros_like(made.tensors[key])
    moeglot.merge(base, made.save(tmp_path / "adapter"), tmp_path / "out", round=kind, threshold=0)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    same = [torch.equal(before[key], after[key]) for key in before if ".experts.1." in key]
    assert all(same)
    assert not all(torch.equal(before[key], after[key]) for key in before if ".experts.2." in key)


def test_an_adapter_beside_an_expert_that_was_pruned(tmp_path):
    """What gives nothing before gives nothing after, which is as it should be."""
    base = changed(tmp_path / "base", lambda key, tensor: tensor * 0 if ".experts.3." in key else tensor)
    made = WRITERS["vLLM's keys"][2](Job("qwen3-moe", 4, 64, 64, 3))
    for key in made.tensors:
        if ".experts.3." in key and "lora_B" in key:
            made.tensors[key] = torch.zeros_like(made.tensors[key])
    assert moeglot.merge(base, made.save(tmp_path / "adapter"), tmp_path / "out").report.verdict == "holds"


def test_an_error_is_relative_to_what_was_expected():
    one = torch.ones(2, 3)
    assert [relative_error(found, one) for found in (one, 3 * one, 0 * one, one / 0)] == [0, 2, 1, math.inf]
    assert relative_error(one, 0 * one) == math.inf
    assert relative_error(0 * one, -0.0 * one) == 0


def test_an_expert_that_has_decayed_to_next_to_nothing(tmp_path):
    """No token that float32 holds makes it loud."""
    source = changed(tmp_path / "a", lambda key, tensor: tensor * 1e-42 if ".experts.3." in key else tensor, dtype=torch.float32)
    moeglot.fingerprint(source).save(tmp_path / "print.json")
    assert moeglot.verify(source, tmp_path / "print.json").verdict == "holds"
    assert moeglot.convert(source, "qwen3-moe/transformers-5", tmp_path / "out").report.verdict == "holds"


@pytest.mark.parametrize("coding", ["nf4", "fp4", "mxfp4-pack", "fp8-block", "int4-pack"])
def test_an_expert_that_was_pruned(coding, tmp_path):
    """Its weights were multiplied by zero, which leaves zeros of either sign."""
    source = changed(tmp_path / "a", lambda key, tensor: tensor * 0 if ".experts.1." in key else tensor)
    report = moeglot.convert(source, f"qwen3-moe/hub+{coding}", tmp_path / "out", allow_loss=True).report
    assert report.verdict == "cannot tell"  # of zeros, every reading is the same
    matrix = moeglot.open(tmp_path / "out").experts(0)["gate"][1]
    assert not matrix.decode(torch.float32).any()
    if coding in ("nf4", "fp4"):  # and a file that was never filled is still known
        blank = {name: torch.zeros_like(part) if part.dtype != torch.uint8 or name == "packed" else part for name, part in matrix.parts.items()}
        problem = matrix.encoding.check(blank)
        assert problem is not None if coding == "nf4" else True


def test_a_group_of_numbers_near_the_smallest(tmp_path):
    def small(key, tensor):
        tensor = tensor.clone()
        tensor[3, :32] = 2e-38
        return tensor

    source = changed(tmp_path / "a", small)
    assert moeglot.convert(source, "qwen3-moe/hub+mxfp4-pack", tmp_path / "out", allow_loss=True).report.verdict == "holds"


@pytest.mark.parametrize("coding", ["mxfp4-pack", "fp8-block", "nf4"])
def test_encoded_experts_beyond_float16(coding, tmp_path):
    """A product with infinity would be NaN somewhere, and nothing would say where it comes from."""
    source = changed(tmp_path / "a", lambda key, tensor: tensor * 1e7 if ".experts.1." in key else tensor)
    moeglot.convert(source, f"qwen3-moe/hub+{coding}", tmp_path / "out", allow_loss=True)
    module = Experts.of(moeglot.open(tmp_path / "out"), 0, backend="eager")
    x, weights = torch.randn(3, 64) * 1e-3, torch.ones(3, 1)
    assert bool(module(x.half(), torch.tensor([[0], [2], [3]]), weights).isfinite().all())
    for several in (x.half(), x.half().repeat(20, 1)):
        index = torch.ones(len(several), 1, dtype=torch.int64)
        if coding != "mxfp4-pack" or len(several) > 8:  # few tokens are multiplied with its codes in float32
            with pytest.raises(BadNumbers, match=r"layer 0, .*beyond float16"):
                module(several, index, torch.ones(len(several), 1))


def test_two_tests_with_two_answers_decide_nothing(tmp_path):
    """Channels of h whose strength differs a little from expert to expert look like channels of i; that all experts share them says what they are."""
    generator = torch.Generator().manual_seed(0)
    shape, strength = torch.randn(256, generator=generator), {}

    def outliers(key, tensor):
        expert = re.search(r"layers\.(\d+).*experts\.(\d+)", key)
        by = (strength.setdefault(expert.groups(), float(torch.rand(1, generator=generator) * 0.1)) * shape).exp()
        numbers = torch.randn(tensor.shape, generator=generator) * 0.02
        return numbers * (by[:, None] if "down" in key else by)

    found = weigh(moeglot.open(changed(tmp_path / "a", outliers, sizes={"e": 8, "h": 256, "i": 256})))
    assert any(one.test == "channel" and one.verdict == "another reading" for one in found.evidence)
    assert (found.verdict, found.exit_status) == ("cannot tell", 0)


def test_groups_of_one_number_lie_on_every_grid(tmp_path):
    """One of sixteen channels is left: along the other axis, every group of sixteen has one number that is not zero."""
    generator = torch.Generator().manual_seed(0)

    def pruned(key, tensor):
        numbers = torch.randn(tensor.shape, generator=generator) * 0.02
        here = torch.arange(256) % 16 == 3
        return numbers * (here if "down" in key else here[:, None])

    found = weigh(moeglot.open(changed(tmp_path / "a", pruned, sizes={"e": 4, "h": 256, "i": 256})))
    assert [one.verdict for one in found.evidence if one.test == "grid"] == ["cannot tell"] * 3
    assert json.dumps([one.figures for one in found.evidence if one.test == "grid"])


def test_numbers_of_64_bits(tmp_path):
    """What differs beyond float32 differs; what is moved keeps every bit, and what is rounded to float32 is off by what float64 says."""
    source = changed(tmp_path / "a", lambda key, tensor: tensor.double() * (1 + 2**-40), dtype=torch.float64)
    near = changed(tmp_path / "b", lambda key, tensor: tensor.double() * (1 + 2**-39), dtype=torch.float64)
    check = moeglot.compare(source, near).checks[0]
    assert (check.verdict, check.figures["unequal"]) == ("does not hold", check.figures["tensors"])
    assert check.figures["relative_error"]["down"] == pytest.approx(2**-40, rel=1e-3)
    assert moeglot.convert(source, "qwen3-moe/transformers-5", tmp_path / "moved").report.verdict == "holds"
    moeglot.convert(tmp_path / "moved", "qwen3-moe/hub", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert all(torch.equal(before[key].view(torch.int64), after[key].view(torch.int64)) for key in before if ".experts." in key)
    found = moeglot.convert(source, "qwen3-moe/transformers-5", tmp_path / "single", encode="float32", allow_loss=True)
    experts = torch.cat([tensor.flatten() for key, tensor in before.items() if ".experts." in key])
    assert found.report.verdict == "holds"
    assert [loss.relative for loss in found.losses.values() if loss.changed] == [pytest.approx(float((experts.float() - experts).norm() / experts.norm()))]
    assert moeglot.compare(source, tmp_path / "single").exit_status == 1


# --- looked at in one pass ------------------------------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_lies(bad, dtype):
    for shape, cut in (((1,), lambda t: t), ((37, 130), lambda t: t), ((37, 130), lambda t: t.mT), ((37, 130), lambda t: t[::2, 1::3])):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        numbers.view(-1)[0] = torch.finfo(dtype).max
        view = cut(numbers)
        assert all_finite(view)
        for place in {0, view.numel() // 2, view.numel() - 1}:
            broken = view.clone()  # strides as they were
            broken[tuple(torch.unravel_index(torch.tensor(place), view.shape))] = bad
            assert not all_finite(broken)
    assert all_finite(torch.empty(0, 3, dtype=dtype))


def test_one_code_that_is_nan_is_found_among_all_others():
    """Bytes of every other value, 0x7e and 0xfe and both zeros among them; the two that are NaN alone, first, last and amid, also in views."""
    sound = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8).repeat(9).view(18, 127)
    for view in (sound, sound.mT, sound[::2, 1::3], sound[:0]):
        assert not fp8.has_nan(view.view(torch.float8_e4m3fn))
    for byte in (0x7F, 0xFF):
        for row, column in ((0, 0), (9, 63), (17, 126)):
            broken = sound.clone()
            broken[row, column] = byte
            for view in (broken, broken.mT, broken[row % 2 :: 2, column % 3 :: 3]):
                assert fp8.has_nan(view.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-6, 1.0, 1e12, 1e18, 1e37])
def test_sums_of_squares_leave_no_range(size):
    """float32 has no square of 1e-30 and none of 1e37; whatever a sum is made in, it is float64's."""
    numbers = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)) * size
    for found in (squares(numbers), squares(numbers.mT)):
        assert found / float(numbers.double().square().sum()) == pytest.approx(1, rel=1e-5)
    assert squares(torch.zeros(3, 4)) == squares(torch.empty(0, 4)) == 0
