"""What packed bases cost in time and memory, and what bitsandbytes' layer does to gradients after an evaluation.

    python benchmarks/packed.py token      # SmolLM2: the products of one token's step, and tokens a second, by format
    python benchmarks/packed.py train      # SmolLM2, 4 x 512 tokens: QLoRA beside LoRA
    python benchmarks/packed.py large      # a random model of 1.5 billion numbers, made packed, trained at 1 x 512
    python benchmarks/packed.py memory     # the same small job by LoRA, QLoRA and PEFT + bitsandbytes: whole processes
    python benchmarks/packed.py peer       # PEFT + bitsandbytes: gradients before and after an evaluation

Each row is measured in a process of its own, one after the other: a step to warm up, then medians. `memory` and `peer`
need peft and bitsandbytes (the dev group), all but `large` the default model. Needs a quiet machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import beside

DTYPES = ("bfloat16", "float32")
TOKEN = [*((d, "") for d in DTYPES), *((d, f) for f in ("int4-g32", "nf4-dq", "nf3-dq", "int8") for d in DTYPES)]
TRAIN = [(d, m) for d in DTYPES for m in ("lora", "qlora")]
ROWS, WIDE, SPOKEN = 4, 512, 64
VILLAGE = Path(__file__).parents[1] / "examples" / "village" / "train.jsonl"
MEMORY = {"lora": ["--method", "lora"], "qlora": ["--method", "qlora"]}


def medians(run, count):
    """Median seconds of a call, after one to warm up; with one thread the processor's: other work adds least."""
    import torch

    run()
    seconds, clock = [], time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(count):
        began = clock()
        run()
        seconds.append(clock() - began)
    return statistics.median(seconds)


def token(dtype, form):
    """One row through every linear layer, and a whole answer."""
    import torch

    from deltaw.api.persona import load_base
    from deltaw.decode.generate import generate
    from deltaw.decode.sampling import Sampling
    from deltaw.kernels.library import instruction_set
    from deltaw.models.slots import Linear

    base = load_base("smollm2-135m", dtype, base_format=form)
    slots = [slot for slot in base.model.layers.modules() if isinstance(slot, Linear)]
    inputs = [torch.randn(1, slot.weight.shape[1], dtype=base.model.dtype) for slot in slots]
    ids = base.tokenizer.encode("The mill stands by the river, and the road goes past it to the village.")

    def products():
        for slot, x_TI in zip(slots, inputs, strict=True):
            slot.run(x_TI)

    def answer():
        list(generate(base.model, [ids], Sampling(max_new_tokens=SPOKEN), set()))

    with torch.inference_mode():
        return {"layers": len(slots), "products_ms": 1e3 * medians(products, 50),
                "token_ms": 1e3 * medians(answer, 3) / SPOKEN, "isa": instruction_set()}  # fmt: skip


def train(dtype, name):
    """Tokens a second of whole steps."""
    import torch

    from deltaw.adapters.adapter import Adapter
    from deltaw.api.persona import load_base
    from deltaw.methods import find, method

    base = load_base("smollm2-135m", dtype, base_format=find(name).base_format)
    adapter = Adapter.build(method(name), base.model).train()
    torch.manual_seed(0)
    ids = torch.randint(1000, 40000, (ROWS, WIDE)).tolist()
    seconds, peak = stepped(base.model, adapter, ids, 5)
    return {"tokens_per_second": ROWS * WIDE / seconds, "peak_bytes": peak}


