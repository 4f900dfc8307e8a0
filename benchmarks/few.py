"""How long do few rows take through every matrix of SmolLM2? Each read as it lies, laid anew for squares, and by torch.

    OMP_NUM_THREADS=1 python benchmarks/few.py      # by the processor's time of this thread: other work counts least
    python benchmarks/few.py                        # by the clock, with all threads: needs a quiet machine

Matrices are random, and as many as the model has: none is in a cache when its turn comes. The least of fifteen times;
sides take turns. Bytes are those of the matrices.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
LAYERS, HEAD, TIMES = 30, (49152, 576), 15
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def least_seconds(calls, clock):
    """Of each call by its name: all in turn, several times, after once."""
    seconds = {name: [] for name in calls}
    for _ in range(TIMES + 1):
        for name, call in calls.items():
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def through(way, x, matrices):
    """Rows of each width through all matrices."""
    for w in matrices:
        way(x[w.shape[1]], w)


def sides():
    """Ways to multiply x with W'."""
    import torch
    import torch.nn.functional as F

    from deltaw.kernels.products import summed, times

    def laid(x, w):
        """As where a second product is none that is read as it lies: one of depth 1, of nothing."""
        nothing = torch.zeros(1, len(w), dtype=x.dtype)
        return summed([(x, w.t()), (nothing[:, :1].expand(len(x), 1).contiguous(), nothing)], fewest=1)

    return {"as it lies": times, "laid anew": laid, "torch": F.linear}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    args = parser.parse_args()
    import torch

    from deltaw.kernels.library import instruction_set

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    matrices = [torch.randn(*shape).bfloat16() for shape in (*LAYER * LAYERS, HEAD)]
    moved = sum(w.nbytes for w in matrices)
    print(f"{instruction_set()}, {torch.get_num_threads()} threads: {len(matrices)} matrices, {moved / 1e6:.0f} MB\n")
    print("| rows | as it lies, ms | GB/s | GFLOP/s | laid anew, ms | torch, ms |\n|---|---|---|---|---|---|")
    done = []
    with torch.inference_mode():
        for rows in ROWS:
            x = {width: torch.randn(rows, width).bfloat16() for width in {w.shape[1] for w in matrices}}
            calls = {name: partial(through, way, x, matrices) for name, way in sides().items()}
            row = {"rows": rows, "threads": torch.get_num_threads(), "bytes": moved, **least_seconds(calls, clock)}
            done.append(row)
            ours = row["as it lies"]
            print(f"| {rows} | {ours * 1e3:.1f} | {moved / ours / 1e9:.0f} | {rows * moved / ours / 1e9:.0f} "
                  f"| {row['laid anew'] * 1e3:.1f} | {row['torch'] * 1e3:.1f} |", flush=True)  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "few.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
