"""Does lm-evaluation-harness measure the same over a server as over `transformers` and PEFT, in float32?

    make bench-peers
    python benchmarks/harness.py

A persona is trained on smart-home rows and exported to PEFT. The harness then asks the server (`local-completions`) and
PEFT's model (`hf`) the same: OpenBookQA's log-likelihoods, WikiText-2's rolling ones, and answers to rows with the chat
template, of the base and of the persona. Printed are both sides' metrics, the largest distance of a log-likelihood, and
how many answers and choices differ.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import beside

TASKS = {"local_openbookqa": 60, "local_wikitext2_valid": 2, "local_smarthome": 30, "local_restaurant": 20}
"""Tasks, and so many documents of each."""
FIRST = 2
"""Stands before the first token of a page, where each way takes another by itself. A server's length is two less."""


def measured(side, base, adapter, port, tasks, limit):
    """Metrics, and every answer, of one side and one task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    os.chdir(beside.DATA)
    if side == "hf":
        kind, told = (
            "hf",
            f"pretrained={base},dtype=float32,max_length=1024,prefix_token_id={FIRST}"
            + (f",peft={adapter}" if adapter else ""),
        )
    else:
        kind = "local-completions"
        told = (f"model={adapter or 'base'},base_url=http://127.0.0.1:{port}/v1/completions,tokenizer={base},"
                "tokenizer_backend=huggingface,num_concurrent=4,max_retries=1,max_length=1026,"
                f"custom_prefix_token_id={FIRST}")  # fmt: skip
    chats = tasks in ("local_smarthome", "local_restaurant")
    got = lm_eval.simple_evaluate(kind, model_args=told, tasks=[tasks], limit=int(limit), log_samples=True,
                                  batch_size=1, device="cpu", bootstrap_iters=0, apply_chat_template=chats,
                                  task_manager=TaskManager(include_path=str(beside.DATA / "lm_eval")))  # fmt: skip
    metrics = {k: v for k, v in got["results"][tasks].items() if isinstance(v, float) and "stderr" not in k}
    samples = sorted(got["samples"][tasks], key=lambda s: s["doc_id"])
    return {"metrics": metrics, "answers": [s["filtered_resps"] for s in samples]}


def flat(answers):
    """Log-likelihoods, and whatever else was answered, of all documents."""
    numbers, others = [], []
    for answer in answers:
        for each in answer:
            parts = each if isinstance(each, list | tuple) else [each]
            numbers += [p for p in parts if isinstance(p, float)]
            others += [p for p in parts if not isinstance(p, float)]
    return numbers, others


def beside_each_other(task, persona, home, port):
    """One task of one persona, by both ways; printed, and how far they are from each other."""
    hf, server = (beside.alone(__file__, side, beside.base(), name, port, task, TASKS[task])
                  for side, name in (("hf", str(home / "peft") if persona else ""), ("server", persona)))  # fmt: skip
    (number, other), (numbers, others) = flat(hf["answers"]), flat(server["answers"])
    far = max((abs(a - b) for a, b in zip(number, numbers, strict=True)), default=0.0)
    odd, name = sum(a != b for a, b in zip(other, others, strict=True)), persona or "base"
    for metric, value in hf["metrics"].items():
        print(f"| {task} | {name} | {metric.split(',')[0]} | {value:.4f} | {server['metrics'][metric]:.4f} | {far:.1e} "
              f"| {odd} of {len(other)} |", flush=True)  # fmt: skip
    return {"task": task, "persona": name, "hf": hf["metrics"], "server": server["metrics"], "distance": far,
            "answers": len(other), "differ": odd}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one)))
        return 0
    done = []
    print("| task | persona | metric | hf + peft | server | distance of log-likelihoods | other answers differ |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        deltaw = [sys.executable, "-m", "deltaw.cli"]
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        rows, steps = str(beside.DATA / "sft" / "smarthome_json_train.jsonl"), ["--steps", "40", "--evaluations", "0"]
        subprocess.run([*deltaw, "train", rows, "--runs", folder, "--name", "home", *steps], **quiet)
        subprocess.run([*deltaw, "export", "home", "--runs", folder, "--to", "peft", "--dtype", "float32", "--out",
                        str(home / "peft")], **quiet)  # fmt: skip
        command = [*deltaw, "serve", "--personas", folder, "--port", "0", "--dtype", "float32"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
            port = re.search(r"http://[\d.]+:(\d+)", server.stdout.readline())[1]
            try:
                for task in args.tasks:
                    for persona in ("", "home"):
                        done.append(beside_each_other(task, persona, home, port))
                        args.out.mkdir(parents=True, exist_ok=True)
                        (args.out / "harness.json").write_text(json.dumps(done, indent=1) + "\n")
            finally:
                server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
