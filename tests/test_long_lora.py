"""§4, LongLoRA: groups are the mask, nobody sees ahead, whole attention outside of training; positions stretch."""

import pytest
import torch
from conftest import write_tiny
from oracles import hf_logits, our_logits, scramble
from small import end
from test_lora import SMOLLM2
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter
from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.decode.generate import generate
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.files import peft
from deltaw.methods import method
from deltaw.methods.long_lora import Grouped, borders
from deltaw.models import checkpoint
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.seen import Documents, Score, Span
from deltaw.models.slots import Attend


def masked(q_THE, k_TKE, v_TKE, group, shift=True):
    """S²-Attn as the rule of the specification: t // G for the lower heads, (t + G/2) // G for the upper."""
    T, H, E = q_THE.shape
    t = torch.arange(T)
    k_THE, v_THE = (x.repeat_interleave(H // x.shape[1], 1) for x in (k_TKE, v_TKE))
    y = torch.empty_like(q_THE)
    for h in range(H):
        of = t // group if h < H // 2 or not shift else (t + group // 2) // group
        seen = (of[:, None] == of[None]) & (t[:, None] >= t[None])
        score = q_THE[:, h] @ k_THE[:, h].T / E**0.5
        y[:, h] = score.masked_fill(~seen, float("-inf")).softmax(-1) @ v_THE[:, h]
    return y


def drawn(T, H, K, E=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(T, n, E, dtype=torch.float64, generator=rng) for n in (H, K, K)]


def slot(H, K, E=4):
    return Attend(Score(E**-0.5), H, K, E)


@pytest.mark.parametrize(("H", "K"), [(8, 8), (9, 3), (8, 2), (1, 1), (3, 1)])
@pytest.mark.parametrize(("T", "group"), [(16, 16), (16, 8), (16, 4), (16, 2), (19, 8), (5, 8), (17, 6), (1, 4)])
@pytest.mark.parametrize("shift", [True, False])
def test_attention_in_groups_is_the_mask(H, K, T, group, shift):
    q, k, v = drawn(T, H, K)
    got = Grouped(group, shift)(slot(H, K), q, k, v, Documents.of_lengths(T))
    torch.testing.assert_close(got, masked(q, k, v, group, shift), rtol=0, atol=1e-12)


def test_every_document_has_its_own_groups_with_a_stem_or_without():
    seen = Documents((Span(0, 5), Span(5, 14, 0, 5), Span(14, 17, 0, 5), Span(17, 30)))
    q, k, v = drawn(30, 9, 3)
    got = Grouped(4, True)(slot(9, 3), q, k, v, seen)
    for rows in ([*range(14)], [*range(5), *range(14, 17)], [*range(17, 30)]):
        want = masked(q[rows], k[rows], v[rows], 4)
        torch.testing.assert_close(got[rows], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [16, 21])
def test_no_token_sees_a_later_one(T):
    q, k, v = drawn(T, 9, 3)
    delta, documents = Grouped(8, True), Documents.of_lengths(T)
    before = delta(slot(9, 3), q, k, v, documents)
    for j in range(T):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[j] += 1
        after = delta(slot(9, 3), *other, documents)
        assert torch.equal(after[:j], before[:j])
        assert not torch.equal(after[j], before[j])


def test_the_first_group_of_the_lower_heads_is_whole_attention_and_one_group_is_all():
    q, k, v = drawn(16, 8, 8)
    whole = slot(8, 8)(q, k, v, Documents.of_lengths(16))
    grouped = Grouped(4, True)(slot(8, 8), q, k, v, Documents.of_lengths(16))
    torch.testing.assert_close(grouped[:4, :4], whole[:4, :4], rtol=0, atol=1e-12)
    alone = Grouped(16, True)(slot(8, 8), q, k, v, Documents.of_lengths(16))
    torch.testing.assert_close(alone[:, :4], whole[:, :4], rtol=0, atol=1e-12)
    torch.testing.assert_close(alone[:8], whole[:8], rtol=0, atol=1e-12)


def test_the_borders_are_those_of_the_authors():
    assert list(borders(16, 4, 0)) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert list(borders(16, 4, 2)) == [(0, 2), (2, 6), (6, 10), (10, 14), (14, 16)]
    assert list(borders(7, 4, 2)) == [(0, 2), (2, 6), (6, 7)]


def fresh(model, **chosen):
    return Adapter.build(method("long_lora", **chosen), model)


def test_outside_of_training_attention_is_whole_also_with_a_cache(tiny, ids):
    adapter = fresh(tiny, group=4)
    before = our_logits(tiny, ids)
    with adapter.on():
        adapter.train()
        assert (our_logits(tiny, ids) - before).abs().max() > 1e-3
        adapter.eval()
        assert torch.equal(our_logits(tiny, ids), before)
        scramble(adapter)
        said = ids[:6].tolist()
        for ((_, token),) in generate(tiny, [said[:6]], Sampling(max_new_tokens=9), set()):
            said.append(token)
        assert our_logits(tiny, said).argmax(-1).tolist()[5:-1] == said[6:]


def test_layers_that_see_a_window_stay_as_they_are(tmp_path, ids):
    write_tiny(tmp_path, {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5})
    model = checkpoint.load(tmp_path)
    before = our_logits(model, ids)
    with fresh(model, group=4).train().on():
        assert torch.equal(our_logits(model, ids), before)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (SMOLLM2, 29_268_288),
        (
            ModelConfig(vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, head_width=128, hidden=11008,
                        context=4096, rope=SMOLLM2.rope),
            139_726_848,
        ),
    ],
    ids=["SmolLM2", "Llama-2-7B"],
)  # fmt: skip
def test_the_numbers_trained_are_those_of_the_specification(config, numbers):
    with torch.device("meta"):
        model, count = Decoder(config), 0
        for site in method("long_lora").plan(method("long_lora").sites(model)):
            if site.whole:
                part = getattr(site.slot, "table", None)
                count += (site.slot.gain if part is None else part).numel()
            elif hasattr(site.slot, "weight"):
                count += site.rank * sum(site.slot.weight.shape)
    assert count == numbers


