"""bitsandbytes' NF4 and FP4: 4-bit codes under one absmax for each run of the flattened matrix, and the quant_state that declares how.

Of a matrix [out, in] of n numbers, flattened row by row (blocks cross rows; the last may be short):
packed u8 [⌈n/2⌉, 1], high nibble first; scale (`absmax`) float32 [⌈n/blocksize⌉]; map (`quant_map`) float32 [16];
state (`quant_state`) u8: JSON that declares kind, block size, shape and dtype. Nested: scale is u8, and absmax = nested_map[scale] × nested_scale
+ nested_offset, with nested_scale float32 for every 256 of them, nested_map float32 [256] and nested_offset in the JSON.
Producer: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py (QuantState, quantize_4bit)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from moeglot.dtypes import DTYPES
from moeglot.encoding import ANY, WHOLE, Encoding, Part, Parts, Stored
from moeglot.encodings.plain import Plain
from moeglot.encodings.quant_state import BLOCKSIZES, NESTED_BLOCK, QuantState, refuse
from moeglot.errors import BadNumbers, UsageError

if TYPE_CHECKING:
    import torch

    from moeglot.kernels.lattice import Lattice

Kind = Literal["nf4", "fp4"]
STATE_BYTES = 256
"""Length of the JSON that we write, filled up with blanks: a file's header is written before the numbers in it are known."""


def names(kind: Kind) -> dict[str, str]:
    """part -> what the library appends to the key of the weight."""
    return {
        "packed": "",
        "scale": ".absmax",
        "map": ".quant_map",
        "nested_scale": ".nested_absmax",
        "nested_map": ".nested_quant_map",
        "state": f".quant_state.bitsandbytes__{kind}",
    }


