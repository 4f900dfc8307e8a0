"""Every method with settings that reach all it can do; a new method is there with none."""

import pytest

from deltaw.methods import names

VARIANTS = {
    "lora": [{}, {"rank": 3, "alpha": 5.0, "rslora": True, "init": "gaussian"}, {"targets": "q,v", "dropout": 0.3},
             {"rank_pattern": {"layers.0.*": 2}, "alpha_pattern": {"mlp.*": 7.0}}],
    "lora_fa": [{}, {"rank": 3, "init": "gaussian", "project": True}, {"init": "orthogonal", "a_seed": 7},
                {"targets": "q,v", "dropout": 0.3, "modules_to_save": "norm"}],
    "multi_lora": [{}, {"rank": 2, "parts": 4, "scales": "scalar", "init": "gaussian"},
                   {"targets": "q,v", "dropout": 0.3, "loraplus_lr_ratio": 4.0}],
    "tied_lora": [{}, {"variant": "tl5", "rank": 3}, {"variant": "tl2"}, {"variant": "vbua", "targets": "q,k,up"}],
    "vera": [{"rank": 24}, {"targets": "q,down", "rank": 40, "d_initial": 1.0, "projection_prng_key": 3}],
    "dora": [{"rank": 4}, {"targets": "q,v", "dropout": 0.3, "rslora": True}],
    "pissa": [{"rank": 4}, {"rank": 3, "niter": 0, "alpha": 2.0}, {"targets": "q,v", "dropout": 0.3}],
    "prefix_tuning": [{"tokens": 5}, {"tokens": 3, "projection": 6}, {"tokens": 4, "gate": True}],
    "long_lora": [{}, {"context": 512, "group": 8, "rope": "yarn"}, {"modules_to_save": "", "grouped": False},
                  {"targets": "q,v", "group": 6, "shift": False, "modules_to_save": "norm", "dropout": 0.3}],
    "glora": [{}, {"a": "lora", "c": "vector", "e": "vector"}, {"a": "none", "b": "constant", "c": "lora", "rank": 2},
              {"a": "constant", "b": "vector", "d": "vector", "e": "constant", "targets": "q,v"}],
    "qlora": [{"rank": 4}],
    "qa_lora": [{"rank": 4}, {"group": 16, "pooling": "mean", "targets": "q,v", "dropout": 0.3}],
    "loftq": [{"rank": 4}, {"format": "int4-g32", "format_pattern": {"layers.0.*": "nf3-dq"}, "targets": "q,down"}],
    "lq_lora": [{"rank": 4}, {"rank": 4, "format_pattern": {".*down_proj": "fp32"}}],
    "full": [{}, {"targets": "all-linear"}, {"targets": "input_layernorm,embed_tokens"}],
}  # fmt: skip
CASES = [pytest.param(n, s, id=f"{n}-{i}") for n in names() for i, s in enumerate(VARIANTS.get(n, [{}]))]
