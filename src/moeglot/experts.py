"""The reference: what one expert computes, in plain float32, from its canonical matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from moeglot.encoded import Encoded
from moeglot.errors import UsageError
from moeglot.family import Config, Family, dig

if TYPE_CHECKING:
    import torch

LOUD = 3.0
"""Standard deviation of the gate's pre-activations; with quiet ones, swapped gate and up give nearly the same output."""

LOUDEST = 1e30
"""The most that tokens are scaled by, so that neither they nor what they give leave float32, however small a gate is."""

SLAB = 1 << 20
"""Numbers of a matrix that are decoded at a time."""

Function = Callable[["torch.Tensor"], "torch.Tensor"]
Matrix = Callable[[str], Encoded]
"""role -> its canonical tensor, still encoded; it is decoded some rows at a time."""
Linear = Callable[["torch.Tensor", str], "torch.Tensor"]
"""(x [t, in], role) -> x @ [out, in]ᵀ + bias, [t, out] in float32."""


@dataclass(frozen=True)
class Expert:
    """An expert of a family with the numbers of one config: `forward(x [t, h]) -> [t, h]`."""

    kind: str
    function: str
    numbers: Mapping[str, float]
    roles: tuple[str, ...]
    groups: tuple[str, ...] = ("",)

    @classmethod
    def of(cls, family: Family, config: Config, layer: int = 0) -> Expert:
        """The expert of a layer that `config` (the Hub's keys) describes; raises `UsageError` for an activation that is not known."""
        activation = family.activation
        key, default = activation.function
        function = str((key and dig(config, key)) or default)
        if activation.kind not in ("clamped-swiglu", "softcapped-swiglu") and function not in FUNCTIONS:
            known = f"known are {', '.join(FUNCTIONS)}"
            raise UsageError(f"config.json says {key} = {function!r}, an activation that is not known", known, "check config.json against the producer's")
        numbers = {name: _number(config, key, value, layer) for name, (key, value) in activation.numbers.items()}
        return cls(activation.kind, function, numbers, family.roles, family.groups)

    def forward(self, tokens: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """tokens [t, h] -> [t, h] in float32; of two groups of experts, what that of each gives, side by side: [t, 2 h]."""
        return self.through(tokens, partial(self.linear, matrix))

    def through(self, tokens: torch.Tensor, linear: Linear) -> torch.Tensor:
        """As `forward`, where `linear` multiplies with the matrices."""
        import torch

        found = [self._of_group(tokens, linear, group) for group in self.groups]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _of_group(self, tokens: torch.Tensor, linear: Linear, group: str) -> torch.Tensor:
        return linear(self.activate({role: linear(tokens, group + role) for role in self.first}), f"{group}down")

    @property
    def is_off_below_zero(self) -> bool:
        """A channel whose pre-activation is negative gives nothing, or next to nothing."""
        return self.function in ("relu", "relu2", "relu6")

    @property
    def first(self) -> tuple[str, ...]:
        """The roles whose matrices multiply the tokens, as they are called in the first group."""
        return ("gate", "up") if f"{self.groups[0]}gate" in self.roles else ("up",)

    def linear(self, matrix: Matrix, x: torch.Tensor, role: str) -> torch.Tensor:
        """x [t, in] @ [out, in]ᵀ + bias -> [t, out]."""
        import torch

        out = product(x, matrix(role))
        return out + matrix(f"{role}_bias").decode(torch.float32) if f"{role}_bias" in self.roles else out

    def activate(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the first matrices gave, role -> [t, i] of any float dtype, to what `down` multiplies, [t, i]."""
        up = given["up"]
        if "gate" not in given:
            return FUNCTIONS[self.function](up)
        gate = given["gate"]
        if self.kind == "softcapped-swiglu":
            return _softcap(gate, self.numbers["gate_cap"]) * gate.sigmoid() * _softcap(up, self.numbers["up_cap"])
        limit = self.numbers.get("limit", float("inf"))
        up = up.clamp(-limit, limit)
        if self.kind == "clamped-swiglu":  # whatever hidden_act says: MiniMax-M3's calls it "swigluoai"
            gate = gate.clamp(max=limit)
            return gate * (gate * self.numbers["alpha"]).sigmoid() * (up + 1)
        act = FUNCTIONS[self.function]
        return (act(gate).clamp(max=limit) if self.kind == "capped-swiglu" else act(gate.clamp(max=limit))) * up


def product(x: torch.Tensor, matrix: Encoded) -> torch.Tensor:
    """x [t, in] @ [out, in]ᵀ -> [t, out] in float32; the matrix is decoded some rows at a time."""
    import torch

    return torch.cat([x @ as_it_lies(block).mT for block in matrix.row_blocks(SLAB)], -1)


def as_it_lies(block: Encoded) -> torch.Tensor:
    """[out, in] in float32 with the strides' order of what is encoded, in memory that is used again."""
    import torch

    from moeglot.kernels.backend import working

    rows, columns = block.shape
    part = next(iter(block.parts.values()))
    if part.dim() == 2 and part.stride(0) < part.stride(1):
        return block.decode(torch.float32, working((columns, rows), torch.float32, part.device).mT)
    return block.decode(torch.float32, working((rows, columns), torch.float32, part.device))


def _number(config: Config, key: str, default: float, layer: int) -> float:
    value = dig(config, key)
    if isinstance(value, (list, tuple)):
        value = value[layer] if layer < len(value) else None
        return float(value) if value else default
    return float(default if value is None else value)


def _softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * (x / cap).tanh()


def _named(name: str, **options: str) -> Function:
    """One of torch's, which is imported when it computes."""

    def computed(x: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        found: torch.Tensor = getattr(functional, name)(x, **options)
        return found

    return computed


FUNCTIONS: Mapping[str, Function] = {
    **dict.fromkeys(("silu", "swish"), _named("silu")),
    **dict.fromkeys(("gelu", "gelu_python"), _named("gelu")),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), _named("gelu", approximate="tanh")),
    **{name: _named(name) for name in ("hardswish", "leaky_relu", "mish", "relu", "relu6", "sigmoid", "tanh")},
    "gelu_10": lambda x: _named("gelu")(x).clamp(-10, 10),
    "laplace": lambda x: (((x - 0.707107) / (0.282095 * 2**0.5)).erf() + 1) / 2,
    "linear": lambda x: x,
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu2": lambda x: x.relu().square(),
    "sqrtsoftplus": lambda x: _named("softplus")(x).sqrt(),
}
"""What transformers' ACT2FN has by these names; the others there (prelu, xielu) have numbers of their own, which no family that we know stores."""


def probe(seed: tuple[int, ...], rows: int, columns: int) -> torch.Tensor:
    """float32 [rows, columns], standard normal; the same numbers on every machine and with every version of torch."""
    import numpy
    import torch

    numbers = numpy.random.Generator(numpy.random.PCG64(seed)).standard_normal((rows, columns))
    return torch.from_numpy(numbers).to(torch.float32)


def probe_tokens(model: Expert, place: tuple[int, int], count: int, h: int) -> torch.Tensor:
    """[t, h]: `count` pseudo-random tokens for one expert; where the activation is zero below zero, their negatives too, or some channels are off for all."""
    import torch

    tokens = probe(place, count, h)
    return torch.cat([tokens, -tokens]) if model.is_off_below_zero else tokens


def loudness(expert: Expert, tokens: torch.Tensor, matrix: Matrix) -> float:
    """The factor that gives the gate's pre-activations (up's where there is no gate) on these tokens a standard deviation of about 3; `LOUDEST` at most."""
    first = matrix("gate" if "gate" in expert.roles else "up")
    spread = float(product(tokens, first).std())
    return min(LOUD / spread, LOUDEST) if spread > 0 else 1.0


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; infinite where either is not finite."""
    import torch

    if found.shape != expected.shape:
        raise ValueError(f"{list(found.shape)} is not {list(expected.shape)}")
    difference = torch.linalg.vector_norm((found - expected).double()).item()
    size = torch.linalg.vector_norm(expected.double()).item()
    if difference == 0:
        return 0.0
    ratio = difference / size if size else float("inf")
    return ratio if ratio == ratio else float("inf")
