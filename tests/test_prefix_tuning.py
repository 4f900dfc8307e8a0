"""§7, prefix-tuning: a text's own keys and values are that text; PEFT's prefixes are ours; a projection is dropped."""

from copy import deepcopy

import pytest
import torch
from conftest import write_tiny
from oracles import our_logits, scramble
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from small import end, gone_on, stopping_at, write_rows
from test_lora import SMOLLM2
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter
from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.decode.generate import generate
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError
from deltaw.files import adapters, peft
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.decoder import Decoder

P = 7
WINDOWED = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 9}


@pytest.fixture(scope="module", params=["whole", "windowed"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, WINDOWED if request.param == "windowed" else {})
    return folder


@pytest.fixture
def model(folder):
    return checkpoint.load(folder)


def fresh(model, tokenizer=None, **chosen):
    made = method("prefix_tuning", **{"tokens": P, **chosen})
    adapter = Adapter.build(made, model, 3)
    if tokenizer is not None:
        made.begin(adapter, model, tokenizer, tuple)
    return adapter.eval()


@pytest.mark.parametrize("projection", [0, 6])
def test_a_fresh_prefix_is_the_text_that_it_starts_as(tiny, tokenizer, ids, projection):
    text = tokenizer.encode("Hey, come in!")
    adapter = fresh(tiny, tokenizer, tokens=len(text), init_text="Hey, come in!", projection=projection)
    with adapter.on():
        worn = our_logits(tiny, ids)
    said = our_logits(tiny, torch.cat((torch.tensor(text), ids)))[len(text) :]
    torch.testing.assert_close(worn, said, rtol=0, atol=1e-5)
    assert (worn - our_logits(tiny, ids)).abs().max() > 0.01


def test_a_short_text_is_said_again_and_an_empty_one_is_refused(tiny, tokenizer):
    once, twice = (fresh(tiny, tokenizer, tokens=6, init_text=text) for text in ("abc", "abcabc"))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    with pytest.raises(UserError, match="empty"):
        fresh(tiny, tokenizer, init_text="")
    drawn, again = fresh(tiny, tokenizer, init="random"), fresh(tiny)
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), again.parameters(), strict=True))


