"""Parts that a weight's encoding carries and never makes: the scale of the activations that it was calibrated with; and how a file shapes one number."""

from __future__ import annotations

from collections.abc import Mapping

from moeglot.encoding import WHOLE, Encoding, Part, Parts, Stored
from moeglot.errors import UsageError


def single_of(shape: tuple[int, ...], leading: int) -> tuple[int, ...]:
    """What a file has in place of the two axes of a matrix for its one scale, after the leading axes: nothing, or ones."""
    rest = shape[leading:]
    return rest if set(rest) <= {1} else ()


def is_joint(shape: tuple[int, ...], leading: int) -> bool:
    """A file has one for gate and up of an expert, where a tensor holds both for all: [e] or [e, 1, 1] in place of [e, p] or [e, p, 1]."""
    return leading == 2 and (len(shape) < leading or shape[1] == 1)


def carried_parts(found: Mapping[str, Stored], names: tuple[str, ...], leading: int) -> tuple[Part, ...]:
    """The parts of these names that a file has, each one number for a matrix, or for all that a stored tensor holds."""
    return tuple(_part(name, *found[name], leading) for name in names if name in found)


def _part(name: str, dtype: str, shape: tuple[int, ...], leading: int) -> Part:
    if len(shape) < leading == 1:
        return Part(name, (dtype,), (WHOLE, WHOLE), shape, shared=True)
    joint = is_joint(shape, leading)
    return Part(name, (dtype,), (WHOLE, WHOLE), single=single_of(shape, leading - joint), joint=joint)


def carried_problem(parts: Parts, carried: tuple[Part, ...]) -> str | None:
    """What makes a carried part impossible, or None. A zero is what some producers write for an expert that no token reached."""
    for name in (part.name for part in carried):
        number = parts[name]
        if not bool(number.isfinite().all()) or (bool((number < 0).any()) and number.is_floating_point()):
            return f"has an {name} of {number.min().item():g}"
    return None


def carries(encoding: Encoding, other: Encoding) -> bool:
    """What the other carries, this one carries too: the rest of what this one does can be left out."""
    return {part.name for part in other.carried} <= {part.name for part in encoding.carried}


def carried_of(parts: Parts, other: Encoding) -> Parts:
    """The parts that the other encoding has."""
    return {part.name: parts[part.name] for part in other.parts}


def without_carried(encoding: Encoding, carried: tuple[Part, ...]) -> None:
    """Raises `UsageError`: an encoder is asked for a part that weights do not tell."""
    if carried:
        raise UsageError(
            f"{encoding} here has {carried[0].name}, which cannot be made from weights",
            "it comes from calibration: the activations that the producer saw",
            "choose an encoding without it, or keep the weights' encoding as it is",
        )
