"""The ways to refuse. Each message has three lines: what is wrong, what we know and from where, what to type next.

MoeglotError
├── CheckpointError           the files cannot be trusted
│   ├── BrokenFile            a safetensors header or an index that is damaged or hostile
│   ├── PickleRefused         only pickle files are there; they are never loaded
│   ├── TensorMismatch        missing, extra, duplicate, wrong dtype or wrong shape
│   └── BadNumbers            NaN, infinite, zero or placeholder scales; weights or a loss that are not finite
├── FormatError               nobody may say what the tensors mean
│   ├── UnknownFormat         no registered format fits
│   ├── AmbiguousFormat       several do
│   └── Contradiction         two declarations disagree
├── AdapterError              an adapter cannot be applied as it is
│   ├── AmbiguousConvention   several readings of its tensors fit
│   ├── HalfAdapter           a tensor is missing, is not used, or has no place in the base
│   └── UnsupportedAdapter    it is more than a low-rank change of matrices
├── OutputError               the result cannot be written as asked
│   ├── OutputExists          something is there that this run did not write
│   ├── NoSpace               the disk is full, or would be
│   ├── Unfinished            parts of it are not written yet
│   └── LossRefused           numbers would change and nobody allowed it
├── NotVerified               the output was written and does not hold
└── UsageError                a name or value that we do not know
"""


class MoeglotError(Exception):
    """`wrong`: what is wrong. `known`: what we know and from where. `do`: what to type next."""

    exit_status = 2
    """Of the command line: 1 does not hold, 2 cannot tell or wrong use."""

    def __init__(self, wrong: str, known: str, do: str) -> None:
        self.wrong, self.known, self.do = (_one_line(text) for text in (wrong, known, do))
        super().__init__(self.wrong, self.known, self.do)

    def __str__(self) -> str:
        return f"{self.wrong}\n  {self.known}\n  {self.do}"


def _one_line(text: str) -> str:
    """Names come from files: what would break a line or steer a terminal is shown as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class CheckpointError(MoeglotError):
    """The files cannot be trusted."""

    exit_status = 1


class BrokenFile(CheckpointError):
    """A safetensors header or an index that is damaged or hostile."""


class PickleRefused(CheckpointError):
    """Only pickle files are there; loading one runs the code in it."""


class TensorMismatch(CheckpointError):
    """A tensor is missing, extra, stored twice, or of another dtype or shape than its format says."""


class BadNumbers(CheckpointError):
    """Scales that are NaN, infinite, zero or placeholders, or weights or a loss that are not finite."""


class FormatError(MoeglotError):
    """Nobody may say what the tensors mean."""


class UnknownFormat(FormatError):
    """No registered format fits."""


class AmbiguousFormat(FormatError):
    """Several formats fit."""


class Contradiction(FormatError):
    """Two declarations disagree, for example config.json and the tensors."""

    exit_status = 1


class AdapterError(MoeglotError):
    """An adapter cannot be applied as it is."""


class AmbiguousConvention(AdapterError):
    """Several readings of an adapter's tensors fit, and they are different changes."""


class HalfAdapter(AdapterError):
    """A tensor of an adapter is missing, is not used, or has no place in the base: an adapter is never half applied."""

    exit_status = 1


class UnsupportedAdapter(AdapterError):
    """More than a low-rank change of matrices, for example DoRA."""


class OutputError(MoeglotError):
    """The result cannot be written as asked."""


class OutputExists(OutputError):
    """Something is there that this run did not write."""


class NoSpace(OutputError):
    """The disk is full, or would be."""


class Unfinished(OutputError):
    """Parts of the output are not written yet."""


class LossRefused(OutputError):
    """Numbers would change and nobody allowed it."""


class NotVerified(MoeglotError):
    """The output was written and does not hold; it keeps its temporary name."""

    exit_status = 1


class UsageError(MoeglotError):
    """A name or a value that we do not know."""
