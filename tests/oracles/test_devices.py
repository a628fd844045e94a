"""Native models on more than one device: placed as the map says, divided by the bytes that they hold, computed and trained where they lie, in any encoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from devices import DEVICE
from elsewhere import ASKED, two_devices
from held_models import NAMES, model_of
from reading import relative
from synthetic import write_checkpoint

import moeglot
from moeglot.demo import BUNDLED
from moeglot.errors import BadNumbers, UsageError
from moeglot.integrations.transformers import VERSION
from moeglot.integrations.transformers_placement import _map_of, blocks, place_of
from moeglot.nn import Experts, add_lora, experts_of
from moeglot.nn.backends import choose

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LIMIT, POWER = 1e-5, 1e-3
IDS = torch.arange(12).view(1, 12) + 3


def spread(one: str, other: str) -> dict[str, str]:
    """The bundled model's four layers on two devices."""
    return {
        "model.embed_tokens": one,
        "model.rotary_emb": one,
        "model.layers.0": one,
        "model.layers.1": one,
        "model.layers.2": other,
        "model.layers.3": other,
        "model.norm": other,
        "lm_head": other,
    }


def logits(model: torch.nn.Module, device: str = "cpu") -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(device)).logits.cpu()


@pytest.fixture(scope="module")
def whole() -> torch.nn.Module:
    return moeglot.load(BUNDLED, "float32", native=True)


def test_a_spread_model_computes_where_its_layers_lie(whole):
    with two_devices() as (one, other):
        model = moeglot.load(BUNDLED, "float32", native=True, device_map=spread(one, other))
        for name, module in experts_of(model).items():
            assert {str(buffer.device) for buffer in module.buffers()} == {place_of(name, spread(one, other))}
        assert relative(logits(model, one), logits(whole)) <= LIMIT
        found = model.generate(IDS.to(one), max_new_tokens=3, do_sample=False)
        assert torch.equal(found.cpu(), whole.generate(IDS, max_new_tokens=3, do_sample=False))
        adapted = []
        for each, first in ((moeglot.load(BUNDLED, "float32", native=True), "cpu"), (model, one)):
            torch.manual_seed(0)
            add_lora(each, 2)
            for module in experts_of(each).values():
                assert {factor.device for factor in module.parameters()} == {module.lines[0].device}  # an adapter lies with its experts
                for lora in module.adapters.values():
                    torch.nn.init.constant_(lora.b, 0.1)
            adapted.append(logits(each, first))
        assert relative(adapted[0], logits(whole)) > POWER
        assert relative(adapted[1], adapted[0]) <= LIMIT
        held = model.model.layers[3].mlp.experts.lines[0]  # one tensor of one layer is left behind, and it shows
        name, buffer = next(held.named_buffers())
        held.register_buffer(name, buffer.to(one), persistent=False)
        with pytest.raises(RuntimeError, match="same device"):
            logits(model, one)


def test_auto_divides_what_is_held(whole):
    """Room for the encoded model on one device, and not for the decoded one: accelerate is asked about the bytes that are there."""
    native, dense = moeglot.load(BUNDLED, "bfloat16", native=True), moeglot.load(BUNDLED, "bfloat16")
    room = {0: 4_000_000, 1: 4_000_000}
    assert _map_of(native, "sequential", dict(room)) == {"": 0}
    assert "disk" in _map_of(dense, "sequential", dict(room)).values()
    balanced = _map_of(native, "auto", dict(room))
    assert {place_of(f"model.layers.{n}.mlp.experts", balanced) for n in range(4)} == {0, 1}
    assert not any("layers." in name and name.count(".") > 2 for name in balanced)  # no layer is divided
    with pytest.raises(UsageError, match="offloads"):
        moeglot.load(BUNDLED, native=True, device_map="auto", max_memory={0: 2_000_000, "cpu": 10**9})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_never_divided_is_what_the_library_never_divides(name):
    live = model_of(name, "square")
    assert set(live._no_split_modules or ()) & {type(module).__name__ for module in live.modules()} <= set(blocks(live))


