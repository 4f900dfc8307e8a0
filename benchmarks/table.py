"""Every technique with its defaults, a minute of training each: score, trained numbers, bytes, memory, speed, merging.

    make table                                               # restaurant with three seeds, smarthome_json with one
    python benchmarks/table.py --methods lora dora --seeds 0         # some of it
    python benchmarks/table.py --out benchmarks/results/table.jsonl  # what was measured last, as a table
    python benchmarks/table.py --methods lora --set learning_rate=2e-3 --out /tmp/rates.jsonl

Each row is a process of its own and one JSON line, written when it is done; a row that is in the file already is not
made again, so an interrupted call goes on where it was. Needs DELTAW_DATA and the extra `eval`, and a quiet machine.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quality import ANSWER_TOKENS, DATA, rows_of

MINUTES, MERGED = 1, ("restaurant", 0)
TASKS = {"restaurant": ("bleu", [0, 1, 2]), "smarthome_json": ("intent", [0])}
TECHNIQUES = {
    "lora": {}, "rslora": {"method": "lora", "rslora": True}, "lora+": {"method": "lora", "loraplus_lr_ratio": 16},
    "dora": {}, "pissa": {}, "lora_fa": {}, "multi_lora": {},
    "tied_lora": {}, "tied_lora tl5": {"method": "tied_lora", "variant": "tl5"},
    "tied_lora tl2": {"method": "tied_lora", "variant": "tl2"}, "vera": {}, "prefix_tuning": {},
    "glora": {}, "long_lora": {}, "full": {},
}  # fmt: skip
BASE = "base"


def measured(name, task, seed, settings, rows=50):
    """One row, in this process: train, answer, merge."""
    import torch

    from deltaw.api.evaluate import grade
    from deltaw.api.finetune import prepare
    from deltaw.api.merge import merge
    from deltaw.api.persona import Persona, load_base
    from deltaw.decode.sampling import Sampling
    from deltaw.errors import UserError
    from deltaw.scoring.text import score
    from deltaw.train.events import Stepped

    metric, asked = TASKS[task][0], rows_of(task, "val")[:rows]

    def scored(persona):
        with persona.on():
            base = persona.base
            graded = grade(base.model, base.tokenizer, asked, Sampling(max_new_tokens=ANSWER_TOKENS))
        return {"metric": metric, "score": score(graded, [metric])[metric]}

    if name == BASE:
        return scored(Persona(BASE, load_base("smollm2-135m")))
    with tempfile.TemporaryDirectory() as folder:
        chosen = {"method": name, "minutes": MINUTES, "val": "0", "evaluations": 0, "seed": seed, "runs": Path(folder)}
        file = DATA / "sft" / f"{task}_train.jsonl"
        made = prepare([str(file)], {**chosen, **TECHNIQUES.get(name, {}), **settings})
        made.job.question = None
        events = list(made.events())
        finished, tokens = events[-1], sum(e.tokens for e in events if isinstance(e, Stepped))
        persona = Persona("tuned", made.base, made.job.adapter.eval())
        merged = None
        if (task, seed) == MERGED:
            with contextlib.suppress(UserError):  # a prefix is no weight
                merged = merge(persona, Path(folder) / "merged", asked[:16]).difference.max_logit_difference
        return {
            **scored(persona), "trained": persona.adapter.parameter_count, "bytes": made.job.run.adapter.stat().st_size,
            "peak_bytes": finished.peak_bytes,
            "tokens_per_second": tokens / finished.train_seconds,
            "train_seconds": finished.train_seconds, "steps": finished.step, "loss": finished.loss,
            "merge_error": merged, "learning_rate": made.job.learning_rate,
            "threads": torch.get_num_threads(),
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=[BASE, *TECHNIQUES])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings in place of the defaults")
    parser.add_argument("--out", type=Path, default=Path("runs/table.jsonl"), help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=50, help="validation rows that are asked (default: %(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(**json.loads(args.one))))
        return 0
    settings = {name: json.loads(value) for name, _, value in (s.partition("=") for s in args.set)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for task in args.tasks:
        for name in args.methods:
            for seed in args.seeds or TASKS[task][1]:
                key = {"name": name, "task": task, "seed": seed, "settings": settings}
                if any(all(d[k] == v for k, v in key.items()) and d.get("rows", 50) == args.rows for d in done) or (
                    name == BASE and seed
                ):
                    continue
                began = time.monotonic()
                asked = json.dumps({**key, "rows": args.rows})
                said = subprocess.run([sys.executable, __file__, "--one", asked], check=True, text=True,
                                      stdout=subprocess.PIPE).stdout  # fmt: skip
                row = {
                    **key,
                    "rows": args.rows,
                    **json.loads(said.splitlines()[-1]),
                    "seconds": time.monotonic() - began,
                }
                done.append(row)
                with args.out.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                print(json.dumps({k: row.get(k) for k in (*key, "score", "steps", "seconds")}), flush=True)
    table(done)
    return 0


def table(done):
    """Medians over seeds with the lowest and the highest, as Markdown."""
    print("\n| technique | BLEU | of LoRA's gain | intent | trained | adapter | peak | tokens/s | merged |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [d for d in done if not d["settings"]]
    bleu = {n: [d["score"] for d in rows if (d["name"], d["task"]) == (n, "restaurant")] for n in [BASE, *TECHNIQUES]}
    gain = statistics.median(bleu["lora"]) - bleu[BASE][0] if bleu["lora"] and bleu[BASE] else None
    for name, got in bleu.items():
        mine = [d for d in rows if d["name"] == name]
        if not mine:
            continue
        intent = [d["score"] for d in mine if d["task"] == "smarthome_json"]
        cells = [f"{statistics.median(got):.1f}" + (f" ({min(got):.1f} to {max(got):.1f})" if len(got) > 1 else "")]
        cells += [f"{(statistics.median(got) - bleu[BASE][0]) / gain:.0%}" if gain and name != BASE else ""]
        cells += [f"{intent[0]:.2f}" if intent else ""]
        if name != BASE:
            wanted = ("trained", "bytes", "peak_bytes", "tokens_per_second")
            trained, size, peak, speed = (statistics.median(d[k] for d in mine) for k in wanted)
            off = [d["merge_error"] for d in mine if d["merge_error"] is not None]
            cells += [f"{trained:,.0f}", f"{size / 1e6:.2f} MB", f"{peak / 1e9:.2f} GB", f"{speed:.0f}"]
            cells += [f"{max(off):.0e}" if off else "none"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
