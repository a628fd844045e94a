"""moeglot: reads, writes, converts, runs, fine-tunes, merges and verifies the expert weights of Mixture-of-Experts models in every dialect they are stored in.

Importing it does not import torch: that waits for the first number that is read. What only adapters need waits until it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeglot.errors import (
    AdapterError,
    AmbiguousConvention,
    AmbiguousFormat,
    BadNumbers,
    BrokenFile,
    CheckpointError,
    Contradiction,
    FormatError,
    HalfAdapter,
    LossRefused,
    MoeglotError,
    NoSpace,
    NotVerified,
    OutputError,
    OutputExists,
    PickleRefused,
    TensorMismatch,
    Unfinished,
    UnknownFormat,
    UnsupportedAdapter,
    UsageError,
)

# isort: split
from moeglot.checkpoints.checkpoint import Checkpoint, open
from moeglot.checkpoints.identify import Identification, identify
from moeglot.checks import Report
from moeglot.conversion.convert import convert, finalize, write_part
from moeglot.conversion.merge import merge
from moeglot.formats import formats
from moeglot.inspection.lint import Finding, lint
from moeglot.live import load, save
from moeglot.planning.plan import Plan, plan
from moeglot.verification.certificate import Certificate
from moeglot.verification.fingerprint import Fingerprint, fingerprint
from moeglot.verification.verify import compare, verify
from moeglot.version import __version__

if TYPE_CHECKING:
    from moeglot.adapters.adapter import Adapter, open_adapter
    from moeglot.adapters.convert import convert_adapter

_WAITING = {"Adapter": "moeglot.adapters.adapter", "open_adapter": "moeglot.adapters.adapter", "convert_adapter": "moeglot.adapters.convert"}


def __getattr__(name: str) -> Any:
    if name not in _WAITING:
        raise AttributeError(f"module 'moeglot' has no attribute {name!r}")
    return getattr(import_module(_WAITING[name]), name)


__all__ = [
    "Adapter",
    "AdapterError",
    "AmbiguousConvention",
    "AmbiguousFormat",
    "BadNumbers",
    "BrokenFile",
    "Certificate",
    "Checkpoint",
    "CheckpointError",
    "Contradiction",
    "Finding",
    "Fingerprint",
    "FormatError",
    "HalfAdapter",
    "Identification",
    "LossRefused",
    "MoeglotError",
    "NoSpace",
    "NotVerified",
    "OutputError",
    "OutputExists",
    "PickleRefused",
    "Plan",
    "Report",
    "TensorMismatch",
    "Unfinished",
    "UnknownFormat",
    "UnsupportedAdapter",
    "UsageError",
    "__version__",
    "compare",
    "convert",
    "convert_adapter",
    "finalize",
    "fingerprint",
    "formats",
    "identify",
    "lint",
    "load",
    "merge",
    "open",
    "open_adapter",
    "plan",
    "save",
    "verify",
    "write_part",
]
