"""What each format and technique of a packed base costs and keeps: bits, perplexity, distance to the base.

    make table-quant                                        # every row; goes on where it was stopped
    python benchmarks/formats.py --rows nf3 "loftq nf3" --out /tmp/some.jsonl

Of `wikitext2/valid_pages`, pages 1 to 30 are trained on, for a minute, and tell what matters; 64 stretches of 512
tokens of pages 31 to 60 measure before and after, against the base in bfloat16. Bits: of all matrices of the layers,
and with the adapter's numbers at 16 bits each. Each row is a process of its own and one JSON line. Needs DELTAW_DATA,
and a quiet machine.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DATA = Path(os.environ.get("DELTAW_DATA", "../shared/data")) / "wikitext2"
SECONDS, WIDE, COUNT, AT_ONCE = 60, 512, 64, 4
PLAIN = ["bf16", "fp16", "fp32", "int8", "nf4", "nf4-dq", "fp4", "int4-g32", "int4-g64", "nf3", "nf2"]
OWN = {"int4-g32": ", the base's own grid"}
ROWS = {
    **{name + OWN.get(name, ""): {"base_format": name} for name in PLAIN},
    **{f"loftq {f}": {"method": "loftq", "format": f} for f in ("nf4", "nf3", "nf2")},
    "loftq nf3 r64": {"method": "loftq", "format": "nf3", "rank": 64},
    "lq_lora nf3, no Fisher": {"method": "lq_lora", "format": "nf3", "fisher": False},
    "lq_lora nf3": {"method": "lq_lora", "format": "nf3"},
    **{f"lq_lora {b} bits": {"method": "lq_lora", "bits": b} for b in (2.5, 2.75, 3.0)},
    # Uniform formats of the same sizes; nf2 above has 2.5 bits
    "nf2-b43 of 2.75 bits": {"base_format": "nf2-b43"},
    "int2-g32 of 3.0 bits": {"base_format": "int2-g32"},
}


def stretches(base):
    """The pages, as tokens, and of the second half of them what is measured on."""
    from deltaw.data.batch import lay
    from deltaw.data.encode import Encoded

    lines = (DATA / "valid_pages.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [base.tokenizer.encode(json.loads(line)["page"]) for line in lines]
    ids = [i for page in pages[30:60] for i in page]
    rows = [Encoded(tuple(ids[i * WIDE : (i + 1) * WIDE]), (True,) * WIDE) for i in range(COUNT)]
    return pages, [lay(rows[i : i + AT_ONCE]) for i in range(0, COUNT, AT_ONCE)]


def read(model, batches, of):
    """What `of` makes of the hidden states where a token follows, and of the tokens that do; in pieces.

    Every processor reads batches of its own: on some, products of two threads are slower.
    """
    import torch

    from deltaw.data.batch import IGNORED

    @torch.inference_mode()
    def one(batch):
        labelled_N = (batch.labels_T != IGNORED).nonzero()[:, 0]
        h_ND = model.hidden(batch.ids_T, batch.at_T, batch.seen)[labelled_N]
        return [of(*piece) for piece in zip(h_ND.split(WIDE), batch.labels_T[labelled_N].split(WIDE), strict=True)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return [piece for pieces in pool.map(one, batches) for piece in pieces]
    finally:
        torch.set_num_threads(threads)


def stated(file):
    """Keep what the base in bfloat16 says after every token, as far as distances from it need it.

    KL(p | q) = sum p log p - E_p[w] . h + log sum exp(W h), of its shares p, the head W, and h of another model.
    """
    import torch

    from deltaw.api.persona import load_base

    base = load_base("smollm2-135m", "float32", base_format="bf16")
    head = base.model.head_VD().double()

    def said(h_ND, _):
        log_p = base.model.logits(h_ND).double().log_softmax(1)
        return log_p.exp() @ head, (log_p.exp() * log_p).sum(1)

    torch.save({"head": base.model.head_VD(), "said": read(base.model, stretches(base)[1], said)}, file)
    return {}


def measured(chosen, file):
    """One row, in this process; the file is of `stated`."""
    import torch

    from deltaw.api.finetune import prepare
    from deltaw.api.persona import load_base
    from deltaw.models.slots import Linear
    from deltaw.weights import Packed

    base = load_base("smollm2-135m", "float32")
    pages, batches = stretches(base)
    kept = torch.load(file)

    def compared(model):
        """Perplexity, and the mean Kullback-Leibler divergence from the base, a token."""
        head_VD = model.head_VD()
        assert torch.equal(head_VD, kept["head"]), "only layers are packed"

        def said(h_ND, labels_N):
            lse_N, h_ND = model.logits(h_ND).logsumexp(1).double(), h_ND.double()
            return h_ND, lse_N, (lse_N - (h_ND * head_VD[labels_N]).sum(1)).sum().item()

        loss = apart = tokens = 0.0
        for (h_ND, lse_N, less), (mean_ND, certain_N) in zip(read(model, batches, said), kept["said"], strict=True):
            loss, tokens = loss + less, tokens + len(h_ND)
            apart += (certain_N - (h_ND * mean_ND).sum(1) + lse_N).sum().item()
        return {"perplexity": math.exp(loss / tokens), "kl": apart / tokens}

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pages.jsonl"
        texts = [
            base.tokenizer.decode(page[i : i + WIDE - 8]) for page in pages[:30] for i in range(0, len(page), WIDE - 8)
        ]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        began = time.monotonic()
        told = {"method": "lora", "dtype": "float32", "max_tokens": WIDE, "train_on": "all", "val": "0",
                "evaluations": 0, "minutes": SECONDS / 60, "learning_rate": 5e-4, "batch_rows": 1,
                "runs": Path(folder) / "runs"}  # fmt: skip
        made = prepare([str(file)], told | chosen)
        prepared = time.monotonic() - began
        made.job.question = None
        adapter, model = made.job.adapter, made.base.model
        own = [m for m in adapter.modules() if isinstance(m, Packed)]
        weights = own or [slot.weight for slot in model.layers.modules() if isinstance(slot, Linear)]
        numbers = sum(w.shape[0] * w.shape[1] for w in weights)
        bits = 8 * sum(w.stored_bytes for w in weights) / numbers
        with adapter.on():
            before = compared(model)
            finished = list(made.events())[-1]
            adapter.eval()
            after = compared(model)
        return {"bits": bits, "bits_with_adapter": bits + 16 * adapter.parameter_count / numbers, "before": before,
                "after": after, "steps": finished.step, "prepare_seconds": prepared}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/formats.jsonl"), help="default: %(default)s")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, file = args.one
        print(json.dumps(measured(ROWS[name], file) if name else stated(file)))
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    wanted = [name for name in args.rows if all(d["name"] != name for d in done)]
    with tempfile.TemporaryDirectory() as folder:
        for name in ["", *wanted] if wanted else []:
            began = time.monotonic()
            command = [sys.executable, __file__, "--one", name, f"{folder}/base.pt"]
            said = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
            if not name:
                continue
            done.append({"name": name, **json.loads(said.splitlines()[-1]), "seconds": time.monotonic() - began})
            with args.out.open("a") as f:
                f.write(json.dumps(done[-1]) + "\n")
            print(json.dumps(done[-1]), flush=True)
    print("\n| base | bits | with adapter | perplexity before | KL | perplexity after | KL | steps | started in |")
    print("|---|---|---|---|---|---|---|---|---|")
    for d in done:
        cells = [f"{d['bits']:.3f}", f"{d['bits_with_adapter']:.2f}"]
        for when in ("before", "after"):
            cells += [f"{d[when]['perplexity']:.4g}", f"{d[when]['kl']:.3g}"]
        print(f"| {d['name']} | " + " | ".join([*cells, str(d["steps"]), f"{d['prepare_seconds']:.0f} s"]) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
