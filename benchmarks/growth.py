"""How does a step grow with the length of a row, the rank, the width and the depth? Where it stops being linear.

    python benchmarks/growth.py                           # all four
    python benchmarks/growth.py --questions length rank

LoRA on all linear layers, random tokens, every one a label. Length and rank: SmolLM2. Width and depth: random models of
Llama's shape, 4 x 512 tokens; `large` is one of 1.5 billion parameters with 1 x 512. Each row is a process of its own,
and its median of three steps after one. Needs a quiet machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import beside
from speed import RANK, deltaw

STEPS = 3
ROOM = {"width": 1024, "depth": 8}
QUESTIONS = {
    "length": [512, 1024, 2048, 4096, 8192],
    "rank": [4, 16, 64, 256],
    "width": [256, 512, 1024, 2048],
    "depth": [4, 8, 16, 32],
    "large": [32],
}


def written(folder, width, depth, vocabulary=8192):
    """A random model of Llama's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4,
                         num_hidden_layers=depth, num_attention_heads=width // 64,
                         num_key_value_heads=max(1, width // 256), tie_word_embeddings=True,
                         max_position_embeddings=8192)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folder


def asked(question, size, folder):
    """The model, rows x tokens, and the rank of one row."""
    if question == "length":
        return beside.base(), f"1x{size}", RANK
    if question == "rank":
        return beside.base(), "4x512", size
    if question == "large":
        return written(folder, 2048, size, 32000), "1x512", RANK
    return written(folder, **{**ROOM, question: size}), "4x512", RANK


def measured(_, path, dtype, shape, rank):
    """Seconds of a step, and the peak of this process."""
    import torch

    ids = torch.randint(1000, 8000, tuple(map(int, shape.split("x"))), generator=torch.Generator().manual_seed(0))
    step = deltaw(path, getattr(torch, dtype), ids, rank=int(rank))
    step()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    return {"step_seconds": median, "tokens_per_second": ids.numel() / median, "seconds": seconds,
            "peak_bytes": beside.peak_bytes()}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="*", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one)))
        return 0
    dtype, done = beside.type_here(), []
    print(f"| {dtype} | rows x tokens | step | tokens/s | peak |\n|---|---|---|---|---|")
    for question in args.questions:
        for size in QUESTIONS[question]:
            with tempfile.TemporaryDirectory() as folder:
                path, shape, rank = asked(question, size, folder)
                row = {"question": question, "size": size, "shape": shape, "dtype": dtype,
                       **beside.alone(__file__, "deltaw", path, dtype, shape, rank)}  # fmt: skip
            done.append(row)
            print(f"| {question} {size} | {shape} | {row['step_seconds']:.2f} s | {row['tokens_per_second']:.0f} "
                  f"| {row['peak_bytes'] / 1e9:.2f} GB |", flush=True)  # fmt: skip
            beside.keep("growth", done, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
