"""Experts: a torch module that holds a layer's experts as they are on disk and computes what their family says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.encoding import Encoding
from moeglot.encodings.plain import Plain
from moeglot.errors import UsageError
from moeglot.experts import Expert
from moeglot.floats import exactly
from moeglot.layout import Stored
from moeglot.nn import backends, held
from moeglot.nn.compute import Factors
from moeglot.nn.held import Held
from moeglot.nn.lora import Lora
from moeglot.nn.routed import Routed


class Experts(torch.nn.Module):
    """The experts of one layer, or some that follow each other (`num_experts` of them, with local ids from 0; other ids are skipped).

    `forward(hidden_states [t, h], top_k_index int [t, k], top_k_weights [t, k]) -> [t, h]` in the dtype of `hidden_states`, into which weights are decoded a
    few experts at a time. Weights are frozen: gradients go to the tokens, the routing weights and an adapter, if `add_lora` put one here.
    `state_dict()` has the bytes on disk under the keys on disk, as far as these follow the experts' path.
    """

    post_expert_norm: torch.nn.Module | None
    form: str = ""
    """The name of the format whose lines it holds. A loader says it, and the next two."""
    beside: str = ""
    """The name of the format under whose names the model has its other tensors."""
    declared: Mapping[str, Any] = {}
    """What quantization_config says on disk, if the lines were held as they are there."""

    def __init__(self, expert: Expert, lines: list[Held], layer: int, family: str = "", backend: str = "auto") -> None:
        super().__init__()
        self.expert, self.layer, self.family = expert, layer, family
        self.backend = backends.check(backend)
        self.held = torch.nn.ModuleList(lines)
        self.num_experts = lines[0].experts
        self.lora = torch.nn.ModuleDict()
        self.post_expert_norm = None
        self.muted = False
        """Its adapter is left out, as PEFT's `disable_adapter` leaves out others."""
        self.watched_by: Callable[[Experts, torch.Tensor, torch.Tensor], None] | None = None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        layer: int,
        *,
        lines: Sequence[tuple[Stored, Encoding]] | None = None,
        experts: range | None = None,
        backend: str = "auto",
    ) -> Experts:
        """The experts of a checkpoint's layer, read one at a time. `lines`: what to hold in place of what is on disk, and in which encoding.

        Raises `TensorMismatch` for a layer without experts and `BadNumbers` for parts that are impossible.
        """
        there = range(checkpoint.sizes["e"])
        some = experts if experts is not None else there
        if not isinstance(some, range) or not some or some.step != 1 or some[0] not in there or some[-1] not in there:
            raise UsageError(f"experts={experts}", f"experts that follow each other are held; the layer has {len(there)}", f"pass a part of {there}")
        sizes = {**checkpoint.sizes, "e": len(some)}
        checkpoint.experts(layer)
        found = []
        on_disk = tuple((line, checkpoint.encoding(line, layer)) for line in checkpoint.format.lines(layer))
        for line, encoding in lines or on_disk:
            read = _encoded(checkpoint, line, encoding, layer, sizes) if lines else _as_stored(checkpoint, line, layer)
            found.append(Held(line, encoding, sizes, layer, read, some.start))
        family = checkpoint.format.family
        return cls(Expert.of(family, checkpoint.config, layer), found, layer, family.name, backend)

    @property
    def lines(self) -> tuple[Held, ...]:
        """The stored tensors that it holds."""
        return tuple(line for line in self.held if isinstance(line, Held))

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds of the checkpoint."""
        return sum(line.nbytes for line in self.lines)

    @property
    def sizes(self) -> dict[str, int]:
        return self.lines[0].sizes

    @property
    def is_encoded(self) -> bool:
        """Some of its tensors are quantized."""
        return any(not isinstance(line.encoding, Plain) for line in self.lines)

    def is_plain(self, dtype: torch.dtype) -> bool:
        """All of its tensors are numbers of that type, which nothing has to be decoded from."""
        return all(line.is_plain(dtype) for line in self.lines)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch types it not; a compiler has nothing to gain in kernels that are compiled
    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., h], top_k_index int [t, k], top_k_weights [t, k] -> [..., h]; raises `UsageError` for other shapes.

        An id that none of these experts has, below 0 or num_experts and above, stands for one that lives elsewhere, whatever the backend: it adds nothing, and
        its weight is not read. Nothing looks whether any is there, since a GPU would have to be waited for.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weights = top_k_index.flatten(0, -2), top_k_weights.flatten(0, -2)
        if index.shape != weights.shape or len(index) != len(flat):
            told = f"hidden_states {list(hidden_states.shape)}, top_k_index {list(top_k_index.shape)}, top_k_weights {list(top_k_weights.shape)}"
            raise UsageError(told, "each token has k experts, and a weight for each of these", "weights of all experts: pass weights.gather(1, top_k_index)")
        device = flat.device.type
        if torch.is_autocast_enabled(device):
            flat = flat.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            found = self._compute(flat, index, weights)
        return found.to(hidden_states.dtype).view(hidden_states.shape)

    def _compute(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not len(hidden):
            return hidden
        if self.watched_by is not None:
            self.watched_by(self, hidden, index)
        for line in self.lines:
            line.check_types()
        name, trained = backends.choose(self, hidden, index), self.trained
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad or any(factor.requires_grad for factor in trained))
        dropped = self.training and not self.muted and any(lora.dropout for lora in self.adapters.values())
        if name == "reference" and dropped:
            raise UsageError(f"layer {self.layer}: the reference has no dropout", "it is what others are measured against", "train with another backend")
        if name == "reference" or not (wanted or dropped):
            return backends.BACKENDS[name](self, hidden, index, weights)
        if self.post_expert_norm is not None:
            raise UsageError(
                f"layer {self.layer}: no gradient goes through these experts", "their family has a norm after each expert", "use backend='reference' to train"
            )
        # from the global generator, so that checkpointing draws it again
        seed = int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu")) if dropped else None
        if name == "triton":
            from moeglot.nn.fused import Fused

            fused: torch.Tensor = Fused.apply(self, seed, hidden, index, weights, *trained)  # type: ignore[no-untyped-call]  # torch types no Function.apply
            return fused
        found: torch.Tensor = Routed.apply(self, name == "eager", seed, hidden, index, weights, *trained)  # type: ignore[no-untyped-call]  # torch types no Function.apply
        return found

    def after(self, out: torch.Tensor) -> torch.Tensor:
        """What follows each expert, [n, h] -> [n, h]: nothing, except where the family has a norm there."""
        if self.post_expert_norm is None:
            return out
        found: torch.Tensor = self.post_expert_norm(out)
        return found

    # --- adapters --------------------------------------------------------------------------------------------------------------------

    @property
    def places(self) -> dict[str, tuple[tuple[str, ...], int, int]]:
        """ "first" and "down" -> (the roles that have one input, [out, in] of each): what is multiplied at once, and has one adapter."""
        h, i = self.sizes["h"], self.sizes["i"]
        return {"first": (self.expert.first, i, h), "down": (("down",), h, i)}

    @property
    def adapters(self) -> dict[str, Lora]:
        """Place -> its adapter, whichever has one."""
        return {name: lora for name, lora in self.lora.items() if isinstance(lora, Lora)}

    @property
    def trained(self) -> list[torch.Tensor]:
        """a and b of each adapter in turn; none where they are left out."""
        return [] if self.muted else [factor for lora in self.adapters.values() for factor in (lora.a, lora.b)]

    def factors(self, place: str, seed: int | None = None, given: Sequence[torch.Tensor] | None = None) -> Factors | None:
        """The adapter of a place, "first" or "down"; `seed`: of this step's dropout. `given`: what `trained` was in this step."""
        if place not in self.places:
            raise KeyError(place)
        sides = self.trained if given is None else given
        if place not in self.adapters or not sides:
            return None
        lora, at = self.adapters[place], 2 * list(self.adapters).index(place)
        dropout = (lora.dropout, seed + list(self.places).index(place) * self.num_experts) if seed is not None else ()
        return Factors(lora.roles, sides[at], sides[at + 1], lora.scale, lora.targets, *dropout)

    # --- as a file has it ------------------------------------------------------------------------------------------------------------

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(full key on disk, tensor), as views of the buffers."""
        for line in self.lines:
            yield from line.stored()

    def relative(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `stored`, under the keys that follow the experts' path, as in `state_dict()`."""
        paths = [line.line.key.format(layer=self.layer, expert="{").partition("{")[0].split(".")[:-1] for line in self.lines]
        shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
        stem = ".".join([*shared, ""])
        for key, tensor in self.stored():
            yield key.removeprefix(stem), tensor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self.relative():
            destination[prefix + key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {prefix + key: tensor for key, tensor in self.relative()}
        if local_metadata.get("assign_to_params_buffers") and mine.keys() <= state_dict.keys():
            for line in self.lines:
                line.leave_meta(next(state_dict[key].device for key in mine))
            mine = {prefix + key: tensor for key, tensor in self.relative()}
        others = {key: tensor for key, tensor in state_dict.items() if key not in mine}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for key, tensor in mine.items():
            given = state_dict.get(key)
            if given is None:
                missing_keys.append(key)
            elif given.shape != tensor.shape or given.dtype != tensor.dtype:
                error_msgs.append(f"{key}: {given.dtype} {list(given.shape)}, held are {tensor.dtype} {list(tensor.shape)}")
            elif tensor.is_meta and not given.is_meta:
                error_msgs.append(f"{key}: held is a placeholder without numbers (meta device); pass assign=True, and all tensors of the layer")
            else:
                tensor.copy_(given)
        for line in self.lines:
            line.note_scales()

    def extra_repr(self) -> str:
        return f"{self.family} layer {self.layer}, {self.num_experts} experts, {self.nbytes} bytes, backend={self.backend}"


def experts_in(model: torch.nn.Module) -> dict[str, Experts]:
    """Name -> module, for all experts of a model that stay encoded."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def _as_stored(checkpoint: Checkpoint, line: Stored, layer: int) -> Callable[[int], Any]:
    return lambda expert: checkpoint.checked(line, layer, expert)


def _encoded(checkpoint: Checkpoint, line: Stored, encoding: Encoding, layer: int, sizes: Mapping[str, int]) -> Callable[[int], Any]:
    def read(expert: int) -> Any:
        roles = checkpoint.experts(layer)
        together = [exactly(roles[role][expert]).parts["value"] for role in line.common] if roles.keys() >= set(line.common) else []
        settled = encoding.common(together) if together else encoding
        return held.encode(line, settled, {role: roles[role][expert] for role in line.roles}, sizes)

    return read
