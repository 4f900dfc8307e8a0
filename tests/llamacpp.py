"""llama.cpp as an oracle, in a process of its own: python tests/llamacpp.py MODEL.gguf IDS NEW [LORA.gguf]

Prints as JSON the greedy text after the ids, and the log-probability of every token that may come first.
"""

import json
import subprocess
import sys
from pathlib import Path


def asked(path, ids, new, lora=None):
    """The text that llama.cpp adds to these ids, and the log-probabilities of its first token by id."""
    told = [sys.executable, __file__, str(path), json.dumps(ids), str(new), *([str(lora)] if lora else [])]
    done = subprocess.run(told, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    answer = json.loads(lines[-1])
    return answer["text"], {int(i): p for i, p in answer["first"].items()}


def main(path, ids, new, lora=None):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 512, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    server = xllamacpp.Server(params)
    wanted = {
        "prompt": json.loads(ids),
        "n_predict": int(new),
        "temperature": 0,
        "n_probs": 1000,
        "cache_prompt": False,
    }
    choice = server.handle_completions(wanted)["choices"][0]
    first = choice["logprobs"]["content"][0]["top_logprobs"]
    sys.stdout.write(json.dumps({"text": choice["text"], "first": {t["id"]: t["logprob"] for t in first}}) + "\n")


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # no module of the tests stands in for a library's
    main(*sys.argv[1:])
