"""Parts that a weight's encoding carries and never makes: the scale of the activations that it was calibrated with; and how a file shapes one number."""

from __future__ import annotations

from collections.abc import Mapping

from moeglot.encoding import WHOLE, Encoding, Part, Stored
from moeglot.errors import UsageError


def single_of(shape: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
    """What a file has in place of the last two axes of a weight [..., out, in] for its one scale: nothing, or ones."""
    rest = shape[len(weight) - 2 :]
    return rest if set(rest) <= {1} else ()


def carried_parts(found: Mapping[str, Stored], names: tuple[str, ...]) -> tuple[Part, ...]:
    """The parts of these names that a file has, each one number for a matrix."""
    weight = next(iter(found.values()))[1]
    return tuple(Part(name, (found[name][0],), (WHOLE, WHOLE), single=single_of(found[name][1], weight)) for name in names if name in found)


def without_carried(encoding: Encoding, carried: tuple[Part, ...]) -> None:
    """Raises `UsageError`: an encoder is asked for a part that weights do not tell."""
    if carried:
        raise UsageError(
            f"{encoding} here has {carried[0].name}, which cannot be made from weights",
            "it comes from calibration: the activations that the producer saw",
            "choose an encoding without it, or keep the weights' encoding as it is",
        )
