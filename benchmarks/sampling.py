"""What does it cost to draw the next token of each row of a batch? Milliseconds a row, of 49,152 logits.

    python benchmarks/sampling.py

Three ways: a softmax, a full sort and torch.multinomial, as tokens were drawn before; torch's way of today in fp64,
which is what native code is tested by; and native code. Logits are normal with a deviation of 3, in float32; the best
of several calls is taken. One thread, and the time of its processor, as others on the machine disturb it less; last,
what passes on the clock with all threads.
"""

import argparse
import os
import sys
import time

import torch

from deltaw.kernels import draw as kernel
from deltaw.kernels.draw import Draw, drawn
from deltaw.kernels.library import instruction_set

VOCABULARY, TIMES, MANY = 49152, 15, 300
WAYS = {"temperature 0.8": Draw(0.8), "and top-p 0.95": Draw(0.8, top_p=0.95), "and top-k 50": Draw(0.8, top_k=50),
        "and min-p 0.05": Draw(0.8, min_p=0.05)}  # fmt: skip


def before(logits_V, how, rng):
    """A token, as it was drawn by torch."""
    p_V, order_V = (logits_V / how.temperature).softmax(-1).sort(descending=True)
    keep_V = (p_V.cumsum(-1) - p_V < how.top_p) | (how.top_p == 1)
    keep_V &= p_V >= how.min_p * p_V[0]
    if how.top_k:
        keep_V[how.top_k :] = False
    p_V = p_V * keep_V
    return int(torch.multinomial(torch.zeros_like(p_V).scatter_(0, order_V, p_V / p_V.sum()), 1, generator=rng))


def best_ms(call, rows, clock=time.process_time, threads=1, times=TIMES):
    """Of several calls, after one; for each row."""
    torch.set_num_threads(threads)
    call()
    took = []
    for _ in range(times):
        began = clock()
        call()
        took.append(clock() - began)
    return 1e3 * min(took) / rows


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    threads = torch.get_num_threads()
    print(f"{instruction_set()}, {os.cpu_count()} cores\n")
    print(f"| rows | drawn with | torch as before | reference | native | native, {threads} threads |")
    print("|---|---|---|---|---|---|")
    rng = torch.Generator().manual_seed(0)
    for rows in (1, 32):
        logits = list(3 * torch.randn(rows, VOCABULARY, generator=rng))
        for name, how in WAYS.items():
            hows = [how._replace(number=(i + 0.5) / rows) for i in range(rows)]
            old = best_ms(lambda rows=logits, how=how: [before(logits_V, how, rng) for logits_V in rows], rows)
            plain = best_ms(lambda rows=logits, hows=hows: list(map(kernel._drawn, rows, hows)), rows)
            native = best_ms(lambda rows=logits, hows=hows: drawn(rows, hows), rows)
            passed = best_ms(lambda rows=logits, hows=hows: drawn(rows, hows), rows, time.perf_counter, threads, MANY)
            print(f"| {rows} | {name} | {old:.2f} | {plain:.2f} | {native:.3f} | {passed:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
