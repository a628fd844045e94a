"""How king-james-logits.json was made: by transformers 5.23.0 from the bundled MXFP4 model, in float32, on a CPU."""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeglot.demo import BUNDLED

assert transformers.__version__ == "5.23.0"
tokens = AutoTokenizer.from_pretrained(BUNDLED)("In the beginning God created the heaven and the earth. And the earth was").input_ids
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)(input_ids=torch.tensor([tokens])).logits[0, -1]
told = {"transformers": transformers.__version__, "tokens": tokens, "logits": [float(f"{n:.9g}") for n in logits.tolist()]}
Path(__file__).with_name("king-james-logits.json").write_text(json.dumps(told) + "\n")
