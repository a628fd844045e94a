"""Fine-tuning: LoRA on the experts of a base that stays encoded, step by step, with checkpoints from which a killed run goes on to the same numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moeglot.errors import BadNumbers, BrokenFile, OutputExists, UsageError
from moeglot.files import newfile
from moeglot.kernels.finite import all_finite
from moeglot.nn.adapters import save_adapter
from moeglot.nn.data import READ, Data, Rows, check_fits, check_seed, read
from moeglot.nn.lora import TARGETS, add_lora, check, experts_of

Step = Callable[[int, int, float], None]
"""(steps done, steps in all, loss of the last)."""
STATE, RECORD = "state.safetensors", "tune.json"
HELD_OUT = 64
"""Of the rows that are held out, at most so many are measured."""


@dataclass(frozen=True)
class Recipe:
    """How a run trains; two runs of one recipe give the same numbers. `modules`: other Linear layers that PEFT adapts, by the ends of their names."""

    steps: int = 100
    batch: int = 4
    accumulate: int = 1
    length: int = 128
    rate: float = 1e-3
    warmup: int = 10
    r: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    modules: tuple[str, ...] = ()
    dropout: float = 0.0
    held_out: float = 0.1
    save_every: int = 50
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.r, self.alpha, self.targets, self.dropout)
        check_seed(self.seed)
        if not 0 <= self.rate < math.inf:
            raise UsageError(f"rate = {self.rate}", "a learning rate is a finite number of at least 0", "pass --rate 1e-3, for example")

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * done))


@dataclass
class Record:
    """What a run says of itself in tune.json. `losses`: of each step, in nats a token; `before` and `after`: of what is held out.

    `measured`: how many "rows" "of" those that are held out. `diverged`: the step at which a number was not finite, 0 before the first.
    """

    base: str
    data: str
    recipe: dict[str, Any]
    held: dict[str, Any]
    measured: dict[str, int]
    losses: list[float] = field(default_factory=list)
    before: float = math.nan
    after: float = math.nan
    diverged: int | None = None

    def write(self, folder: Path) -> None:
        told = {"schema": "moeglot/tune/1", **asdict(self)}
        partial = folder / (RECORD + ".partial")
        partial.write_text(json.dumps({key: None if value != value else value for key, value in told.items()}, indent=2, allow_nan=False), encoding="utf-8")
        partial.rename(folder / RECORD)


def check_new(out: str | Path, resume: bool) -> None:
    """Raises `OutputExists` for a folder that is there, unless it is to go on with."""
    if os.path.lexists(out) and not resume:
        raise OutputExists(f"{out} exists", "moeglot overwrites nothing", "choose another name, or go on with it by --resume")


def tune(
    model: Any,
    tokenizer: Any,
    data: Data | str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    base: str | None = None,
    resume: bool = False,
    step: Step | None = None,
) -> Record:
    """Train an adapter on a native model and write it to `out`/adapter, with the record beside it and checkpoints below.

    `data`: a file, or its rows. `resume` goes on with what is there, and begins where nothing is.
    Raises `OutputExists` for a folder that is there, `UsageError` for one to resume that another recipe, base or text made, `BadNumbers` where a loss, a
    gradient or a factor is no longer finite: what was written before is kept.
    """
    check_new(out := Path(out), resume)
    read_ = data if isinstance(data, Data) else read(data, tokenizer, recipe.length, recipe.held_out)
    check_fits(model, read_.train.tokens, read_.held_out.tokens)
    measured = {"rows": len(read_.sample(HELD_OUT)), "of": len(read_.held_out)}
    record = Record(base or str(model.config.name_or_path), read_.digest, json.loads(json.dumps(asdict(recipe))), _held(model), measured)
    run = _Run(_prepared(model, recipe), read_, recipe, record, out)
    if resume:
        run.restore()
    if math.isnan(record.before):
        with tempfile.TemporaryDirectory() as trial:  # what could not be saved is not trained
            save_adapter(run.model, Path(trial) / "adapter", base=base)
        out.mkdir(parents=True, exist_ok=resume)
        record.write(out)
        record.before = run.held_out()
        record.write(out)
    run.train(step)
    record.after = run.held_out()
    if not (out / "adapter").exists():
        save_adapter(run.model, out / "adapter", base=base)
    record.write(out)
    return record


def _held(model: Any) -> dict[str, Any]:
    """In which types and encodings the base is: a run goes on over the numbers that it began with."""
    encodings = {str(line.encoding) for module in experts_of(model).values() for line in module.lines}
    return {"dtype": str(model.dtype).removeprefix("torch."), "experts": sorted(encodings)}


def _prepared(model: Any, recipe: Recipe) -> Any:
    torch.manual_seed(recipe.seed)
    if recipe.modules:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UsageError(f"{', '.join(recipe.modules)} are no experts", f"those are PEFT's business, and {error}", "pip install peft") from error
        alpha = recipe.alpha if recipe.alpha is not None else 2 * recipe.r
        config = LoraConfig(r=recipe.r, lora_alpha=alpha, target_modules=list(recipe.modules), lora_dropout=recipe.dropout)
        names = [name for name, _ in model.named_modules()]
        if unknown := [wanted for wanted in recipe.modules if not any(f".{name}".endswith(f".{wanted}") for name in names)]:
            raise UsageError(f"no module is called {unknown[0]}", _linear(model), "pass some of these as --modules; experts are --targets")
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(f"PEFT does not adapt {', '.join(recipe.modules)}: {error}", _linear(model), "pass some of these as --modules") from error
    add_lora(model, recipe.r, recipe.alpha, recipe.targets, recipe.dropout)
    if recipe.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _linear(model: Any) -> str:
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return f"Linear layers of the model are {', '.join(sorted(found))}"


class _Run:
    """A model, its data and its optimizer, somewhere between the first step and the last."""

    def __init__(self, model: Any, data: Data, recipe: Recipe, record: Record, out: Path) -> None:
        self.model, self.data, self.recipe, self.record, self.out = model, data, recipe, record, out
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.cuda = sorted({parameter.device.index for parameter in self.trained if parameter.is_cuda})
        """The GPUs that PEFT's dropout is drawn on; the experts' is drawn on the CPU."""
        self.optimizer = torch.optim.AdamW(self.trained, lr=recipe.rate, weight_decay=0.0)

    def nats(self, rows: Rows) -> torch.Tensor:
        """The loss of all tokens of some rows that are learned, summed."""
        tokens, labels = (tensor.to(next(self.model.parameters()).device) for tensor in (rows.tokens, rows.labels))
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=READ, reduction="sum")

    @torch.no_grad()
    def held_out(self) -> float:
        """Nats a token of what is held out, from rows that are spread over it."""
        self.model.eval()
        rows = self.data.sample(HELD_OUT)
        found = sum(float(self.nats(row)) for row in rows.split(1)) / rows.learned
        if not math.isfinite(found):
            raise self._diverged(f"the loss of the held-out text is {found}")
        return found

    def train(self, step: Step | None) -> None:
        for n in range(len(self.record.losses), self.recipe.steps):
            self.model.train()
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate_at(n)
            rows, total = self.data.batch(n, self.recipe.batch * self.recipe.accumulate, self.recipe.seed), 0.0
            for some in rows.split(self.recipe.batch):
                loss = self.nats(some) / rows.learned
                torch.autograd.backward(loss)
                total += loss.item()
            norm = float(torch.nn.utils.clip_grad_norm_(self.trained, 1.0))
            if not math.isfinite(total) or not math.isfinite(norm):
                raise self._diverged(f"the loss is {total}, and the norm of its gradient {norm}")
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not all(all_finite(parameter) for parameter in self.trained):
                raise self._diverged("the adapter is not finite")
            self.record.losses.append(total)
            if (n + 1) % self.recipe.save_every == 0 and n + 1 < self.recipe.steps:
                self.save()
            if step:
                step(n + 1, self.recipe.steps, total)

    def _diverged(self, told: str) -> BadNumbers:
        """Says so in the record, too."""
        done, held = len(self.record.losses), self.record.held["dtype"]
        begun = math.isfinite(self.record.before)
        self.record.diverged = min(done + 1, self.recipe.steps) if begun else 0
        self.record.write(self.out)
        kept = max(self._checkpoints(), key=_steps, default=None)
        known = f"the model is in {held}, the rate is {self.recipe.rate:g}; {self.out} keeps {kept.name if kept else 'no checkpoint'} and {RECORD}"
        tries = ["a smaller --rate"] * begun + ["--dtype bfloat16 or float32"] * (held == "float16")
        do = f"begin another folder with {', or '.join(tries)}; --resume goes on at the same rate alone" if tries else "`moeglot verify` the base"
        return BadNumbers(f"step {self.record.diverged} of {self.recipe.steps}: {told}", known, do)

    # --- checkpoints -----------------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """The adapter, the optimizer and the state of chance, under the number of the step; the one before goes when this is whole."""
        folder = self.out / "checkpoints"
        work, done = folder / "partial", folder / f"step-{len(self.record.losses)}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        tensors = {"rng": torch.get_rng_state(), **{f"rng.cuda.{n}": torch.cuda.get_rng_state(n) for n in self.cuda}}
        for n, parameter in enumerate(self.trained):
            state = self.optimizer.state[parameter]
            tensors |= {f"{n}.value": parameter.detach(), f"{n}.first": state["exp_avg"], f"{n}.second": state["exp_avg_sq"]}
        with newfile.by_library(work / STATE):
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, work / STATE)
        self.record.write(work)
        work.rename(done)
        for other in folder.iterdir():
            if other != done:
                shutil.rmtree(other)

    def _checkpoints(self) -> list[Path]:
        return [path for path in (self.out / "checkpoints").glob("step-*") if (path / RECORD).is_file()]

    def restore(self) -> None:
        """Nothing where a run was killed before it had said what it is; raises `UsageError` for a folder of others, or where it was made otherwise."""
        if not (self.out / RECORD).is_file():
            if os.path.lexists(self.out) and not (self.out.is_dir() and {path.name for path in self.out.iterdir()} <= {RECORD + ".partial"}):
                raise UsageError(f"{self.out}: no run to resume", f"it has no {RECORD}", "choose another name, and leave --resume out")
            return
        shutil.rmtree(self.out / "checkpoints" / "partial", ignore_errors=True)
        begun = _read_record(self.out, "begin another folder")
        for key in ("base", "data", "recipe", "held"):
            if (before := begun.get(key)) != (now := getattr(self.record, key)):
                if isinstance(before, dict) and isinstance(now, dict):
                    before = {name: value for name, value in before.items() if value != now.get(name)} or before
                raise UsageError(f"{self.out} was begun with another {key}", f"{RECORD} says {before}", "pass what it was begun with, or another folder")
        self.record.before = math.nan if begun["before"] is None else begun["before"]
        if not (found := self._checkpoints()):
            return
        folder = max(found, key=_steps)
        do = f"remove {folder}: --resume then begins at the first step"
        self.record.losses = _read_record(folder, do)["losses"]
        try:
            tensors = load_file(folder / STATE)
        except SafetensorError as error:
            raise BrokenFile(f"{folder / STATE}: not what a run writes", str(error), do) from error
        for n, parameter in enumerate(self.trained):
            with torch.no_grad():
                parameter.copy_(tensors[f"{n}.value"])
            first, second = (tensors[f"{n}.{which}"].to(parameter.device) for which in ("first", "second"))
            steps = torch.tensor(float(len(self.record.losses)), dtype=torch.float32, device="cpu")
            self.optimizer.state[parameter] = {"step": steps, "exp_avg": first, "exp_avg_sq": second}
        torch.set_rng_state(tensors["rng"])
        for n in self.cuda:
            if (state := tensors.get(f"rng.cuda.{n}")) is not None:
                torch.cuda.set_rng_state(state, n)


def _read_record(folder: Path, do: str) -> dict[str, Any]:
    """Raises `BrokenFile` for what `Record.write` did not write."""
    try:
        told = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {key: told[key] for key in Record.__dataclass_fields__}
    except (ValueError, KeyError, TypeError) as error:
        known = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise BrokenFile(f"{folder / RECORD}: not what a run writes", known, do) from error


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
