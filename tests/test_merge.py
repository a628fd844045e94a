"""Merges of every encoding, judged by sums in float64 on grids that this file reads from the bytes itself; and what a merge refuses."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from io import StringIO

import pytest
import torch
from adapters import WRITERS, Job
from cells import tried
from reading import differing
from rich.console import Console
from safetensors.torch import load_file, save_file
from synthetic import write_checkpoint

import moeglot
from moeglot import Plan
from moeglot.conversion.carrying import Carrying
from moeglot.conversion.convert import carry_out
from moeglot.floats import values
from moeglot.planning.units import make
from moeglot.reports.report import show_survival
from moeglot.survival import Survival, percent
from moeglot.verification.beside import read_again
from moeglot.verification.beside import rounding as measured
from moeglot.verification.kept import refuse_lost, survived

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
EXPERTS, RANK = 3, 4
SIZES = {"square": (128, 128), "h=2i": (256, 128), "neither": (192, 320)}
PLAIN = {"gpt-oss": "gpt-oss/transformers", "qwen3-moe": "qwen3-moe/hub", "mixtral": "mixtral/transformers-5"}
LINEAR = {"gpt-oss": "gpt-oss/llm-compressor", "qwen3-moe": "qwen3-moe/hub", "mixtral": "mixtral/transformers-5"}
BASES = {
    "bf16": ("", "bfloat16"),
    "mxfp4": ("mxfp4", "mxfp4"),
    "fp8-block": ("+fp8-block", "fp8-block"),
    "fp8-channel": ("+fp8-channel", "fp8-channel"),
    "nvfp4": ("+nvfp4-modelopt", "nvfp4"),
    "int4": ("+int4-pack", "int4:32"),
    "nf4": ("+nf4", "nf4"),
}
PAIRS = [(n + m, family, base) for n, family in enumerate(PLAIN) for m, base in enumerate(BASES)]
CELLS = [(family, base, size) for turn, family, base in PAIRS for k, size in enumerate(SIZES) if tried(turn, k)]
"""Square, and every third at another size."""
ROUNDINGS = ("nearest", "stochastic:3", "delta")


@dataclass
class Case:
    base: moeglot.Checkpoint
    adapter: moeglot.Adapter
    changes: dict


def base_of(folder, family, base, size, encode=None, layers=2):
    h, i = SIZES[size]
    plain = write_checkpoint(folder / "plain", PLAIN[family], {"e": EXPERTS, "h": h, "i": i}, layers, dtype=torch.bfloat16)
    if base == "bf16":
        return plain
    suffix, usual = BASES[base]
    to = "gpt-oss/openai" if (family, base) == ("gpt-oss", "mxfp4") else LINEAR[family] + ("+mxfp4-pack" if base == "mxfp4" else suffix)
    moeglot.convert(plain, to, folder / "base", encode=encode or usual, allow_loss=True)
    return folder / "base"


def case(folder, family, base, size, strength=0.3, layers=2) -> Case:
    opened = moeglot.open(base_of(folder, family, base, size, layers=layers))
    h, i = SIZES[size]
    made = WRITERS["PEFT"][2](Job(family, EXPERTS, h, i, RANK, layers=layers))
    for key in made.tensors:
        if "lora_B" in key:
            made.tensors[key] = made.tensors[key] * strength
    changes = {place: change * strength for place, change in made.changes.items()}
    return Case(opened, moeglot.open_adapter(made.save(folder / "adapter"), opened, "peft"), changes)


def test_an_adapter_is_of_the_base_that_it_is_merged_into(tmp_path):
    """Opened for the same model in other bytes, it is as if opened for these; opened for another model, its tensors are refused by name."""
    made = case(tmp_path / "one", "gpt-oss", "mxfp4", "square")
    plain = moeglot.open(tmp_path / "one" / "plain")
    moeglot.merge(plain, made.adapter, tmp_path / "lent")
    moeglot.merge(plain, moeglot.open_adapter(tmp_path / "one" / "adapter", plain, "peft"), tmp_path / "own")
    assert not differing(tmp_path / "lent", tmp_path / "own")
    for name, sizes in {"fewer experts": {"e": EXPERTS - 1}, "wider": {"e": EXPERTS, "h": 2 * SIZES["square"][0]}}.items():
        other = write_checkpoint(tmp_path / name, PLAIN["gpt-oss"], dict(zip("hi", SIZES["square"], strict=True)) | sizes, dtype=torch.bfloat16)
        with pytest.raises(moeglot.MoeglotError, match="lora"):
            moeglot.merge(other, made.adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(moeglot.UsageError, match="merge without an adapter"):
        moeglot.merge(plain, None, tmp_path / "out")


def test_its_certificate_makes_each_expert_once(tmp_path, monkeypatch):
    """For the comparison of values, for what experts compute, and for the wrong readings that prove the power."""
    made, counts = case(tmp_path, "gpt-oss", "mxfp4", "square"), Counter()

    def counted(plan, unit):
        counts[unit.key] += 1
        return make(plan, unit)

    monkeypatch.setattr("moeglot.verification.certificate.make", counted)
    report = moeglot.merge(made.base, made.adapter, tmp_path / "out", threshold=0).report
    assert [(check.level, check.verdict) for check in report.checks if check.what in ("canonical tensors", "power of the check")] == [
        ("values", "holds"),
        ("forward", "holds"),
    ]
    assert set(counts.values()) == {1}
    assert len(counts) == 2 * EXPERTS * 2  # layers, experts, gate_up and down


# --- an independent reading of scales ------------------------------------------------------------------------------------------------


def grid64(encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """(levels, scale of each number [out, in]) in float64, from the bytes of one stored slice."""
    parts, (rows, columns), kind = encoded.parts, encoded.shape, encoded.encoding.kind
    signed = torch.cat([-E2M1.flip(0), E2M1[1:]])

    def spread(scale, height, width):
        return scale.double().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]

    if kind == "mxfp4":
        return signed, spread(torch.exp2(parts["scale"].double() - 127).reshape(rows, -1), 1, 32)
    if kind == "nvfp4":
        return signed, spread((parts["scale"].float() * parts["global"].float()).reshape(rows, -1), 1, 16)
    if kind == "int4":
        return torch.arange(-8.0, 8).double(), spread(parts["scale"].reshape(rows, -1), 1, 32)
    if kind == "nf4":
        return parts["map"].double(), parts["scale"].double().repeat_interleave(64)[: rows * columns].view(rows, columns)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    height, width = (128, 128) if kind == "fp8-block" else (1, columns)
    return codes[codes.isfinite()].unique(), spread(parts["scale"].reshape(-(-rows // height), -1), height, width)


def nearest64(wanted: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest level × scale to each number."""
    quotient = wanted / scale
    index = torch.searchsorted(levels, quotient).clamp(1, len(levels) - 1)
    low, high = levels[index - 1] * scale, levels[index] * scale
    return torch.where((wanted - low).abs() <= (high - wanted).abs(), low, high)


