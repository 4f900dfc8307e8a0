"""Does the search through a GLoRA supernet find more than chance? As many candidates of either kind, on the same rows.

    python benchmarks/paths.py                    # one supernet, three seeds of the search, 64 candidates each way
    python benchmarks/paths.py --steps 10 --evaluations 8 --seeds 0

The supernet learns the restaurant rows but the last 24, which are the search split; what is found is measured on fifty
validation rows, which nothing has seen. Needs DELTAW_DATA.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from deltaw.api.evaluate import rows_of
from deltaw.api.finetune import prepare
from deltaw.api.persona import Persona
from deltaw.api.search import Search, measure, search

DATA = Path(os.environ.get("DELTAW_DATA", "../shared/data")) / "sft"
SEARCHED, TESTED = 24, 50


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--budget", type=int, default=600_000)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = (DATA / "restaurant_train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        test = (DATA / "restaurant_val.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:TESTED]
        for name, some in (("train", lines[:-SEARCHED]), ("search", lines[-SEARCHED:]), ("test", test)):
            (folder / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
        made = prepare([str(folder / "train.jsonl")],
                       {"method": "glora", "supernet": True, "steps": args.steps, "val": "0", "evaluations": 0,
                        "runs": folder / "runs"})  # fmt: skip
        made.job.question = None
        list(made.events())
        persona = Persona("super", made.base, made.job.adapter.eval())
        picked, test_rows = (rows_of(folder / f"{name}.jsonl", persona) for name in ("search", "test"))
        deltas = [delta for _, delta in persona.adapter.named_deltas()]
        print("| seed | candidates | best on search split | trained | on test split | most that was tried |")
        print("|---|---|---|---|---|---|")
        for seed in args.seeds:
            for evolve in (True, False):
                chosen = Search(budget=args.budget, evaluations=args.evaluations, seed=seed, evolve=evolve)
                found = list(search(persona, picked, chosen, folder / "log.jsonl"))
                best = min(found, key=lambda m: m.perplexity)
                tested = measure(persona, deltas, best.paths, test_rows)
                how, most = "evolved" if evolve else "at random", max(m.parameters for m in found)
                print(f"| {seed} | {how} | {best.perplexity:.4f} | {best.parameters:,} | {tested:.4f} | {most:,} |",
                      flush=True)  # fmt: skip
        print(json.dumps({"budget": args.budget, "evaluations": args.evaluations, "steps": args.steps}))


if __name__ == "__main__":
    sys.exit(main())
