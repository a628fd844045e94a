"""How the golden files of encodings were made: compressed by compressed-tensors 0.20.0 and quantized by transformers 5.23.0, by ModelOpt 0.47.0, by AMD's
Quark 0.13, which compiles what quantizes to FP4 when it is imported, by GPTQModel 7.6.0, or by AutoRound 0.16.1.

Each file holds, under NAME/, the tensors as the library stores them and `values`, what it decodes them to in the type that it returns.
Run in the environment of tests/environments that has the library:
python tests/golden/make_encodings.py compressed-tensors | transformers | nvidia-modelopt | amd-quark | gptqmodel | auto-round
"""

import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def weights(rows: int = 48, columns: int = 64) -> torch.Tensor:
    random = torch.Generator().manual_seed(7)
    values = torch.randn(rows, columns, generator=random) * torch.exp2(3 * torch.rand(rows, 1, generator=random)) * 0.02
    values[0, :32] = 0
    return values


def scheme(**arguments):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **arguments))


def compressed(compressor, given: torch.Tensor, groups: torch.Tensor, theirs, dtype: torch.dtype, whole: torch.Tensor | None = None) -> Tensors:
    from compressed_tensors.quantization.utils import calculate_qparams

    scale = calculate_qparams(groups.amin(-1), groups.amax(-1), theirs.weights, global_scale=whole)[0].to(dtype)
    more = {} if whole is None else {"weight_global_scale": whole}
    state = compressor.compress({"weight": given, "weight_scale": scale, **more}, theirs)
    return {**state, "values": compressor.decompress(state, theirs)["weight"]}


def compressed_tensors() -> dict[str, Tensors]:
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import generate_gparam

    given = weights()
    by = {n: given.view(48, -1, n) for n in (16, 32, 64)}
    float32, bfloat16 = torch.float32, torch.bfloat16
    nvfp4 = scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
    mxfp4 = scheme(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    int4 = scheme(num_bits=4, type="int", strategy="group", group_size=32)
    channel, tensor = (scheme(num_bits=8, type="float", strategy=name) for name in ("channel", "tensor"))
    block = scheme(num_bits=8, type="float", strategy="block", block_structure=[32, 32])
    tiles = torch.nn.functional.pad(given, (0, 0, 0, 16)).view(2, 32, 2, 32).transpose(1, 2).flatten(-2)
    return {
        "fp8-channel": compressed(FloatQuantizationCompressor, given, by[64], channel, bfloat16),
        "fp8-tensor": compressed(FloatQuantizationCompressor, given, given.flatten(), tensor, float32),
        "fp8-block-32x32": compressed(FloatQuantizationCompressor, given, tiles, block, float32),
        "nvfp4": compressed(NVFP4PackedCompressor, given, by[16], nvfp4, float32, generate_gparam(given.min(), given.max())),
        "mxfp4": compressed(MXFP4PackedCompressor, given, by[32], mxfp4, float32),
        "int4-32": compressed(PackedQuantizationCompressor, given, by[32], int4, bfloat16),
        "int4-channel": compressed(PackedQuantizationCompressor, given, by[64], scheme(num_bits=4, type="int", strategy="channel"), bfloat16),
    }


def transformers() -> dict[str, Tensors]:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    made = {}
    for name, scale_fmt in (("fp8-block-16x32", None), ("fp8-block-16x32-ue8m0", "ue8m0")):
        config = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=[16, 32], scale_fmt=scale_fmt))
        found = Fp8Quantize(config).convert({"weight": weights()})
        found["values"] = Fp8Dequantize(config)._dequantize_one(found["weight"], found["weight_scale_inv"], torch.float32)
        made[name] = found
    return made


def nvidia_modelopt() -> dict[str, Tensors]:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    tensor, scale, whole = NVFP4QTensor.quantize(weights(), 16)
    values = tensor.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    return {"nvfp4": {"weight": tensor._quantized_data, "weight_scale": scale, "weight_scale_2": whole, "values": values}}


