"""The peer of ``merge_files``: merge an adapter as PEFT's guide says, and note the time without the imports.

    python benchmarks/peft_merge.py BASE ADAPTER DTYPE OUT

It imports nothing of ours, whose time and memory would count as PEFT's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(base: str, adapter: str, dtype: str, out: str) -> None:
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    Path(out, "seconds.json").write_text(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(*sys.argv[1:])
