"""What moeglot makes of the same numbers while torch has another default dtype or default device, as JSON: name of a step -> a digest of all its bits.

A program, since what is kept for the life of a process is what it looks for: `python tests/default_steps.py FOLDER DEFAULT STEPS...`. DEFAULT is the name of
a dtype or of a device, or "changing"; everything that a step is given says its own. FOLDER has what `prepare` wrote.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import torch
from adapters import WRITERS, Job
from synthetic import write_checkpoint

import moeglot
from moeglot.encoded import Encoded
from moeglot.encodings import ENCODINGS, by_name
from moeglot.encodings.bnb4 import BNB4
from moeglot.encodings.fp8 import FP8
from moeglot.encodings.plain import Plain
from moeglot.kernels import backend, mxfp4
from moeglot.kernels.lattice import Floats
from moeglot.kernels.rounding import stochastic
from moeglot.layout import Stored
from moeglot.straddled import Straddled

CODED = {name: encoding for name, encoding in ENCODINGS.items() if not isinstance(encoding, Plain)}
CODED |= {"fp8-rows": FP8((48, 32), "F32"), "nf4": BNB4(), "fp4": BNB4("fp4"), "nf4:4096": BNB4(blocksize=4096), "nf4:nested": by_name("nf4:nested")}
CODINGS = ("fp8-block", "fp8-tensor", "mxfp8", "mxfp4-pack", "nvfp4-modelopt", "nvfp4-pack", "int4-pack", "int8-channel", "int8-pack", "nf4", "fp4")
"""Of Qwen3-MoE."""
OF_EACH_KIND = ("fp8-block", "mxfp4-pack", "nvfp4-pack", "int4-pack", "nf4")
"""In which files and dense models are made; layers are in all."""
ON_THE_WAY = ("mxfp4", "fp8-block", "nvfp4", "int4:32", "int8-channel", "nf4", "nf4:nested")
BACKENDS = {"torch": ("reference", "eager", "grouped", "batched"), "numba": ("eager", "grouped")}
"""Kernels -> the ways of a layer: they decode the same way for all, and eager asks them for products, too."""
KERNELS = backend.NAMES if backend.installed() else ("torch",)
Steps = Iterator[tuple[str, Callable[[], Any]]]


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def numbers(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def prepare(folder: Path) -> None:
    """A plain checkpoint, the same in each coding, and an adapter for them; under torch's own defaults."""
    sizes = {"e": 3, "h": 64, "i": 64}
    write_checkpoint(folder / "plain", "qwen3-moe/hub", sizes, layers=1)
    for coding in CODINGS:
        moeglot.convert(folder / "plain", f"qwen3-moe/hub+{coding}", folder / coding, allow_loss=True)
    WRITERS["PEFT"][2](Job("qwen3-moe", *sizes.values(), 4, layers=1)).save(folder / "adapter")


# --- numbers and files -----------------------------------------------------------------------------------------------------------------


def coded(folder: Path) -> Steps:
    """Every encoding, both ways, by both kernels, from one float type by each; and what else asks a kernel."""
    rows = torch.exp2(torch.arange(128, dtype=torch.float32, device="cpu") % 24 - 20).unsqueeze(1)
    for kernels in KERNELS:
        for n, (name, encoding) in enumerate(CODED.items()):
            kind = (torch.bfloat16, torch.float32)[(n + KERNELS.index(kernels)) % 2]
            yield f"{kernels} {name} {kind}", lambda e=encoding, k=kind, b=kernels: _both_ways(e, (numbers((128, 256)) * rows).to(k), b)
        yield f"{kernels} products", lambda b=kernels: _products(b)
    line = Stored("layers.{layer}.gate_up", ("gate", "up"), "e (p i) h")
    parts = by_name("fp8-block").encode(numbers((80, 40)))
    stored = Encoded(by_name("fp8-block"), parts, (80, 40))
    yield "straddled", lambda: digest(*(Straddled(line, stored)[role].parts["value"] for role in ("gate", "up")))
    yield "stochastic", lambda: digest(stochastic(numbers((40, 40)), Floats(torch.bfloat16), 7, ("here",)))


def _both_ways(encoding: Any, values: torch.Tensor, kernels: str) -> str:
    with backend.using(kernels):
        parts = encoding.encode(values)
        decoded = [encoding.decode(parts, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
        again = encoding.encode(decoded[1])
    return digest(*parts.values(), *decoded, *again.values())


def _products(kernels: str) -> str:
    with backend.using(kernels):
        parts = by_name("mxfp4").encode(numbers((64, 96)))
        parts["scale"][3, 1] = 253
        bad = mxfp4.infinite(parts["packed"], parts["scale"])
        parts["scale"][3, 1] = 120
        found = mxfp4.times(numbers((3, 96)), parts["packed"], parts["scale"])
    return f"{bad} {digest(found) if found is not None else None}"


def files(folder: Path) -> Steps:
    """Conversions with their certificates, merges, and a fingerprint."""
    for coding in OF_EACH_KIND:
        yield f"{coding} to bfloat16", lambda c=coding: _written(lambda out: moeglot.convert(folder / c, "qwen3-moe/hub", out, allow_loss=True))
        yield f"bfloat16 to {coding}", lambda c=coding: _written(lambda out: moeglot.convert(folder / "plain", f"qwen3-moe/hub+{c}", out, allow_loss=True))
        yield f"{coding} merged", lambda c=coding: _written(lambda out: moeglot.merge(folder / c, folder / "adapter", out, convention="peft", allow_loss=True))
    for how in ("stochastic:3", "delta"):
        yield (
            f"merged {how}",
            lambda h=how: _written(lambda out: moeglot.merge(folder / "mxfp4-pack", folder / "adapter", out, convention="peft", round=h, allow_loss=True)),
        )
    yield "verify", lambda: moeglot.verify(folder / "nvfp4-pack").verdict
    yield "fingerprint", lambda: _fingerprint(folder / "nvfp4-pack")


def _written(make: Callable[[Path], Any]) -> str:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        certificate = make(out)
        found = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(out.glob("*.safetensors")))).hexdigest()[:16]
        return f"{certificate.report.verdict} {found}"