def stored(checkpoint, role, layer, expert):
    """(the slice of the stored tensor that holds a role, or the role itself where its blocks are its own; how to cut the role's numbers out of it)."""
    line = checkpoint.format.line_of(role)
    encoded = checkpoint.expert(line, layer, expert)[role]
    if encoded.encoding.kind not in ("float32", "bfloat16"):
        return encoded, lambda tensor: tensor
    return checkpoint.stored(line, layer, expert), lambda tensor: line.split(values(tensor.float()))[role].parts["value"].double()


def matrix(checkpoint, role, layer, expert) -> torch.Tensor:
    return checkpoint.expert(checkpoint.format.line_of(role), layer, expert)[role].decode(torch.float32).double()


# --- the matrix of bases ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "base", "size"), CELLS, ids=lambda value: value)
def test_a_merge_is_the_nearest_to_sums_in_float64(family, base, size, tmp_path):
    made = case(tmp_path, family, base, size)
    certificate = moeglot.merge(made.base, made.adapter, tmp_path / "out", threshold=0)
    assert certificate.report.verdict == "holds"
    merged = moeglot.open(tmp_path / "out")
    assert merged.format.name == made.base.format.name
    unequal = total = 0
    for (layer, role, expert), change in made.changes.items():
        before, after = matrix(made.base, role, layer, expert), matrix(merged, role, layer, expert)
        wanted = before + change
        assert torch.equal(after[change == 0], before[change == 0])
        if base == "bf16":
            near, slack = wanted.float().bfloat16().double(), 1e-5
        else:
            encoded, cut = stored(merged, role, layer, expert)
            levels, scale = grid64(encoded)
            near, slack = nearest64(wanted, levels, cut(scale)), 8e-3 if base == "nf4" else 1e-5  # its numbers are rounded to bfloat16
        assert float(((after - wanted).abs() - (near - wanted).abs()).div(before.abs() + change.abs() + 1e-3).max()) <= slack
        unequal, total = unequal + int(((after - near).abs() > slack * (near.abs() + 1e-9)).sum()), total + near.numel()
        survival = certificate.survived[layer, expert, role]
        applied = after - before
        assert survival.rec == pytest.approx(float((applied * change).sum() / change.square().sum()), rel=1e-4)
        assert survival.cosine == pytest.approx(float((applied * change).sum() / applied.norm() / change.norm()), rel=1e-4)
        assert survival.rho == pytest.approx(float(change.norm() / before.norm()), rel=1e-4)
        assert survival.changed == int((applied != 0).sum())
    assert unequal <= 1e-3 * total, "more than ties"


