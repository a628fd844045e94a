"""A real megatron-core GPTModel on a CPU: what it makes of a checkpoint, as a program, since it needs a process group and stand-ins for CUDA.

Run as `megatron_cpu.py CHECKPOINT LOGITS [--save FOLDER] ...`, alone or under torchrun, where each process holds its share of the model: half of the experts,
unless --tp, --etp, --pp and --ep say otherwise. Importing it puts the stand-ins in place (`megatron_forks`), which no other process may have.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def stand_in() -> None:
    """megatron-core asks CUDA for a device, streams and random states wherever it runs; on a CPU these mean nothing, and nothing that computes is replaced."""
    import megatron.core.fusions.fused_softmax as softmax
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe
    import megatron.core.transformer.moe.token_dispatcher as dispatcher
    import megatron.core.transformer.multi_latent_attention as latent
    import megatron.core.transformer.utils as masks

    class Stream:
        """All work is done when it is asked for, so that there is nothing to wait for."""

        def wait_stream(self, _: Any) -> None:
            pass

        def record_event(self) -> Stream:
            return self

        def synchronize(self) -> None:
            pass

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.Stream = Stream
    torch.cuda.current_stream = lambda *_: Stream()
    torch.cuda.stream = lambda *_: contextlib.nullcontext()
    random.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()

    if not hasattr(moe, "te_general_gemm"):  # left unbound where transformer-engine is not there; None is how the code asks for it
        moe.te_general_gemm = None

    for name in ("TELinear", "TEColumnParallelLinear"):  # no types where transformer-engine is not there, and asked for as such all the same
        if not isinstance(getattr(latent, name), type):
            setattr(latent, name, type(name, (), {}))

    # Numbers of tokens become a list only on their way from a GPU; gloo wants them as one, too.
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    def on_cpu(make: Any) -> Any:
        def made(*args: Any) -> torch.Tensor:
            ones = torch.ones
            torch.ones = lambda *shape, device=None, **rest: ones(*shape, **rest)
            try:
                return make(*args)
            finally:
                torch.ones = ones

        return made

    for name in ("get_default_causal_mask", "get_sliding_window_causal_mask"):
        setattr(masks, name, on_cpu(getattr(masks, name)))
        setattr(softmax, name, getattr(masks, name))


def products_of_groups() -> None:
    """GroupedMLP's one CUDA kernel, `grouped_gemm.ops.gmm(a, b, sizes)`: runs of rows of a, each times its matrix of b [e, in, out]."""
    import megatron.core.transformer.moe.grouped_gemm_util as grouped

    def gmm(a: torch.Tensor, b: torch.Tensor, sizes: torch.Tensor, trans_b: bool) -> torch.Tensor:
        assert not trans_b
        return torch.cat([rows @ matrix for rows, matrix in zip(a.split(sizes.tolist()), b, strict=True)])

    grouped.grouped_gemm = grouped.ops = SimpleNamespace(gmm=gmm)


def in_blocks(model: Any, size: int) -> None:
    """What `moe_mlp_glu_interleave_size` makes of the first linear of an expert, which later releases have for transformer-engine's layers alone: of each
    2 * size numbers that it gives, the first `size` are gate's (https://github.com/NVIDIA/TransformerEngine, `glu_interleave_size` of ScaledSwiGLU).
    """
    from megatron.core.transformer.moe.experts import SequentialMLP

    def in_halves(given: torch.Tensor) -> torch.Tensor:
        starts = range(0, given.shape[-1], 2 * size)
        return torch.cat([given[..., at + side : at + side + size] for side in (0, size) for at in starts], -1)

    for module in model.modules():
        for expert in module.local_experts if isinstance(module, SequentialMLP) else ():
            expert.linear_fc1.register_forward_hook(lambda _, __, given: tuple(one if one is None else in_halves(one) for one in given))