def _fingerprint(checkpoint: Path) -> str:
    with TemporaryDirectory() as folder:
        moeglot.fingerprint(checkpoint).save(Path(folder) / "fp.json")
        return hashlib.sha256((Path(folder) / "fp.json").read_bytes()).hexdigest()[:16]


# --- modules and models ----------------------------------------------------------------------------------------------------------------


def modules(folder: Path) -> Steps:
    """A layer of experts that stay encoded, and LoRA on it, forward and backward."""
    for kernels in KERNELS:
        for coding in ("plain", *CODINGS) if kernels == "torch" else OF_EACH_KIND:
            checkpoint = moeglot.open(folder / coding)
            for way in BACKENDS[kernels]:
                yield f"{kernels} {coding} {way}", lambda c=checkpoint, w=way, b=kernels: _trained(c, w, b)


def _trained(checkpoint: moeglot.Checkpoint, way: str, kernels: str) -> str:
    from moeglot.nn import Experts, add_lora

    hidden, weights = numbers((9, 64), 1), numbers((9, 2), 2).abs()
    index = torch.tensor([[n % 3, (n + 1) % 3] for n in range(9)], dtype=torch.int64, device="cpu")
    with backend.using(kernels):
        module = Experts.of(checkpoint, 0, backend=way)
        with torch.no_grad():
            few = [module(hidden[:n], index[:n], weights[:n]) for n in (1, 9)]
        torch.manual_seed(0)
        add_lora(module, 4, 8, dropout=0.0 if way == "reference" else 0.1)
        for lora in module.adapters.values():
            lora.b.data.copy_(numbers(tuple(lora.b.shape), 3))
        module.train()
        out = module(hidden.requires_grad_(), index, weights.requires_grad_())
        out.square().sum().backward()
    factors = [factor for lora in module.adapters.values() for factor in (lora.a, lora.b)]
    return digest(*few, out, *(one.grad for one in (hidden, weights, *factors)), *factors)


def models(folder: Path) -> Steps:
    """What `moeglot.load` gives, and what it writes again."""
    for kernels in KERNELS:
        for coding in CODINGS if kernels == "torch" else OF_EACH_KIND:
            for native in (False, True) if coding in OF_EACH_KIND and kernels == "torch" else (True,):
                yield f"{kernels} load {coding} {native=}", lambda c=coding, n=native, b=kernels: _loaded(folder / c, b, native=n)
        for encode in ON_THE_WAY:
            yield f"{kernels} load encode={encode}", lambda e=encode, b=kernels: _loaded(folder / "plain", b, native=True, encode=e)
    yield (
        "save",
        lambda: _written(lambda out: moeglot.save(moeglot.load(folder / "fp8-block", dtype="float32", native=True), out, to="qwen3-moe/hub", allow_loss=True)),
    )
    yield "verify against transformers", lambda: moeglot.verify(folder / "plain", "transformers").verdict


def _loaded(checkpoint: Path, kernels: str, **options: Any) -> str:
    with backend.using(kernels), torch.no_grad():
        model = moeglot.load(checkpoint, dtype="float32", **options)
        logits = model(torch.arange(20, dtype=torch.int64, device="cpu").view(2, 10)).logits
    return digest(*model.state_dict().values(), logits)


# ---------------------------------------------------------------------------------------------------------------------------------------


def results(steps: Steps) -> dict[str, str]:
    found = {}
    for name, step in steps:
        try:
            found[name] = str(step())
        except Exception as error:
            found[name] = f"Error: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found


def main(folder: Path, default: str, *which: str) -> None:
    warnings.simplefilter("ignore")
    kinds = {"coded": coded, "files": files, "modules": modules, "models": models}
    with _default(default):
        during = {f"{kind}: {name}": found for kind in which for name, found in results(kinds[kind](folder)).items()}
    after = {} if which == ("models",) else results(coded(folder))
    print(json.dumps({"during": during, "after": after}))


@contextmanager
def _default(default: str) -> Iterator[None]:
    """Of torch, for all threads if it is a dtype. "changing": another thread goes through the dtypes, as one does that builds models meanwhile,
    ten thousand times a second: one that never sleeps takes as much time as all steps."""
    dtypes, done = {"changing": (torch.bfloat16, torch.float64, torch.float16)}.get(default, (getattr(torch, default, None),)), Event()

    def change() -> None:
        while not done.is_set():
            for dtype in dtypes:
                torch.set_default_dtype(dtype)
                time.sleep(1e-4)

    other = Thread(target=change)
    if len(dtypes) > 1:
        other.start()
    elif dtypes[0]:
        torch.set_default_dtype(dtypes[0])
    else:
        torch.set_default_device(default)
    try:
        yield
    finally:
        done.set()
        if other.ident:
            other.join()
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
