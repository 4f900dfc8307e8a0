"""What does a technique cost in a step? Bytes that are kept for the way back, for each token, and tokens a second.

    python benchmarks/techniques.py
    python benchmarks/techniques.py --methods lora vera

SmolLM2, 4 rows of 512 tokens, every one a label, each technique with its defaults; the base as it is stored by default,
but where a technique packs it. Each row is a process of its own: a step to warm up, one that is counted, then the
median of three; the optimizer's part is left out. Needs a quiet machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import beside

STEPS, SHAPE = 3, (4, 512)
WORDS = "the mill stands by the river, and the road goes past it"
TECHNIQUES = ["lora", "lora_fa", "multi_lora", "tied_lora", "vera", "dora", "pissa", "glora", "long_lora",
              "prefix_tuning", "qlora", "qa_lora", "loftq", "lq_lora", "full"]  # fmt: skip


def measured(_, name, path, dtype):
    """Bytes kept for each token, and tokens a second of going there and back; the base is prepared as in training."""
    import torch

    from deltaw.advise.probe import counting, micro_step
    from deltaw.api.finetune import prepare
    from deltaw.data.batch import lay
    from deltaw.data.encode import Encoded

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps({"text": f"Row {i}: {WORDS}"}) + "\n" for i in range(8)), encoding="utf-8")
        told = {"base": path, "method": name, "dtype": dtype, "steps": 1, "val": "0", "train_on": "all",
                "evaluations": 0, "batch_rows": 1, "runs": Path(folder) / "runs"}  # fmt: skip
        job = prepare([str(file)], told).job
        ids = torch.randint(1000, 40000, SHAPE, generator=torch.Generator().manual_seed(0))
        batch = lay([Encoded(tuple(row), (True,) * len(row)) for row in ids.tolist()])
        with job.adapter.on():
            micro_step(job, batch)
            with counting(job.model, job.adapter) as kept:
                micro_step(job, batch)
            seconds = [micro_step(job, batch) for _ in range(STEPS)]
    return {"trained": job.adapter.parameter_count, "kept_bytes_per_token": kept() / ids.numel(),
            "tokens_per_second": ids.numel() / statistics.median(seconds), "seconds": seconds}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=TECHNIQUES, choices=TECHNIQUES)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one)))
        return 0
    path, dtype, done = beside.base(), beside.type_here(), []
    print(f"| {dtype}, 4x512 | trained | kept for each token | tokens/s |\n|---|---|---|---|")
    for name in args.methods:
        row = {"name": name, "dtype": dtype, **beside.alone(__file__, "deltaw", name, path, dtype)}
        done.append(row)
        print(f"| {name} | {row['trained']:,} | {row['kept_bytes_per_token'] / 1e3:.0f} kB "
              f"| {row['tokens_per_second']:.0f} |", flush=True)  # fmt: skip
        beside.keep("techniques", done, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
