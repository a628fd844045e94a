"""Forms of config.json that releases have and `save_pretrained` does not write: what transformers' config classes make of them, we make of them."""

import copy
import json

import families
import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN

from moeglot.checkpoints.config import hub_config
from moeglot.experts import FUNCTIONS
from moeglot.formats import FAMILIES, by_name
from moeglot.integrations.transformers import VERSION

SIZES = {"e": 3, "h": 64, "i": 96}


def dense_first(said: dict) -> None:
    """Inkling: how many layers are dense, and that what is called intermediate_size is the experts'."""
    said |= {"dense_mlp_idx": said.pop("mlp_layer_types").index("sparse"), "dense_intermediate_size": said["intermediate_size"]}
    said["intermediate_size"] = said.pop("moe_intermediate_size")


def at_the_top(said: dict) -> None:
    """dots3 and GLM-5.3-Flash: the language model's keys beside the others."""
    said |= {key: value for key, value in said.pop("text_config").items() if key not in said}


def below_another_key(said: dict) -> None:
    """Unlimited-OCR, and one key of it at the top."""
    said["language_config"] = said.pop("text_config")
    said["sliding_window"] = said["language_config"].pop("sliding_window")


def as_num_experts(said: dict) -> None:
    """DeepSeek-V3.2, GLM-5 and Mistral-Large-4, whose classes take the number of experts under this name, too."""
    part = said.get("text_config", said)
    part["num_experts"] = part.pop("n_routed_experts")


RELEASED = {"inkling-text": dense_first, "dots3-note": at_the_top, "glm5-next": at_the_top, "unlimited-ocr": below_another_key}
RELEASED |= dict.fromkeys(("deepseek-v32", "glm-moe-dsa", "mistral-large4"), as_num_experts)


@pytest.mark.skipif(VERSION < (5, 23), reason="the classes are those of 5.23")
@pytest.mark.parametrize("name", RELEASED)
def test_what_transformers_makes_of_it(name):
    family = next(family for family in FAMILIES if family.name == name)
    dense = {"mlp_layer_types": ["dense", "sparse", "sparse"]} if name == "inkling-text" else {}
    saved = json.loads(families.config_of(family, SIZES).to_json_string()) | dense
    said = copy.deepcopy(saved)
    RELEASED[name](said)
    theirs, ours = read(said), hub_config(said, by_name(f"{name}/hub"))
    assert family.layers(ours) == tuple(n for n, kind in enumerate(theirs["mlp_layer_types"]) if kind == "sparse") == (1, 2)
    assert {letter: n for letter, n in family.read_sizes(ours).items() if letter in SIZES} == SIZES
    for found in (theirs, read(ours)):
        assert {key: found.get(key) for key in read(saved)} == read(saved)
    assert hub_config(ours, by_name(f"{name}/hub")) == ours


def read(said: dict) -> dict:
    """What the library reads of the language model in it."""
    return CONFIG_MAPPING[said["model_type"]].from_dict(copy.deepcopy(said)).get_text_config().to_dict()


def test_activations():
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, -0.0, 1e-6])])
    assert ACT2FN.keys() - FUNCTIONS.keys() == {"prelu", "xielu"}
    for name in FUNCTIONS.keys() & ACT2FN.keys():
        torch.testing.assert_close(FUNCTIONS[name](x), ACT2FN[name](x), rtol=1e-5, atol=1e-6)