def amd_quark() -> dict[str, Tensors]:
    from quark.torch import ModelQuantizer
    from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
    from quark.torch.quantization.config.config import OCP_MXFP4Spec, QConfig, QLayerConfig

    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False, dtype=torch.bfloat16))
    model[0].weight.data.copy_(weights())
    quantizer = ModelQuantizer(QConfig(global_quant_config=QLayerConfig(weight=OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec())))
    linear = QParamsLinear(quantizer.freeze(quantizer.quantize_model(model))[0], custom_mode="quark")
    return {"mxfp4": {"weight": linear.weight.data, "weight_scale": linear.weight_quantizer.scale, "values": linear._get_qweight(linear.weight).data}}


def gptqmodel() -> dict[str, Tensors]:
    """Packed and decoded by its torch kernel: zero points as they are (v2), or less one, as its own conversion of formats has it; AWQ by its own utilities."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    def made(bits: int, group: int, symmetric: bool, shuffled: bool = False, v1: bool = False) -> Tensors:
        rows, columns = 32, 64
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data.copy_(weights(rows, columns))
        order = torch.arange(columns, dtype=torch.int32) // group
        order = order[torch.randperm(columns, generator=torch.Generator().manual_seed(5))] if shuffled else order
        given = linear.weight.data[:, order.argsort(stable=True)].view(rows, -1, group)
        middle = 2 ** (bits - 1)
        if symmetric:
            scale = given.abs().amax(-1).clamp(min=1e-4) / middle
            zero = torch.full_like(scale, middle)
        else:
            low, high = given.amin(-1).clamp(max=0), given.amax(-1).clamp(min=0)
            scale = (high - low).clamp(min=1e-4) / (2 * middle - 1)
            zero = (-low / scale).round().clamp(1, 2 * middle - 1)  # a zero point of 0 is not to be stored less one
        module = TorchLinear(bits=bits, group_size=group, sym=symmetric, desc_act=shuffled, in_features=columns, out_features=rows, bias=False)
        module.pack_original(linear, scale, zero, order)
        module.post_init()
        values = module.dequantize_weight()
        if v1:
            convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        found = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
        if v1:
            convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
            assert torch.equal(module.dequantize_weight(), values)
        return {**found, "values": values}

    return {
        "gptq-v1": made(4, 32, True, v1=True),
        "gptq-v1-asymmetric": made(4, 32, False, v1=True),
        "gptq-v2-asymmetric": made(4, 32, False),
        "gptq-v1-act-order": made(4, 32, False, shuffled=True, v1=True),
        "gptq-v1-8-bit": made(8, 32, False, v1=True),
        "gptq-v1-8-bit-act-order": made(8, 32, True, shuffled=True, v1=True),
    }


def auto_round() -> dict[str, Tensors]:
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm

    made = {}
    for name, symmetric in (("awq", True), ("awq-asymmetric", False)):
        linear = torch.nn.Linear(64, 48, bias=False)
        linear.weight.data.copy_(weights())
        given = linear.weight.data.view(48, 2, 32)
        if symmetric:  # AutoRound's scale has the sign of the largest number, which is the code -8
            largest = given.gather(-1, given.abs().argmax(-1, keepdim=True)).squeeze(-1)
            scale, zero = -largest.where(largest != 0, torch.tensor(1e-4)) / 8, 8
        else:
            low, high = given.amin(-1).clamp(max=0), given.amax(-1).clamp(min=0)
            scale = (high - low).clamp(min=1e-4) / 15
            zero = (-low / scale).round().clamp(0, 15).t()
        module = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scale.t(), zeros=zero, device="cpu")
        found = {part: getattr(module, part).clone() for part in ("qweight", "qzeros", "scales")}
        made[name] = {**found, "values": dequantize_gemm(found["qweight"], found["qzeros"], found["scales"], 4, 32)}
    return made


if __name__ == "__main__":
    library = sys.argv[1]
    known = {"compressed-tensors": compressed_tensors, "transformers": transformers, "nvidia-modelopt": nvidia_modelopt, "amd-quark": amd_quark}
    made = (known | {"gptqmodel": gptqmodel, "auto-round": auto_round})[library]()
    for kind in sorted({name.split("-")[0] for name in made}):
        tensors = {f"{name}/{part}": tensor.contiguous() for name in made if name.split("-")[0] == kind for part, tensor in made[name].items()}
        path = Path(__file__).with_name(f"{library}-{version(library)}-{kind}.safetensors")
        save_file(tensors, path, {"library": library, "version": version(library)})
        assert path.stat().st_size <= 50_000, path.stat().st_size
