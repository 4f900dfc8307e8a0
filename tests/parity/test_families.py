"""Every family computes what transformers does: a document alone and among others, cached, saved, and gradients."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny
from oracles import hf_logits, our_logits
from transformers import AutoModelForCausalLM

from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.decode.generate import generate
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.kernels import library
from deltaw.models import checkpoint
from deltaw.models.config import FAMILIES
from deltaw.models.seen import Documents
from deltaw.scoring.loss import batch_loss

EAGER = {"attn_implementation": "eager"}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
GEMMA3 = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 20, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16,
         "num_hidden_layers": 3}  # fmt: skip
VARIANTS = {
    "mistral: a window": {"model_type": "mistral", "sliding_window": 30},
    "mistral: none": {"model_type": "mistral", "sliding_window": None},
    "qwen2: biases": {"model_type": "qwen2"},
    "qwen2: a window in the last layer": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 30,
                                          "max_window_layers": 1},
    "qwen3: norms of heads": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False},
    "qwen3: biases too": {"model_type": "qwen3", "attention_bias": True},
    "gemma2": {"model_type": "gemma2", **GEMMA},
    "gemma2: no caps": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": None,
                        "final_logit_softcapping": None},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "rope_parameters": GEMMA3, "sliding_window_pattern": 3},
    "gemma3: its vocabulary": {"model_type": "gemma3_text", **GEMMA, "vocab_size": 262_144, "num_hidden_layers": 1},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
    "phi3: a window, part of a head turned": {"model_type": "phi3", "pad_token_id": 0, "sliding_window": 30,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "rope linear": {"rope_parameters": LINEAR},
    "rope dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 128},
    "rope yarn": {"rope_parameters": YARN},
    "rope yarn, all told": {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
                                                "attention_factor": 1.3}},
    "rope yarn, two scales": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "rope llama3": {"rope_parameters": LLAMA3},
}  # fmt: skip
LONG = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    """Their model, ours, and the folder of both."""
    folder = tmp_path_factory.mktemp("family")
    hf = write_tiny(folder, VARIANTS[request.param])
    hf.set_attn_implementation("eager")  # the only one that heeds caps
    return hf, checkpoint.load(folder), folder


def test_every_family_is_tested():
    assert {v.get("model_type", "llama") for v in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("tokens", [1, 19, 31, 200])
def test_logits_are_those_of_transformers(pair, tokens):
    hf, ours, _ = pair
    assert (our_logits(ours, LONG[:tokens]) - hf_logits(hf, LONG[:tokens])).abs().max() <= 1e-4


def test_a_document_among_others_is_what_it_is_alone(pair):
    _, ours, _ = pair
    texts = [LONG[:150], torch.cat((LONG[:40], LONG[:60])), LONG[:40].flip(0)]
    rows = [Encoded(tuple(t.tolist()), (False,) * len(t)) for t in texts]
    batch = lay(rows, share=ours.shares(max(map(len, texts))))
    logits_TV = ours.logits(ours.hidden(batch.ids_T, batch.at_T, batch.seen))
    alone = torch.cat([our_logits(ours, t)[-1:] for t in texts])
    stems = {(s.stem_start, s.stem_stop) for s in batch.seen.spans}
    ends = [s.stop - 1 for s in batch.seen.spans if (s.start, s.stop) not in stems]
    assert len(ends) == len(texts)
    torch.testing.assert_close(logits_TV[ends], alone, rtol=0, atol=1e-4)


def test_what_we_save_transformers_loads_and_computes_the_same(pair, tmp_path):
    hf, ours, folder = pair
    checkpoint.save(ours, tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **EAGER)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (hf_logits(again.eval(), LONG) - hf_logits(hf, LONG)).abs().max() <= 1e-5
    assert checkpoint.load(tmp_path).config == ours.config
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]


def test_generation_with_a_cache_is_the_full_forward_pass(pair):
    _, ours, _ = pair
    prompts = [LONG[:60].tolist(), LONG[:45].tolist(), LONG[50:58].tolist()]
    said = [[] for _ in prompts]
    with torch.inference_mode():
        for step in generate(ours, prompts, Sampling(max_new_tokens=12), set()):
            for who, token in step:
                said[who].append(token)
        for prompt, answer in zip(prompts, said, strict=True):
            for n, token in enumerate(answer):
                logits_V = our_logits(ours, torch.tensor(prompt + answer[:n]))[-1]
                assert logits_V[token] >= logits_V.max() - 1e-4


def test_the_loss_and_what_flows_back_are_those_of_transformers(pair):
    hf, ours, _ = pair
    table = hf.get_input_embeddings().weight
    hf.get_input_embeddings().padding_idx = None  # else a token that is the padding's learns nothing
    loss = F.cross_entropy(hf(LONG[None, :-1]).logits[0], LONG[1:], reduction="sum")
    (want,) = torch.autograd.grad(loss, table)
    ours.embed_tokens.table.requires_grad_()
    mine = batch_loss(ours, lay([Encoded(tuple(LONG.tolist()), (True,) * len(LONG))]))
    (got,) = torch.autograd.grad(mine, ours.embed_tokens.table)
    ours.embed_tokens.table.requires_grad_(False)
    torch.testing.assert_close(mine, loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_dynamic_scaling_plans_for_the_whole_text_and_only_long_texts_share_nothing(tmp_path):
    write_tiny(tmp_path, VARIANTS["rope dynamic"])
    ours = checkpoint.load(tmp_path)
    assert (ours.config.context, ours.shares(128), ours.shares(129)) == (256, True, False)
    said = [t for step in generate(ours, [LONG[:120].tolist()], Sampling(max_new_tokens=30), set()) for _, t in step]
    ids = torch.cat((LONG[:120], torch.tensor(said)))  # 150 tokens: their angles are those of a text of 150
    logits_TV = our_logits(ours, ids)
    for n, token in enumerate(said):
        assert logits_TV[119 + n, token] >= logits_TV[119 + n].max() - 1e-4
    assert not torch.allclose(logits_TV[:120], our_logits(ours, LONG[:120]), atol=1e-3)


def test_a_window_costs_no_more_than_what_it_sees(tmp_path):
    """Far pairs are never scored: the largest mask is a piece by a piece and a window."""
    write_tiny(tmp_path, {"model_type": "mistral", "sliding_window": 30, "max_position_embeddings": 4096})
    ours, seen = checkpoint.load(tmp_path), []
    real = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append((args[0].shape[2], args[1].shape[2]))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", watched)
        ours.hidden(torch.zeros(3000, dtype=torch.long), torch.arange(3000), Documents.of_lengths(3000))
    assert max(s for _, s in seen) <= 512 + 30


OTHERWISE = {
    "mistral: kinds of layers": ({"model_type": "mistral", "sliding_window": 10},
                                 {"layer_types": ["full_attention", "sliding_attention"]}),
    "gemma3: a cap of scores": ({"model_type": "gemma3_text", **GEMMA}, {"attn_logit_softcapping": 2.0}),
    "gemma3: a cap of logits": ({"model_type": "gemma3_text", **GEMMA}, {"final_logit_softcapping": 3.0}),
    "llama: caps": ({}, {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 100}),
    "llama: part of a head": ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                       "partial_rotary_factor": 0.5}}),
    "qwen3: part of a head": ({"model_type": "qwen3", "head_dim": 16}, {"partial_rotary_factor": 0.5}),
}  # fmt: skip
"""Keys that are another family's: read, or not, as transformers does."""


