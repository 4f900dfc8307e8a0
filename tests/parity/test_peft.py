"""From the same start, on the same rows, at the same rates, our LoRA's losses and gradients are PEFT's."""

import pytest
import torch
from oracles import scramble
from peft import LoraConfig, get_peft_model
from small import stored
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from deltaw.adapters.adapter import Adapter
from deltaw.data.batch import IGNORED, micro_batches, steps
from deltaw.data.encode import encode_all
from deltaw.data.rows import Example
from deltaw.files import adapters
from deltaw.files.runs import Run
from deltaw.methods import method
from deltaw.models import checkpoint
from deltaw.models.tokenizer import Tokenizer
from deltaw.scoring.loss import batch_loss
from deltaw.settings import Training
from deltaw.train.events import Job, Stepped
from deltaw.train.loop import Trainer
from deltaw.train.optimizer import rate

STEPS = 20
SHORT = {"q": "q_proj", "v": "v_proj", "up": "up_proj"}
VARIANTS = {
    "all-linear": ({"rank": 4, "alpha": 8.0}, {}),
    "q,v": ({"rank": 8, "alpha": 16.0, "targets": "q,v"}, {}),
    "rslora": ({"rank": 4, "alpha": 4.0, "rslora": True, "targets": "q,v,up"}, {}),
    "patterns": ({"rank": 4, "rank_pattern": {"layers.0.*": 2}, "alpha_pattern": {"up_proj": 3.0}}, {}),
    "with weight decay, no clipping": ({"rank": 4}, {"weight_decay": 0.1, "clip": 0.0}),
    "in micro-batches": ({"rank": 4}, {"micro_tokens": 120}),
}


def examples(n):
    asked = [
        "Who keeps the bees?",
        "And the mill, whose is it?",
        "Name the river that runs past Oatleby, please.",
        "Why?",
    ]
    said = [
        "Martha.",
        "It is Hob Gantry's.",
        "The Wend, and in spring the Little Wend too.",
        "Nobody knows; ask the vicar.",
    ]
    turns = [({"role": "user", "content": f"{asked[i % 4]} ({i})"}, {"role": "assistant", "content": said[i % 4]})
             for i in range(n)]  # fmt: skip
    return [Example(pair, where=f"rows:{i}") for i, pair in enumerate(turns)]


class Pair:
    """The same model, rows and LoRA here and in PEFT, B moved away from zero on request."""

    def __init__(self, folder, chosen, rows, moved=False):
        self.model, self.tokenizer = checkpoint.load(folder), Tokenizer.load(folder)
        self.rows = encode_all(examples(rows), self.tokenizer, "answers", 512)[0]
        self.adapter = Adapter.build(method("lora", **chosen), self.model)
        options = {
            "r": chosen["rank"],
            "lora_alpha": chosen.get("alpha", 2 * chosen["rank"]),
            "use_rslora": chosen.get("rslora", False),
            "target_modules": [SHORT[t] for t in chosen["targets"].split(",")] if "targets" in chosen else "all-linear",
            "rank_pattern": chosen.get("rank_pattern", {}),
            "alpha_pattern": chosen.get("alpha_pattern", {}),
        }
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.peft = get_peft_model(hf, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **options)).eval()
        if moved:
            scramble(torch.nn.ParameterList([p for _, p in self.trained_there()]))
        adapters.put(self.adapter, {name: p.detach() for name, p in self.trained_there()}, "PEFT")

    def trained_there(self):
        """PEFT's trained tensors by our names."""
        for name, p in self.peft.named_parameters():
            if p.requires_grad:
                name = name.removeprefix("base_model.model.model.")
                yield name.replace(".lora_A.default.weight", ".A").replace(".lora_B.default.weight", ".B"), p

    def loss_there(self, rows):
        """The mean loss of rows in one padded batch."""
        ids = pad_sequence([torch.tensor(r.ids) for r in rows], True, 0)
        mask = pad_sequence([torch.ones(len(r.ids), dtype=torch.long) for r in rows], True, 0)
        labels = [torch.tensor([i if t else IGNORED for i, t in zip(r.ids, r.trained, strict=True)]) for r in rows]
        return self.peft(input_ids=ids, attention_mask=mask, labels=pad_sequence(labels, True, IGNORED)).loss

    def train_there(self, settings, peak):
        parameters = [p for _, p in self.trained_there()]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=settings.weight_decay)
        order = steps([(len(self.rows), 1.0)], settings.batch_rows, settings.seed)
        losses = []
        for step in range(STEPS):
            loss = self.loss_there([self.rows[i] for i in next(order)[1]])
            optimizer.zero_grad()
            loss.backward()
            if settings.clip:
                torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.param_groups[0]["lr"] = rate(step, STEPS, peak, settings)
            optimizer.step()
            losses.append(loss.item())
        return losses

    def train_here(self, settings, peak, folder):
        header = adapters.Header.of(self.adapter, "tiny", checkpoint.fingerprint(self.model))
        job = Job(Run(folder), self.model, self.tokenizer, self.adapter, header, settings, stored(self.rows),
                  ((len(self.rows), 1.0),), (), STEPS, peak)  # fmt: skip
        return [event.loss for event in Trainer(job).run() if isinstance(event, Stepped)]


