"""Writes bitsandbytes-VERSION-*.safetensors beside this file: weights, what bitsandbytes stores of them, and what it decodes.

Run where bitsandbytes is installed: python tests/golden/make_bnb4.py. For each NAME: `given.NAME`, `decoded.NAME`, and under NAME itself the
tensors of a state_dict. Linears are bitsandbytes.nn.Linear4bit, 3-D parameters bitsandbytes.nn.parametrize.replace_parameter_4bit.
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import save_file

HERE = Path(__file__).parent
RANDOM = torch.Generator().manual_seed(1)


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    spread = torch.exp(torch.randn(*shape[:-1], 1, generator=RANDOM))
    return (torch.randn(*shape, generator=RANDOM) * spread).to(dtype)


def functional(name: str, given: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    codes, state = bitsandbytes.functional.quantize_4bit(given, **options)
    stored = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {f"given.{name}": given, f"decoded.{name}": bitsandbytes.functional.dequantize_4bit(codes, state), name: codes, **stored}


def linear(name: str, given: torch.Tensor, kind: str, nested: bool) -> dict[str, torch.Tensor]:
    module = bitsandbytes.nn.Linear4bit(given.shape[1], given.shape[0], bias=False, compress_statistics=nested, quant_type=kind)
    module.weight = bitsandbytes.nn.Params4bit(given.clone(), requires_grad=False, compress_statistics=nested, quant_type=kind)
    module.to("cpu")
    decoded = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    stored = {f"{name.removesuffix('weight')}{key}": value for key, value in module.state_dict().items()}
    return {f"given.{name}": given, f"decoded.{name}": decoded, **stored}


def stacked(experts: str) -> dict[str, torch.Tensor]:
    """Two experts, H = I = 32, as one parameter each; `decoded` is expert 1."""
    module, found = torch.nn.Module(), {}
    for name, shape in (("gate_up_proj", (2, 64, 32)), ("down_proj", (2, 32, 32))):
        setattr(module, name, torch.nn.Parameter(weights(*shape), requires_grad=False))
        replace_parameter_4bit(module, name)
        found[f"decoded.{experts}{name}"] = getattr(module, name)[1]
    return found | {f"{experts}{name}": value for name, value in module.state_dict().items()}


def main() -> None:
    expert = "model.layers.0.mlp.experts.0."
    files = {
        "nf4": linear(expert + "gate_proj.weight", weights(48, 48), "nf4", False)
        | functional("ragged", weights(9, 50, dtype=torch.float32), quant_type="nf4")
        | functional("odd", weights(7, 9, dtype=torch.float16), quant_type="nf4", blocksize=32)
        | functional("long", weights(10, 30), quant_type="nf4", blocksize=128),
        "nf4-nested": linear(expert + "down_proj.weight", weights(30, 31), "nf4", True)
        | functional("many", weights(1, 8300), quant_type="nf4", blocksize=32, compress_statistics=True),
        "fp4": linear(expert + "up_proj.weight", weights(48, 48), "fp4", False)
        | linear(expert + "down_proj.weight", weights(40, 55), "fp4", True)
        | functional("ragged", weights(9, 50, dtype=torch.float32), quant_type="fp4"),
        "stacked": stacked("model.layers.0.mlp.experts."),
    }
    for name, tensors in files.items():
        path = HERE / f"bitsandbytes-{bitsandbytes.__version__}-{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"bitsandbytes": bitsandbytes.__version__})
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
