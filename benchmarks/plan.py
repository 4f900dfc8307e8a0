"""How far is the plan off? Predicted and measured time and memory; and seconds from the command to the first step.

    python benchmarks/plan.py --out benchmarks/results/plan.json

Five shapes of data, each trained once by the command line in a process of its own, with its validation and samples.
Needs DELTAW_DATA. Run it on a quiet machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deltaw.models import source
from deltaw.models.tokenizer import Tokenizer

DATA = Path(os.environ.get("DELTAW_DATA", "../shared/data"))
SPEECHES = DATA / "long" / "state_union_1945_1990.txt"


def cases(scratch):
    """Name, and arguments of `deltaw train`."""
    sft = DATA / "sft"
    yield "village", ["examples/village/train.jsonl", "--epochs", "1"]
    yield "restaurant", [sft / "restaurant_train.jsonl", "--epochs", "1"]
    yield "sql", [sft / "sql_train.jsonl", "--epochs", "1"]
    text = ["--train-on", "all", "--epochs", "1", "--val", "0"]
    yield "16 x 2,048 tokens", [documents(scratch / "long.jsonl", [2048] * 16), *text]
    short = [60 + i % 50 for i in range(64)]
    yield "one of 8,000 among short", [documents(scratch / "mixed.jsonl", [*short[:20], 8000, *short[20:]]), *text]


def documents(path, lengths):
    """Plain-text rows of these lengths in tokens, cut from speeches."""
    tokenizer = Tokenizer.load(source.find("smollm2-135m"))
    ids = tokenizer.encode(SPEECHES.read_text()[: sum(lengths) * 8])
    with path.open("w") as f:
        for n in lengths:
            some, ids = ids[: n - 1], ids[n - 1 :]
            f.write(json.dumps({"text": tokenizer.decode(some)}) + "\n")
    return path


def measured(name, arguments, runs):
    """Train in a process of its own; what its events say."""
    began = time.time()
    command = [sys.executable, "-m", "deltaw.cli", "train", *map(str, arguments), "--runs", str(runs), "--json"]
    first, known, finished, planned = None, None, {}, {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "stepped" and first is None:
                first = time.time() - began
            if event["event"] == "planned":
                planned, known = event, time.time() - began
            finished = event if event["event"] == "finished" else finished
    seconds, memory = finished["train_seconds"], finished["peak_bytes"]
    return {
        "case": name, "steps": finished["step"], "planned_after_seconds": known, "first_step_seconds": first,
        "predicted_seconds": finished["predicted_seconds"], "seconds": seconds,
        "time_off": seconds / finished["predicted_seconds"] - 1,
        "predicted_bytes": finished["predicted_bytes"], "bytes": memory,
        "memory_off": memory / finished["predicted_bytes"] - 1, "recompute": planned["recompute"],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", help="only cases whose name begins so")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan.json"))
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, arguments in cases(Path(scratch)):
            if args.cases and not name.startswith(tuple(args.cases)):
                continue
            results.append(measured(name, arguments, Path(scratch) / "runs"))
            print(json.dumps(results[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    head = "data | plan known | first step done | predicted | took | off | predicted | held at most | off"
    print(f"\n| {head} |\n" + "|---" * 9 + "|")
    for r in results:
        first = f"{r['planned_after_seconds']:.1f} s | {r['first_step_seconds']:.1f} s"
        took = f"{r['predicted_seconds']:.0f} s | {r['seconds']:.0f} s | {r['time_off']:+.0%}"
        memory = f"{r['predicted_bytes'] / 1e9:.2f} GB | {r['bytes'] / 1e9:.2f} GB | {r['memory_off']:+.0%}"
        print(f"| {r['case']} | {first} | {took} | {memory} |")


if __name__ == "__main__":
    main()