@pytest.mark.parametrize(("family", "base"), [(family, base) for family in PLAIN for base in BASES if base != "bf16"])
def test_scales_are_the_bases_but_where_they_do_not_reach(family, base, tmp_path):
    made = case(tmp_path, family, base, "square", {"fp8-block": 0.3, "fp8-channel": 0.3, "nvfp4": 0.1}.get(base, 1.0), layers=1)
    certificate = moeglot.merge(made.base, made.adapter, tmp_path / "out", threshold=0)
    merged, clipped, kept = moeglot.open(tmp_path / "out"), 0, 0
    for (layer, role, expert), change in made.changes.items():
        old, cut = stored(made.base, role, layer, expert)
        levels, before = grid64(old)
        after = grid64(stored(merged, role, layer, expert)[0])[1]
        wanted = (matrix(made.base, role, layer, expert) + change) / cut(before)
        low, high = 1.5 * levels[0] - 0.5 * levels[1], 1.5 * levels[-1] - 0.5 * levels[-2]
        beyond = (wanted < low * (1 + 1e-6)) | (wanted > high * (1 + 1e-6))
        assert certificate.survived[layer, expert, role].clipped == pytest.approx(int(beyond.sum()), abs=1)
        clipped += int(beyond.sum())
        kept += int((cut(before) == cut(after))[~beyond].sum())
        far = (wanted < low * 1.01) | (wanted > high * 1.01)  # a scale of few bits may round back to what it was
        assert not bool((cut(before) == cut(after))[far].any())
    assert min(clipped, kept) > 0, "the test would show nothing"


@pytest.mark.parametrize(("turn", "family", "base"), PAIRS)
def test_no_change_gives_back_every_byte(turn, family, base, tmp_path):
    made = case(tmp_path, family, base, "square", strength=0.0, layers=1)
    for rounding in ROUNDINGS if family == "qwen3-moe" else ROUNDINGS[turn % 3 :][:1]:  # one family in all, the others in turn
        moeglot.merge(made.base, made.adapter, tmp_path / rounding, round=rounding)
        before, after = load_file(next((made.base.source.folder).glob("*.safetensors"))), load_file(tmp_path / rounding / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key].contiguous().view(torch.uint8), after[key].contiguous().view(torch.uint8)) for key in before if before[key].dim())


@pytest.mark.parametrize("base", ["fp8-block", "mxfp4", "bf16"])
def test_experts_without_factors_stay_byte_identical(base, tmp_path):
    """An adapter of one expert of one layer."""
    opened = moeglot.open(base_of(tmp_path, "qwen3-moe", base, "neither"))
    h, i = SIZES["neither"]
    made = WRITERS["vLLM's keys"][2](Job("qwen3-moe", EXPERTS, h, i, RANK))
    made.tensors = {key: tensor for key, tensor in made.tensors.items() if "layers.1." in key and "experts.2.down_proj" in key}
    made.config["target_modules"] = r".*layers\.1\..*experts\.2\.down_proj"
    certificate = moeglot.merge(opened, made.save(tmp_path / "adapter"), tmp_path / "out", threshold=0)
    assert set(certificate.survived) == {(1, 2, "down")}
    before, after = load_file(next(opened.source.folder.glob("*.safetensors"))), load_file(tmp_path / "out" / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key].contiguous().view(torch.uint8), after[key].contiguous().view(torch.uint8))}
    assert changed
    assert all("layers.1." in key and "experts.2.down_proj" in key for key in changed)


