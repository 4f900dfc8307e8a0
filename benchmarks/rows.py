"""How many rows a second are learnt from, of short rows whose answers alone are labels? Ours beside TRL's SFTTrainer.

    make bench-peers                      # TRL and PEFT, in an environment of their own
    python benchmarks/rows.py --steps 30

The restaurant rows, eight a step, LoRA of rank 16 on all linear layers, the same type, rate and threads. TRL is run as
it comes (padded) and with packing; the first steps are left out, then the time from step to step is taken whole. Losses
are means of the last third of the steps: the sides draw A and the order of rows by themselves. Needs DELTAW_DATA and a
quiet machine.
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

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
DATA = Path(os.environ.get("DELTAW_DATA", "../shared/data")) / "sft" / "restaurant_train.jsonl"
SIDES = {"deltaw": sys.executable, "trl": PEERS, "trl packed": PEERS}
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
        return [(time.perf_counter(), e.loss) for e in made.events() if isinstance(e, Stepped)]


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
                stepped.append((time.perf_counter(), float(logs["loss"])))

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
    return {"rows_per_second": each * (len(stepped) - WARM) / seconds, "rows_per_step": each, "losses": losses,
            "loss": statistics.mean(losses[-len(losses) // 3 :]), "threads": torch.get_num_threads()}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--dtype", help="default: what the processor is good at")
    parser.add_argument("--out", type=Path, default=Path("runs/rows.json"), help="default: %(default)s")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one)))
        return 0
    from deltaw.models import source
    from deltaw.models.device import choose_device, choose_dtype

    if args.sides != ["deltaw"] and not PEERS.exists():
        sys.exit("The peers are not installed: make bench-peers")
    dtype = args.dtype or str(choose_dtype("auto", choose_device("cpu"))).removeprefix("torch.")
    print("| side | type | rows/s | rows a step | loss in the end |\n|---|---|---|---|---|")
    done = []
    for side in args.sides:
        command = [str(SIDES[side]), __file__, "--one", side, str(source.find("smollm2-135m")), dtype, str(args.steps)]
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "DELTAW_DATA": str(DATA.parents[1].resolve())}
        said = subprocess.run(command, env=quiet, check=True, text=True, stdout=subprocess.PIPE).stdout
        done.append({"side": side, "dtype": dtype, **json.loads(said.splitlines()[-1])})
        print(f"| {side} | {dtype} | {done[-1]['rows_per_second']:.2f} | {done[-1]['rows_per_step']:.1f} "
              f"| {done[-1]['loss']:.3f} |", flush=True)  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(done, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
