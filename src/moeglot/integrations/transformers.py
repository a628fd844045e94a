"""What the installed transformers makes of a checkpoint: it loads the files with its own loader and its own modules compute.

The second implementation of `verify --against transformers`. Speaks 4.57, 5.5 and 5.23; reads nothing of the checkpoint by our own specs.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.errors import NotVerified, UsageError
from moeglot.experts import Expert, Matrix
from moeglot.files.remote import on_disk
from moeglot.verification.forward import loud_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

AUTOS = (
    *("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForTokenClassification"),
    *("AutoModelForSeq2SeqLM", "AutoModel"),
)
"""Where the library keeps its models, those that compute most first."""
VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])
READS = (*(["5"] if VERSION >= (5, 0) else []), *(["5.5"] if (5, 0) <= VERSION < (5, 6) else []), "any")
"""`Format.transformers` of what the installed version loads."""
EXPERTS = re.compile(r"\.(?:layers|blocks?)\.(\d+)\.(?:\w+\.)*experts$")
BLOCK = re.compile(r"\.layers\.(\d+)\.(?:mlp|block_sparse_moe)$")
TOWERS = re.compile(r"(?:vision|visual|audio)\S*\.(?:layers|blocks?)\.|talker|mtp|self_attention")
"""Parts of a model whose experts, if they have any, are not those of the language model's layers."""
BUILDING = threading.Lock()
"""Held while the library builds a model, since it sets torch's default dtype for all threads meanwhile."""