@dataclass(frozen=True)
class BNB4(Encoding):
    """`nested`: the absmax are coded as well; None stands, in a spec, for whichever the file has, and means plain ones to `encode`.
    `state_bytes`: length of the JSON, ANY for a file whose producer did not fix it.

    Decoded numbers are those of bitsandbytes on a CPU: code × absmax in float32, rounded once to the dtype of the quant_state.
    Encoding writes its bytes, and that dtype is the one of the values. A matrix that lies on the grid with other absmax than the library
    would choose gets those absmax, so that decode∘encode∘decode = decode; nested absmax are rounded anew, and the law holds for their codes alone.
    `offset`: what nested absmax are coded as differences from; None is their own mean, which for a tensor of several experts is the mean over all.
    """

    kind: Kind = "nf4"
    blocksize: int = 64
    nested: bool | None = False
    state_bytes: int = STATE_BYTES
    offset: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "fp4") or self.blocksize not in BLOCKSIZES:
            raise ValueError(f"no such 4-bit encoding: {self.kind}, blocks of {self.blocksize}")

    @property
    def name(self) -> str:
        return self.kind + (":nested" if self.nested else "") + (f":{self.blocksize}" if self.blocksize != 64 else "")

    @property
    def parts(self) -> tuple[Part, ...]:
        def whole(name: str, dtype: str, length: int) -> Part:
            return Part(name, (dtype,), (WHOLE, WHOLE), (length,), shared=True)

        nested = (Part("nested_scale", ("F32",), flat=self.blocksize * NESTED_BLOCK), whole("nested_map", "F32", 256)) if self.nested else ()
        return (
            Part("packed", ("U8",), trailing=(1,), flat=2),
            Part("scale", ("F32", "U8") if self.nested is None else ("U8" if self.nested else "F32",), flat=self.blocksize),
            whole("map", "F32", 16),
            *nested,
            whole("state", "U8", self.state_bytes),
        )

    def as_stored(self, found: Mapping[str, Stored], leading: int = 0) -> BNB4:
        """Nested or not, and the block size that gives the number of absmax; a tensor of a single block has it with every larger size too."""
        numbers, scales = 2 * prod(found["packed"][1]), prod(found["scale"][1])
        fits = [size for size in (self.blocksize, *BLOCKSIZES) if scales in (-(-numbers // size), -(-(numbers - 1) // size))]
        return replace(self, nested=found["scale"][0] == "U8", blocksize=fits[0] if fits else self.blocksize, state_bytes=ANY)

    def like(self, other: Encoding) -> BNB4:
        return replace(other, state_bytes=self.state_bytes) if isinstance(other, BNB4) else self

    told_by = ("state",)

    def matrix_shape(self, parts: Parts) -> tuple[int, int]:
        rows, columns = QuantState.read(parts["state"]).shape
        return rows, columns

    def decode(self, parts: Parts, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        from moeglot.kernels import bnb4

        state = QuantState.read(parts["state"])
        shape = state.slice_shape(parts["packed"])
        if shape is None:
            raise refuse(f"a quant_state of shape {list(state.shape)} beside {parts['packed'].numel()} bytes of codes")
        rounded = DTYPES[state.dtype].torch
        straight = out is not None and dtype == rounded and out.is_contiguous()
        place = out.view(-1) if out is not None and straight else None
        values = bnb4.decode(parts["packed"], absmax(parts), self.kind, state.blocksize, prod(shape), rounded, place).view(shape)
        if out is None:
            return values.to(dtype)
        return out if straight else out.copy_(values)

    def encode(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        from moeglot.dtypes import by_torch_name
        from moeglot.kernels import bnb4

        packed, scale, dtype = bnb4.encode(values, self.kind, self.blocksize)
        state = QuantState(self.kind, self.blocksize, by_torch_name(str(dtype).removeprefix("torch.")).name, tuple(values.shape))
        parts = {"packed": packed, "scale": scale, "map": bnb4.codebook(self.kind) + 0.0}  # of two zeros, both are positive there
        if self.nested:
            parts["scale"], parts["nested_scale"], offset = bnb4.encode_nested(scale, self.offset)
            parts["nested_map"], state = bnb4.nested_codebook().clone(), replace(state, offset=offset)
        return parts | {"state": state.write(self.state_bytes)}

    def _problem(self, parts: Parts) -> str | None:
        from moeglot.kernels import bnb4

        try:
            state = QuantState.read(parts["state"])
        except BadNumbers as error:
            return error.wrong.removeprefix("a 4-bit tensor ")
        shape, nested = state.slice_shape(parts["packed"]), "nested_scale" in parts
        if state.kind != self.kind or nested != (state.offset is not None):
            return f"has a quant_state of {'nested ' if state.offset is not None else ''}{state.kind}, which its tensors are not"
        if shape is None or -(-prod(shape) // state.blocksize) != parts["scale"].numel():
            return f"has a quant_state of {list(state.shape)} in blocks of {state.blocksize}, which its codes and absmax are not"
        if not bool(parts["map"].sub(bnb4.codebook(self.kind)).abs().max() < 1e-6):
            return f"has a quant_map that is not the codebook of {self.kind}, which bitsandbytes uses whatever is stored"
        if problem := self._check_scales(scale := absmax(parts), parts["packed"]):
            return problem
        rounded = DTYPES[state.dtype].torch
        if not bool(scale.to(rounded).isfinite().all()) and not bool(self.decode(parts, rounded).isfinite().all()):
            return f"has absmax of {scale.max().item():g}, under which codes are infinite in the {state.dtype} that its quant_state says"
        return None

    def _check_scales(self, scale: torch.Tensor, packed: torch.Tensor) -> str | None:
        if not bool(scale.isfinite().all()):
            return "has absmax that are NaN or infinite"
        if bool((scale == 0).all()) and not self._all_zeros(packed):
            return "has absmax that are all zero beside codes that are not, as in a file that was never filled"
        return None

    def _all_zeros(self, packed: torch.Tensor) -> bool:
        """Codes that an encoder writes for zeros of either sign; bytes of zeros are -0 in NF4, and what a file that was never filled has."""
        import torch

        from moeglot.kernels import bnb4

        zeros = bnb4.zeros(self.kind)
        known = bool((torch.isin(packed & 15, zeros) & torch.isin(packed >> 4, zeros)).all())
        return known and (self.kind == "fp4" or not packed.numel() or bool(packed.any()))

    def fits_in(self, other: Encoding) -> bool:
        """Whatever dtype a quant_state says, float32 holds its numbers."""
        if isinstance(other, Plain):
            return other.dtype is not None and DTYPES["F32"].fits_in(DTYPES[other.dtype])
        return self.recodes(other)

    def recodes(self, other: Encoding) -> bool:
        """Nested absmax become plain ones, and longer blocks shorter ones."""
        if not isinstance(other, BNB4) or other.kind != self.kind or other.state_bytes == ANY != self.state_bytes:
            return False
        same = bool(self.nested) and self.blocksize == other.blocksize
        return same if other.nested else self.blocksize % other.blocksize == 0

    def recode(self, parts: Parts, other: Encoding) -> Parts:
        assert isinstance(other, BNB4)
        state = QuantState.read(parts["state"])
        state = replace(state, shape=state.slice_shape(parts["packed"]) or state.shape)
        if other.nested == self.nested and other.blocksize == self.blocksize:
            return {**parts, "state": state.write(other.state_bytes)}
        shape = state.slice_shape(parts["packed"])
        assert shape, "`check` has seen these parts"
        scale = absmax(parts).repeat_interleave(self.blocksize // other.blocksize)[: -(-prod(shape) // other.blocksize)]
        state = replace(state, blocksize=other.blocksize, offset=None)
        return {"packed": parts["packed"], "scale": scale, "map": parts["map"], "state": state.write(other.state_bytes)}

    @property
    def is_joint(self) -> bool:
        return bool(self.nested) and self.offset is None

    @property
    def apart(self) -> BNB4:
        return replace(self, nested=False)

    def settled(self, experts: Iterable[Parts]) -> BNB4:
        """The offset of the first, if it says one, or the mean of all absmax: experts have equally many."""
        import torch

        means = list[float]()
        for parts in experts:
            if (offset := QuantState.read(parts["state"]).offset) is not None:
                return replace(self, offset=offset)
            means.append(float(parts["scale"].double().mean()))
        return replace(self, offset=torch.tensor(sum(means) / len(means), dtype=torch.float32, device="cpu").item())

    def stacked(self, parts: Parts, experts: int) -> Parts:
        if self.is_joint:
            raise UsageError(
                "nested absmax cannot be stacked while experts are encoded one by one",
                "they have one offset, the mean over all experts",
                f"choose {self.apart.name}, or let `convert --encode {self.name}` write the checkpoint first",
            )
        state = QuantState.read(parts["state"])
        shape = state.slice_shape(parts["packed"]) or state.shape
        return {**parts, "state": replace(state, shape=(experts, *shape)).write(self.state_bytes)}

    def grid(self, parts: Parts, shape: tuple[int, ...]) -> Lattice:
        from moeglot.kernels import bnb4
        from moeglot.kernels.lattice import Lattice, spread_flat

        dtype = DTYPES[QuantState.read(parts["state"]).dtype].torch
        codes = bnb4.unpacked(parts["packed"])[: prod(shape)].view(shape)
        return Lattice(bnb4.levels(self.kind), spread_flat(absmax(parts), self.blocksize, shape), codes, dtype)

    def placed(self, values: torch.Tensor, parts: Parts, kept: torch.Tensor) -> Parts:
        from moeglot.kernels import bnb4

        return {**parts, "packed": bnb4.pack(self.grid(parts, tuple(values.shape)).kept(values, kept).flatten(), self.kind)}

    def encode_like(self, parts: Parts, values: torch.Tensor) -> Parts:
        """The dtype that decoding rounds to stays."""
        fresh = self.encode(values)
        state = QuantState.read(fresh["state"])
        return {**fresh, "state": replace(state, dtype=QuantState.read(parts["state"]).dtype).write(self.state_bytes)}

    def rescaled(self, parts: Parts, values: torch.Tensor, beyond: torch.Tensor) -> Parts:
        """Nested absmax are coded anew as a whole, as differences from the offset that they have; the quant_state stays, dtype and spelling."""
        from moeglot.kernels.lattice import any_in_flat, chosen

        if self.nested:
            return {**replace(self, offset=QuantState.read(parts["state"]).offset).encode(values), "state": parts["state"]}
        fresh = self.encode(values)
        return {**parts, "scale": chosen(any_in_flat(beyond, self.blocksize), fresh["scale"], parts["scale"])}

    def undetermined(self, parts: Parts) -> int:
        """Blocks without a code of ±1, or whose absmax the dtype of the quant_state does not hold; every nested one."""
        from moeglot.kernels import bnb4

        state, scale = QuantState.read(parts["state"]), absmax(parts)
        if "nested_scale" in parts:
            return scale.numel()
        return bnb4.undetermined(parts["packed"], scale, self.kind, state.blocksize, DTYPES[state.dtype].torch)

    def inverted(self, parts: Parts) -> Parts:
        """With plain absmax: the reciprocals of nested ones cannot be coded as such."""
        import torch

        scale = absmax(parts)
        rest = {name: part for name, part in parts.items() if not name.startswith("nested")}
        return {**rest, "scale": torch.where(scale == 0, scale, scale.reciprocal())}


def absmax(parts: Parts) -> torch.Tensor:
    """float32 [⌈n/blocksize⌉], whether stored so or nested."""
    from moeglot.kernels import bnb4

    if "nested_scale" not in parts:
        return parts["scale"]
    offset = QuantState.read(parts["state"]).offset
    if offset is None:
        raise refuse("nested absmax and a quant_state without nested_offset")
    return bnb4.decode_nested(parts["scale"], parts["nested_scale"], parts["nested_map"], offset)


def by_name(name: str) -> BNB4:
    """`"nf4:nested:128"` -> BNB4; raises `UsageError`."""
    kind, *options = name.split(":")
    sizes = [int(option) for option in options if option.isdecimal() and int(option) in BLOCKSIZES]
    nested = "nested" in options
    found = BNB4("fp4" if kind == "fp4" else "nf4", sizes[0] if sizes else 64, nested)
    if found.kind != kind or len(options) != nested + len(sizes):
        raise UsageError(f"{name!r} is no 4-bit encoding", f"nf4 or fp4, then :nested, then one of {BLOCKSIZES} if not 64", "for example nf4:nested:128")
    return found
