"""Laws of conversions: every pair of formats of a family, there and back and by way of a third, byte for byte."""

from itertools import permutations

import pytest
import torch
from cells import EVERY
from synthetic import write_checkpoint

import moeglot
from moeglot.encodings.plain import Plain
from moeglot.files.shards import tensor_bytes
from moeglot.formats import PLAIN

SIZES = {"square": (2, 64, 64), "h=2i": (2, 64, 32), "2h=i": (3, 32, 64), "e=h=i": (32, 32, 32), "one": (1, 32, 32)}
THOROUGH = ("gpt-oss", "qwen3-moe", "mixtral")
"""Families that are tried at more sizes; the others, whose lines are of the same kinds, at the square one."""


def sizes_of(form, other=None):
    """A pair at the square size one way and at another, which goes round the pairs, the other way; a format alone at every size.

    There and back from one of two is back and there from the other: a pair begins at one of them, which goes round, and where families are not tried
    thoroughly at that one alone.
    Formats that name every tensor (Megatron's) have lines of few kinds: each is paired with two of the others, at one size from it and another to it.
    """
    if other and form.closed and other.closed:
        return ()
    if other and (form.closed or other.closed) and not meet(form, other):
        return ()
    if other and form.family.name not in THOROUGH and not first(form, other):
        return ()
    if form.family.name not in THOROUGH or (form.closed and other):
        return ("square",)
    if form.closed:
        return ("square", "one")
    if other is None:
        return tuple(SIZES)
    if other.closed:
        return ("h=2i",)
    sizes = "square", [*SIZES][1 + (PLAIN.index(form) + PLAIN.index(other)) % (len(SIZES) - 1)]
    return sizes if EVERY else sizes[:1] if first(form, other) else sizes[1:]


def first(form, other):
    """Whether a pair begins with this one."""
    a, b = PLAIN.index(form), PLAIN.index(other)
    return (a < b) == bool((a + b) % 2)


def meet(form, other):
    """Of a format that names every tensor and one that does not: the latter go round."""
    closed, open_ = (form, other) if form.closed else (other, form)
    names = [one.name for one in PLAIN if one.family == form.family and not one.closed]
    at = PLAIN.index(closed)
    return names.index(open_.name) in (at % len(names), (at + 1) % len(names))


def plain(form):
    return all(isinstance(line.encoding, Plain) for line in form.stored)


FOUND = [(a, b, size) for a, b in permutations(PLAIN, 2) if a.family == b.family and a.alone == b.alone for size in sizes_of(a, b)]
PAIRS = [(a.name, b.name, size) for a, b, size in FOUND]
ENCODED = [(a.name, b.name, size) for a, b, size in FOUND if plain(a) and not plain(b)]
"""Those whose numbers are rounded on the way, unless they were before."""
ALONE = [(form.name, size) for form in PLAIN for size in sizes_of(form)]


def entries(path):
    return moeglot.open(path).source.entries


def same_tensors(a, b):
    mine, theirs = entries(a), entries(b)
    assert mine.keys() == theirs.keys()
    return [name for name in mine if tensor_bytes(mine[name].read()) != tensor_bytes(theirs[name].read())]


@pytest.fixture
def sizes(request):
    return dict(zip("ehi", SIZES[request.param], strict=True))


