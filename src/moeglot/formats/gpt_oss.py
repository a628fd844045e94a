"""gpt-oss: gate and up interleaved, biases, clamped SwiGLU, H = I; MXFP4 is [out, in] and transformers' BF16 is [in, out]."""

from moeglot.encodings.mxfp4 import MXFP4
from moeglot.family import Activation, Family
from moeglot.format import ConfigForm, Dense, Format
from moeglot.layout import Stored

FAMILY = Family(
    name="gpt-oss",
    model_types=("gpt_oss",),
    roles=("gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
    activation=Activation("clamped-swiglu", numbers={"alpha": ("swiglu_alpha", 1.702), "limit": ("swiglu_limit", 7.0)}),
    sizes={
        "e": ("num_local_experts", "num_experts"),
        "h": ("hidden_size",),
        "i": ("intermediate_size",),
        "q": ("num_attention_heads",),
        "k": ("num_key_value_heads",),
        "d": ("head_dim",),
    },
    source="https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/model.py",
)

EXPERTS = "model.layers.{layer}.mlp.experts."
BIASES = (
    Stored(EXPERTS + "gate_up_proj_bias", ("gate_bias", "up_bias"), "e (i p)"),
    Stored(EXPERTS + "down_proj_bias", ("down_bias",), "e h"),
)
BLOCKS = {"packed": "_blocks", "scale": "_scales"}

OPENAI = Format(
    "gpt-oss/openai",
    FAMILY,
    (
        Stored(EXPERTS + "gate_up_proj", ("gate", "up"), "e (i p) h", MXFP4(), BLOCKS),
        Stored(EXPERTS + "down_proj", ("down",), "e h i", MXFP4(), BLOCKS),
        *BIASES,
    ),
    source="https://huggingface.co/openai/gpt-oss-20b",
    about="the release on the Hub: MXFP4 blocks and scales",
    config=ConfigForm(
        quantization={
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        },
    ),
)

TRANSFORMERS = Format(
    "gpt-oss/transformers",
    FAMILY,
    (
        Stored(EXPERTS + "gate_up_proj", ("gate", "up"), "e h (i p)"),
        Stored(EXPERTS + "down_proj", ("down",), "e i h"),
        *BIASES,
    ),
    source="https://github.com/huggingface/transformers/blob/main/src/transformers/models/gpt_oss/modeling_gpt_oss.py",
    about="GptOssExperts in memory, and what save_pretrained writes of it",
    says_transposed=True,
)

DEQUANTIZED = Format(
    "gpt-oss/dequantized",
    FAMILY,
    (
        Stored(EXPERTS + "gate_up_proj", ("gate", "up"), "e (i p) h"),
        Stored(EXPERTS + "down_proj", ("down",), "e h i"),
        *BIASES,
    ),
    source="https://github.com/AI-Hypercomputer/maxtext/blob/418244f1efb678b54ec30bf63933f631e97eecc3/MaxText/scratch_code/dequantize_mxfp4.py",
    about="the release decoded by scripts that turn no matrix: transformers' names, and the axes of the blocks",
    reads="nothing that we know",
    asked="decoded MXFP4 and turned no matrix",
)

BLOCK = "block.{layer}."
HUB = "model.layers.{layer}."
QKV = ("q d", "k d", "k d")
ORIGINAL_BLOCKS = {"packed": ".blocks", "scale": ".scales"}

ORIGINAL = Format(
    "gpt-oss/original",
    FAMILY,
    (
        Stored(BLOCK + "mlp.mlp1_weight", ("gate", "up"), "e (i p) h", MXFP4(), ORIGINAL_BLOCKS),
        Stored(BLOCK + "mlp.mlp2_weight", ("down",), "e h i", MXFP4(), ORIGINAL_BLOCKS),
        Stored(BLOCK + "mlp.mlp1_bias", ("gate_bias", "up_bias"), "e (i p)"),
        Stored(BLOCK + "mlp.mlp2_bias", ("down_bias",), "e h"),
    ),
    source="https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/weights.py",
    about="the folder original/ of the release, which openai's own code reads",
    reads="openai's gpt_oss",
    dense=(
        Dense("embedding.weight", ("model.embed_tokens.weight",)),
        Dense("unembedding.weight", ("lm_head.weight",)),
        Dense("norm.scale", ("model.norm.weight",)),
        Dense(BLOCK + "attn.norm.scale", (HUB + "input_layernorm.weight",)),
        Dense(BLOCK + "attn.qkv.weight", tuple(HUB + f"self_attn.{x}_proj.weight" for x in "qkv"), QKV),
        Dense(BLOCK + "attn.qkv.bias", tuple(HUB + f"self_attn.{x}_proj.bias" for x in "qkv"), QKV),
        Dense(BLOCK + "attn.sinks", (HUB + "self_attn.sinks",)),
        Dense(BLOCK + "attn.out.weight", (HUB + "self_attn.o_proj.weight",)),
        Dense(BLOCK + "attn.out.bias", (HUB + "self_attn.o_proj.bias",)),
        Dense(BLOCK + "mlp.norm.scale", (HUB + "post_attention_layernorm.weight",)),
        Dense(BLOCK + "mlp.gate.weight", (HUB + "mlp.router.weight",)),
        Dense(BLOCK + "mlp.gate.bias", (HUB + "mlp.router.bias",)),
    ),
    config=ConfigForm(
        names={
            "num_hidden_layers": "num_hidden_layers",
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "experts_per_token",
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "intermediate_size": "intermediate_size",
            "swiglu_limit": "swiglu_limit",
            "head_dim": "head_dim",
            "num_attention_heads": "num_attention_heads",
            "num_key_value_heads": "num_key_value_heads",
            "sliding_window": "sliding_window",
            "rope_theta": "rope_theta",
            "rope_scaling.original_max_position_embeddings": "initial_context_length",
            "rope_scaling.factor": "rope_scaling_factor",
            "rope_scaling.beta_slow": "rope_ntk_alpha",
            "rope_scaling.beta_fast": "rope_ntk_beta",
        },
        only=True,
        defaults={"swiglu_limit": 7.0},  # configs that transformers 4.57 and 5.5 save do not say it
        hub_constants={
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "rope_scaling.rope_type": "yarn",
            "rope_scaling.truncate": False,
        },
    ),
)

LINEAR = EXPERTS + "experts.{expert}."
LLM_COMPRESSOR = Format(
    "gpt-oss/llm-compressor",
    FAMILY,
    (
        Stored(LINEAR + "gate_proj.weight", ("gate",), "i h"),
        Stored(LINEAR + "up_proj.weight", ("up",), "i h"),
        Stored(LINEAR + "down_proj.weight", ("down",), "h i"),
        Stored(LINEAR + "gate_proj.bias", ("gate_bias",), "i"),
        Stored(LINEAR + "up_proj.bias", ("up_bias",), "i"),
        Stored(LINEAR + "down_proj.bias", ("down_bias",), "h"),
    ),
    source="https://github.com/vllm-project/llm-compressor/blob/main/src/llmcompressor/modeling/gpt_oss.py",
    about="one Linear a role and expert, as llm-compressor takes the experts apart to quantize them (convert_model_for_quantization_gptoss)",
    reads="vLLM",
    wrapped=False,
)

NUMBERED = EXPERTS + "{expert}."
LLM_COMPRESSOR_0_14 = Format(
    "gpt-oss/llm-compressor-0.14",
    FAMILY,
    (
        Stored(NUMBERED + "gate_proj.weight", ("gate",), "i h"),
        Stored(NUMBERED + "up_proj.weight", ("up",), "i h"),
        Stored(NUMBERED + "down_proj.weight", ("down",), "h i"),
        Stored(NUMBERED + "gate_proj.bias", ("gate_bias",), "i"),
        Stored(NUMBERED + "up_proj.bias", ("up_bias",), "i"),
        Stored(NUMBERED + "down_proj.bias", ("down_bias",), "h"),
    ),
    source="https://github.com/vllm-project/llm-compressor/blob/main/src/llmcompressor/modeling/moe/gpt_oss.py",
    about="one Linear a role and expert, as llm-compressor since 0.14 and AutoRound take the experts apart to quantize them",
    reads="vLLM",
    wrapped=False,
)

QUARK = Format(
    "gpt-oss/quark",
    FAMILY,
    (
        Stored(NUMBERED + "gate_up_proj.weight", ("gate", "up"), "(i p) h"),
        Stored(NUMBERED + "down_proj.weight", ("down",), "h i"),
        Stored(NUMBERED + "gate_up_proj.bias", ("gate_bias", "up_bias"), "(i p)"),
        Stored(NUMBERED + "down_proj.bias", ("down_bias",), "h"),
    ),
    source="https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/gpt_oss.py",  # _load_weights_quark
    about="AMD's releases in MXFP4 with activations in FP8: one Linear an expert, gate and up interleaved as in OpenAI's",
    reads="vLLM",
    wrapped=False,
)

UNSLOTH = Format(
    "gpt-oss/unsloth",
    FAMILY,
    (
        Stored(EXPERTS + "gate_up_projs.{expert}.weight", ("gate", "up"), "(i p) h"),
        Stored(EXPERTS + "down_projs.{expert}.weight", ("down",), "h i"),
        Stored(EXPERTS + "gate_up_projs.{expert}.bias", ("gate_bias", "up_bias"), "(i p)"),
        Stored(EXPERTS + "down_projs.{expert}.bias", ("down_bias",), "h"),
    ),
    source="https://huggingface.co/unsloth/gpt-oss-20b-unsloth-bnb-4bit",
    about="unsloth's 4-bit release, and what a merge with it writes: one Linear an expert",
    dense=(Dense(HUB + "mlp.router.linear.{rest}", (HUB + "mlp.router.{rest}",)),),
    reads="unsloth",
    wrapped=False,
)

FORMATS = (OPENAI, ORIGINAL, TRANSFORMERS, LLM_COMPRESSOR, LLM_COMPRESSOR_0_14, QUARK, UNSLOTH, DEQUANTIZED)
