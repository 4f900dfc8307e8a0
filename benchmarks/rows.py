"""How many rows a second are learnt from, of short rows whose answers alone are labels? Ours beside TRL's SFTTrainer.

    make bench-peers                      # TRL and PEFT, in an environment of their own
    python benchmarks/rows.py --steps 30

The restaurant rows, eight a step, LoRA of rank 16 on all linear layers, the same type, rate and threads. TRL is run as
it comes (padded) and with packing; the first steps are left out, then the time from step to step is taken whole. How
long it takes from starting the process to the first step's end is told too. Losses
are means of the last third of the steps: the sides draw A and the order of rows by themselves. Needs DELTAW_DATA and a
quiet machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import beside

DATA = beside.DATA / "sft" / "restaurant_train.jsonl"
SIDES = ("deltaw", "trl", "trl packed")
ROWS, RANK, RATE, WARM, LONGEST = 8, 16, 1e-3, 3, 768


def deltaw(path, dtype, steps):
    """Times and losses of our steps."""
    from deltaw.api.finetune import prepare
    from deltaw.train.events import Stepped

    with tempfile.TemporaryDirectory() as folder:
        made = prepare([str(DATA)], {"base": path, "dtype": dtype, "rank": RANK, "batch_rows": ROWS, "val": "0",
                                     "evaluations": 0, "steps": steps, "learning_rate": RATE, "schedule": "constant",
                                     "warmup": 0.0, "runs": Path(folder)})  # fmt: skip
        made.job.question = None
        return [(time.time(), e.loss) for e in made.events() if isinstance(e, Stepped)]


def trl(path, dtype, steps, packed):
    """Times and losses of TRL's."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    stepped = []

    class Clock(TrainerCallback):
        def on_log(self, *_, logs=None, **__):
            if logs and "loss" in logs:
                stepped.append((time.time(), float(logs["loss"])))

    rows = [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        told = SFTConfig(output_dir=folder, per_device_train_batch_size=1 if packed else ROWS, max_steps=steps,
                         learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1, packing=packed,
                         max_length=LONGEST, completion_only_loss=True, use_cpu=True, bf16=False, save_strategy="no",
                         report_to=[], gradient_checkpointing=False, disable_tqdm=True)  # fmt: skip
        told.max_grad_norm = 1.0
        data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        trainer = SFTTrainer(model=model, args=told, train_dataset=data, callbacks=[Clock()],
                             processing_class=AutoTokenizer.from_pretrained(path),
                             peft_config=lora)  # fmt: skip
        each = len(rows) / len(trainer.train_dataset) * told.per_device_train_batch_size
        trainer.train()
    return stepped, each


def measured(side, path, dtype, steps):
    """Rows a second from step to step, and the loss in the end."""
    import torch

    stepped, each = (deltaw(path, dtype, int(steps)), ROWS) if side == "deltaw" else trl(
        path, dtype, int(steps), side == "trl packed")  # fmt: skip
    seconds = stepped[-1][0] - stepped[WARM - 1][0]
    losses = [loss for _, loss in stepped]
    return {"first_step_at": stepped[0][0], "rows_per_second": each * (len(stepped) - WARM) / seconds,
            "rows_per_step": each, "losses": losses, "loss": statistics.mean(losses[-len(losses) // 3 :]),
            "threads": torch.get_num_threads()}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES)
    parser.add_argument("--dtype", help="default: what the processor is good at")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one)))
        return 0
    path, dtype = beside.base(), args.dtype or beside.type_here()
    print("| side | type | rows/s | rows a step | first step done | loss in the end |\n|---|---|---|---|---|---|")
    done = []
    for side in args.sides:
        began = time.time()
        row = {"side": side, "dtype": dtype, **beside.alone(__file__, side, path, dtype, args.steps)}
        row["first_step_seconds"] = row.pop("first_step_at") - began
        done.append(row)
        print(f"| {side} | {dtype} | {row['rows_per_second']:.2f} | {row['rows_per_step']:.1f} "
              f"| {row['first_step_seconds']:.1f} s | {row['loss']:.3f} |", flush=True)  # fmt: skip
        beside.keep("rows", done, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
