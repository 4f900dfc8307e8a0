"""How far do losses drift from those in fp32? Ours in bfloat16, and PEFT's, beside PEFT's in fp32, on the same rows.

    make bench-peers
    python benchmarks/drift.py

SmolLM2 learns pages of WikiText-2, 4 x 512 tokens a step, LoRA of rank 16 on all linear layers, AdamW, fifty steps; all
three begin with the same A and read the same rows. Told is the mean of |loss - loss in fp32|. Needs DELTAW_DATA.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import beside

SIDES = {"peft fp32": "float32", "peft bf16": "bfloat16", "deltaw bf16": "bfloat16"}
STEPS, RATE, RANK, SHAPE = 50, 5e-4, 16, (4, 512)


def batches(path):
    """The same rows for all sides, as ids."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    lines = (beside.DATA / "wikitext2" / "valid_pages.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [i for line in lines for i in tokenizer.encode(json.loads(line)["page"])]
    count = SHAPE[0] * SHAPE[1]
    return [torch.tensor(ids[i * count : (i + 1) * count]).view(SHAPE) for i in range(STEPS)]


def peft(path, dtype, start, steps):
    """PEFT's losses, after writing or reading the A that all begin with."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    if (start / "adapter_model.safetensors").exists():
        set_peft_model_state_dict(model, load_file(start / "adapter_model.safetensors"))
    else:
        model.save_pretrained(start)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for ids in steps:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def deltaw(path, dtype, start, steps):
    """Ours, from the same A."""
    from safetensors.torch import load_file

    from deltaw.adapters.adapter import Adapter
    from deltaw.data.batch import lay
    from deltaw.data.encode import Encoded
    from deltaw.files import adapters
    from deltaw.methods import method
    from deltaw.models import checkpoint
    from deltaw.scoring.loss import batch_loss
    from deltaw.settings import Training
    from deltaw.train.optimizer import adamw

    model = checkpoint.load(Path(path), dtype)
    adapter = Adapter.build(method("lora", rank=RANK), model).train()
    written = load_file(start / "adapter_model.safetensors")
    short = {name: name.removeprefix("base_model.model.model.").replace(".lora_", ".").removesuffix(".weight")
             for name in written}  # fmt: skip
    adapters.put(adapter, {short[name]: t for name, t in written.items()}, str(start))
    optimizer = adamw(adapter, Training())
    for group in optimizer.param_groups:
        group["lr"] = RATE * group["pace"]
    for ids in steps:
        batch = lay([Encoded(tuple(row), (True,) * len(row)) for row in ids.tolist()])
        with adapter.on():
            loss = batch_loss(model, batch) / batch.targets
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        yield loss.item()


def measured(side, path, start):
    import torch

    of = deltaw if side.startswith("deltaw") else peft
    return list(of(path, getattr(torch, SIDES[side]), Path(start), batches(path)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one)))
        return 0
    with tempfile.TemporaryDirectory() as start:
        losses = {side: beside.alone(__file__, side, beside.base(), start) for side in SIDES}
    exact = losses["peft fp32"]
    print("| side | loss in the end | mean distance to fp32 |\n|---|---|---|")
    for side, mine in losses.items():
        apart = sum(abs(a - b) for a, b in zip(mine, exact, strict=True)) / STEPS
        print(f"| {side} | {mine[-1]:.4f} | {apart:.5f} |")
    beside.keep("drift", losses, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
