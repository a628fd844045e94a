"""The conventions that we know: how each writer lays out the LoRA factors of experts in the tensors of an adapter.

Letters: e expert, r rank, x what the matrix multiplies (in), y what it gives (out). The change of expert e is scale × [y, r] [r, x]. `"(e r) x"` reads: rows
of one expert follow each other; `"y (r e)"`: columns of one rank follow each other, an expert's are e apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeglot.axes import parse_axes
from moeglot.errors import UsageError
from moeglot.format import Format

Leaves = tuple[tuple[tuple[str, ...], str], ...]
"""(roles, name) of each tensor pair of a layer's experts."""


@dataclass(frozen=True)
class Convention:
    """One way to lay out factors. Law: their product is the change that the writer's own forward applies.

    `a`, `b`: axes of the two stored tensors; `keys`: what follows the module's name in their keys. Where the tensors are named after the parameters or
    modules of a format, `leaves` is empty: with e in the axes they sit on its stacked parameters, else on its modules of one expert each.
    `joined`: how axis y holds gate and up, for a leaf of both; otherwise the base's format says so. `shared`: axis e may be 1 long, one factor for all.
    `patterns`: its readers know rank_pattern and alpha_pattern; if not, one rank and one scale must do for all. `modules`: what the writer calls other
    modules, and the Hub's name. `families`: the only ones that have it, or all.
    """

    name: str
    a: str
    b: str
    about: str
    source: str
    keys: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
    leaves: Leaves = ()
    joined: str = ""
    shared: bool = False
    patterns: bool = False
    modules: tuple[tuple[str, str], ...] = ()
    families: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        a, b = (sorted(letter for group in parse_axes(axes) for letter in group) for axes in (self.a, self.b))
        experts = ["e"] * ("e" in a)
        if sorted([a, b]) != sorted([sorted([*experts, "r", "x"]), sorted([*experts, "r", "y"])]):
            raise ValueError(f"{self.name}: {self.a!r} and {self.b!r} must hold r and one of x, y each, and e both or neither")
        if any(len(roles) > 1 for roles, _ in self.leaves) != bool(self.joined):
            raise ValueError(f"{self.name}: a leaf of two roles needs `joined`, and nothing else has it")

    @property
    def stacked(self) -> bool:
        """One pair of tensors for all experts."""
        return "e" in self.a

    @property
    def wraps(self) -> bool:
        """PEFT's ParamWrapper: the pair is named after the module whose parameter it wraps, wrapped once for each parameter."""
        return self.stacked and not self.leaves

    @property
    def packed(self) -> bool:
        """Experts and ranks share an axis, so that a shape tells the product of both and neither of them."""
        return any({"e", "r"} <= set(group) for group in parse_axes(self.a))

    @property
    def grouped(self) -> bool:
        """The columns of one expert follow each other."""
        return "(e r)" in self.b

    @property
    def turned(self) -> bool:
        """The first factor lies on y."""
        return "y" in self.a


PEFT_SOURCE = "https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py"
ZOO_SOURCE = "https://github.com/unslothai/unsloth-zoo/blob/main/unsloth_zoo/temporary_patches/moe_utils.py"