def test_a_choice_is_made_for_the_device_of_the_tokens(whole):
    """Other devices are there too, and what is placed on a CPU computes as on a CPU."""
    with two_devices() as (one, _):
        module = Experts.of(moeglot.open(BUNDLED), 0)
        few, some = torch.zeros(1, 4, dtype=torch.long), torch.zeros(8, 4, dtype=torch.long)
        for index, here, there in ((few, "eager", "batched"), (some, "grouped", "batched"), (some.repeat(8, 1), "grouped", "grouped")):
            hidden = torch.zeros(len(index), 192)
            assert choose(module, hidden, index) == here
            assert choose(module, hidden.to(one), index.to(one)) == there
        assert torch.equal(logits(moeglot.load(BUNDLED, "float32", native=True, device_map="cpu")), logits(whole))


@pytest.mark.skipif(VERSION < (5, 0), reason="4.57 hands gpt-oss's experts the scores of all")
def test_where_the_host_waits(tmp_path):
    """Plain experts of few tokens: never, and it shows where a backend asks for where each expert's rows end."""
    moeglot.convert(BUNDLED, "gpt-oss/transformers", tmp_path / "plain")
    with two_devices() as (one, _):
        model = moeglot.load(tmp_path / "plain", "float32", native=True, device_map={"model": one, "lm_head": one})
        module = model.model.layers[0].mlp.experts
        index = torch.tensor([[0, 3], [5, 1]] * 3).to(one)
        hidden, weights = torch.randn(6, 192).to(one), torch.rand(6, 2).to(one)
        for module.backend, waits in (("batched", False), ("eager", True)):
            ASKED.clear()
            module(hidden, index, weights)
            assert bool(ASKED) == waits, ASKED


@pytest.mark.skipif(VERSION < (5, 23), reason="no release of transformers has a say in it")
@pytest.mark.parametrize("device", [(), *([(DEVICE,)] if DEVICE != "cpu" else ())], ids=str)
def test_every_encoding_computes_elsewhere_by_every_backend(device, tmp_path):
    """By torch alone, as on a GPU where Triton is not: no table and no scratch memory stays on the CPU. On a GPU that is there, by Triton too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, Path(__file__).with_name("elsewhere_steps.py"), tmp_path / "base", *device]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 16 * (5 + len(device))
    assert not {name: error for name, error in found.items() if not error <= LIMIT}


@pytest.mark.parametrize("backend", ["batched", "grouped"])
def test_a_number_beyond_float16_is_refused_elsewhere_too(backend, tmp_path):
    """Before it becomes infinity; and once it is known that there is none, no step asks again."""
    write_checkpoint(tmp_path / "base", "gpt-oss/openai", {"h": 32, "i": 32, "e": 4}, dtype=torch.float32)
    module = Experts.of(moeglot.open(tmp_path / "base"), 0, backend=backend)
    index, weights = torch.tensor([[0], [1], [0]]), torch.ones(3, 1).half()
    with two_devices() as (one, _):
        module, given = module.to(one), [each.to(one) for each in (torch.randn(3, 32).half() * 0.01, index, weights)]
        asked = []
        for _ in range(3):
            ASKED.clear()
            assert bool(module(*given).cpu().isfinite().all())
            asked.append(len(ASKED))
        assert asked[0] > asked[1] == asked[2]
        state = module.state_dict()
        key = next(key for key in state if key.endswith("down_proj_scales"))
        module.load_state_dict({**state, key: state[key].index_fill(0, torch.tensor([2]).to(one), 127 + 15)})
        with pytest.raises(BadNumbers, match="layer 0, down_proj, expert 2: a number is beyond float16"):
            module(*given)
        module(given[0].bfloat16(), *given[1:])


def test_modules_that_are_no_experts_may_be_offloaded(whole, tmp_path):
    model = moeglot.load(BUNDLED, "float32", native=True, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path)
    assert model.lm_head.weight.is_meta
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"": "disk"}, "offloads model.layers.0.mlp.experts to 'disk'"),
        ({"": 0, "model.layers.1": "cpu"}, "offloads model.layers.1.mlp.experts to 'cpu'"),
        ({"": "cpu", "model.layers.1": "meta"}, "nothing has numbers"),
        ({"": 1, "model.layers.1.mlp.experts.down_proj": 0}, "are one module"),
        ({"model.layers.1": "cpu"}, "no place for model.layers.0.mlp.experts"),
        ("everywhere", "is no place"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_places_where_encoded_experts_cannot_be(place, words):
    with pytest.raises(UsageError, match=words):
        moeglot.load(BUNDLED, native=True, device_map=place)
    with pytest.raises(UsageError, match="both say"):
        moeglot.load(BUNDLED, native=True, device="cpu", device_map=place)
