"""Does memory grow with the data? Files of growing size, each trained on for two steps in a process of its own.

    python benchmarks/large.py --sizes 4 40 200        # megabytes

A small random model with a byte tokenizer; the rows are real text if DELTAW_DATA is there. Prints the most memory that
each process held.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw.models import source

TEXT = Path(os.environ.get("DELTAW_DATA", "../shared/data")) / "long" / "state_union_1945_1990.txt"
ROW = 2000


def write_base(folder):
    """A model of two small layers with the default model's tokenizer."""
    found = source.find("smollm2-135m")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (found / name).exists():
            (folder / name).write_bytes((found / name).read_bytes())
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(file, megabytes):
    """Rows of 2,000 characters, until the file is so large; how many."""
    text = TEXT.read_text() if TEXT.exists() else "The mill stands by the river, and the road goes past it. " * 9999
    rows = size = 0
    with file.open("w") as f:
        while size < megabytes * 1e6:
            at = rows * 1237 % (len(text) - ROW)
            size += f.write(json.dumps({"text": text[at : at + ROW]}) + "\n")
            rows += 1
    return rows


def trained(file, base, runs):
    """What the run's events say."""
    command = [sys.executable, "-m", "deltaw.cli", "train", str(file), "--base", str(base), "--runs", str(runs),
               "--json", "--train-on", "all", "--steps", "2", "--threads", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return events[0]["tokens"], next(e for e in events if e["event"] == "finished")["peak_bytes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="*", default=[4, 40, 200])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        base = Path(scratch) / "base"
        base.mkdir()
        write_base(base)
        print("| rows | data | tokens | held at most |\n|---|---|---|---|")
        for megabytes in args.sizes:
            rows = write_rows(file := Path(scratch) / "rows.jsonl", megabytes)
            tokens, peak = trained(file, base, Path(scratch) / "runs")
            print(f"| {rows:,} | {megabytes:,.0f} MB | {tokens:,} | {peak / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