@dataclass(frozen=True)
class Live:
    """A side of `verify`: the experts modules of a loaded model, in float32."""

    name: str
    experts: Mapping[int, tuple[torch.nn.Module, ...]]

    def tokens(self, layer: int, expert: int, model: Expert, matrix: Matrix, h: int) -> torch.Tensor:
        return loud_tokens(layer, expert, model, matrix, h)

    def answer(self, layer: int, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([respond(module, expert, tokens) for module in self.experts[layer]], -1)

    def seen(self, layer: int, expert: int, response: torch.Tensor) -> torch.Tensor:
        return response


def respond(module: Any, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [t, h] -> [t, h]: the output of one expert of an experts module, all tokens routed to it with weight 1."""
    if isinstance(module, torch.nn.ModuleList):
        found = module[expert](tokens)
    elif isinstance(module, torch.nn.ModuleDict):
        found = module[f"expert_{expert}"](tokens)
    elif hasattr(module, "fc1") and hasattr(module.fc1, "groups"):
        found = _by_itself(module, expert, tokens)
    elif hasattr(module, "input_linear"):
        found = _routed_by(module, expert, tokens)
    elif type(module).__name__ == "Llama4TextExperts":
        each = tokens.new_zeros(module.num_experts, *tokens.shape)  # it takes as many tokens for each expert, in the experts' order
        each[expert] = tokens
        found = module(each.flatten(0, 1)).view(each.shape)[expert]
    else:
        found = (_routed_to if VERSION >= (5, 0) else _named_to)(module, expert, tokens)
    assert isinstance(found, torch.Tensor)
    return found.reshape(len(tokens), -1)  # 4.57 adds an axis


def _routed_to(module: Any, expert: int, tokens: torch.Tensor) -> Any:
    """A module of all experts. A norm after them, which they share, belongs to no expert (Muse Spark), and is left out."""
    ranks = 2 if hasattr(module, "zero_expert_num") else 1  # LongCat's takes no single rank: the second weighs nothing
    routed = torch.full((len(tokens), ranks), expert, dtype=torch.int64, device="cpu")
    routed[:, 1:] = 1 - min(expert, 1)
    weights = tokens.new_ones(len(tokens), ranks)
    weights[:, 1:] = 0
    if not hasattr(module, "post_expert_norm"):
        return module(tokens, routed, weights)
    with _instead(module, "post_expert_norm", torch.nn.Identity()):
        return module(tokens, routed, weights)


def _named_to(module: Any, expert: int, tokens: torch.Tensor) -> Any:
    """4.57's modules of all experts, those of gpt-oss, Qwen3-VL and DBRX: each has an order of its own, and most have the weights by expert."""
    chosen = torch.full((len(tokens), 1), expert, dtype=torch.int64, device="cpu")
    by_expert = torch.nn.functional.one_hot(chosen[:, 0], getattr(module, "num_experts", 0) or module.moe_num_experts).to(tokens.dtype)
    known = {
        **dict.fromkeys(("router_indices", "top_experts"), chosen),
        **dict.fromkeys(("routing_weights", "weights"), by_expert),
        "top_weights": tokens.new_ones(len(tokens), 1),
    }
    return module(tokens[None], **{name: known[name] for name in [*inspect.signature(module.forward).parameters][1:]})


def _by_itself(module: Any, expert: int, tokens: torch.Tensor) -> Any:
    """Aria's before 5.23: 5.5 is given the router's logits, 4.57 how many of the tokens are each expert's."""
    if VERSION >= (5, 0):
        logits = tokens.new_full((len(tokens), module.fc1.groups), float("-inf"))
        logits[:, expert] = 0
        return module(tokens, logits)
    counts = torch.zeros(module.fc1.groups, dtype=torch.int64, device="cpu")
    counts[expert] = len(tokens)
    return module(tokens, counts)


_SWAPPING = threading.Lock()


@contextmanager
def _instead(module: torch.nn.Module, name: str, other: torch.nn.Module) -> Iterator[None]:
    """Another part of a module for as long as it computes one answer; one thread at a time."""
    with _SWAPPING:
        own = getattr(module, name)
        try:
            setattr(module, name, other)
            yield
        finally:
            setattr(module, name, own)


class _Everything(torch.nn.Module):
    """A router that sends every token to one expert with weight 1, as JetMoE's and Granite's blocks ask theirs."""

    def __init__(self, expert: int, experts: int) -> None:
        super().__init__()
        self.expert, self.experts = expert, experts

    def forward(self, tokens: torch.Tensor) -> tuple[Any, ...]:
        counts = [len(tokens) if n == self.expert else 0 for n in range(self.experts)]
        places = torch.arange(len(tokens), dtype=torch.int64, device="cpu")
        return places, places, tokens.new_ones(len(tokens)), counts, None


def _routed_by(block: Any, expert: int, tokens: torch.Tensor) -> torch.Tensor:
    """The block's own forward with another router; what it adds after the experts is taken off again."""
    with _instead(block, "router", _Everything(expert, len(block.input_linear.weight))):
        found: Any = block(tokens[None])
    output: torch.Tensor = (found[0] if isinstance(found, tuple) else found)[0]
    bias = getattr(block, "bias", None)
    return output - bias if isinstance(bias, torch.Tensor) else output


def live(checkpoint: Checkpoint) -> Live:
    """The experts of the whole model as `from_pretrained` loads it; it needs the model's size in float32 as memory.

    Raises `UsageError` for a format that the installed transformers does not read and `NotVerified` if it finds tensors missing or unexpected.
    """
    model = load(checkpoint)
    found = experts_of(model, len(checkpoint.format.family.groups))
    if missing := set(checkpoint.layers) - found.keys():
        raise NotVerified(
            f"transformers {transformers.__version__} has no experts in layers {sorted(missing)}",
            f"{checkpoint.source.name} has; {checkpoint.known}",
            "check config.json against the producer's",
        )
    return Live(f"transformers {transformers.__version__}", found)


def experts_of(model: torch.nn.Module, groups: int = 1) -> dict[int, tuple[torch.nn.Module, ...]]:
    """Layer -> the experts modules of the language model: one for each group of experts, in the order of the model.

    Of more modules in layers of one number (an encoder that shares its decoder's weights), the last ones.
    """
    ours = {name: module for name, module in model.named_modules() if not TOWERS.search(name)}
    found: dict[int, tuple[torch.nn.Module, ...]] = {}
    for name, module in ours.items():
        if match := EXPERTS.search("." + name):
            found[int(match[1])] = (*found.get(int(match[1]), ()), module)
    blocks = {int(match[1]): module for name, module in ours.items() if (match := BLOCK.search("." + name)) and hasattr(module, "input_linear")}
    return {layer: modules[-groups:] for layer, modules in found.items()} or {layer: (block,) for layer, block in blocks.items()}


def model_class(config: Any) -> Any:
    """The class that computes with a config: the one that it names, else the largest that the library has for its type."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in AUTOS:
        known = getattr(transformers, auto, None)
        found = known._model_mapping.get(type(config), None) if known else None
        if found is not None and (found.config_class is type(config) or auto == "AutoModel"):
            return found
    raise UsageError(
        f"transformers {transformers.__version__} has no model for {type(config).__name__}",
        f"config.json says model_type = {config.model_type}",
        "pass --against another checkpoint",
    )


@contextmanager
def in_our_words(checkpoint: Checkpoint) -> Iterator[None]:
    """What the library's config classes and models raise for a config.json, as `UsageError`: they know no such family, or no such value."""
    said, installed = checkpoint.config, f"transformers {transformers.__version__}"
    try:
        yield
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        if said.get("model_type") not in transformers.CONFIG_MAPPING:
            own = "; its config.json names code that comes with it (auto_map), and moeglot runs none" if "auto_map" in said else ""
            wrong = f"{installed} knows no model_type {said.get('model_type')}{own}"
            raise UsageError(wrong, checkpoint.known, "install a version that has the family; inspect, convert and verify need none") from error
        known = f"it raises {type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{installed} builds no model as config.json says it", known, "take config.json from the producer") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers tells of errors alone and draws no bars; afterwards it does what it did before."""
    verbosity, bars, hub_bars = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()  # the Hub's, too
            if not hub_bars:
                disable_progress_bars()


def load(checkpoint: Checkpoint) -> Any:
    """The model in float32, by transformers alone."""
    if checkpoint.format.transformers not in READS:
        raise UsageError(
            f"transformers {transformers.__version__} does not read {checkpoint.format.name}",
            f"that format is for {checkpoint.format.reads}",
            f"pass --against SRC, or convert to {checkpoint.format.family.name}'s format on the Hub first",
        )
    # MXFP4 in float32 crashes in 4.57 and is silently bfloat16 in 5.5; bfloat16 holds every MXFP4 value, and float32 those.
    dtype = torch.float32 if checkpoint.format.is_plain else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}  # a mismatch is told like the rest
    if VERSION >= (5, 0):
        options["experts_implementation"] = "eager"
    folder = on_disk(checkpoint.source.home, "transformers")
    with quiet(), BUILDING, in_our_words(checkpoint):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, info = model_class(config).from_pretrained(folder, **options)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise NotVerified(
            f"transformers {transformers.__version__} loads it with {len(keys)} {kind.replace('_', ' ')}, first {sorted(map(key_name, keys))[0]}",
            checkpoint.known,
            "the folder is not what its config.json says, or this version does not read the format",
        )
    try:
        return model.float().eval()
    except ValueError as error:
        told = f"transformers {transformers.__version__} keeps {checkpoint.format.name} quantized, and does not compute it in float32"
        raise UsageError(told, str(error).split("\n")[0], "pass --against SRC, the checkpoint that it was made from") from error


def key_name(key: Any) -> str:
    """A key of the loading report: a name, or a name with the shapes that do not fit."""
    return " ".join(str(part if isinstance(part, str) else list(part)) for part in key) if isinstance(key, (tuple, list)) else str(key)


def continue_text(checkpoint: Checkpoint, prompt: str, tokens: int = 40) -> str:
    """The prompt and its greedy continuation, by transformers."""
    model = load(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(on_disk(checkpoint.source.home, "transformers"))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]  # 4.57 adds token types, which its own generate refuses
    with torch.no_grad(), quiet():
        found = model.generate(
            input_ids=ids,
            attention_mask=ids.new_ones(ids.shape),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(found[0], skip_special_tokens=True))


def register() -> None:
    """Make `experts_implementation="moeglot"` work on stock models of transformers 5.23, through its own registry; doing it again changes nothing.

    Raises `UsageError` in a release that has no registry for it, with the way that works there.
    """
    from moeglot.integrations import transformers_register

    transformers_register.register()
