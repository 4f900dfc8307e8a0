"""Several processes that compute one model together say what one process says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_tiny
from serve.parallel_ranks import personas, said

from deltaw.errors import UserError
from deltaw.kernels.worn import share
from deltaw.models import checkpoint
from deltaw.models.ranks import part_of
from deltaw.serve.engine import Engine

PATIENCE = 300
UNEVEN = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "hidden_size": 288,
    "intermediate_size": 96,
}
FAMILIES = {
    "llama": UNEVEN | {"attention_bias": True, "mlp_bias": True},
    "gemma2": UNEVEN | {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "qwen3": UNEVEN,
    "phi3": UNEVEN | {"pad_token_id": 259, "eos_token_id": 257},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, more in FAMILIES.items():
        write_tiny(folder / name, {"model_type": name, **more})
    return folder


@pytest.fixture(scope="module")
def alone(models):
    """What one process says, with the logarithms of probabilities."""
    whole = {}
    for path in models.iterdir():
        model = checkpoint.load(path)
        whole[path.name] = said(Engine(model, 8 << 20, most=9, chunk=40), personas(model))
    return whole


def begun(script, *told, ranks, meet, **more):
    """Processes of a script that find each other at a file."""
    env = {**os.environ, "DELTAW_MEET": f"file://{meet}", "WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo",
           "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, told)]
    return [subprocess.Popen(command, env={**env, "RANK": str(k)}, **more) for k in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_say_what_one_says_whatever_is_worn(models, alone, ranks, tmp_path):
    """Nine heads are not shared evenly by two; all techniques that share a batch, blends, prefixes, any rank."""
    for process in begun("parallel_ranks.py", models, ranks, ranks=ranks, meet=tmp_path / "meet"):
        assert process.wait(PATIENCE) == 0
    for name, want in alone.items():
        *got, bare, worn, refused = json.loads((models / name / f"said-{ranks}.json").read_text())
        width, rank = 288, 4
        assert bare == [10 * width] * 4  # of two layers, what o_proj and down_proj give
        shared = [10 * rank] * 2 if name == "phi3" else [10 * rank * 3, 10 * rank * 2]  # A x of what reads the same x
        assert worn == [shared[0], 10 * (width + rank), shared[1], 10 * (width + rank)] * 2
        assert refused == "It does more than several processes compute."
        assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want], name
        for (_, scores), (_, expected) in zip(got, want, strict=True):
            torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=0, atol=2e-4)
    assert len({tuple(tokens) for want in alone.values() for tokens, _ in want}) > 60


def test_a_step_that_fails_in_one_process_ends_all_rather_than_that_they_wait_for_each_other(models, tmp_path):
    first, other = begun("parallel_ranks.py", models, 2, 30, ranks=2, meet=tmp_path / "meet", stderr=subprocess.PIPE)
    assert b"failed: there is none left: no more is answered." in first.communicate(timeout=PATIENCE)[1]
    assert first.returncode == 1
    other.communicate(timeout=PATIENCE)
    assert other.returncode


def test_parts_have_all_of_a_model_between_them(models):
    model = checkpoint.load(models / "llama")
    parts = [part_of(model, (k, 2)) for k in range(2)]
    assert [part.config.kv_heads for part in parts] == [2, 1]
    assert [part.config.heads for part in parts] == [6, 3]
    layers = [sum(b.numel() for b in each.layers.buffers()) for each in (model, *parts)]
    twice = sum(
        b.numel()
        for n, b in model.layers.named_buffers()
        if "norm" in n or n.endswith(("o_proj.bias", "down_proj.bias"))
    )
    assert layers[1] + layers[2] == layers[0] + twice


def test_shares_are_whole_and_differ_by_one_at_most():
    for count in range(12):
        for parts in range(1, 6):
            shares = [share(count, (k, parts)) for k in range(parts)]
            assert [i for each in shares for i in each] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert len(shares[0]) == max(map(len, shares))


def test_more_processes_than_heads_of_keys_or_packed_matrices_are_refused(models):
    with pytest.raises(UserError, match="3 heads of keys and values are not shared by 4 processes"):
        part_of(checkpoint.load(models / "llama"), (0, 4))
