"""LongLoRA: what groups save at 8,192 tokens, and what each of its parts is worth.

    python benchmarks/longlora.py speed       # SmolLM2, one row of 8,192 tokens: groups beside whole attention
    python benchmarks/longlora.py parts       # a small model of 512 positions goes on at 1,024 for 200 steps, six ways

`speed` runs each side in a process of its own, one after the other: a step to warm up, then the median of three.
`parts` teaches a model of bytes Shakespeare from nothing at 512 tokens, stretches its positions to 1,024, trains each
way with the same rows, and measures all with whole attention on text that none has seen. Needs DELTAW_DATA, and a quiet
machine for `speed`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from deltaw.adapters.adapter import Adapter
from deltaw.api.persona import load_base
from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.kernels.memory import peak_bytes
from deltaw.methods import method
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.rope import Rope
from deltaw.models.slots import Linear
from deltaw.scoring.loss import batch_loss
from deltaw.settings import Training
from deltaw.train.optimizer import adamw, rate

DATA = Path(os.environ.get("DELTAW_DATA", "../shared/data"))
TOKENS = 8192
SHORT, LONG, BEGINNING, STEPS, ROWS = 512, 1024, 600, 200, 4
WAYS = {
    "whole attention": {"grouped": False}, "groups, shifted": {}, "groups, not shifted": {"shift": False},
    "whole attention, LoRA alone": {"grouped": False, "modules_to_save": ""},
    "groups, shifted, LoRA alone": {"modules_to_save": ""},
    "groups, not shifted, LoRA alone": {"shift": False, "modules_to_save": ""},
}  # fmt: skip


def batch_of(ids):
    return lay([Encoded(tuple(ids), (True,) * len(ids))])


def step(model, optimizer, batches, now):
    total = 0.0
    for batch in batches:
        loss = batch_loss(model, batch) / sum(b.targets for b in batches)
        loss.backward()
        total += loss.item()
    for group in optimizer.param_groups:
        group["lr"] = now * group["pace"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return total


def timed(grouped):
    """Tokens a second and peak memory of steps at 8,192 tokens, in this process."""
    base = load_base("smollm2-135m")
    text = next((DATA / "long").glob("*.txt")).read_text(encoding="utf-8")
    batch = batch_of(base.tokenizer.encode(text[: TOKENS * 6])[:TOKENS])
    adapter = Adapter.build(method("long_lora", grouped=grouped), base.model).train()
    optimizer, seconds = adamw(adapter, Training()), []
    with adapter.on():
        for _ in range(4):
            began = time.perf_counter()
            step(base.model, optimizer, [batch], 1e-4)
            seconds.append(time.perf_counter() - began)
    return {"tokens_per_second": TOKENS / statistics.median(seconds[1:]), "peak_bytes": peak_bytes(base.model.device)}


def speed():
    print("| attention in training | tokens/s | peak of the process |\n|---|---|---|")
    found = {}
    for grouped in (False, True):
        said = subprocess.run([sys.executable, __file__, "timed", str(int(grouped))], check=True, text=True,
                              stdout=subprocess.PIPE).stdout  # fmt: skip
        found[grouped] = json.loads(said.splitlines()[-1])
        print(f"| {'in groups' if grouped else 'whole'} | {found[grouped]['tokens_per_second']:.0f} "
              f"| {found[grouped]['peak_bytes'] / 1e9:.2f} GB |", flush=True)  # fmt: skip
    print(f"\n{found[True]['tokens_per_second'] / found[False]['tokens_per_second']:.2f} times as fast")


def bytes_of(text, length, count, seed):
    """Batches of rows drawn from a text, as bytes."""
    rng, body = torch.Generator().manual_seed(seed), text.encode()
    at = torch.randint(len(body) - length, (count,), generator=rng).tolist()
    return [batch_of(body[i : i + length]) for i in at]


def newborn(seed=0):
    """A model of bytes that knows nothing: 8 layers of width 192, and 512 positions."""
    c = ModelConfig(vocab=256, width=192, layers=8, heads=6, kv_heads=3, head_width=32, hidden=512, context=SHORT,
                    rope=Rope(width=32), tied=True)  # fmt: skip
    rng, model = torch.Generator().manual_seed(seed), Decoder(c)
    for slot in model.modules():
        if isinstance(slot, Linear):
            slot.swap({"weight": slot.weight.repack(0.05 * torch.randn(slot.weight.shape, generator=rng))})
        elif hasattr(slot, "gain"):
            slot.gain = torch.ones_like(slot.gain)
    model.embed_tokens.table = 0.05 * torch.randn(c.vocab, c.width, generator=rng)
    return model


def trained(model, adapter, text, length, steps, peak):
    optimizer, settings = adamw(adapter, Training()), Training(warmup=0.1)
    adapter.train()
    with adapter.on():
        for i in range(steps):
            step(model, optimizer, bytes_of(text, length, ROWS, i), rate(i, steps, peak, settings))
    adapter.eval()


@torch.no_grad()
def perplexity(model, text, length):
    batches = bytes_of(text, length, 32, 10**6)
    total = sum(batch_loss(model, batch).item() for batch in batches)
    return torch.tensor(total / sum(batch.targets for batch in batches)).exp().item()


def parts():
    text = "".join(file.read_text(encoding="utf-8") for file in sorted((DATA / "shakespeare").glob("*.txt")))
    cut = int(0.9 * len(text))
    text, held = text[:cut], text[cut:]
    model = newborn()
    whole = Adapter.build(method("full"), model)
    trained(model, whole, text, SHORT, BEGINNING, 3e-3)
    whole.merge()
    print(f"| way | perplexity at {LONG} | s a step |\n|---|---|---|", flush=True)
    print(f"| as it was, of {SHORT} positions ({perplexity(model, held, SHORT):.3f} there) "
          f"| {perplexity(model, held, LONG):.3f} | |", flush=True)  # fmt: skip
    for name, chosen in {"positions stretched, not trained": None, **WAYS}.items():
        adapter = Adapter.build(method("long_lora", context=LONG, **(chosen or {})), model)
        began = time.perf_counter()
        if chosen is not None:
            trained(model, adapter, text, LONG, STEPS, 2e-3)
        seconds = (time.perf_counter() - began) / STEPS
        took = f"{seconds:.2f}" if chosen is not None else ""
        with adapter.eval().on():
            print(f"| {name} | {perplexity(model, held, LONG):.3f} | {took} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "parts", "timed"])
    parser.add_argument("grouped", nargs="?", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "timed":
        print(json.dumps(timed(bool(args.grouped))))
    else:
        {"speed": speed, "parts": parts}[args.what]()


if __name__ == "__main__":
    main()