@pytest.mark.parametrize(("chosen", "trained"), VARIANTS.values(), ids=VARIANTS)
def test_the_losses_of_twenty_steps_are_pefts(chosen, trained, tiny_path, tmp_path):
    pair = Pair(tiny_path, chosen, rows=12)
    settings = Training(batch_rows=5, evaluations=0, **trained)
    here, there = pair.train_here(settings, 2e-3, tmp_path), pair.train_there(settings, 2e-3)
    assert len(here) == STEPS
    assert here == pytest.approx(there, abs=1e-4)
    assert there[-1] < there[0] - 0.05


@pytest.mark.parametrize("chosen", [chosen for chosen, _ in VARIANTS.values()][:4], ids=list(VARIANTS)[:4])
def test_the_gradients_of_both_factors_are_pefts(chosen, tiny_path):
    pair = Pair(tiny_path, chosen, rows=6, moved=True)
    loss = pair.loss_there(pair.rows)
    loss.backward()
    with pair.adapter.on():
        batches = micro_batches(pair.rows, 200)
        assert len(batches) > 1
        for batch in batches:
            (batch_loss(pair.model, batch) / sum(b.targets for b in batches)).backward()
    there = dict(pair.trained_there())
    here = {name.removeprefix("deltas.").replace("/", "."): p for name, p in pair.adapter.named_parameters()}
    assert here.keys() == there.keys()
    for name, p in here.items():
        assert p.grad.norm() > 0
        torch.testing.assert_close(
            p.grad, there[name].grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_merged_weights_are_pefts(tiny_path):
    pair = Pair(tiny_path, {"rank": 4, "alpha": 8.0}, rows=1, moved=True)
    pair.adapter.merge()
    merged = pair.peft.merge_and_unload().state_dict()
    for name, layer in pair.model.named_modules():
        if f"model.{name}.weight" in merged and hasattr(layer, "weight"):
            torch.testing.assert_close(layer.weight.dense(), merged[f"model.{name}.weight"], rtol=0, atol=1e-6)


@pytest.mark.model
def test_the_losses_of_twenty_steps_on_smollm2_are_pefts(smollm2_path, tmp_path):
    pair = Pair(smollm2_path, {"rank": 8, "alpha": 16.0, "targets": "q,v"}, rows=4)
    settings = Training(batch_rows=2, evaluations=0)
    here, there = pair.train_here(settings, 1e-3, tmp_path), pair.train_there(settings, 1e-3)
    assert here == pytest.approx(there, abs=1e-4)
    assert there[-1] < there[0] - 0.5
