"""llama.cpp as an oracle, in a process of its own: python tests/llamacpp.py MODEL.gguf PROMPTS NEW [LORA.gguf]

Prompts are ids or texts. Prints as JSON, for each, the greedy text after it, and the log-probability of every token
that may come first.
"""

import json
import subprocess
import sys
from pathlib import Path


def asked(path, ids, new, lora=None):
    """The text that llama.cpp adds to these ids, and the log-probabilities of its first token by id."""
    return asked_all(path, [ids], new, lora)[0]


def asked_all(path, prompts, new, lora=None):
    """The same for several prompts."""
    told = [sys.executable, __file__, str(path), json.dumps(prompts), str(new), *([str(lora)] if lora else [])]
    done = subprocess.run(told, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines, done.stderr[-2000:]
    return [(one["text"], {int(i): p for i, p in one["first"].items()}) for one in json.loads(lines[-1])]


def main(path, prompts, new, lora=None):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 512, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    server = xllamacpp.Server(params)
    wanted = {"n_predict": int(new), "temperature": 0, "n_probs": 1000, "cache_prompt": False}
    answers = []
    for prompt in json.loads(prompts):
        choice = server.handle_completions({"prompt": prompt, **wanted})["choices"][0]
        first = choice["logprobs"]["content"][0]["top_logprobs"]
        answers.append({"text": choice["text"], "first": {t["id"]: t["logprob"] for t in first}})
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # no module of the tests stands in for a library's
    main(*sys.argv[1:])
