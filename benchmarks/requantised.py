"""What merging into few bits changes: QA-LoRA before and after, and beside it QLoRA, merged and rounded.

    python benchmarks/requantised.py --minutes 2

Both are trained on `smarthome_json`, in float32; every row of its other part is answered greedily by each model that
can be made of them. Counted: answers that are another text than that of the same adapter, worn by the base it was
trained on; measured: perplexity of the right answers. Needs DELTAW_DATA.
"""

import argparse
import os
import tempfile
from pathlib import Path

from deltaw.api.evaluate import perplexity, prompt_ids
from deltaw.api.exchange import export, requantised
from deltaw.api.finetune import finetune
from deltaw.api.merge import merge, quantize
from deltaw.api.persona import Persona, load, load_base
from deltaw.data import files as reading
from deltaw.data.batch import micro_batches
from deltaw.data.encode import encode_all
from deltaw.decode.generate import complete
from deltaw.decode.sampling import Sampling

DATA = Path(os.environ.get("DELTAW_DATA", "../shared/data")) / "sft"
ORIGINAL = "smollm2-135m"


def spoken(persona, rows):
    """All its answers, and the perplexity of the right ones."""
    base = persona.base
    encoded = encode_all(rows, base.tokenizer, "answers", 8192)[0]
    with persona.on():
        answers = complete(base.model, base.tokenizer, [prompt_ids(row, base.tokenizer) for row in rows],
                           Sampling(max_new_tokens=90))  # fmt: skip
        return [answer.text for answer in answers], perplexity(base.model, micro_batches(encoded, 2048))


def told(what, persona, rows, before=None):
    """Print a line; return what it said."""
    answers, ppl = spoken(persona, rows)
    same = "" if before is None else sum(a != b for a, b in zip(answers, before, strict=True))
    print(f"| {what} | {same} | {ppl:.4f} |", flush=True)
    return answers


def plain(path, dtype="float32"):
    return Persona("merged", load_base(str(path), dtype))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2)
    args = parser.parse_args()
    rows = reading.read(DATA / "smarthome_json_val.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        tuned = {m: finetune(DATA / "smarthome_json_train.jsonl", method=m, dtype="float32", minutes=args.minutes,
                             val="0", evaluations=0, runs=made / "runs", name=m, listen=())
                 for m in ("qa_lora", "qlora")}  # fmt: skip
        print(f"| of {len(rows)} answers | other than worn | perplexity |\n|---|---|---|")
        qa, q = tuned.values()
        for form in ("int4-g32", "nf4-dq"):  # by themselves
            encoded = encode_all(rows, qa.base.tokenizer, "answers", 8192)[0]
            base = load_base(ORIGINAL, "float32", base_format=form)
            print(
                f"| the base as {form}, nothing worn | | {perplexity(base.model, micro_batches(encoded, 2048)):.4f} |"
            )
        before = told("QA-LoRA, worn", qa, rows)
        requantised(qa, made / "int4")
        told("merged: int4-g32, offsets of 32 bits", plain(made / "int4"), rows, before)
        told("merged, computed in bfloat16", plain(made / "int4", "bfloat16"), rows, before)
        told("worn, computed in bfloat16", load("qa_lora", made / "runs", dtype="bfloat16"), rows, before)
        export(qa, "gguf", made / "qa.gguf", "Q4_1")
        told("merged: Q4_1, offsets of 16 bits", plain(made / "qa.gguf"), rows, before)
        before = told("QLoRA, worn", q, rows)
        merge(q, made / "own")
        told("merged into its packed base's plain numbers", plain(made / "own"), rows, before)
        merge(q, made / "original", into=load_base(ORIGINAL, "float32"))
        told("merged into the original", plain(made / "original"), rows, before)
        requantised(q, made / "nf4")
        told("merged, rounded to nf4-dq again", plain(made / "nf4"), rows, before)
        for name in ("own", "original"):
            quantize(str(made / name), "int4-g32", made / f"{name}4")
            told(f"merged ({name}), rounded to int4-g32", plain(made / f"{name}4"), rows, before)


if __name__ == "__main__":
    main()