def test_peft_and_we_compute_the_same_both_ways(model, folder, ids, tmp_path):
    adapter = scramble(fresh(model), 0.5)
    with adapter.on():
        want = our_logits(model, ids)
    peft.write(adapter, model, str(folder), tmp_path / "ours")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids[None]).logits[0], want, rtol=0, atol=1e-4)
    other = get_peft_model(AutoModelForCausalLM.from_pretrained(folder),
                           PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()  # fmt: skip
    other.save_pretrained(tmp_path / "theirs")
    with peft.read(tmp_path / "theirs", model).on(), torch.no_grad():
        torch.testing.assert_close(our_logits(model, ids), other(ids[None]).logits[0], rtol=0, atol=1e-4)


def test_prefixes_of_other_shapes_and_gates_are_refused(model, folder, tmp_path):
    with pytest.raises(UserError, match="no prefix behind a gate"):
        peft.write(fresh(model, gate=True), model, str(folder), tmp_path)
    with pytest.raises(UserError, match="vLLM loads no prefix"):
        peft.write(fresh(model), model, str(folder), tmp_path, uniform=True)
    peft.write(fresh(model), model, str(folder), tmp_path)
    write_tiny(tmp_path / "wide", {"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"made for another model.*64 values a token, and this model takes 96"):
        peft.read(tmp_path, checkpoint.load(tmp_path / "wide"))
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"num_virtual_tokens": {P}', '"num_virtual_tokens": 9'))
    with pytest.raises(UserError, match=f"says 9 as num_virtual_tokens, and it is {P} here"):
        peft.read(tmp_path, model)
    config.write_text(config.read_text().replace('"num_virtual_tokens": 9', f'"num_virtual_tokens": {P}')
                      .replace('"num_layers": 2', '"num_layers": 4'))  # fmt: skip
    with pytest.raises(UserError, match="says 4 as num_layers, and it is 2 here"):
        peft.read(tmp_path, model)


@pytest.mark.parametrize("gate", [False, True])
def test_generating_with_a_cache_is_computing_everything_anew(model, gate):
    prompts = [[5, 9, 70, 31], [5, 9, 70, 12, 44, 8, 90, 3, 2, 1, 17, 60], [200]]
    adapter = scramble(fresh(model, gate=gate), 0.5)
    with adapter.on(), torch.no_grad():
        said = [list(p) for p in prompts]
        for step in generate(model, prompts, Sampling(max_new_tokens=14), set()):
            for row, token in step:
                said[row].append(token)
        for prompt, whole in zip(prompts, said, strict=True):
            assert len(whole) == len(prompt) + 14
            best = our_logits(model, whole).argmax(-1).tolist()
            assert best[len(prompt) - 1 : -1] == whole[len(prompt) :]


def test_documents_in_a_row_that_share_a_beginning_are_as_each_by_itself(model):
    rows = [Encoded((5, 9, 70, 31, 8), (False,) * 3 + (True,) * 2), Encoded((5, 9, 70, 44), (False,) * 3 + (True,)),
            Encoded((7, 7), (False, True))]  # fmt: skip
    batch = lay(rows)
    assert any(span.stem_stop for span in batch.seen.spans)
    with scramble(fresh(model), 0.5).on(), torch.no_grad():
        together = model.logits(model.hidden(batch.ids_T, batch.at_T, batch.seen))
        for row in rows:
            last = max(
                span.stop
                for span in batch.seen.spans
                if batch.ids_T[span.stop - 1] == row.ids[-1] and batch.at_T[span.stop - 1] == len(row.ids) - 1
            )
            torch.testing.assert_close(together[last - 1], our_logits(model, row.ids)[-1], rtol=0, atol=1e-5)


def test_behind_a_gate_a_fresh_prefix_changes_nothing(tiny, tokenizer, ids):
    before = our_logits(tiny, ids)
    adapter = fresh(tiny, tokenizer, gate=True)
    with adapter.on():
        assert torch.equal(our_logits(tiny, ids), before)
        assert tiny.before == 0
    with scramble(adapter, 0.5).on():
        assert not torch.allclose(our_logits(tiny, ids), before, atol=1e-2)


def test_it_takes_its_tokens_out_of_the_context(model):
    context = model.config.context
    with fresh(model).on():
        assert model.context == context - P
        with pytest.raises(UserError, match=f"this model sees {context - P:,}"):
            next(generate(model, [[1] * (context - P)], Sampling(), set()))
    assert model.context == context
    with pytest.raises(UserError, match=f"fills the context of {context}"):
        fresh(model, tokens=context)


def test_a_sample_that_does_not_fit_beside_the_prefix_is_not_asked(here, ready, tmp_path):
    write_rows(tmp_path / "long.jsonl", {"prompt": "say " + "a" * 350, "completion": "bbb"})
    made = ready(method="prefix_tuning", tokens=100, val=str(tmp_path / "long.jsonl"), steps=1)
    assert made.job.question is None
    assert end(list(made.events())).reason == "done"


def test_lengths_that_change_angles_count_the_prefix(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    write_tiny(tmp_path, {"rope_parameters": rope, "max_position_embeddings": 64})
    model = checkpoint.load(tmp_path)
    assert model.shares(60)
    with fresh(model).on():
        assert model.shares(64 - P)
        assert not model.shares(60)


@pytest.mark.parametrize(("projection", "numbers"), [(0, 115_200), (128, 1_512_704)])
def test_the_numbers_trained_are_those_of_the_specification(projection, numbers):
    with torch.device("meta"):
        model = Decoder(SMOLLM2)
    assert Adapter.build(method("prefix_tuning", tokens=10, projection=projection), model).parameter_count == numbers


def test_some_layers_alone_are_refused(tiny):
    with pytest.raises(UserError, match="Every layer has a prefix"):
        Adapter.build(method("prefix_tuning", targets="layers.0.*"), tiny)


@pytest.mark.parametrize("gate", [False, True])
def test_what_is_kept_of_a_projection_is_what_it_made_of_its_points(tiny, ids, gate):
    adapter = scramble(fresh(tiny, projection=6, gate=gate), 0.5)
    with adapter.on():
        want = our_logits(tiny, ids)
    kept = adapter.method.finished(adapter)
    assert {name.rsplit(".", 1)[-1] for name in adapters.state(kept)} == {"k", "v", *(["gate"] if gate else [])}
    with kept.on():
        assert torch.equal(our_logits(tiny, ids), want)
    assert kept.method.projection == 0


def test_a_run_with_a_projection_resumes_and_its_result_is_without(ready):
    chosen = {"method": "prefix_tuning", "projection": 8, "tokens": 4, "steps": 4, "evaluations": 2, "micro_tokens": 64}
    whole, broken = ready(**chosen), ready(stopping_at(6), **chosen)
    start = deepcopy(adapters.state(whole.job.adapter))
    list(whole.events())
    assert end(list(broken.events())).reason == "interrupted"
    assert end(list(gone_on(broken.job.run.folder).events())).reason == "done"
    result = whole.job.run.adapter
    assert result.read_bytes() == broken.job.run.adapter.read_bytes()
    assert {name.rsplit(".", 1)[-1] for name in adapters.read(result)[1]} == {"k", "v"}
    worn = adapters.load(result, whole.base.model)
    k = dict(worn.named_deltas())["layers.0.self_attn.attend"].k
    assert not torch.equal(k, start["layers.0.self_attn.attend.k"])
