"""What encoded experts take: a load, measured from outside in anonymous memory, and a training step over one layer."""

import subprocess
import sys

import pytest
from small_models import mostly_experts
from synthetic import write_checkpoint

from moeglot.demo import BUNDLED

WATCH = """
import ctypes, sys, threading, time, torch
from pathlib import Path
torch.set_num_threads(1)
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
class Peak:
    def __enter__(self):
        ctypes.CDLL(None).malloc_trim(0)
        self.base, self.peak, self.going = anonymous(), 0, True
        self.thread = threading.Thread(target=self.watch); self.thread.start()
        return self
    def watch(self):
        while self.going:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.001)
    def __exit__(self, *_):
        self.going = False; self.thread.join()
        self.over = self.peak - self.base
"""

LOAD = (
    WATCH
    + """
import moeglot, transformers
transformers.utils.logging.disable_progress_bar()
moeglot.load(sys.argv[2], native=True)
with Peak() as peak:
    model = moeglot.load(sys.argv[1], dtype="bfloat16", native=sys.argv[3] == "native")
others = sum(p.nbytes for p in model.parameters())
model(input_ids=torch.arange(8)[None])
print(peak.over, others, model.dtype)
"""
)

STEP = (
    WATCH
    + """
import moeglot
from moeglot.nn import Experts, add_lora
module = Experts.of(moeglot.open(sys.argv[1]), 0, backend=sys.argv[2])
e, h, i = (module.sizes[letter] for letter in "ehi")
factors = add_lora(module, 4)
hidden, index, weights = torch.randn(256, h).requires_grad_(), torch.randint(0, e, (256, 4)), torch.rand(256, 4).requires_grad_()
def step(n):
    module(hidden[:n], index[:n], weights[:n]).square().sum().backward()
    for tensor in (hidden, weights, *factors):
        tensor.grad = None
step(8)
with Peak() as peak:
    for _ in range(3):
        step(256)
expert = 3 * h * i * 4
# tokens in, out and their gradients; what one expert's rows become on the way there and back; factors, their gradients and the optimizer's view
activations = 4 * 256 * (8 * h + 4 * 4) + 4 * 256 * 4 // e * 2 * (4 * h + 12 * i) + 3 * sum(f.nbytes for f in factors)
print(peak.over, expert, activations, e * expert)
"""
)


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    return folder, mostly_experts(folder, layers=8)


def test_an_mxfp4_load_takes_mxfp4s_memory(large):
    folder, experts = large
    peak, others, dtype = run(LOAD, folder, BUNDLED, "native")
    assert dtype == "torch.bfloat16"
    print(f"native: {(int(peak) - int(others)) / experts:.3f} of the experts in bfloat16")
    assert 0.2 < (int(peak) - int(others)) / experts <= 0.35
    peak, whole, _ = run(LOAD, folder, BUNDLED, "dense")  # the measure sees what is dense
    assert int(peak) / experts > 0.9
    assert int(whole) > experts


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_training_step_keeps_one_expert_dense(backend, tmp_path):
    write_checkpoint(tmp_path, "gpt-oss/openai", {"e": 32, "h": 512, "i": 512, "v": 32}, layers=1)
    peak, expert, activations, layer = map(int, run(STEP, tmp_path, backend))
    print(f"{backend}: {peak / 1e6:.1f} MB over the weights; activations {activations / 1e6:.1f}, an expert {expert / 1e6:.1f}, a layer {layer / 1e6:.1f}")
    if backend == "eager":
        assert peak <= activations + 6 * expert  # torch's tables decode in scratch of their own; a layer has 32
    else:
        assert peak > activations + 16 * expert  # the reference keeps what it decoded, and the measure sees it
