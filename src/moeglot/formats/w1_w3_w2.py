"""The families whose releases name an expert's matrices as Mixtral does: w1 is gate, w3 is up, w2 is down; transformers 5 moves most of them to `mlp`."""

from moeglot.format import Dense, Format
from moeglot.formats.lines import LAYER, SILU, family, first_dense, fused, hub, linears, memory, numbered, separate

SPARSE = LAYER + "block_sparse_moe."
MLP = LAYER + "mlp."

MIXTRAL = family("mixtral", e=("num_local_experts", "num_experts"), i="intermediate_size")
PHIMOE = family("phimoe", e=("num_local_experts", "num_experts"), i="intermediate_size")
MINIMAX = family("minimax", e=("num_local_experts", "num_experts"), i="intermediate_size")
MINIMAX_M2 = family("minimax-m2", e=("num_local_experts", "num_experts"), i="intermediate_size")
LFM2 = family("lfm2-moe", e="num_experts", sparse=first_dense("num_dense_layers", 2), activation=SILU)

FORMATS = (
    hub(MIXTRAL, "mistralai/Mixtral-8x7B-v0.1", numbered(SPARSE + "experts.")),
    memory(MIXTRAL, fused(MLP + "experts."), {MLP + "gate.{rest}": SPARSE + "gate.{rest}"}),
    Format(
        "mixtral/quark",
        MIXTRAL,
        separate(MLP + "experts."),
        "https://github.com/amd/quark/blob/main/quark/torch/utils/llm/module_replacement/quark_experts.py",
        "one Linear a role and expert, as AMD's Quark takes the experts of transformers 5 apart and saves them",
        (Dense(MLP + "gate.{rest}", (SPARSE + "gate.{rest}",)),),
        reads="AMD's Quark",
    ),
    linears(MIXTRAL, separate(SPARSE + "experts.")),
    hub(PHIMOE, "microsoft/Phi-3.5-MoE-instruct", numbered(SPARSE + "experts.")),
    memory(PHIMOE, fused(MLP + "experts."), {MLP + "router.{rest}": SPARSE + "gate.{rest}"}),
    linears(PHIMOE, separate(SPARSE + "experts.")),
    hub(MINIMAX, "MiniMaxAI/MiniMax-Text-01-hf", numbered(SPARSE + "experts.")),
    memory(MINIMAX, fused(MLP + "experts."), {MLP + "gate.{rest}": SPARSE + "gate.{rest}"}),
    linears(MINIMAX, separate(SPARSE + "experts.")),
    hub(MINIMAX_M2, "MiniMaxAI/MiniMax-M2", numbered(SPARSE + "experts.")),
    memory(
        MINIMAX_M2,
        fused(MLP + "experts."),
        {MLP + "gate.{rest}": SPARSE + "gate.{rest}", MLP + "e_score_correction_bias": SPARSE + "e_score_correction_bias"},
    ),
    linears(MINIMAX_M2, separate(SPARSE + "experts.")),
    hub(LFM2, "LiquidAI/LFM2-8B-A1B", numbered(LAYER + "feed_forward.experts.")),
    memory(LFM2, fused(LAYER + "feed_forward.experts.")),
    linears(LFM2, separate(LAYER + "feed_forward.experts.")),
)
