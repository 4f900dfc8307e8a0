"""How near is each native kernel to what the machine can do, and how far from torch's way?

    python benchmarks/roofline.py

Sizes are those of a step of SmolLM2 over 4 rows of 512 tokens. A kernel cannot be quicker than its operations at the
rate of a large matrix product, nor than its bytes at that of a copy; the larger of the two, over the time it takes, is
its share of the roofline. Rates are measured first; times are medians of nine. Needs a quiet machine.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import beside

ROWS, LENGTH, WIDTH, INNER, HEADS, KV_HEADS, SIZE, VOCABULARY, LABELS = 4, 512, 576, 1536, 9, 3, 64, 49152, 128
TIMES = 9


def median_seconds(call):
    """Of several calls, after one."""
    call()
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def rates(dtype):
    """Operations a second of a large product, and bytes a second of a large copy, read and written."""
    import torch

    x = torch.randn(2048, 2048).to(dtype)
    long = torch.zeros(1 << 27)
    there = torch.empty_like(long)
    return 2 * 2048**3 / median_seconds(lambda: x @ x), 2 * long.nbytes / median_seconds(lambda: there.copy_(long))


def there_and_back(call, inputs):
    """The call alone, and its way back alone."""
    import torch

    inputs = [t.detach().requires_grad_() for t in inputs]
    out = call(*inputs)
    back = torch.randn_like(out)
    return (lambda: call(*inputs)), (lambda: torch.autograd.grad(out, inputs, back, retain_graph=True))


def cases(dtype):
    """Of each kernel: name, our call, torch's call, operations, bytes."""
    import torch
    import torch.nn.functional as F

    from deltaw.kernels.attention import attend
    from deltaw.kernels.rows import gated, rms_norm, rotate, surprise
    from deltaw.models.seen import Documents
    from deltaw.weights.formats import parse

    def drawn(*shape):
        return torch.randn(*shape).to(dtype)

    tokens, wide = ROWS * LENGTH, dtype.itemsize

    def both(name, ours, theirs, inputs, operations, numbers):
        """There and back: `operations` and `numbers` read and written of each way."""
        mine, other = there_and_back(ours, inputs), there_and_back(theirs, inputs)
        for way, i in (("", 0), (", back", 1)):
            yield name + way, mine[i], other[i], operations[i], numbers[i] * wide

    x, gain, (cosine, sine) = drawn(tokens, WIDTH), drawn(WIDTH), drawn(2, tokens, 1, SIZE)
    yield from both("norm", lambda x: rms_norm(x, gain, 1e-5), lambda x: F.rms_norm(x, (WIDTH,), gain, 1e-5), [x],
                    (4 * x.numel(), 8 * x.numel()), (2 * x.numel(), 3 * x.numel()))  # fmt: skip
    g, u = drawn(tokens, INNER), drawn(tokens, INNER)
    yield from both("gate", lambda g, u: gated(g, u, False), lambda g, u: F.silu(g) * u, [g, u],
                    (20 * g.numel(), 26 * g.numel()), (3 * g.numel(), 5 * g.numel()))  # fmt: skip
    q, k, v = drawn(tokens, HEADS, SIZE), drawn(tokens, KV_HEADS, SIZE), drawn(tokens, KV_HEADS, SIZE)

    def turned(x):
        a, b = x.chunk(2, -1)
        return x * cosine + torch.cat((-b, a), -1) * sine

    yield from both("turn", lambda x: rotate(x, cosine, sine), turned, [q], (3 * q.numel(),) * 2, (2 * q.numel(),) * 2)
    spans = Documents.of_lengths(*[LENGTH] * ROWS).spans
    pairs = ROWS * HEADS * LENGTH * (LENGTH + 1) // 2
    moved = 2 * q.numel() + 2 * k.numel()

    def attended(*x):
        q, k, v = (t.view(ROWS, LENGTH, -1, SIZE).transpose(1, 2) for t in x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(tokens, HEADS, SIZE)

    yield from both("attention", lambda *x: attend(*x, spans, SIZE**-0.5, 0), attended, [q, k, v],
                    (4 * SIZE * pairs, 10 * SIZE * pairs), (moved, 2 * moved + q.numel()))  # fmt: skip
    z, labels = drawn(LABELS, VOCABULARY), torch.randint(VOCABULARY, (LABELS,))

    logits = z.clone().requires_grad_()
    yield ("cross entropy and its gradient", lambda: surprise(z, labels, True),
           lambda: torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits),
           28 * z.numel(), 3 * z.nbytes)  # fmt: skip
    for form in ("nf4", "int4-g32"):
        w = parse(form).pack(drawn(INNER, WIDTH), dtype)
        numbers, held = INNER * WIDTH, w.stored_bytes
        one = drawn(1, WIDTH)
        yield f"{form} unpacked", w.lent, w.plain, 2 * numbers, held + numbers * wide
        yield (
            f"{form} by one row",
            lambda w=w, one=one: w(one),
            lambda w=w, one=one: one @ w.plain().t(),
            4 * numbers,
            held,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    args = parser.parse_args()
    import torch

    from deltaw.kernels.library import instruction_set

    dtype = getattr(torch, beside.type_here())
    flops, bandwidth = rates(dtype)
    print(f"{instruction_set()}, {os.cpu_count()} cores, {beside.type_here()}: {flops / 1e9:.0f} GFLOP/s in a product, "
          f"{bandwidth / 1e9:.0f} GB/s in a copy\n")  # fmt: skip
    print("| kernel | ms | GFLOP/s | GB/s | share of the roofline | torch, ms |\n|---|---|---|---|---|---|")
    done = []
    for name, ours, theirs, operations, moved in cases(dtype):
        mine, other = median_seconds(ours), median_seconds(theirs)
        share = max(operations / flops, moved / bandwidth) / mine
        done.append({"kernel": name, "seconds": mine, "torch_seconds": other, "operations": operations, "bytes": moved,
                     "roofline_share": share, "product_flops": flops, "copy_bandwidth": bandwidth})  # fmt: skip
        print(f"| {name} | {mine * 1e3:.2f} | {operations / mine / 1e9:.0f} | {moved / mine / 1e9:.1f} | {share:.0%} "
              f"| {other * 1e3:.2f} |", flush=True)  # fmt: skip
    beside.keep("roofline", done, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
