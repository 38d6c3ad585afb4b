"""Load an artifact with transformers alone, and compare it with `agentforge.load(FOLDER, "packed")`.

    python examples/transformers_only.py FOLDER ["A prompt"]

All that transformers needs is `import agentforge.huggingface`.  Prints the text of both, which are the same, and whether the
folder that `save_pretrained` writes is the same artifact.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import agentforge.huggingface  # registers the format
from agentforge.artifact import Artifact

folder, prompt = sys.argv[1], (sys.argv[2:] or ["The capital of France is"])[0]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
asked = {**inputs, "max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
ids = model.generate(**asked)
print("transformers:", repr(tokenizer.decode(ids[0])))

expected = agentforge.load(folder, "packed").model.generate(**asked)
print("agentforge:  ", repr(tokenizer.decode(expected[0])))

with tempfile.TemporaryDirectory() as scratch:
    model.save_pretrained(scratch)
    saved = Artifact(scratch)
    saved.verify()
    same = saved.rows == Artifact(folder).rows
    print("saved again: ", "the same tensors" if same else "other tensors")
sys.exit(0 if torch.equal(ids, expected) and same else 1)