PEFT = Convention(
    "peft",
    "(e r) x",
    "y (r e)",
    "PEFT's ParamWrapper on a stacked parameter: PEFT >= 0.19 on [e, out, in]; any PEFT on gpt-oss in transformers 5, 0.18 on gpt-oss anywhere",
    PEFT_SOURCE,
    patterns=True,
)
PEFT_TURNED = Convention(
    "peft-turned",
    "(e r) y",
    "x (r e)",
    "the same with A on the out axis: PEFT 0.18 on [e, out, in]; PEFT >= 0.19 on gpt-oss in transformers 4.57",
    PEFT_SOURCE,
    patterns=True,
)
GROUPED = Convention(
    "grouped",
    "(e r) x",
    "y (e r)",
    "unsloth_zoo from 2026-02 to 2026.9.5 with PEFT >= 0.19: the columns of one expert follow each other",
    ZOO_SOURCE,
    patterns=True,
)
GROUPED_TURNED = Convention(
    "grouped-turned",
    "(e r) y",
    "x (e r)",
    "the same with A on the out axis: unsloth_zoo with PEFT 0.18; Megatron-Bridge's save_hf_adapter",
    "https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/src/megatron/bridge/models/conversion/auto_bridge.py",
    patterns=True,
)
PER_EXPERT = Convention(
    "per-expert",
    "r x",
    "y r",
    "one Linear an expert, as in transformers 4.57; vLLM, ms-swift and Automodel use the same keys",
    PEFT_SOURCE,
)
UNSLOTH_BNB = Convention(
    "unsloth-bnb",
    "r x",
    "y r",
    "one Linear an expert in unsloth's 4-bit gpt-oss; gate and up alternate in its rows",
    "https://huggingface.co/unsloth/gpt-oss-20b-unsloth-bnb-4bit",
    leaves=((("gate", "up"), "gate_up_projs.{expert}"), (("down",), "down_projs.{expert}")),
    joined="(i p)",
    families=("gpt-oss",),
)
TINKER = Convention(
    "tinker",
    "e r x",
    "e y r",
    "tinker: 3-D tensors named w1, w3 and w2; a factor may be one for all experts",
    "https://github.com/thinking-machines-lab/tinker-cookbook/blob/main/tinker_cookbook/weights/_merge.py",
    leaves=((("gate",), "w1"), (("up",), "w3"), (("down",), "w2")),
    shared=True,
    modules=((".attn.", ".self_attn."),),
)
SGLANG = Convention(
    "sglang",
    "e r x",
    "e y r",
    "SGLang, and Megatron-Bridge's stream: 3-D tensors; a factor may be one for all experts",
    "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora.py",
    leaves=((("gate",), "gate_proj"), (("up",), "up_proj"), (("down",), "down_proj")),
    shared=True,
)
AUTOMODEL = Convention(
    "automodel",
    "e x r",
    "e r y",
    "NeMo Automodel's own: 3-D tensors [e, in, r] and [e, r, out], gate before up",
    "https://github.com/NVIDIA-NeMo/Automodel/blob/main/nemo_automodel/components/_peft/lora_experts.py",
    keys=("_A", "_B"),
    leaves=((("gate", "up"), "lora_gate_and_up"), (("down",), "lora_down")),
    joined="(p i)",
    families=("qwen3-moe", "mixtral"),
)

CONVENTIONS = (PEFT, PEFT_TURNED, GROUPED, GROUPED_TURNED, PER_EXPERT, UNSLOTH_BNB, TINKER, SGLANG, AUTOMODEL)


@dataclass(frozen=True)
class Reader:
    """Someone who reads adapters, and which convention he needs: for experts stored [e, out, in], for those stored [e, in, out], and for these where the
    module does not say so (`silent`).

    `patterns`: he knows rank_pattern and alpha_pattern, where the convention's readers do.
    """

    name: str
    out_in: Convention
    in_out: Convention
    about: str
    patterns: bool = True
    silent: Convention | None = None


READERS = (
    Reader("transformers-5", PEFT, PEFT, "PEFT >= 0.19 on transformers 5", silent=PEFT_TURNED),
    Reader("transformers-4.57", PER_EXPERT, PEFT_TURNED, "PEFT >= 0.19 on transformers 4.57"),
    Reader("peft-0.18-transformers-5", PEFT_TURNED, PEFT, "PEFT 0.18 on transformers 5"),
    Reader("peft-0.18-transformers-4.57", PER_EXPERT, PEFT, "PEFT 0.18 on transformers 4.57"),
    Reader("unsloth", PEFT, PEFT, "unsloth_zoo >= 2026.9.6, which reads lora_B_layout"),
    Reader("vllm", PER_EXPERT, PEFT, "vLLM: keys of one expert each; for gpt-oss PEFT's own", patterns=False),
)
"""Names that `--to` takes beside those of the conventions."""


def by_name(name: str) -> Convention:
    """`"peft"` -> its Convention; raises `UsageError` with the names that are known."""
    for convention in CONVENTIONS:
        if convention.name == name:
            return convention
    raise UsageError(f"{name!r} is not a convention", f"known: {', '.join(c.name for c in CONVENTIONS)}", "`moeglot adapter conventions` says what each one is")


def target(name: str, form: Format | None) -> tuple[Convention, bool]:
    """The convention of a name, or the one that a reader of this name needs; whether patterns are read. `form`: how a family's experts are stacked."""
    for reader in READERS:
        if reader.name == name:
            convention = reader.in_out if form and form.is_in_out else reader.out_in
            if form and form.is_in_out and not form.says_transposed:
                convention = reader.silent or reader.in_out
            return convention, convention.patterns and reader.patterns
    if name in (convention.name for convention in CONVENTIONS):
        return by_name(name), by_name(name).patterns
    known = ", ".join(known.name for known in (*CONVENTIONS, *READERS))
    raise UsageError(f"{name!r} is neither a convention nor a reader", f"known: {known}", "`moeglot adapter conventions` says what each one is")
