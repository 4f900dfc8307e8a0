"""How fast is a step of training, and what does its process hold? Ours beside PEFT's, as it comes and compiled.

    make bench-peers                                            # PEFT and others, in an environment of their own
    python benchmarks/speed.py
    python benchmarks/speed.py --models smollm2 --shapes 4x512 --sides deltaw peft

LoRA of rank 16 on all linear layers, AdamW, random tokens, every one a label; the same type and threads on all sides:
bfloat16 where the processor multiplies it, else float32. SmolLM2, and a random model of Gemma 3's shape, whose
vocabulary is 262,144. Each row is a process of its own: a step to warm up (of a compiled model two), then the median of
five; the peak is of the whole process. Needs a quiet machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import beside

SIDES = ("deltaw", "peft", "peft compiled")
SHAPES = ("4x512", "1x2048", "16x128")
STEPS, RANK = 5, 16
GEMMA = {"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 6,
         "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
         "max_position_embeddings": 4096}  # fmt: skip


def written(folder):
    """A random model of Gemma 3's shape."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)).save_pretrained(folder)
    return folder


def deltaw(path, dtype, ids, name="lora", **chosen):
    """One step by deltaw, as a function; of a technique with these settings."""
    from deltaw.adapters.adapter import Adapter
    from deltaw.data.batch import lay
    from deltaw.data.encode import Encoded
    from deltaw.methods import method
    from deltaw.models import checkpoint
    from deltaw.scoring.loss import batch_loss
    from deltaw.settings import Training
    from deltaw.train.optimizer import adamw

    model = checkpoint.load(Path(path), dtype)
    adapter = Adapter.build(method(name, **(chosen or {"rank": RANK})), model).train()
    optimizer = adamw(adapter, Training())
    batch = lay([Encoded(tuple(row), (True,) * len(row)) for row in ids.tolist()])

    def step():
        with adapter.on():
            (batch_loss(model, batch) / batch.targets).backward()
        moved(optimizer)

    return step


def peft(path, dtype, ids, compiled=False):
    """One step by PEFT, as a function."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    called = torch.compile(model) if compiled else model

    def step():
        called(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        moved(optimizer)

    return step


def moved(optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def measured(side, path, dtype, shape):
    """Tokens a second, and the peak of this process."""
    import torch

    began = time.perf_counter()
    torch.manual_seed(0)
    ids = torch.randint(1000, 40000, tuple(map(int, shape.split("x"))))
    dtype = getattr(torch, dtype)
    step = deltaw(path, dtype, ids) if side == "deltaw" else peft(path, dtype, ids, side == "peft compiled")
    for _ in range(2 if side == "peft compiled" else 1):
        step()
    ready = time.perf_counter() - began
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    peak = beside.peak_bytes()
    return {"tokens_per_second": ids.numel() / statistics.median(seconds), "peak_bytes": peak, "ready_seconds": ready,
            "seconds": seconds, "threads": torch.get_num_threads()}  # fmt: skip


def rows(args):
    """Each measurement, in a process of its own."""
    dtype = args.dtype or beside.type_here()
    with tempfile.TemporaryDirectory() as folder:
        found = {"smollm2": beside.base, "gemma3": lambda: written(folder)}
        for model in args.models:
            path = found[model]()
            for shape in args.shapes:
                for side in args.sides:
                    yield {"model": model, "shape": shape, "side": side, "dtype": dtype,
                           **beside.alone(__file__, side, path, dtype, shape)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["smollm2", "gemma3"], choices=["smollm2", "gemma3"])
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="rows x tokens; default: %(default)s")
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES)
    parser.add_argument("--dtype", help="default: what the processor is good at")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one)))
        return 0
    print("| model | rows x tokens | side | tokens/s | peak | first step done |\n|---|---|---|---|---|---|")
    done = []
    for row in rows(args):
        done.append(row)
        print(f"| {row['model']}, {row['dtype']} | {row['shape']} | {row['side']} | {row['tokens_per_second']:.0f} "
              f"| {row['peak_bytes'] / 1e9:.2f} GB | {row['ready_seconds']:.0f} s |", flush=True)  # fmt: skip
        beside.keep("speed", done, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
