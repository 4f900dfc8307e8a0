"""One adapter for three tasks at once: MultiLoRA beside LoRA of about as many numbers; scores, and spread of updates.

    python benchmarks/multitask.py                   # three seeds; each run is a JSON line, and is not made again
    python benchmarks/multitask.py --seeds 0

Restaurant, smarthome_json and sql are mixed, a row of each as often as any other. For every side: the score of each
task, and, as medians over all layers, the share of the largest singular value in the sum of all and the effective rank
exp(entropy) of the update. Needs DELTAW_DATA and the extra `eval`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from quality import ANSWER_TOKENS, DATA, TASKS, rows_of

from deltaw.api.evaluate import grade
from deltaw.api.finetune import prepare
from deltaw.api.persona import Persona
from deltaw.decode.sampling import Sampling
from deltaw.scoring.text import score

ROWS = 50
SIDES = {
    "LoRA, rank 24": {"method": "lora", "rank": 24, "alpha": 48.0},
    "MultiLoRA, 3 parts of rank 8": {"method": "multi_lora"},
}
SETTINGS = {"epochs": 0.5, "batch_rows": 8, "val": "0", "evaluations": 0}


def spread(adapter):
    """Medians over layers: share of the largest singular value, and effective rank."""
    shares, ranks = [], []
    for form in adapter.low_rank().values():
        _, ra = torch.linalg.qr(form.A_RI.detach().t().double())
        _, rb = torch.linalg.qr(form.B_OR.detach().double())
        s = torch.linalg.svdvals(rb @ ra.t())
        s = s[s > 0] / s.sum()
        shares.append(float(s[0]))
        ranks.append(float((-(s * s.log()).sum()).exp()))
    return {"share": statistics.median(shares), "effective_rank": statistics.median(ranks)}


def run(side, seed):
    with tempfile.TemporaryDirectory() as runs:
        files = [str(DATA / "sft" / f"{task}_train.jsonl") for task in TASKS]
        made = prepare(files, {**SETTINGS, **SIDES[side], "seed": seed, "runs": Path(runs)})
        made.job.question = None
        *_, finished = made.events()
        persona, scores = Persona("tuned", made.base, made.job.adapter.eval()), {}
        with persona.on():
            for task, metrics in TASKS.items():
                graded = grade(made.base.model, made.base.tokenizer, rows_of(task, "val")[:ROWS],
                               Sampling(max_new_tokens=ANSWER_TOKENS))  # fmt: skip
                scores[task] = score(graded, metrics[-1:])[metrics[-1]]
    return {"scores": scores, "trained": persona.adapter.parameter_count, "seconds": finished.train_seconds,
            **spread(persona.adapter)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/multitask.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for seed in args.seeds:
        for side in SIDES:
            if not any((d["side"], d["seed"]) == (side, seed) for d in done):
                done.append({"side": side, "seed": seed, **run(side, seed)})
                with args.out.open("a") as f:
                    f.write(json.dumps(done[-1]) + "\n")
                print(json.dumps(done[-1]), flush=True)
    print(
        f"\n| | {' | '.join(f'{task}, {m[-1]}' for task, m in TASKS.items())} | trained | σ₁ share | effective rank |"
    )
    print("|---|" + "---|" * (len(TASKS) + 3))
    for side in SIDES:
        mine = [d for d in done if d["side"] == side]
        if mine:
            cells = [f"{statistics.median(d['scores'][task] for d in mine):.3g}" for task in TASKS]
            middle = [statistics.median(d[k] for d in mine) for k in ("trained", "share", "effective_rank")]
            print(
                f"| {side} | "
                + " | ".join([*cells, f"{middle[0]:,.0f}", f"{middle[1]:.3f}", f"{middle[2]:.1f}"])
                + " |"
            )


if __name__ == "__main__":
    sys.exit(main())