def of_some_experts(folder, opened, experts, strength=0.3):
    """An adapter of these experts of each layer, and no others; with its changes."""
    made = WRITERS["vLLM's keys"][2](Job("qwen3-moe", EXPERTS, opened.sizes["h"], opened.sizes["i"], RANK))
    made.tensors = {key: tensor * strength for key, tensor in made.tensors.items() if any(f".experts.{n}." in key for n in experts)}
    made.config["target_modules"] = rf".*experts\.[{''.join(map(str, experts))}]\.(gate|up|down)_proj"
    changes = {place: change * strength**2 for place, change in made.changes.items() if place[2] in experts}
    return moeglot.open_adapter(made.save(folder), opened, "per-expert"), changes


ROUNDED = [("bf16", {"encode": encode}) for encode in ("mxfp4", "nvfp4", "fp8-block", "int4:32", "int8-channel", "nf4")]
ROUNDED += [(base, {option: "bf16"}) for base in ("fp8-block", "fp8-channel", "nvfp4", "int4", "nf4", "mxfp4") for option in ("encode", "keep_touched")]


@pytest.mark.parametrize(
    ("base", "options", "experts"), [(*one, (0, 2) if n % 2 else (1,)) for n, one in enumerate(ROUNDED)], ids=lambda value: str(value).strip("{}")
)
def test_experts_without_factors_are_rounded_beside_those_that_have_some(base, options, experts, tmp_path):
    """As they are without any adapter, number by number; the others are close to sums in float64."""
    opened = moeglot.open(base_of(tmp_path, "qwen3-moe", base, "square"))
    adapter, changes = of_some_experts(tmp_path / "adapter", opened, experts)
    certificate = moeglot.merge(opened, adapter, tmp_path / "out", **options, allow_loss=True, threshold=0)
    assert certificate.report.verdict == "holds"
    moeglot.convert(opened, "qwen3-moe/hub", tmp_path / "alone", encode=next(iter(options.values())), allow_loss=True)
    merged, alone = moeglot.open(tmp_path / "out"), moeglot.open(tmp_path / "alone")
    assert {expert for _, _, expert in changes} == {*experts}
    for layer in range(2):
        for role in ("gate", "up", "down"):
            for n in range(EXPERTS):
                found = matrix(merged, role, layer, n)
                if n in experts:
                    wanted = matrix(opened, role, layer, n) + changes[layer, role, n]
                    assert float((found - wanted).norm() / wanted.norm()) < 0.12
                else:
                    assert torch.equal(found, matrix(alone, role, layer, n))


