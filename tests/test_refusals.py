"""Every way in which we refuse: one small real checkpoint each, damaged in one way, and the three lines that the user then reads."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeglot
from moeglot import convert as conversion
from moeglot import (
    AmbiguousFormat,
    BadNumbers,
    BrokenFile,
    CheckpointError,
    Contradiction,
    MoeglotError,
    NoSpace,
    OutputExists,
    PickleRefused,
    TensorMismatch,
    UnknownFormat,
    UsageError,
)