def determined(path):
    """Raise small codes, so that the bytes can return: the first code of each group becomes 6."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("blocks"):
            tensor[..., 0] |= 0x07
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("a", "b", "sizes"), PAIRS, indirect=["sizes"])
def test_there_and_back_returns_every_byte(a, b, sizes, tmp_path):
    source = write_checkpoint(tmp_path / "a", a, sizes, 1 if sizes["e"] == 32 else 2)
    if "openai" in a or "original" in a:
        determined(source)
    if (a, b) in {pair[:2] for pair in ENCODED}:
        with pytest.raises(moeglot.LossRefused):
            moeglot.convert(source, b, tmp_path / "b")
        moeglot.convert(source, b, tmp_path / "once", allow_loss=True)
        moeglot.convert(tmp_path / "once", a, tmp_path / "grid")
        source = tmp_path / "grid"  # numbers that MXFP4 can hold
    there = moeglot.convert(source, b, tmp_path / "b")
    assert there.report.exit_status == 0
    assert moeglot.compare(source, tmp_path / "b").verdict == "holds"
    assert_by_way_of_the_canonical_form(source, tmp_path / "b", sizes)
    back = moeglot.convert(tmp_path / "b", a, tmp_path / "back")
    assert back.report.exit_status == 0
    assert same_tensors(source, tmp_path / "back") == []


@pytest.mark.parametrize(("a", "sizes"), ALONE, indirect=["sizes"])
def test_to_itself_is_the_identity_on_bytes(a, sizes, tmp_path):
    source = write_checkpoint(tmp_path / "a", a, sizes, 1 if sizes["e"] == 32 else 2, shards=2)
    moeglot.convert(source, a, tmp_path / "again", shard_size=20_000)
    assert same_tensors(source, tmp_path / "again") == []
    assert len([path for path in (tmp_path / "again").iterdir() if path.suffix in (".safetensors", ".distcp")]) > 1


@pytest.mark.parametrize(("a", "b", "sizes"), ENCODED, indirect=["sizes"])
def test_directly_is_by_way_of_the_canonical_form(a, b, sizes, tmp_path):
    """Also where numbers are rounded; the other pairs are looked at above."""
    source = write_checkpoint(tmp_path / "a", a, sizes, 1 if sizes["e"] == 32 else 2)
    moeglot.convert(source, b, tmp_path / "b", allow_loss=True)
    assert_by_way_of_the_canonical_form(source, tmp_path / "b", sizes)


def assert_by_way_of_the_canonical_form(source, out, sizes):
    """A -> B = A -> canonical -> B, where the canonical tensors [e, out, in] are joined here, by the axes of B alone."""
    checkpoint, written = moeglot.open(source), moeglot.open(out)
    for layer in checkpoint.layers:
        canonical = checkpoint.experts(layer)
        for line in written.format.stored:
            for expert in range(sizes["e"]):
                roles = {role: canonical[role][expert] for role in line.roles}
                stored = written.stored(line, layer, expert)
                if len({encoded.encoding.name for encoded in roles.values()} | {stored.encoding.name}) == 1:
                    expected = line.join(roles.__getitem__).parts
                else:
                    values = {role: moeglot.layout.values(encoded.decode(torch.float32)) for role, encoded in roles.items()}
                    expected = stored.encoding.encode(line.join(values.__getitem__).parts["value"])
                for name, part in stored.parts.items():
                    assert tensor_bytes(part) == tensor_bytes(expected[name])


@pytest.mark.parametrize("form", PLAIN, ids=[form.name for form in PLAIN])
def test_lazy_tensors_are_the_whole_ones(form, tmp_path):
    checkpoint = moeglot.open(write_checkpoint(tmp_path / "a", form.name, {"e": 3, "h": 64, "i": 32}))
    for role, lazy in checkpoint.experts(1).items():
        whole = lazy.decode(torch.float32)
        assert whole.shape == lazy.shape
        assert torch.equal(whole[2], lazy[2].decode(torch.float32))
        assert torch.equal(whole[2], lazy[-1].decode(torch.float32))
        with pytest.raises(IndexError):
            lazy[3]
        assert role in form.family.roles


CODED = {"+nf4": "nf4", "+fp8-block": "fp8-block", "+int4-pack": "int4:32", "+nvfp4-pack": "nvfp4", "+mxfp4-pack": "mxfp4"}


@pytest.mark.parametrize("coding", CODED)
def test_matrices_that_are_compared_in_several_runs_of_rows(coding, tmp_path):
    """More numbers than one run has, in encodings whose blocks end elsewhere than those of floats, or cross rows; and there and back it is the same grid."""
    source = write_checkpoint(tmp_path / "a", "qwen3-moe/hub", {"e": 1, "h": 576, "i": 1024}, 1, dtype=torch.float32)
    lossy = moeglot.convert(source, f"qwen3-moe/hub{coding}", tmp_path / "b", encode=CODED[coding], allow_loss=True)
    assert 1e-3 < max(loss.relative for loss in lossy.losses.values()) < 0.3
    exact = moeglot.convert(tmp_path / "b", "qwen3-moe/hub", tmp_path / "c", encode="float32")
    assert exact.report.verdict == "holds"
    assert moeglot.compare(tmp_path / "b", tmp_path / "c").verdict == "holds"
    assert moeglot.compare(source, tmp_path / "c").verdict == "does not hold"


@pytest.mark.parametrize("form", [form.name for form in PLAIN if form.family.name == "qwen3-moe" and form.name != "qwen3-moe/hub"])
def test_rounding_on_the_way_is_rounding_before(form, tmp_path):
    """From float32 to bfloat16 in another layout, and in its own first: rows that take turns in blocks, too."""
    source = write_checkpoint(tmp_path / "a", "qwen3-moe/hub", {"e": 2, "h": 64, "i": 64}, 1, dtype=torch.float32)
    moeglot.convert(source, form, tmp_path / "at once", encode="bfloat16", allow_loss=True)
    moeglot.convert(source, "qwen3-moe/hub", tmp_path / "first", encode="bfloat16", allow_loss=True)
    moeglot.convert(tmp_path / "first", form, tmp_path / "then")
    assert same_tensors(tmp_path / "at once", tmp_path / "then") == []


@pytest.mark.parametrize(("encode", "back"), [("mxfp4", "bfloat16"), ("fp8-block", "float32"), ("nvfp4", "float32"), ("int4:32", "float32")])
def test_bytes_that_may_not_return_are_counted_of_the_first_expert(encode, back, tmp_path):
    """Whether codes are written or read; what changes of numbers is measured of all."""
    sizes = {"e": 3, "h": 64, "i": 64}
    source = write_checkpoint(tmp_path / "a", "qwen3-moe/hub", sizes, 2)
    there = moeglot.convert(source, "qwen3-moe/hub", tmp_path / "b", encode=encode, allow_loss=True)
    again = moeglot.convert(tmp_path / "b", "qwen3-moe/hub", tmp_path / "c", encode=back, allow_loss=True)
    written = moeglot.open(tmp_path / "b")
    looked = [written.stored(line, layer, 0) for line in written.format.stored for layer in written.layers]
    for certificate in (there, again):
        (loss,) = certificate.losses.values()
        assert loss.blocks == sum(stored.parts["scale"].numel() for stored in looked) > 0
        assert loss.undetermined == sum(stored.encoding.undetermined(stored.parts) for stored in looked)
    (loss,) = there.losses.values()
    assert loss.values == 3 * 3 * 64 * 64 * len(written.layers)
    assert 0 < loss.changed <= loss.values