@pytest.mark.parametrize(("config", "edits"), OTHERWISE.values(), ids=OTHERWISE)
def test_keys_of_another_family_are_read_as_transformers_does(config, edits, tmp_path):
    write_tiny(tmp_path, config)
    told = json.loads((tmp_path / "config.json").read_text()) | edits
    (tmp_path / "config.json").write_text(json.dumps(told))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER).eval()
    torch.testing.assert_close(our_logits(checkpoint.load(tmp_path), LONG), hf_logits(theirs, LONG), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("edits", "said"), [
    ({"num_key_value_heads": 3}, "3 heads of keys and values"),
    ({"use_bidirectional_attention": True}, "see those after them"),
])  # fmt: skip
def test_what_the_decoder_does_not_compute_is_refused(edits, said, tmp_path):
    write_tiny(tmp_path, {"model_type": "gemma3_text", **GEMMA})
    told = json.loads((tmp_path / "config.json").read_text()) | edits
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=said):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["phi3", "mistral: none"])
def test_a_gate_is_native_in_every_family(name, tmp_path, monkeypatch):
    write_tiny(tmp_path, VARIANTS[name])
    called = []
    monkeypatch.setattr(F, "silu", lambda x: called.append(x.shape) or torch.sigmoid(x) * x)
    our_logits(checkpoint.load(tmp_path), LONG)
    assert bool(called) == (library.function("gated") is None)
