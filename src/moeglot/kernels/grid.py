"""Blocks that share a scale: their largest numbers, and the scale of numbers that are codes × a float32 already.

A tile is block[0] × block[1] numbers of a matrix [rows, columns]; 0 (WHOLE) is the whole axis; the last tile of an axis may be short.
The scale of a tile is found from its largest magnitude, which must be one of the codes × the scale, and from the numbers that refute a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

import torch

from moeglot.kernels import backend

CHUNK = 1 << 19  # numbers at a time: the scratch of a step stays near 10 MB whatever the matrix
FEW = 128  # numbers of a row that are looked at first
WITNESSES = 6  # numbers of a tile that each guess of its scale is tried on: of random ones, six fit a guess in no tile of thousands
Block = tuple[int, int]
E4M3, INT4, INT8 = "e4m3", "int4", "int8"
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Grid:
    """Codes that are multiplied by a scale.

    `largest`: the magnitudes of codes that the largest number of a tile may have, the likeliest first. `nearest`: quotients (float32, may be overwritten)
    -> the nearest codes, as float32. `holds`: which scales (float32) the scale's own type has. `ulps`: how far a scale may be from the quotient of the
    largest number and its code: 1 where a product is rounded, 0 where none is. `kind`: the name of `nearest` for compiled kernels.
    """

    largest: tuple[float, ...]
    nearest: Callable[[torch.Tensor], torch.Tensor]
    holds: Callable[[torch.Tensor], torch.Tensor]
    ulps: int = 1
    kind: str = ""


def shape_of(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """[..., rows, columns] -> [..., tiles, tiles]."""
    return (*shape[:-2], *(-(-n // (b or n or 1)) for n, b in zip(shape[-2:], block, strict=True)))


def runs(rows: int, columns: int) -> Iterator[slice]:
    """Rows of about CHUNK numbers."""
    step = step_of(columns)
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))


def step_of(columns: int) -> int:
    """Of how many rows a run is."""
    return max(1, CHUNK // max(1, columns))


def in_singles(matrix: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """As `runs` of a matrix, with float32 [these rows, columns] of whatever was there before, each time in the same memory of its device."""
    rows, columns = matrix.shape
    room = backend.working((min(rows, step_of(columns)), columns), torch.float32, matrix.device)
    for some in runs(rows, columns):
        yield some, room[: some.stop - some.start]


def slabs(matrix: torch.Tensor, block: Block, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Rows of blocks with some `numbers` at a time, as rows of numbers and as rows of scales."""
    tall = block[0] or max(1, len(matrix))
    some = max(1, numbers // (tall * max(1, matrix.shape[1])))
    for at in range(0, -(-len(matrix) // tall), some):
        yield slice(at * tall, (at + some) * tall), slice(at, at + some)


def tiled(values: torch.Tensor, width: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """[rows, columns] as views [rows, tiles, width] with the tiles' place: the whole ones, and a short one if there is one."""
    width = width or values.shape[-1]
    full = values.shape[-1] // width
    if full:
        whole = values[:, : full * width]
        yield whole.as_strided((len(values), full, width), (whole.stride(0), width * whole.stride(1), whole.stride(1))), slice(0, full)
    if full * width < values.shape[-1]:
        yield values[:, full * width :].unsqueeze(1), slice(full, full + 1)


def tile_rows(rows: slice, block: Block) -> torch.Tensor:
    """int64: the row of tiles that each row is in."""
    numbers = torch.arange(rows.start, rows.stop, dtype=torch.int64, device="cpu")
    return numbers // block[0] if block[0] else torch.zeros_like(numbers)


def _spread(values: torch.Tensor, rows: slice, scale: torch.Tensor, block: Block) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """[these rows, columns] as views of it, each with what it has of scale [tiles, tiles], broadcast to it; long rows of either where there are some."""
    if block[0] == 1:
        factor = scale[rows]
        for part, place in tiled(values, block[1]):
            yield part, factor[:, place].unsqueeze(-1)
        return
    height, columns = block[0] or rows.stop, values.shape[1]
    for tile in range(rows.start // height, -(-rows.stop // height)):
        first = max(0, tile * height - rows.start)
        yield values[first : (tile + 1) * height - rows.start], scale[tile].repeat_interleave(block[1] or columns)[:columns]


def times(values: torch.Tensor, rows: slice, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """float32 [these rows, columns] × scale [tiles, tiles], each product rounded once, in place."""
    for part, factor in _spread(values, rows, scale, block):
        part *= factor
    return values


def plus(values: torch.Tensor, rows: slice, offset: torch.Tensor, block: Block) -> torch.Tensor:
    """float32 [these rows, columns] + offset [tiles, tiles], in place."""
    for part, term in _spread(values, rows, offset, block):
        part += term
    return values


def over(values: torch.Tensor, rows: slice, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """float32 [these rows, columns] / scale [tiles, tiles], in place."""
    for part, factor in _spread(values, rows, scale, block):
        part /= factor
    return values


def _reduced(found: torch.Tensor, rows: slice, block: Block, into: torch.Tensor, how: str) -> None:
    """[rows, tiles] of these rows reduced into [tiles, tiles]."""
    index = tile_rows(rows, block).unsqueeze(-1).expand(found.shape)
    into.scatter_reduce_(0, index, found, how)


def largest(values: torch.Tensor, block: Block) -> torch.Tensor:
    """float32 [tiles, tiles]: the largest magnitude; NaN and infinity stay."""
    amax = torch.zeros(shape_of(tuple(values.shape), block), dtype=torch.float32, device="cpu")
    if values.dtype in (torch.bfloat16, torch.float32) and (fast := backend.compiled("grid", values)):
        fast.largest(values, block, amax)
        return amax
    height = block[0] or values.shape[0]
    shape = (min(height if height > 1 else len(values), step_of(values.shape[1])), values.shape[1])
    room = torch.empty(shape, dtype=BITS.get(values.dtype, torch.int32), device="cpu")  # once: new memory costs as much as what is done in it
    if height > 1:
        tiles = [values[at : at + height] for at in range(0, len(values), height)]
        columns = [torch.stack([_magnitude(tile[rows], room).amax(0) for rows in runs(*tile.shape)]).amax(0) for tile in tiles]
        return _of_tiles(torch.stack(columns), block[1])
    for rows in runs(*values.shape):
        amax[rows] = _of_tiles(_magnitude(values[rows], room), block[1])
    return amax


def _magnitude(values: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """In `room`, whose type has the order of the magnitudes: the bits of a float without its sign, where NaN comes last."""
    values = values if values.dtype in BITS else values.to(torch.float32)
    return torch.bitwise_and(values.view(room.dtype), torch.iinfo(room.dtype).max, out=room[: len(values)])


def _of_tiles(magnitude: torch.Tensor, width: int) -> torch.Tensor:
    """What `_magnitude` gave [rows, columns] -> float32 [rows, tiles], the largest of each."""
    found = torch.cat([part.amax(-1) for part, _ in tiled(magnitude, width)], -1)
    return found.view(next(dtype for dtype, bits in BITS.items() if bits == found.dtype)).to(torch.float32)


def refuted(values: torch.Tensor, scale: torch.Tensor, block: Block, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [tiles, tiles], twice: the smallest and the largest number that codes × scale do not reproduce; inf and -inf where all are reproduced."""
    low, high = torch.full_like(scale, inf), torch.full_like(scale, -inf)
    if values.dtype in (torch.bfloat16, torch.float32) and grid.kind and (fast := backend.compiled("grid", values)):
        fast.refuted(values, scale, block, grid.kind, low, high)
        return low, high
    for rows in runs(*values.shape):
        factor = scale[tile_rows(rows, block)]
        lows, highs = [], []
        for part, place in tiled(values[rows].to(torch.float32), block[1]):
            by = factor[:, place].unsqueeze(-1)
            wrong = grid.nearest(part / by).mul_(by) != part
            lows.append(torch.where(wrong, part, inf).amin(-1))
            highs.append(torch.where(wrong, part, -inf).amax(-1))
        _reduced(torch.cat(lows, -1), rows, block, low, "amin")
        _reduced(torch.cat(highs, -1), rows, block, high, "amax")
    return low, high


def neighbours(numbers: torch.Tensor, ulps: int) -> torch.Tensor:
    """[..., n] -> [..., n × (2 ulps + 1)]: each positive float32 followed by those beside it, the nearest first."""
    steps = torch.tensor([0, *(step for n in range(1, ulps + 1) for step in (n, -n))], dtype=torch.int32, device="cpu")
    return (numbers.contiguous().view(torch.int32).unsqueeze(-1) + steps).clamp_(min=0).view(torch.float32).flatten(-2)


def settle(values: torch.Tensor, scale: torch.Tensor, block: Block, grid: Grid, least: float = 0.0, amax: torch.Tensor | None = None) -> torch.Tensor:
    """The scale [tiles, tiles], with those of tiles that lie on a grid replaced by one (≥ `least`) that reproduces every number of the tile.

    `amax`: what `largest` says of these values, for those who know it.
    """
    low, high = _refuted_by_few(values, scale, block, grid)
    if not bool((high > -inf).all()):
        low, high = refuted(values, scale, block, grid)
    amax = largest(values, block) if amax is None else amax
    step, guesses = block[0] or values.shape[0], len(grid.largest) * (2 * grid.ulps + 1) * scale.shape[1]
    numbers = torch.stack([low, high, *first_numbers(values, step, block[1] or values.shape[1])])
    high = torch.where(possible(amax, numbers, grid, least), high, -inf)
    if not bool((high > -inf).any()):
        return scale
    scale = scale.clone()
    count = max(1, CHUNK // max(guesses, step * values.shape[1]))
    for first in range(0, scale.shape[0], count):
        tiles = slice(first, first + count)
        if bool((high[tiles] > -inf).any()):
            rows = slice(first * step, min((first + count) * step, values.shape[0]))
            _search(values[rows], amax[tiles], scale[tiles], low[tiles], high[tiles], block, grid, least)
    return scale


def first_numbers(values: torch.Tensor, height: int, width: int) -> Iterator[torch.Tensor]:
    """float32 [tiles, tiles], a few times: the first numbers of each tile's first row."""
    starts = torch.arange(0, values.shape[1], width, dtype=torch.int64, device="cpu")
    for n in range(min(WITNESSES, width)):
        yield values[::height, (starts + n).clamp_(max=values.shape[1] - 1)].to(torch.float32)


def _refuted_by_few(values: torch.Tensor, scale: torch.Tensor, block: Block, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """As `refuted`, from the first row of each tile, or the first numbers of each row; numbers that are on no grid show it there already."""
    height, width = block[0] or values.shape[0], block[1] or values.shape[1]
    if height > 1:
        return refuted(values[::height], scale, (1, block[1]), grid)
    if width >= 8 * FEW and width == values.shape[1]:
        return refuted(values[:, :FEW], scale, (1, FEW), grid)
    return torch.full_like(scale, inf), torch.full_like(scale, -inf)


def _search(
    values: torch.Tensor, amax: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor, block: Block, grid: Grid, least: float
) -> None:
    """Replace in `scale` what can be replaced. Each guess that fails names two more numbers, and these rule out nearly all of the other guesses."""
    where = (high > -inf).nonzero()
    guesses, alive = _guesses(amax[where[:, 0], where[:, 1]], grid, least)
    low, high = low[where[:, 0], where[:, 1]], high[where[:, 0], where[:, 1]]
    while len(where):
        alive &= _fits(guesses, low, grid) & _fits(guesses, high, grid)
        left = alive.any(-1)
        where, guesses, alive = where[left], guesses[left], alive[left]
        if not len(where):
            return
        choice = alive.int().argmax(-1, keepdim=True)
        guess = guesses.gather(1, choice).squeeze(1)
        low, high = _refuted_at(values, scale, where, guess, block, grid)
        done = high == -inf
        scale[where[done, 0], where[done, 1]] = guess[done]
        alive.scatter_(1, choice, False)
        where, guesses, alive, low, high = where[~done], guesses[~done], alive[~done], low[~done], high[~done]


def _guesses(amax: torch.Tensor, grid: Grid, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest magnitudes [k] -> the scales that such a number may have [k, n], and which of them are scales at all."""
    guesses = neighbours(amax.unsqueeze(-1) / torch.tensor(grid.largest, dtype=torch.float32, device="cpu"), grid.ulps)
    return guesses, grid.holds(guesses) & (guesses >= least) & (guesses < inf) & (guesses > 0)


def _fits(guesses: torch.Tensor, number: torch.Tensor, grid: Grid) -> torch.Tensor:
    """bool [k, n]: a code × the guess reproduces a number [k]."""
    if grid.kind and (fast := backend.compiled("grid", guesses)):
        found: torch.Tensor = fast.fits(guesses, number, grid.kind)
        return found
    number = number.unsqueeze(-1)
    return grid.nearest(number / guesses).mul_(guesses) == number


def possible(amax: torch.Tensor, numbers: torch.Tensor, grid: Grid, least: float) -> torch.Tensor:
    """bool [tiles, tiles]: False where no guess reproduces these numbers [n, tiles, tiles] of a tile; infinite ones name no number, and none fits."""
    if grid.kind and (fast := backend.compiled("grid", numbers)):
        found: torch.Tensor = fast.possible(amax, numbers, torch.tensor(grid.largest, dtype=torch.float32, device="cpu"), grid.ulps, least, grid.kind)
        return found
    tiles = max(1, CHUNK // (len(grid.largest) * (2 * grid.ulps + 1)))
    flat, all_numbers = amax.flatten(), numbers.flatten(1)
    parts = [_possible_of(flat[at : at + tiles], all_numbers[:, at : at + tiles], grid, least) for at in range(0, len(flat), tiles)]
    return torch.cat(parts).view(amax.shape)


def _possible_of(amax: torch.Tensor, numbers: torch.Tensor, grid: Grid, least: float) -> torch.Tensor:
    """bool [tiles], of amax [tiles] and numbers [n, tiles]; each number leaves fewer tiles to look at."""
    (guesses, alive), where = _guesses(amax, grid, least), torch.arange(len(amax), dtype=torch.int64, device="cpu")
    for number in numbers:
        alive &= _fits(guesses, number[where], grid)
        left = alive.any(-1)
        guesses, alive, where = guesses[left], alive[left], where[left]
    return torch.zeros(len(amax), dtype=torch.bool, device="cpu").index_fill_(0, where, True)


def _refuted_at(
    values: torch.Tensor, scale: torch.Tensor, where: torch.Tensor, guess: torch.Tensor, block: Block, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """`refuted` [k], twice, for the tiles `where` [k, 2] under a guess [k] each; looks at the rows of these tiles only."""
    above, place = torch.unique(where[:, 0], return_inverse=True)
    height = block[0] or values.shape[0]
    rows = (above.unsqueeze(-1) * height + torch.arange(height, dtype=torch.int64, device="cpu")).flatten()
    tried = scale[above]
    tried[place, where[:, 1]] = guess
    low, high = refuted(values[rows[rows < values.shape[0]]], tried, block, grid)
    return low[place, where[:, 1]], high[place, where[:, 1]]


def matrices(tensor: torch.Tensor) -> torch.Tensor:
    """[..., rows, columns] -> [n, rows, columns], as a view where strides allow it."""
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor.flatten(0, -3)
