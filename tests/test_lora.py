"""LoRA: every option does something, and what it says."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny
from hypothesis import given, settings, strategies as st
from oracles import our_logits, scramble
from peft.utils.other import get_pattern_key

from deltaw.adapters.adapter import Adapter, Site
from deltaw.errors import UserError
from deltaw.methods import method
from deltaw.methods.full import Whole
from deltaw.methods.lora import LoRA, LowRank
from deltaw.models import checkpoint
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.rope import Rope
from deltaw.models.seen import Documents
from deltaw.models.slots import Linear
from deltaw.weights import Dense

SMOLLM2 = ModelConfig(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_width=64, hidden=1536, context=8192,
                      rope=Rope(width=64, theta=1e5), tied=True)  # fmt: skip
size = st.integers(1, 40)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def untied_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    write_tiny(folder, {"tie_word_embeddings": False})
    return folder


@pytest.fixture
def untied(untied_path):
    return checkpoint.load(untied_path)


def built(model, seed=0, **chosen):
    return Adapter.build(LoRA(**chosen), model, seed)


def names(adapter):
    return [name for name, _ in adapter.named_deltas()]


def one(i=48, o=40, seed=0, **chosen):
    """A slot with a random weight and bias, and its delta."""
    rng = torch.Generator().manual_seed(seed)
    slot = Linear(Dense(torch.randn(o, i, generator=rng)), torch.randn(o, generator=rng))
    method = LoRA(**chosen)
    (site,) = method.plan([Site("layers.0.q_proj", slot)])
    return slot, method.build(site, rng)


@settings(deadline=None, max_examples=50)
@given(i=size, o=size, rank=st.integers(1, 12), alpha=st.floats(0.1, 64), rslora=st.booleans(), seed=st.integers(0, 99))
@torch.no_grad()
def test_the_update_is_alpha_over_rank_or_its_root_times_b_a(i, o, rank, alpha, rslora, seed):
    slot, delta = one(i, o, seed, rank=rank, alpha=alpha, rslora=rslora)
    scramble(delta, 0.3, seed)
    x_TI = torch.randn(5, i, generator=torch.Generator().manual_seed(seed))
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    update_OI = scale * delta.B.double() @ delta.A.double()
    w_OI = slot.weight.dense().double() + update_OI
    want = x_TI.double() @ w_OI.t() + slot.bias.double()
    largest = max(1.0, float(want.abs().max()), float(update_OI.abs().max()))
    torch.testing.assert_close(delta(slot, x_TI).double(), want, rtol=0, atol=2e-6 * largest)
    merged = delta.merged(slot)
    assert merged.keys() == {"weight"}
    torch.testing.assert_close(merged["weight"].dense().double(), w_OI, rtol=0, atol=1e-6 * largest)
    served = delta.served(slot)
    torch.testing.assert_close((served.scale * served.B_OR @ served.A_RI).double(), update_OI, rtol=1e-4, atol=1e-5)


def test_rank_and_alpha_patterns_change_the_layers_they_name(tiny):
    adapter = built(
        tiny, rank=4, alpha=8.0, rank_pattern={"layers.0.*": 2, "q_proj": 6}, alpha_pattern={"mlp.up_proj": 16}
    )
    for name, delta in adapter.named_deltas():
        rank = 2 if name.startswith("layers.0.") else 6 if name.endswith("q_proj") else 4  # the first that fits counts
        assert delta.A.shape[0] == delta.B.shape[1] == rank, name
        assert delta.scale == (16 if name.endswith("mlp.up_proj") else 8) / rank, name


PATTERNS = ["q_proj", "layers.1.*", r"layers\.1\..*", "self_attn.q_proj", "proj", ".*mlp.*", "mlp", "q|v", "(q|v)_proj"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fit_the_names_that_they_fit_in_peft(pattern):
    with torch.device("meta"):
        model = Decoder(SMOLLM2)
    want = [name for name in names(built(model, rank=1)) if get_pattern_key([pattern], name) == pattern]
    if not want:
        with pytest.raises(UserError, match="fits no adapted layer"):
            built(model, rank=1, rank_pattern={pattern: 3})
    else:
        adapter = built(model, rank=1, rank_pattern={pattern: 3})
        assert [name for name, delta in adapter.named_deltas() if delta.A.shape[0] == 3] == want


@pytest.mark.parametrize("pattern", ["layers.7.*", "lm_head"])
def test_a_pattern_that_fits_nothing_is_refused(pattern, tiny):
    for option in ({"rank_pattern": {pattern: 2}}, {"alpha_pattern": {pattern: 2.0}}):
        with pytest.raises(UserError, match=f"'{pattern}' fits no adapted layer"):
            built(tiny, **option)


def test_what_is_no_pattern_is_refused_by_a_sentence(tiny):
    for option in ({"rank_pattern": {"q(": 2}}, {"targets": "q("}):
        with pytest.raises(UserError, match=r"'q\(' is no pattern"):
            built(tiny, **option)


@torch.no_grad()
def test_dropout_zeroes_its_share_of_the_adapters_input_in_training_and_nothing_else():
    slot = Linear(Dense(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))))
    delta = LowRank(torch.eye(16), torch.eye(16), 1.0, dropout=0.3)  # its update is its input
    x_TI = torch.rand(4000, 16, generator=torch.Generator().manual_seed(1)) + 1
    torch.manual_seed(2)
    dropped = (delta.train()(slot, x_TI) - slot(x_TI)) / x_TI
    zero = dropped.abs() < 1e-4
    assert float(zero.float().mean()) == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(dropped[~zero], torch.full_like(dropped[~zero], 1 / 0.7), rtol=1e-4, atol=0)
    torch.testing.assert_close(delta.eval()(slot, x_TI), slot(x_TI) + x_TI)


def test_dropout_comes_through_the_settings_and_is_off_outside_training(tiny, ids):
    adapter = scramble(built(tiny, dropout=0.5))
    with adapter.on():
        torch.manual_seed(0)
        one, two = (our_logits(tiny, ids) for _ in range(2))
        torch.manual_seed(0)
        again = our_logits(tiny, ids)
        adapter.eval()
        calm, calm_again = (our_logits(tiny, ids) for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(one, again)
    assert torch.equal(calm, calm_again)


@torch.no_grad()
def test_kaiming_is_the_authors_initialisation():
    _, delta = one(300, 7, seed=3, rank=64)
    rng = torch.Generator().manual_seed(3)
    for n in ((7, 300), (7,)):
        torch.randn(n, generator=rng)
    want = torch.nn.init.kaiming_uniform_(torch.empty(64, 300), a=math.sqrt(5), generator=rng)
    torch.testing.assert_close(delta.A.data, want)
    assert not delta.B.any()


@torch.no_grad()
def test_gaussian_starts_with_a_deviation_of_one_over_the_rank():
    _, delta = one(2000, 7, rank=8, init="gaussian")
    assert float(delta.A.mean()) == pytest.approx(0, abs=0.005)
    assert float(delta.A.std()) == pytest.approx(1 / 8, rel=0.02)
    assert float((delta.A.abs() > 2 / 8).float().mean()) == pytest.approx(0.0455, abs=0.005)
    assert not delta.B.any()


def test_another_seed_gives_another_start(tiny):
    same, other = built(tiny, seed=1), built(tiny, seed=2)
    assert not any(torch.equal(a.A, b.A) for (_, a), (_, b) in zip(same.items(), other.items(), strict=True))
    drawn = [delta.A for _, delta in same.named_deltas() if delta.A.shape == (16, 32)]
    assert not torch.equal(drawn[0], drawn[1])


def test_all_linear_is_every_matrix_but_the_head(untied):
    assert names(built(untied)) == [
        n for n, slot in untied.named_modules() if isinstance(slot, Linear) and n != "lm_head"
    ]
    assert {n.rsplit(".", 1)[-1] for n in names(built(untied))} == set(LINEAR)
    assert names(built(untied, targets="all-linear,lm_head")) == [*names(built(untied)), "lm_head"]


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("q,v", ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]),
        (" v_proj , q ,", ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]),
        ("layers.1.mlp.up_proj", ["1.mlp.up_proj"]),
        ("mlp.up_proj", ["0.mlp.up_proj", "1.mlp.up_proj"]),
        (r"layers\.0\.self_attn\.(k|o)_proj", ["0.self_attn.k_proj", "0.self_attn.o_proj"]),
        ("layers.1.mlp.*", ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
    ],
)
def test_targets_are_short_names_whole_names_tails_and_patterns(targets, wanted, tiny):
    assert names(built(tiny, targets=targets)) == [f"layers.{w}" for w in wanted]


@pytest.mark.parametrize("targets", ["q,w", "embed_tokens", "norm", "layers.2.mlp.up_proj", "Q"])
def test_a_target_that_is_no_linear_layer_is_refused(targets, tiny):
    with pytest.raises(UserError, match=f"'{targets.rsplit(',')[-1]}' names no layer"):
        built(tiny, targets=targets)


def test_an_adapted_head_changes_the_logits_as_its_formula_says(untied, ids):
    before = our_logits(untied, ids)
    h_TD = untied.hidden(ids, torch.arange(24), Documents.of_lengths(24))
    adapter = scramble(built(untied, targets="lm_head", rank=2, alpha=6.0))
    ((_, delta),) = adapter.named_deltas()
    with adapter.on():
        logits_TV = our_logits(untied, ids)
    torch.testing.assert_close(logits_TV, before + 3 * F.linear(F.linear(h_TD, delta.A), delta.B), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("targets", "count"), [("q,v", 460_800), ("q,k,v,o", 921_600), ("all-linear", 2_442_240)])
def test_smollm2_adapters_of_rank_8_have_the_published_sizes(targets, count):
    with torch.device("meta"):
        model = Decoder(SMOLLM2)
    assert built(model, rank=8, targets=targets).parameter_count == count


@given(rank=st.integers(1, 9), targets=st.sets(st.sampled_from(LINEAR), min_size=1))
def test_the_number_of_parameters_is_the_rank_times_what_goes_in_and_out(rank, targets):
    with torch.device("meta"):
        model = Decoder(
            ModelConfig(
                vocab=9, width=8, layers=2, heads=2, kv_heads=1, head_width=6, hidden=20, context=9, rope=Rope(width=6)
            )
        )
    sizes = {
        "q_proj": 8 + 12,
        "k_proj": 8 + 6,
        "v_proj": 8 + 6,
        "o_proj": 12 + 8,
        "gate_proj": 28,
        "up_proj": 28,
        "down_proj": 28,
    }
    adapter = built(model, rank=rank, targets=",".join(sorted(targets)))
    assert adapter.parameter_count == 2 * rank * sum(sizes[t] for t in targets)


def test_over_a_bf16_base_the_sum_is_made_in_fp32_and_rounded_once(tiny_path):
    model = checkpoint.load(tiny_path, torch.bfloat16)
    adapter = scramble(built(model, rank=4, alpha=8.0))
    wanted = {name: (slot.weight.dense().double() + 2 * delta.B.double() @ delta.A.double())
              for (name, delta), (slot, _) in zip(adapter.named_deltas(), adapter.items(), strict=True)}  # fmt: skip
    adapter.merge()
    for name, want_OI in wanted.items():
        got_OI = model.get_submodule(name).weight.dense()
        assert got_OI.dtype == torch.bfloat16
        # Half a unit in the last of bf16's eight places, and fp32's own error before it.
        torch.testing.assert_close(got_OI.double(), want_OI, rtol=2**-8, atol=1e-6)
    adapter.unmerge()
    assert checkpoint.fingerprint(model) == checkpoint.fingerprint(checkpoint.load(tiny_path, torch.bfloat16))


@given(rank=st.integers(1, 64))
def test_alpha_is_twice_the_rank_unless_it_is_given(rank):
    assert LoRA(rank=rank) == LoRA(rank=rank, alpha=2.0 * rank)
    assert LoRA(rank=rank).alpha == 2.0 * rank
    assert LoRA(rank=rank, alpha=3.5).alpha == 3.5


def test_modules_to_save_are_trained_whole_and_the_others_are_not(tiny):
    adapter = built(tiny, targets="q,v", rank=2, modules_to_save="embed_tokens,norm,layers.1.self_attn.q_proj")
    whole = {name for name, delta in adapter.named_deltas() if isinstance(delta, Whole)}
    assert whole == {"embed_tokens", "norm", "layers.1.self_attn.q_proj"}
    low = {name for name, delta in adapter.named_deltas() if isinstance(delta, LowRank)}
    assert low == {"layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"}
    with pytest.raises(UserError, match="The target 'embd_tokens' names no layer"):
        built(tiny, modules_to_save="embd_tokens")


@pytest.mark.parametrize("follows", [True, False])
def test_a_tied_head_follows_a_trained_embedding_only_if_it_is_to(tiny, follows):
    head = tiny.head_VD().clone()
    adapter = scramble(built(tiny, targets="q", modules_to_save="embed_tokens", ensure_weight_tying=follows), 0.5)
    trained = dict(adapter.named_deltas())["embed_tokens"].value
    with adapter.on():
        assert torch.equal(tiny.embed_tokens(torch.arange(5)), trained[:5])
        assert torch.equal(tiny.head_VD(), trained if follows else head)


@pytest.mark.parametrize("alpha", [0, -4.0, 2e6])
def test_an_alpha_for_some_layers_is_as_it_may_be_for_all(alpha):
    with pytest.raises(UserError, match="alpha"):
        method("lora", alpha_pattern={"mlp.*": alpha})
