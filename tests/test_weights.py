"""Codes in bytes, scales in few bits, names of formats, and weights that llama.cpp's Q4_1 had before."""

import pytest
import torch
from hypothesis import given, strategies as st

from deltaw.errors import UserError
from deltaw.kernels.packed import PLANES, pack, stored_bytes, unpack
from deltaw.weights.codebook import Double, Plain, TwoLevel
from deltaw.weights.formats import parse
from deltaw.weights.grid import Grid


@given(st.sampled_from(sorted(PLANES)), st.lists(st.integers(0, 255), max_size=70))
def test_g10_codes_come_out_of_bytes_as_they_went_in(width, codes):
    codes_N = torch.tensor(codes, dtype=torch.uint8) & (1 << width) - 1
    packed = pack(codes_N, width)
    assert len(packed) == stored_bytes(len(codes), width) == sum(-(-len(codes) * p // 8) for p in PLANES[width])
    assert torch.equal(unpack(packed, width, len(codes)), codes_N)


def test_the_first_of_two_codes_is_in_the_high_bits():
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x12, 0x30]


@pytest.mark.parametrize("scales", [Plain(), Double(), TwoLevel(), TwoLevel(4, "fp16", 64), TwoLevel(2, "bf16", 16),
                                    TwoLevel(3, "fp32", 256)], ids=str)  # fmt: skip
@pytest.mark.parametrize("count", [1, 16, 257, 1000])
def test_scales_come_back_as_near_as_their_bits_allow(scales, count):
    scale_N = 0.5 + torch.rand(count, generator=torch.Generator().manual_seed(count))
    got = scales.read(scales.store(scale_N), count)
    assert sum(t.nbytes for t in scales.store(scale_N).values()) == scales.size(count)
    steps = {"": 0.0, "-dq": 0.03}.get(str(scales), 0.5 / (2 ** getattr(scales, "width", 8) - 1) + 0.005)
    assert (got - scale_N).abs().max() <= steps * (scale_N.max() - scale_N.min()) + 1e-6


@pytest.mark.parametrize("scales", [Plain(), Double(), TwoLevel()], ids=str)
def test_scales_that_are_all_the_same_come_back_exactly(scales):
    same = torch.full((300,), 0.37)
    torch.testing.assert_close(scales.read(scales.store(same), 300), same, rtol=1e-6, atol=0)


def test_the_explicit_formula_of_two_levels():
    scale_N = torch.tensor([0.2, 0.5, 0.9, 0.3, 1.7])
    least, got = 0.2, TwoLevel(3, "fp32", 2).read(TwoLevel(3, "fp32", 2).store(scale_N), 5)
    want = []
    for block in ([0.2, 0.5], [0.9, 0.3], [1.7]):
        most = max(s - least for s in block)
        want += [least + round((s - least) * 7 / most) * most / 7 if most else least for s in block]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["nf5", "nf4-b", "fp3", "int5", "int4-g0x", "q4", "", "nf4-b1", "nf3-s8.fp64.256", "nf4-dq-s8"]
)
def test_a_format_that_there_is_not_is_refused(name):
    with pytest.raises(UserError, match="There is no format"):
        parse(name)


@pytest.mark.parametrize(("name", "whole"), [("nf4-b64", "nf4"), ("int4", "int4-g32"), ("int8", "int8-g32"),
                                             ("nf3-b32-s4.fp16.64", "nf3-b32-s4.fp16.64"), ("bf16", "bf16")]
)  # fmt: skip
def test_names_are_said_in_one_way(name, whole):
    assert str(parse(name)) == whole


def test_a9_a_matrix_that_was_on_the_grid_is_on_it_again():
    """As the default base is, whose file has 4-bit codes with a scale and a least value of 16 bits for 32 inputs."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 3, 32), generator=rng)
    codes[..., 0], codes[..., 1] = 0, 15
    d, m = torch.rand(8, 3, 1, generator=rng).half(), torch.randn(8, 3, 1, generator=rng).half()
    w_OI = (codes * d.float() + m.float()).view(8, 96)
    packed = Grid(4, 32).pack(w_OI, torch.float32)
    assert torch.equal(unpack(packed.codes, 4, 768).view(8, 3, 32), codes.to(torch.uint8))
    assert torch.equal(packed.scale, d[..., 0])
    assert torch.equal(packed.offset, m[..., 0])


def test_a_group_of_one_value_is_that_value():
    w_OI = torch.full((2, 32), 0.5)
    assert torch.equal(Grid(4, 32).pack(w_OI, torch.float32).dense(), w_OI)
