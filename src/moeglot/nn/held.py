"""Held: one stored tensor of a layer's experts in memory, in the bytes that its format has on disk and under its names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from moeglot import scratch
from moeglot.encoded import Encoded
from moeglot.encoding import Encoding, Part
from moeglot.encodings.mxfp4 import MXFP4
from moeglot.encodings.plain import Plain
from moeglot.errors import BadNumbers, UsageError
from moeglot.floats import exactly, values
from moeglot.kernels import backend, mxfp4, threads
from moeglot.layout import Stored

FEW_ROWS = 8
"""Tokens of an expert up to which a CPU multiplies with MXFP4 as it decodes; above, the decoded matrix is in the cache often enough."""
Read = Callable[[int], Encoded]
"""Number of an expert on disk -> its slice of the stored tensor."""


class Held(torch.nn.Module):
    """The parts of one line of a format, for the experts `first` to `first + sizes["e"]` of a layer, as buffers.

    A part that each expert has is one buffer [e, ...]; one that several share is a buffer of its own. No cast of the module touches them: their dtypes
    are what the encoding says. `read` is asked for one expert at a time.
    """

    def __init__(self, line: Stored, encoding: Encoding, sizes: Mapping[str, int], layer: int, read: Read, first: int = 0) -> None:
        super().__init__()
        self.line, self.encoding, self.sizes, self.layer, self.first = line, encoding, dict(sizes), layer, first
        self.shape = line.expert_shape(sizes)
        self.types: dict[str, torch.dtype] = {}
        for expert in range(sizes["e"]):
            for name, tensor in read(first + expert).parts.items():
                self._put(self._part(name), expert, tensor)
        several = len(line.roles) > 1
        self.alone = any(part.flat or part.shared or (several and part.is_single) for part in encoding.parts)
        """Only one expert can be decoded at a time."""
        self.note_scales()

    def note_scales(self) -> None:
        """`largest_scale`: of scales that are powers of two as bytes; 0 where there are none. Looked up here, so that no step has to ask a device.

        `beyond_half`: experts with a number beyond float16; None until somebody computes in float16.
        """
        scale = self._buffers.get("part_scale")
        powers = scale is not None and scale.numel() and scale.dtype in (torch.uint8, torch.float8_e8m0fnu) and not scale.is_meta
        self.largest_scale = int(scale.view(torch.uint8).max()) if scale is not None and powers else 0
        self.beyond_half: list[int] | None = None

    def _part(self, name: str) -> Part:
        return next(part for part in self.encoding.parts if part.name == name)

    def _name(self, part: Part, expert: int) -> str:
        """Of its buffer; a part may be called `shape`, which a module has already."""
        return f"part_{part.name}_{expert}" if part.shared and self.line.per_expert else f"part_{part.name}"

    def _put(self, part: Part, expert: int, tensor: torch.Tensor) -> None:
        name = self._name(part, expert)
        if part.shared:
            if name not in self._buffers:
                self.register_buffer(name, tensor.clone(), persistent=False)
                self.types[name] = tensor.dtype
            return
        if name not in self._buffers:
            self.register_buffer(name, torch.empty(self.sizes["e"], *tensor.shape, dtype=tensor.dtype, device="cpu"), persistent=False)
            self.types[name] = tensor.dtype
        self.get_buffer(name)[expert].copy_(tensor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Held:
        """Buffers go to other devices, and are never cast: `fn` sees bytes."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer.reshape(-1).view(torch.uint8)).view(buffer.dtype).view(buffer.shape)
        return self

    def leave_meta(self, device: torch.device) -> None:
        """Buffers on the meta device get memory on another, for numbers to come."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_meta:
                self._buffers[name] = torch.empty_like(buffer, device=device)

    def check_types(self) -> None:
        """Raises `UsageError` where somebody cast codes or scales, as FSDP casts buffers: they would be other numbers."""
        for name, dtype in self.types.items():
            found = self._buffers[name]
            if found is not None and found.dtype != dtype and not isinstance(self.encoding, Plain):
                wrong = f"layer {self.layer}, {self.line.short}: {name.removeprefix('part_')} was {dtype} and is {found.dtype}"
                raise UsageError(wrong, f"{self.encoding} is decoded from bytes, which no cast keeps", "leave buffer_dtype out of FSDP's MixedPrecision")

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        return next(buffer.device for buffer in self._buffers.values() if buffer is not None)

    @property
    def experts(self) -> int:
        return self.sizes["e"]

    def is_plain(self, dtype: torch.dtype) -> bool:
        """It holds numbers of that type, and `dense` is a view of them."""
        return isinstance(self.encoding, Plain) and self.get_buffer("part_value").dtype == dtype

    # --- numbers ---------------------------------------------------------------------------------------------------------------------

    def encoded(self, expert: int) -> Encoded:
        """The slice of one expert, its axes as they lie on disk."""
        found = {}
        for part in self.encoding.parts:
            buffer = self.get_buffer(self._name(part, expert))
            found[part.name] = buffer if part.shared else buffer[expert]
        return Encoded(self.encoding, found, self.shape)

    def roles(self, expert: int) -> dict[str, Encoded]:
        """role -> [out, in] of one expert, still encoded where that can be."""
        slice_ = self.encoded(expert)
        return self.line.split(slice_ if self.line.movable(self.encoding, self.sizes) else values(slice_.decode(torch.float32)))

    def dense(self, experts: range, dtype: torch.dtype) -> torch.Tensor:
        """The slices of some experts that follow each other, decoded: [b, ...] in stored axes; of plain numbers, a view where it can be.

        Raises `BadNumbers` for a number beyond float16.
        """
        return self._in_half(self._dense(experts, dtype), experts)

    def _in_half(self, found: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
        """The same [b, ...], if it is no infinity in float16. A CPU looks at what it decoded; other devices are asked once about all experts, and no more."""
        if found.dtype != torch.float16:
            return found
        if found.device.type == "cpu":
            beyond = _not_finite(found, experts)
        else:
            if self.beyond_half is None:
                self.beyond_half = [expert for n in range(self.experts) for expert in _not_finite(self._dense(range(n, n + 1), torch.float16), [n])]
            beyond = self.beyond_half
        if beyond:
            wrong = f"layer {self.layer}, {self.line.short}, expert {', '.join(str(self.first + n) for n in sorted({*beyond}))}: a number is beyond float16"
            raise BadNumbers(wrong, f"the largest that it has is 65504; the numbers are held as {self.encoding}", "load the model in bfloat16 or float32")
        return found

    def _dense(self, experts: range, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(self.encoding, Plain):
            return self.get_buffer("part_value")[experts.start : experts.stop].to(dtype)
        if self.alone:
            found = [self._decoded(expert, dtype) for expert in experts]
            return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)
        return self._several({name: buffer[experts.start : experts.stop] for name, buffer in self._whole()}, len(experts), dtype)

    def gathered(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """ids int [n] -> the slices of these experts [n, ...]. Packed bytes are gathered, then decoded, so that no id comes to the host."""
        if self.alone:
            found = torch.stack([self._decoded(expert, dtype) for expert in ids.tolist()])
        else:
            found = self._several({name: _take(buffer, ids) for name, buffer in self._whole()}, len(ids), dtype)
        return self._in_half(found, ids.tolist() if found.device.type == "cpu" and dtype == torch.float16 else ())

    def _whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(part, [e, ...]) where every part is one buffer."""
        for part in self.encoding.parts:
            yield part.name, self.get_buffer(self._name(part, 0))

    def times(self, x: torch.Tensor, expert: int) -> torch.Tensor | None:
        """x [n, in] times the slice of an expert, [n, out], out of its codes; None where that takes longer than to decode it, or cannot be done."""
        if not isinstance(self.encoding, MXFP4) or not self.line.upright or len(x) > FEW_ROWS or self.largest_scale > mxfp4.LAST_FINITE:
            return None
        groups = self.shape[1] // mxfp4.GROUP
        packed, scale = (self.get_buffer(f"part_{name}")[expert].view(torch.uint8) for name in ("packed", "scale"))
        return mxfp4.times(x, packed.reshape(-1, groups, mxfp4.GROUP // 2), scale.reshape(-1, groups))

    def _several(self, parts: Mapping[str, torch.Tensor], count: int, dtype: torch.dtype) -> torch.Tensor:
        return self._memory(Encoded(self.encoding, parts, (count, *self.shape)), dtype)

    def _decoded(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        if len(self.line.roles) > 1 and any(part.is_single and not (part.shared or part.joint) for part in self.encoding.parts):  # each projection has its own
            roles = self.roles(expert)
            found = self.line.join(lambda role: values(roles[role].decode(dtype).cpu())).parts["value"]
        else:
            return self._memory(self.encoded(expert), dtype)
        return found.to(self.device)

    def _memory(self, encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        """Decoded on the device of the parts; on a CPU into memory that is used again as soon as no product refers to it."""
        if isinstance(self.encoding, Plain) or self.device.type != "cpu":
            return encoded.decode(dtype).to(self.device)
        out = scratch.empty(encoded.shape, dtype)
        shares = threads.shares(out.numel()) if backend.current() == "numba" else 1
        if shares == 1 or out.dim() != 3:
            return encoded.decode(dtype, out)
        into, at, works = out, 0, []
        if len(out) == 1:
            into, one = out[0], Encoded(encoded.encoding, {name: part[0] for name, part in encoded.parts.items()}, encoded.shape[1:])
            pieces = one.row_blocks(-(-out.numel() // shares))
        else:
            step = -(-len(out) // shares)
            pieces = (encoded.cut(0, range(first, min(first + step, len(out)))) for first in range(0, len(out), step))
        for some in pieces:
            works.append(partial(some.decode, dtype, into[at : (at := at + some.shape[0])]))
        threads.together(works)
        return out

    # --- as a file has them ----------------------------------------------------------------------------------------------------------

    def stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, tensor) as on disk, as views of the buffers."""
        for part in self.encoding.parts:
            if self.line.per_expert:
                for expert in range(self.experts):
                    buffer = self.get_buffer(self._name(part, expert))
                    one = buffer if part.shared else buffer[expert]
                    yield self.line.key_of(part, self.layer, self.first + expert), one if part.shared else one.view(self.line.part_shape(part, self.sizes))
            else:
                buffer = self.get_buffer(self._name(part, 0))
                yield self.line.key_of(part, self.layer, None), buffer if part.shared else buffer.view(self.line.part_shape(part, self.sizes))

    def extra_repr(self) -> str:
        return f"{self.line.short}: {self.experts} × {list(self.shape)} as {self.encoding}, {self.nbytes} bytes"


def _take(buffer: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`buffer[ids]`, as bytes: torch does not index every type of 8 bits."""
    rows = buffer.reshape(len(buffer), -1).view(torch.uint8)
    return rows[ids].view(buffer.dtype).view(len(ids), *buffer.shape[1:])


def _not_finite(values: torch.Tensor, experts: Sequence[int]) -> list[int]:
    """Those of the experts whose numbers [b, ...] are not all finite."""
    return [expert for expert, finite in zip(experts, values.flatten(1).isfinite().all(1).tolist(), strict=True) if not finite]


def encode(line: Stored, encoding: Encoding, roles: Mapping[str, Encoded], sizes: Mapping[str, int]) -> Encoded:
    """role -> [out, in] of one expert, to the slice of a line in this encoding: each role by itself where it is coded so."""

    def coded(given: Encoded) -> Encoded:
        return Encoded(own, own.encode(given.parts["value"]), given.shape)

    own = encoding.upright if line.movable(encoding, sizes) else encoding
    if line.movable(encoding, sizes):
        found = line.join(lambda role: coded(exactly(roles[role])))
    else:
        found = coded(values(line.decoded(roles.__getitem__)))
    parts = found.parts if line.per_expert else encoding.stacked(found.parts, sizes["e"])
    shaped = {part.name: parts[part.name] if part.shared else parts[part.name].view(line.slice_shape(part, sizes)) for part in encoding.parts}
    return Encoded(encoding, shaped, line.expert_shape(sizes))
