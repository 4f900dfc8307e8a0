"""Who takes the time of a training step? By torch's profiler, ours beside PEFT's.

    make bench-peers
    python benchmarks/step.py                       # 4 rows of 512 tokens, as in benchmarks/speed.py

Self times of operations, by what they are for: products with a side of at most 64 are an adapter's (or attention's,
where it is not one call), all others those of frozen weights and head, with
which our sums of both are counted. A profiled step is slower than others; shares
are what counts. Needs a quiet machine.
"""

import argparse
import json
import sys
from pathlib import Path

import beside
from speed import deltaw, peft

THIN, WARM = 64, 4
KINDS = {
    "cross entropy": ("crossentropy", "nll_loss", "log_softmax", "logsumexp"),
    "attention": ("attend", "attention", "softmax", "bmm"),
    "norms, gates, turns": ("norm", "gated", "turn", "silu", "rsqrt", "pow", "mean", "neg", "mul", "add", "sub", "div"),
    "moving and filling": ("copy", "fill", "cat", "zero", "clone", "index", "slice", "empty"),
}


def kind(event):
    """What an operation is for."""
    name = event.key.lower().removeprefix("aten::")
    if name.startswith("joined"):
        return "products of weights and head"
    if name in ("mm", "addmm", "addmm_"):
        sides = {side for shape in event.input_shapes for side in shape}
        return "products of the adapter" if min(sides) <= THIN else "products of weights and head"
    return next((k for k, names in KINDS.items() if any(part in name for part in names)), "the rest")


def measured(side, path, dtype, shape):
    """Milliseconds of each kind."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    ids = torch.randint(1000, 40000, tuple(map(int, shape.split("x"))))
    step = {"deltaw": deltaw, "peft": peft}[side](path, getattr(torch, dtype), ids)
    for _ in range(WARM):  # until its memory is its own
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as told:
        step()
    found = {}
    for event in told.key_averages(group_by_input_shape=True):
        found[kind(event)] = found.get(kind(event), 0.0) + event.self_cpu_time_total / 1e3
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4x512", help="rows x tokens; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one)))
        return 0
    path, dtype = beside.base(), beside.type_here()
    rows = {side: beside.alone(__file__, side, path, dtype, args.shape) for side in ("deltaw", "peft")}
    print(f"| {dtype}, {args.shape} | " + " | ".join(f"{side}, ms" for side in rows) + " |\n|---|---|---|")
    for name in dict.fromkeys(name for found in rows.values() for name in sorted(found, key=found.get, reverse=True)):
        print(f"| {name} | " + " | ".join(f"{found.get(name, 0):.0f}" for found in rows.values()) + " |")
    print("| in all | " + " | ".join(f"{sum(found.values()):.0f}" for found in rows.values()) + " |")
    beside.keep("step", rows, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
