"""How far is each model family from transformers? The largest difference of a logit, in float32.

    python benchmarks/families.py

Small random models of the configurations that the tests use, 200 tokens each; greedy answers with a cache, against
those of `transformers`' own generation.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from conftest import write_tiny  # noqa: E402 (after the path)
from oracles import hf_logits, our_logits  # noqa: E402
from parity.test_families import LONG, VARIANTS  # noqa: E402

from deltaw.decode.generate import generate  # noqa: E402
from deltaw.decode.sampling import Sampling  # noqa: E402
from deltaw.models import checkpoint  # noqa: E402

NEW = 40


def measured(changes, folder):
    """Largest difference of a logit, and how many of `NEW` greedy tokens are the same."""
    hf = write_tiny(folder, changes)
    hf.set_attn_implementation("eager")
    ours = checkpoint.load(folder)
    off = (our_logits(ours, LONG) - hf_logits(hf, LONG)).abs().max().item()
    prompt = LONG[:50]
    said = [t for step in generate(ours, [prompt.tolist()], Sampling(max_new_tokens=NEW), set()) for _, t in step]
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = hf.generate(prompt[None], attention_mask=torch.ones(1, 50), **options)[0, 50:].tolist()
    return off, sum(a == b for a, b in zip(said, theirs, strict=True))


def main():
    print(f"| configuration | max logit difference | greedy tokens the same, of {NEW} |\n|---|---|---|")
    for name, changes in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            off, same = measured(changes, Path(folder))
        print(f"| {name} | {off:.1e} | {same} |", flush=True)


if __name__ == "__main__":
    main()