def stepped(model, adapter, rows, count, recompute=False):
    """Median seconds of a step on these rows, all in one micro-batch, and the most memory of the process."""
    from deltaw.data.batch import lay
    from deltaw.data.encode import Encoded
    from deltaw.kernels.memory import frugal, peak_bytes
    from deltaw.scoring.loss import batch_loss
    from deltaw.settings import Training
    from deltaw.train.optimizer import adamw

    batch, optimizer = lay([Encoded(tuple(ids), (True,) * len(ids)) for ids in rows]), adamw(adapter, Training())
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def step():
        (batch_loss(model, batch, recompute) / batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    with frugal(recompute), adapter.on():
        return medians(step, count), peak_bytes(model.device)


def large():
    """A model of the shape of Llama, each matrix packed as it is drawn; trained with checkpointed layers."""
    import torch

    from deltaw.adapters.adapter import Adapter
    from deltaw.kernels.memory import frugal, peak_bytes
    from deltaw.methods import method
    from deltaw.models import checkpoint
    from deltaw.models.config import ModelConfig
    from deltaw.models.decoder import Decoder
    from deltaw.models.rope import Rope
    from deltaw.models.slots import Linear
    from deltaw.weights.formats import parse

    c = ModelConfig(vocab=32000, width=1536, layers=32, heads=12, kv_heads=2, head_width=128, hidden=8960, context=2048,
                    rope=Rope(width=128), tied=True)  # fmt: skip
    form = parse("nf4-dq")
    with torch.device("meta"):
        model = Decoder(c)
    with frugal():  # as where a base is loaded
        for slot in model.modules():
            if isinstance(slot, Linear):
                slot.weight = form.pack(0.02 * torch.randn(*slot.weight.shape), torch.float32)
            elif hasattr(slot, "gain"):
                slot.gain = torch.ones(slot.gain.shape)
    model.embed_tokens.table = 0.02 * torch.randn(c.vocab, c.width)
    made = peak_bytes(model.device)
    adapter = Adapter.build(method("qlora"), model).train()
    seconds, peak = stepped(model, adapter, torch.randint(0, c.vocab, (1, WIDE)).tolist(), 3, recompute=True)
    return {"numbers": checkpoint.count(model), "packed_bytes": checkpoint.stored(model)[0],
            "trained": adapter.parameter_count, "made_bytes": made, "peak_bytes": peak,
            "tokens_per_second": WIDE / seconds}  # fmt: skip


def peft_and_bitsandbytes(rows=(), steps=0, rate=1e-3):
    """A model of PEFT over bitsandbytes' layers, trained on these conversations."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from deltaw.models import source

    path = source.find("smollm2-135m")
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=packed, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for i in range(steps):
        texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows[8 * i : 8 * i + 8]]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def peer():
    """How far the gradients of PEFT + bitsandbytes are from what they were before an evaluation."""
    import torch

    from deltaw.models.device import instruction_sets

    model, tokenizer = peft_and_bitsandbytes()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.02)
    batch = tokenizer("The mill stands by the river, and the road goes past it.", return_tensors="pt")

    def gradients():
        model.train().zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    before = gradients()
    with torch.no_grad():
        model.eval()(**batch)
    after = gradients()
    return {"instructions": [name for name, has in instruction_sets().items() if has],
            "relative_change": ((after - before).norm() / before.norm()).item()}  # fmt: skip


def process(command):
    """Run to the end; the most memory it held."""
    with tempfile.TemporaryDirectory() as folder:
        job = subprocess.Popen([part.format(folder=folder) for part in command], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(job.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    return used.ru_maxrss * 1024


def said(*arguments):
    """What a process of this file says."""
    done = subprocess.run([sys.executable, __file__, "one", *arguments], check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["token", "train", "large", "memory", "peer", "one"])
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    match args.what:
        case "one":
            name, *more = args.more
            made = {"token": token, "train": train, "large": large, "peer": peer}
            if name == "peft":
                lines = VILLAGE.read_text(encoding="utf-8").splitlines()
                peft_and_bitsandbytes([json.loads(line)["messages"] for line in lines], 10)
                print(json.dumps({"peak_bytes": beside.peak_bytes()}))
            else:
                print(json.dumps(made[name](*more)))
        case "token":
            print("| type | format | 210 products, ms | whole step, ms |\n|---|---|---|---|")
            for dtype, form in TOKEN:
                row = said("token", dtype, form)
                print(f"| {dtype} | {form or 'plain'} | {row['products_ms']:.2f} | {row['token_ms']:.2f} |", flush=True)
        case "train":
            print("| type | method | tokens/s | peak |\n|---|---|---|---|")
            for dtype, name in TRAIN:
                row = said("train", dtype, name)
                print(
                    f"| {dtype} | {name} | {row['tokens_per_second']:.0f} | {row['peak_bytes'] / 1e9:.2f} GB |",
                    flush=True,
                )
        case "memory":
            print("| way | peak of the process |\n|---|---|")
            for name, flags in MEMORY.items():
                command = [sys.executable, "-m", "deltaw.cli", "train", str(VILLAGE), "--steps", "10", "--val", "0",
                           "--dtype", "bfloat16", "--runs", "{folder}", *flags]  # fmt: skip
                print(f"| deltaw, {name} | {process(command) / 1e9:.2f} GB |", flush=True)
            print(f"| PEFT + bitsandbytes | {said('peft')['peak_bytes'] / 1e9:.2f} GB |")
        case _:
            for name, value in said(args.what).items():
                print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
