"""How well does LoRA learn in three minutes? Ours beside PEFT's: same rows, steps, rate and order, several seeds.

    python benchmarks/quality.py --out benchmarks/results/quality.jsonl            # all tasks, seeds 0 1 2, both sides
    python benchmarks/quality.py --tasks sql --seeds 0 --sides deltaw

Each finished run is one JSON line; a run that is in the file already is not made again. Needs DELTAW_DATA, the extra
`eval` and, for the other side, `peft`. Run it on a quiet machine: training seconds are part of the result.
"""

import argparse
import csv
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from deltaw.api.evaluate import grade
from deltaw.api.finetune import prepare
from deltaw.api.persona import Persona, load_base
from deltaw.data import files as reading
from deltaw.data.batch import steps as ordered
from deltaw.data.encode import encode_all
from deltaw.decode.sampling import Sampling
from deltaw.scoring.text import Graded, score
from deltaw.settings import Training
from deltaw.train.optimizer import rate

DATA = Path(os.environ.get("DELTAW_DATA", "../shared/data"))
TASKS = {
    "smarthome_json": ["json_valid", "intent", "slot_f1"],
    "restaurant": ["bleu"],
    "sql": ["exact_match"],
}
SETTINGS = {"epochs": 1.2, "batch_rows": 8, "learning_rate": 2e-3, "val": "0", "rank": 16, "alpha": 32.0}
ANSWER_TOKENS = 90
MASKED = -100


def rows_of(task, split):
    """Rows of a task; restaurant rows get every reference of their meaning representation."""
    examples = reading.read(DATA / "sft" / f"{task}_{split}.jsonl")
    if task != "restaurant":
        return examples
    references = {}
    with (DATA / "e2e" / "e2e_dev_train.csv").open(newline="") as f:
        for row in csv.DictReader(f):
            meaning = re.sub(r"(\w[\w ]*)\[([^\]]*)\]", r"\1: \2", row["mr"])
            references.setdefault(meaning, []).append(row["ref"])
    return [reading.Example(e.messages, "", e.where, tuple(references[e.messages[1]["content"]])) for e in examples]


def ours(task, seed):
    """Train with deltaw; seconds, and graded answers."""
    with tempfile.TemporaryDirectory() as runs:
        prepared = prepare([str(DATA / "sft" / f"{task}_train.jsonl")],
                           {**SETTINGS, "seed": seed, "runs": Path(runs), "evaluations": 0})  # fmt: skip
        prepared.job.question = None
        finished = list(prepared.events())[-1]
        persona = Persona("tuned", prepared.base, prepared.job.adapter)
        with persona.on():
            graded = answered(prepared.base, task)
    return {"train_seconds": finished.train_seconds, "predicted_seconds": finished.predicted_seconds,
            "peak_bytes": finished.peak_bytes, "predicted_bytes": finished.predicted_bytes,
            "steps": finished.step, "loss": finished.loss}, graded  # fmt: skip


def answered(base, task):
    return grade(base.model, base.tokenizer, rows_of(task, "val"), Sampling(max_new_tokens=ANSWER_TOKENS))


def peft(task, seed):
    """Train the same rows in the same order with PEFT, padded as its collators do; answers by `generate`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = load_base("smollm2-135m")
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_pretrained(base.path, dtype=base.model.dtype)
    model = get_peft_model(
        hf, LoraConfig(r=SETTINGS["rank"], lora_alpha=SETTINGS["alpha"], target_modules="all-linear")
    )
    settings = Training(**{k: v for k, v in SETTINGS.items() if k not in ("rank", "alpha")}, seed=seed)
    rows = encode_all(rows_of(task, "train"), base.tokenizer, "answers", 8192)[0]
    total = round(settings.epochs * math.ceil(len(rows) / settings.batch_rows))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0)
    model.train()
    start = time.perf_counter()
    for step, (_, drawn) in zip(range(total), ordered([(len(rows), 1.0)], settings.batch_rows, seed), strict=False):
        ids, mask, labels = padded([rows[i] for i in drawn])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total, settings.learning_rate, settings)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    return {"train_seconds": seconds, "steps": total, "loss": loss.item()}, generated(model.eval(), base, task)


def padded(rows):
    longest = max(len(r.ids) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, MASKED)
    for i, r in enumerate(rows):
        ids[i, : len(r.ids)] = torch.tensor(r.ids)
        mask[i, : len(r.ids)] = 1
        labels[i, : len(r.ids)] = torch.tensor(
            [t if learnt else MASKED for t, learnt in zip(r.ids, r.trained, strict=True)]
        )
    return ids, mask, labels


@torch.inference_mode()
def generated(model, base, task):
    examples = rows_of(task, "val")
    prompts = [base.tokenizer.encode(base.tokenizer.chat(e.prompt, prompt=True)) for e in examples]
    end = min(base.tokenizer.end_ids)
    graded = []
    for some in range(0, len(prompts), 25):
        batch = prompts[some : some + 25]
        longest = max(map(len, batch))
        ids = torch.tensor([[end] * (longest - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False,
                              pad_token_id=end, eos_token_id=end)  # fmt: skip
        for row, e in zip(said, examples[some : some + 25], strict=True):
            text = base.tokenizer.decode(row[longest:].tolist(), skip_special=True)
            graded.append(Graded(text, e.references or (e.answer,), ()))
    return graded


def untrained(task, _seed):
    """The base as it is."""
    return {}, answered(load_base("smollm2-135m"), task)


SIDES = {"base": untrained, "deltaw": ours, "peft": peft}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for seed in args.seeds:
        for task in args.tasks:
            for side in args.sides:
                if side == "base" and seed != args.seeds[0]:
                    continue
                key = {"task": task, "side": side, "seed": seed, "settings": SETTINGS}
                if any(all(d.get(k) == v for k, v in key.items()) for d in done):
                    continue
                facts, graded = SIDES[side](task, seed)
                result = {**key, **facts, "threads": torch.get_num_threads(), "scores": score(graded, TASKS[task])}
                done.append(result)
                with args.out.open("a") as f:
                    f.write(json.dumps(result) + "\n")
                print(
                    json.dumps({k: result.get(k) for k in ("task", "side", "seed", "train_seconds", "scores")}),
                    flush=True,
                )
    table(done)


def table(done):
    """Medians over seeds, as Markdown."""
    print("\n| task | score | base | deltaw | PEFT | deltaw s | PEFT s |\n|---|---|---|---|---|---|---|")
    for task, metrics in TASKS.items():
        for metric in metrics:
            cells = []
            for side in SIDES:
                got = [d["scores"][metric] for d in done if d["task"] == task and d["side"] == side]
                cells.append(f"{statistics.median(got):.3g} ({min(got):.3g} to {max(got):.3g})" if got else "")
            for side in ("deltaw", "peft"):
                took = [d["train_seconds"] for d in done if d["task"] == task and d["side"] == side]
                cells.append(f"{statistics.median(took):.0f}" if took else "")
            print(f"| {task} | {metric} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