def transformer_config(hf: dict[str, Any], sizes: dict[str, int]) -> Any:
    """config.json of a Hub checkpoint, and among how many processes each thing is divided -> TransformerConfig."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer.transformer_config import TransformerConfig

    shared = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf.get("head_dim"),
        "num_moe_experts": hf.get("num_local_experts") or hf.get("num_experts") or hf["n_routed_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_aux_loss_coeff": 0.0,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "tensor_model_parallel_size": sizes["tp"],
        "expert_tensor_parallel_size": sizes["etp"],
        "pipeline_model_parallel_size": sizes["pp"],
        "expert_model_parallel_size": sizes["ep"],
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
    }
    if hf["model_type"] == "gpt_oss":
        inner = hf["intermediate_size"]
        found = TransformerConfig(
            **shared,
            ffn_hidden_size=inner,
            moe_ffn_hidden_size=inner,
            add_bias_linear=True,
            add_qkv_bias=True,
            activation_func=quick_gelu,
            glu_linear_offset=1.0,
            activation_func_clamp_value=hf.get("swiglu_limit", 7.0),
            softmax_type="learnable",
            window_size=(hf["sliding_window"] - 1, 0),
            window_attn_skip_freq=2,
        )
        rope = rope_of(hf)
        numbers = {
            "position_embedding_type": "yarn",
            "yarn_rotary_scaling_factor": rope["factor"],
            "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
            "yarn_beta_fast": rope["beta_fast"],
            "yarn_beta_slow": rope["beta_slow"],
            "yarn_mscale": None,
            "yarn_mscale_all_dim": None,
            "yarn_correction_range_round_to_int": rope.get("truncate", True),
        }
        for name, value in numbers.items():
            setattr(found, name, value)
        return found
    if hf["model_type"] == "deepseek_v3":
        return latent_config(hf, shared)
    inner = hf.get("moe_intermediate_size") or hf["intermediate_size"]
    return TransformerConfig(
        **shared,
        ffn_hidden_size=inner,
        moe_ffn_hidden_size=inner,
        add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
        qk_layernorm=hf["model_type"] == "qwen3_moe",
    )


def latent_config(hf: dict[str, Any], shared: dict[str, Any]) -> Any:
    """DeepSeek-V3: latent attention, a first layer without experts, shared experts, groups of experts chosen by sigmoids and a bias."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    count, dense, inner = hf["num_hidden_layers"], hf["first_k_dense_replace"], hf["moe_intermediate_size"]
    return MLATransformerConfig(
        **shared | {"kv_channels": hf["v_head_dim"]},
        ffn_hidden_size=hf["intermediate_size"],
        moe_ffn_hidden_size=inner,
        moe_shared_expert_intermediate_size=inner * hf["n_shared_experts"],
        moe_layer_freq=[0] * dense + [1] * (count - dense),
        add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
        qk_layernorm=True,
        q_lora_rank=hf["q_lora_rank"],
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        rope_type="rope",
        rotary_base=rope_of(hf)["rope_theta"],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=hf["n_group"],
        moe_router_group_topk=hf["topk_group"],
        moe_router_topk_scaling_factor=hf["routed_scaling_factor"],
    )