SCALED = {
    "none, linear": ({}, "linear", {"rope_type": "linear", "factor": 4.0}),
    "none, yarn": ({}, "yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
    "linear": ({"rope_type": "linear", "factor": 2.0}, "linear", {"rope_type": "linear", "factor": 8.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
        "yarn",
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
    ),
}


@pytest.mark.parametrize("case", SCALED)
def test_positions_are_stretched_further_and_what_is_merged_is_what_transformers_loads(case, tmp_path, ids):
    """Trained at 1,000 of 256 tokens: four times as slow, on top of what the model has."""
    own, kind, want = SCALED[case]
    write_tiny(tmp_path / "base", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **own},
                                   "max_position_embeddings": 256})  # fmt: skip
    model = checkpoint.load(tmp_path / "base")
    adapter = scramble(fresh(model, context=1000, rope=kind)).eval()
    bare = our_logits(model, ids)
    with adapter.on():
        assert model.context == 1000
        worn = our_logits(model, ids)
    assert model.context == 256
    adapter.merge()
    checkpoint.save(model, tmp_path / "merged")
    adapter.unmerge()
    assert torch.equal(our_logits(model, ids), bare)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert hf.config.max_position_embeddings == 1000
    assert want.items() <= dict(hf.config.rope_parameters).items()
    torch.testing.assert_close(hf_logits(hf, ids), worn, rtol=0, atol=1e-4)
    again = checkpoint.load(tmp_path / "merged")
    torch.testing.assert_close(our_logits(again, ids), worn, rtol=0, atol=1e-5)


def test_another_scaling_than_the_models_own_and_a_shorter_context_are_refused(tmp_path, tiny):
    write_tiny(tmp_path, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}})
    with pytest.raises(UserError, match=r"scaled already, by 'linear'.*--rope linear"):
        fresh(checkpoint.load(tmp_path), context=10**6, rope="yarn")
    with pytest.raises(UserError, match=r"sees .* tokens already"):
        fresh(tiny, context=2)
    with pytest.raises(UserError, match="no half"):
        fresh(tiny, group=5)
    with pytest.raises(UserError, match="--rope yarn"):
        fresh(tiny, context=10**6, rope="llama3")
    write_tiny(tmp_path, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}})
    with pytest.raises(UserError, match="stretch with the length"):
        fresh(checkpoint.load(tmp_path), context=10**6)


def test_peft_takes_it_unless_positions_are_stretched(tmp_path, tiny, tiny_path, ids):
    peft.write(scramble(fresh(tiny)), tiny, str(tiny_path), tmp_path)
    with pytest.raises(UserError, match="positions"):
        peft.write(scramble(fresh(tiny, context=4096)), tiny, str(tiny_path), tmp_path)


def test_a_row_longer_than_the_base_sees_can_be_trained_and_asked(tmp_path, tiny_path, ready, rows_file):
    rows_file.write_text('{"text": "' + "ab " * 300 + '"}\n')
    made = ready(method="long_lora", context=1024, train_on="all", val="0", steps=1, evaluations=0, batch_rows=1)
    assert max(len(row.ids) for row in made.job.rows) > made.base.model.config.context
    assert end(list(made.events())).reason == "done"
    with made.job.adapter.on():
        assert len(next(generate(made.base.model, [[1] * 600], Sampling(max_new_tokens=1), set()))) == 1


def test_documents_that_begin_alike_are_as_each_by_itself_in_training(tiny):
    rows = [Encoded((5, 9, 70, 31, 8), (False,) * 3 + (True,) * 2), Encoded((5, 9, 70, 44), (False,) * 3 + (True,))]
    batch = lay(rows)
    assert any(span.stem_stop for span in batch.seen.spans)
    with fresh(tiny, group=2).train().on(), torch.no_grad():
        together = tiny.logits(tiny.hidden(batch.ids_T, batch.at_T, batch.seen))
        for row in rows:
            alone = our_logits(tiny, row.ids)[-1]
            assert any(torch.allclose(logits_V, alone, atol=1e-5) for logits_V in together)