@pytest.mark.parametrize("encode", ["bf16", "fp8-block"])
def test_an_expert_without_factors_that_is_spoilt_is_off_by_more_than_rounding(encode, tmp_path):
    """The forward level alone tells it, whatever the values say: turned, read from another expert, or one matrix of it gone."""
    opened = moeglot.open(base_of(tmp_path, "qwen3-moe", "fp8-channel", "square"))
    plan = moeglot.plan(opened, adapter=of_some_experts(tmp_path / "adapter", opened, (1,))[0], encode=encode)
    carry_out(plan, tmp_path / "out", Carrying(allow_loss=True, threshold=0))
    losses = {unit.key: make(plan, unit)[1] for unit in plan.units}

    def verdict():
        return read_again(moeglot.open(tmp_path / "out"), opened, plan.change.adapter, survived(plan, losses), measured(plan, losses), 1, None)[1]

    assert verdict().verdict == "holds"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stem = "model.layers.1.mlp.experts.{}.{}_proj.weight"
    for wrong in (tensors[stem.format(2, "down")].mT, tensors[stem.format(0, "down")].clone(), torch.zeros_like(tensors[stem.format(2, "down")])):
        save_file(tensors | {stem.format(2, "down"): wrong.contiguous()}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
        assert verdict().verdict == "does not hold"
        assert verdict().figures["beyond_rounding"] == 1


def test_gpt_oss_leaves_mxfp4_for_the_layout_that_transformers_reads(tmp_path):
    made = case(tmp_path, "gpt-oss", "mxfp4", "square")
    moeglot.merge(made.base, made.adapter, tmp_path / "out", encode="bf16")
    assert moeglot.open(tmp_path / "out").format.name == "gpt-oss/transformers"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("base", ["bf16", "mxfp4", "fp8-block", "nvfp4", "int4", "nf4"])
def test_into_other_encodings(base, tmp_path):
    """A base in any encoding becomes a 16-bit or 32-bit model that says nothing of a quantization."""
    made = case(tmp_path, "qwen3-moe", base, "neither")
    for encode, limit in (("bf16", 3e-3), ("float32", 1e-6)):
        moeglot.merge(made.base, made.adapter, tmp_path / encode, encode=encode, allow_loss=True)
        config = json.loads((tmp_path / encode / "config.json").read_text())
        assert "quantization_config" not in config
        merged = moeglot.open(tmp_path / encode)
        assert merged.format.name == "qwen3-moe/hub"
        for (layer, role, expert), change in made.changes.items():
            wanted = matrix(made.base, role, layer, expert) + change
            assert float((matrix(merged, role, layer, expert) - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize("rounding", ["stochastic:1", "delta"])
def test_other_roundings_keep_what_the_nearest_loses(rounding, tmp_path):
    made = case(tmp_path, "gpt-oss", "mxfp4", "square", strength=0.02)
    with pytest.raises(moeglot.LossRefused, match="survives rounding to mxfp4") as refused:
        moeglot.merge(made.base, made.adapter, tmp_path / "refused")
    assert "pass --to gpt-oss/transformers --encode bf16; or --round stochastic" in refused.value.do
    assert not (tmp_path / "refused").exists()
    rec = {}
    for name in ("nearest", rounding):
        certificate = moeglot.merge(made.base, made.adapter, tmp_path / name, round=name, threshold=0)
        assert certificate.document["merge"]["rounding"] == name
        rec[name] = certificate.document["merge"]["survived"]["down"]["rec"]
    assert rec["nearest"] < 0.3 < 0.6 < rec[rounding] < 1.2


def test_a_merge_that_is_found_lost_once_it_is_written(tmp_path):
    """What it says to do can be done: with another rounding the folder is in the way, with a lower threshold it is gone on with."""
    made = case(tmp_path, "gpt-oss", "mxfp4", "square", strength=0.02)
    out = tmp_path / "out"

    def planned(rounding: str) -> Plan:
        """As if the few experts that are looked at before had said nothing."""
        return replace(moeglot.plan(made.base, adapter=made.adapter, round=rounding), estimated=True)

    with pytest.raises(moeglot.LossRefused, match="measured on all that was written") as refused:
        carry_out(planned("nearest"), out)
    assert refused.value.do.startswith(f"remove {out}.partial, then pass --to")
    assert refused.value.do.endswith("or keep it, and pass --resume with a lower --threshold, if that is meant")
    with pytest.raises(moeglot.OutputExists, match="rounding"):
        carry_out(planned("stochastic"), out, Carrying(resume=True))
    assert carry_out(planned("nearest"), out, Carrying(resume=True, threshold=0)).report.verdict == "holds"


def test_what_points_the_other_way_by_next_to_nothing(tmp_path):
    """It is told without a sign, and a threshold of 0 lets it pass."""
    made = case(tmp_path, "gpt-oss", "mxfp4", "square")
    plan, found = moeglot.plan(made.base, adapter=made.adapter), {"gate": Survival(-1e-4, 1.0, 1.0, 1.0, 100, 100)}
    refuse_lost(plan, found, 0)
    with pytest.raises(moeglot.LossRefused, match=r"^0\.0% of the adapter's change in gate"):
        refuse_lost(plan, found, 0.5)
    assert [percent(share) for share in (-0.0004, -0.0006, 0.0, -0.0, 1.0, -0.5)] == ["0.0%", "-0.1%", "0.0%", "0.0%", "100.0%", "-50.0%"]
    merged = {"survived": {"gate": found["gate"].as_json()}, "layers": {}, "adapter": "a", "rounding": "nearest"}
    show_survival(Console(file=(told := StringIO())), merged)
    assert "\t0.0%\t" in told.getvalue()


def test_what_is_touched_can_stay_in_bfloat16(tmp_path):
    """Of one layer: the other stays quantized, byte for byte, and transformers reads which is which."""
    opened = moeglot.open(base_of(tmp_path, "qwen3-moe", "fp8-block", "neither"))
    h, i = SIZES["neither"]
    made = WRITERS["PEFT"][2](Job("qwen3-moe", EXPERTS, h, i, RANK))
    changes = {place: change for place, change in made.changes.items() if place[0] == 1}
    made.tensors = {key: tensor for key, tensor in made.tensors.items() if "layers.1." in key}
    made.config["target_parameters"] = [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    adapter = moeglot.open_adapter(made.save(tmp_path / "adapter"), opened, "peft")
    certificate = moeglot.merge(opened, adapter, tmp_path / "out", keep_touched="bf16", allow_loss=True)
    assert min(one["rec"] for one in certificate.document["merge"]["survived"].values()) > 0.99
    before, after = load_file(next(opened.source.folder.glob("*.safetensors"))), load_file(tmp_path / "out" / "model.safetensors")
    experts = [key for key in after if ".experts." in key]
    assert all(after[key].dtype == torch.bfloat16 for key in experts if "layers.1." in key)
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in experts if "layers.0." in key)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.1.mlp.experts.0.gate_proj" in said
    assert not any("layers.0.mlp.experts" in name for name in said)
    merged = moeglot.open(tmp_path / "out")
    for (layer, role, expert), change in changes.items():
        wanted = matrix(opened, role, layer, expert) + change
        assert float((matrix(merged, role, layer, expert) - wanted).norm() / wanted.norm()) < 3e-3
    made = case(tmp_path / "other", "gpt-oss", "mxfp4", "square")
    with pytest.raises(moeglot.UsageError, match="cannot leave some experts in floats"):
        moeglot.merge(made.base, made.adapter, tmp_path / "refused", keep_touched="bf16")
    for name in ("", "int8", "fp8-block", 16):
        with pytest.raises(moeglot.UsageError, match=f"--keep-touched {name!r} is no float type"):
            moeglot.plan(made.base, adapter=made.adapter, keep_touched=name)


@pytest.mark.parametrize("base", ["fp8-block", "nf4", "mxfp4"])
def test_all_that_is_touched_can_stay_in_bfloat16(tmp_path, base):
    """Every layer is: then nothing is left to quantize, and config.json says so."""
    made = case(tmp_path, "qwen3-moe", base, "neither")
    certificate = moeglot.merge(made.base, made.adapter, tmp_path / "out", keep_touched="bf16", allow_loss=True)
    assert min(one["rec"] for one in certificate.document["merge"]["survived"].values()) > 0.99
    merged = moeglot.open(tmp_path / "out")
    assert merged.format.name == "qwen3-moe/hub"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for (layer, role, expert), change in made.changes.items():
        wanted = matrix(made.base, role, layer, expert) + change
        assert float((matrix(merged, role, layer, expert) - wanted).norm() / wanted.norm()) < 3e-3


@pytest.mark.parametrize(("base", "encode"), [("int4", "int4:64"), ("nvfp4", None), ("nf4", None)])
@pytest.mark.parametrize("only", ["down_proj", "gate_up_proj"])
def test_a_role_that_is_touched_in_every_layer_can_stay_in_bfloat16(tmp_path, base, encode, only):
    """The other roles stay quantized, byte for byte, and so does what config.json says of them."""
    folder = base_of(tmp_path, "qwen3-moe", base, "square", encode)
    opened, (h, i) = moeglot.open(folder), SIZES["square"]
    made = WRITERS["PEFT"][2](Job("qwen3-moe", EXPERTS, h, i, RANK))
    wrapper = ".base_layer.lora" if only == "gate_up_proj" else "experts.lora"
    made.tensors = {key.replace(".base_layer", ""): tensor for key, tensor in made.tensors.items() if wrapper in key}
    made.config["target_parameters"] = [f"mlp.experts.{only}"]
    adapter = moeglot.open_adapter(made.save(tmp_path / "adapter"), opened, "peft")
    assert moeglot.merge(opened, adapter, tmp_path / "out", keep_touched="bf16", allow_loss=True).report.verdict == "holds"
    merged = moeglot.open(tmp_path / "out")
    assert merged.format.name == opened.format.name
    for (layer, role, expert), change in made.changes.items():
        touched = (role == "down") == (only == "down_proj")
        before, after = matrix(opened, role, layer, expert), matrix(merged, role, layer, expert)
        wanted = before + change * touched
        assert float((after - wanted).norm() / wanted.norm()) < (3e-3 if touched else 1e-12)
    said = [json.loads((where / "config.json").read_text())["quantization_config"] for where in (folder, tmp_path / "out")]
    key = opened.format.coding.kept
    assert {**said[0], key: None} == {**said[1], key: None}


def test_quantized_attention_that_becomes_bfloat16(tmp_path):
    """Its change is added before the sum is rounded, as was asked for; judged by float64 on the bytes of the base."""
    folder = base_of(tmp_path, "qwen3-moe", "fp8-block", "neither")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    factors, wanted = {}, {}
    for layer in range(2):
        key = f"model.layers.{layer}.self_attn.q_proj.weight"
        rows, columns = tensors[key].shape
        scale = torch.full((-(-rows // 128), -(-columns // 128)), 1 / 300)
        tensors[key], tensors[key + "_scale_inv"] = (tensors[key].float() * 300).to(torch.float8_e4m3fn), scale
        a, b = torch.randn(RANK, columns) * 0.2, torch.randn(rows, RANK) * 0.2
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        factors |= {f"{name}A.weight": a, f"{name}B.weight": b}
        wanted[key] = tensors[key].double() / 300 + 2 * b.double() @ a.double()
    kept = config["quantization_config"]["modules_to_not_convert"]
    config["quantization_config"]["modules_to_not_convert"] = [module for module in kept if "q_proj" not in module]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "moeglot.json").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "of-attention").mkdir()
    save_file(factors, tmp_path / "of-attention" / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj"]}
    (tmp_path / "of-attention" / "adapter_config.json").write_text(json.dumps(told))
    moeglot.merge(folder, tmp_path / "of-attention", tmp_path / "out", encode="bf16", allow_loss=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(float((after[key].double() - sums).norm() / sums.norm()) < 3e-3 for key, sums in wanted.items())
    assert all(float((after[key].double() - sums.roll(1, 0)).norm() / sums.norm()) > 1 for key, sums in wanted.items())
    assert all(float((after[key] == sums.bfloat16()).float().mean()) > 0.99 for key, sums in wanted.items())
    for encode in ("bf16", None):
        nearest, by_chance = (tmp_path / f"{encode}-{rounding}" for rounding in ("nearest", "stochastic"))
        moeglot.merge(folder, tmp_path / "of-attention", nearest, encode=encode, allow_loss=True, threshold=0)
        moeglot.merge(folder, tmp_path / "of-attention", by_chance, encode=encode, allow_loss=True, threshold=0, round="stochastic:1")
        one, other = load_file(nearest / "model.safetensors"), load_file(by_chance / "model.safetensors")
        assert all(0.1 < float((one[key].float() != other[key].float()).float().mean()) < 0.9 for key in wanted)


def test_an_embedding_that_is_the_output_as_well_is_not_changed(tmp_path):
    """Live, PEFT changes one of the two uses; attention in the same base is merged."""
    made = case(tmp_path, "qwen3-moe", "bf16", "square")
    folder = made.base.source.folder
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "tied")
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    rows, columns = made.base.source.entries["model.embed_tokens.weight"].shape
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    factors = {f"{name}A": torch.ones(RANK, rows), f"{name}B": torch.ones(columns, RANK)}
    (tmp_path / "of-embedding").mkdir()
    save_file(factors, tmp_path / "of-embedding" / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "target_modules": ["embed_tokens"]}
    (tmp_path / "of-embedding" / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(moeglot.UnsupportedAdapter, match="input and output embeddings are one tensor"):
        moeglot.merge(tmp_path / "tied", tmp_path / "of-embedding", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    moeglot.merge(folder, tmp_path / "of-embedding", tmp_path / "out", threshold=0)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"model.embed_tokens.weight"}
    moeglot.merge(tmp_path / "tied", moeglot.open_adapter(tmp_path / "adapter", tmp_path / "tied", "peft"), tmp_path / "experts")


def test_experts_that_fall_back_to_the_nearest_are_named(tmp_path):
    """Second moments of a text that never reached one expert of a layer: GPTQ has nothing to go by there."""
    made = case(tmp_path, "qwen3-moe", "mxfp4", "square")
    square, moments = torch.eye(128), tmp_path / "moments.safetensors"
    here = [(layer, expert) for layer in range(2) for expert in range(EXPERTS) if (layer, expert) != (1, 2)]
    save_file({f"layers.{layer}.experts.{expert}.{name}": square * (1 + expert) for layer, expert in here for name in ("hidden", "intermediate")}, moments)
    certificate = moeglot.merge(made.base, made.adapter, tmp_path / "out", round=f"gptq:{moments}", threshold=0)
    merge = certificate.document["merge"]
    assert sorted(map(tuple, merge["fell_back_to_nearest"])) == [(1, role, 2) for role in ("down", "gate", "up")]
    assert any("1 experts were reached by no token" in note and "layer 1 expert 2" in note for note in merge["notes"])
    moeglot.merge(made.base, made.adapter, tmp_path / "nearest", threshold=0)
    gptq, nearest = moeglot.open(tmp_path / "out"), moeglot.open(tmp_path / "nearest")
    assert torch.equal(matrix(gptq, "down", 1, 2), matrix(nearest, "down", 1, 2))


@pytest.mark.parametrize(("moments", "error"), [(torch.eye(64), moeglot.TensorMismatch), (torch.full((128, 128), float("nan")), moeglot.BadNumbers)])
def test_moments_of_another_model(moments, error, tmp_path):
    made, file = case(tmp_path, "qwen3-moe", "mxfp4", "square"), tmp_path / "moments.safetensors"
    names = [f"layers.{layer}.experts.{expert}.{name}" for layer in range(2) for expert in range(EXPERTS) for name in ("hidden", "intermediate")]
    save_file({name: moments.clone() for name in names}, file)
    with pytest.raises(error, match="gather them again"):
        moeglot.merge(made.base, made.adapter, tmp_path / "out", round=f"gptq:{file}", threshold=0)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_merged_twice_is_told(tmp_path):
    made = case(tmp_path, "qwen3-moe", "bf16", "square")
    once = moeglot.merge(made.base, tmp_path / "adapter", tmp_path / "once", convention="peft")
    twice = moeglot.merge(tmp_path / "once", tmp_path / "adapter", tmp_path / "twice", convention="peft")
    assert [any("its change is there twice" in note for note in one.document["merge"]["notes"]) for one in (once, twice)] == [False, True]
    assert twice.document["merge"]["adapters"] == 2 * once.document["merge"]["adapters"]


def test_an_adapter_that_names_another_base_is_told(tmp_path):
    made = case(tmp_path, "qwen3-moe", "bf16", "square")
    for named, told in (("somebody/another-model", True), (f"somebody/{made.base.source.folder.name}", False), (None, False)):
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        out = tmp_path / f"out{bool(named)}{told}"
        certificate = moeglot.merge(made.base, tmp_path / "adapter", out, convention="peft", threshold=0)
        assert any("somebody/another-model" in note for note in certificate.document["merge"]["notes"]) == told


def test_a_sum_that_is_not_finite_is_refused(tmp_path):
    """Both parts are finite, float32 cannot hold their product; and what float32 holds is more than float16 does."""
    made = case(tmp_path, "qwen3-moe", "bf16", "square")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for strength, encode in ((1e25, None), (1e3, "float16")):
        save_file({key: tensor * strength for key, tensor in tensors.items()}, path)
        adapter = moeglot.open_adapter(tmp_path / "adapter", made.base, "peft")
        with pytest.raises(moeglot.BadNumbers, match="not finite"):
            moeglot.merge(made.base, adapter, tmp_path / "out", encode=encode, allow_loss=True, threshold=0)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