def rope_of(hf: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions, as transformers 5 writes it or 4."""
    return dict(hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf["rope_theta"]})


def build(hf: dict[str, Any], sizes: dict[str, int], te_names: bool, grouped: bool = False, words: int | None = None) -> Any:
    """What this process has of the model, its experts as SequentialMLP, or `grouped`, as the legacy GroupedMLP. `te_names`: its checkpoint has the names
    that the layers of transformer-engine give it. `words`: the rows of the embedding, if they are more than words.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe.experts import GroupedMLP

    class LatentAttention(DotProductAttention):
        """It is told the sizes of heads that transformer-engine's has to know; here the tensors have them."""

        def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **rest: Any) -> None:
            super().__init__(*args, **rest)

    config = transformer_config(hf, sizes)
    config.moe_grouped_gemm = grouped
    if hf["model_type"] == "deepseek_v3":
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        names = {f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")}
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = LatentAttention
        for layer, kind in zip(spec.layer_specs if te_names else (), config.moe_layer_freq, strict=False):
            own = names if kind else names | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
            layer.submodules = replace(layer.submodules, sharded_state_dict_keys_map=own)
    else:
        spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=grouped, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        if te_names:
            spec.submodules = replace(spec.submodules, sharded_state_dict_keys_map=names)
    model = GPTModel(
        config,
        spec,
        vocab_size=words or hf["vocab_size"],
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=hf.get("tie_word_embeddings", False),
        position_embedding_type="yarn" if hf["model_type"] == "gpt_oss" else "rope",
        rotary_base=int(rope_of(hf)["rope_theta"]),
    ).eval()
    for module in model.modules():
        if grouped and isinstance(module, GroupedMLP):  # it wants to be told bfloat16, and computes in what it is given
            module.config = replace(config, bf16=True)
    return model


def logits_of(model: Any, hf: dict[str, Any]) -> torch.Tensor:
    """[2, 12, v] on the processes of the last stage of the pipeline; on the others, what they hand on."""
    from megatron.core import parallel_state

    tokens = torch.arange(24).view(2, 12) * 7 % hf["vocab_size"]
    if not parallel_state.is_pipeline_first_stage():
        handed = torch.empty(12, 2, hf["hidden_size"])
        torch.distributed.recv(handed, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(handed)
    with torch.no_grad():
        found = model(tokens, torch.arange(12).expand(2, 12), None)
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(found.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return found


def load(model: Any, folder: Path) -> bool:
    """Whether every process could load its state dict, each name and shape being right; where one cannot, none computes."""
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        print(error)
        loaded = torch.zeros(1)
    else:
        loaded = torch.ones(1)
    torch.distributed.all_reduce(loaded, torch.distributed.ReduceOp.MIN)
    return bool(loaded)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--save", type=Path, help="have Megatron write what it has loaded")
    parser.add_argument("--random", action="store_true", help="load nothing: random weights")
    parser.add_argument("--dump", type=Path, help="the state dict as safetensors")
    parser.add_argument("--te-names", action="store_true")
    parser.add_argument("--grouped", action="store_true", help="experts as GroupedMLP")
    parser.add_argument("--states", action="store_true", help="the checkpoint is a state dict in safetensors")
    parser.add_argument("--ranks", nargs="*", help="the checkpoint is a folder of state dicts, and process n loads the n-th of these")
    parser.add_argument("--exchanged", nargs="*", help="as --ranks, once more, which may fail: `exchanged` beside the logits, if all of them could be loaded")
    parser.add_argument("--words", type=int, help="rows of the embedding, padding among them")
    for kind in ("tp", "etp", "pp", "ep"):
        parser.add_argument(f"--{kind}", type=int)
    parser.add_argument("--glu-blocks", type=int, default=0, help="gate and up lie in blocks of so many rows")
    parser.add_argument("--layout", choices=["stacked", "numbered", "single"], help="ask the model for this one, not for the checkpoint's")
    args = parser.parse_args(arguments)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    else:
        torch.distributed.init_process_group("gloo")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    sizes = {kind: getattr(args, kind) or 1 for kind in ("tp", "etp", "pp")}
    sizes["ep"] = args.ep or world // (sizes["etp"] * sizes["pp"])
    parallel_state.initialize_model_parallel(sizes["tp"], sizes["pp"], expert_model_parallel_size=sizes["ep"], expert_tensor_parallel_size=sizes["etp"])
    rank, root = torch.distributed.get_rank(), args.checkpoint
    if args.ranks:
        args.checkpoint /= args.ranks[rank]
    with contextlib.suppress(Exception):
        model_parallel_cuda_manual_seed(0)
    hf = json.loads((args.checkpoint / "config.json").read_text())
    torch.manual_seed(0)
    model = build(hf, sizes, args.te_names, args.grouped, args.words)
    if args.glu_blocks:
        in_blocks(model, args.glu_blocks)
    metadata = {"singleton_local_shards": args.layout == "single", "non_homogeneous_layers": args.layout != "stacked"} if args.layout else {}
    if not args.layout and (args.checkpoint / "common.pt").is_file():  # a checkpoint says how it is laid out, and trainers ask it, as here
        metadata = dist_checkpointing.load_content_metadata(str(args.checkpoint)) or {}
    if args.states or args.ranks:
        assert load(model, args.checkpoint)
    elif not args.random:
        wanted = model.sharded_state_dict(metadata=metadata)
        # transformer-engine's layers have objects without content that the local ones lack; a key that is missing in the checkpoint is an error anyway
        strict = StrictHandling.RAISE_UNEXPECTED if args.te_names else StrictHandling.RAISE_ALL
        found = dist_checkpointing.load({"model": wanted}, str(args.checkpoint), strict=strict)
        model.load_state_dict(found["model"])
    with torch.no_grad():
        for parameter in model.parameters() if args.random else ():
            parameter.copy_(torch.randn(parameter.shape) / 8 + (parameter.ndim == 1))
    told = {"logits": logits_of(model, hf)}
    own = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    args.logits.with_suffix(f".{rank}.json").write_text(json.dumps({name: list(tensor.shape) for name, tensor in own.items()}))
    if args.exchanged and load(model, root / args.exchanged[rank]):
        told["exchanged"] = logits_of(model, hf)
    if rank == world - world // sizes["pp"]:  # the first of the last stage
        save_file({name: tensor.float().contiguous() for name, tensor in told.items()}, args.logits)
    if args.dump and rank == 0:
        save_file(own, args.dump)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata), "iteration": 1}, str(args.save), content_metadata=metadata)
    torch.distributed.destroy_process_group()


stand_in()
products_of_groups()
for name in ("dist_checkpointing", "models.gpt.gpt_layer_specs", "models.gpt.gpt_model"):  # after the stand-ins, which some of them copy
    importlib.import_module(f"megatron.core.{name}")

if __name__ == "__main__":
    main()
