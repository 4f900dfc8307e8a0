"""Native code does what torch does, on every instruction set of this processor: the head of the report names them.

Unpacking is the same to the last bit; products are as near as sums in another order are.
"""

import copy
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from deltaw.errors import UserError
from deltaw.kernels import library
from deltaw.kernels.packed import FEW, SCRATCH, WIDTHS, nearest
from deltaw.weights.codebook import dynamic, fp4, normal
from deltaw.weights.formats import parse

FORMATS = ["nf4", "nf4-dq", "nf4-b48", "nf4-b128", "fp4", "fp4-dq", "nf3", "nf3-dq", "nf2", "nf8", "nf8-dq",
           "nf3-b32-s4.fp16.64", "nf2-b16-s2.bf16.16", "nf8-b64-s8.fp32.256", "int2-g32", "int3-g64", "int4-g32",
           "int4-g32-moved", "int8-g16", "int4-g128"]  # fmt: skip
SHAPES = [(64, 192), (7, 128), (33, 640), (100, 320), (1, 64)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(name, shape, dtype=torch.float32, seed=0):
    form = parse(name)
    if shape[1] % getattr(form, "group", 1):
        shape = (shape[0], shape[1] // form.group * form.group or form.group)
    w_OI = drawn(*shape, seed=seed)
    w_OI[0, :16] = 0
    w_OI.view(-1)[-1] = 7
    return form.pack(w_OI, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_unpacked_is_what_torch_unpacks_to_the_last_bit(path, name, shape):
    for dtype in (torch.float32, torch.bfloat16):
        weight = packed(name, shape, dtype)
        unpacked_OI = weight.native().unpack(torch.full(weight.shape, torch.nan, dtype=dtype))
        assert torch.equal(unpacked_OI, weight.plain())
        assert torch.equal(weight.dense(), weight.plain())
        assert torch.equal(weight.lent(), weight.plain())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("name", FORMATS)
def test_a4_few_rows_are_multiplied_as_they_would_be_with_the_unpacked_matrix(path, name, count):
    weight = packed(name, (33, 640))
    x_TI = drawn(count, weight.shape[1], seed=1)
    want = x_TI.double() @ weight.plain().double().t()
    off = (weight.native().multiply(x_TI).double() - want).abs().max() / want.abs().max()
    assert off < 1e-6
    narrow = packed(name, (33, 640), torch.bfloat16)
    got = narrow(x_TI.bfloat16())
    assert got.dtype == torch.bfloat16
    want = x_TI.bfloat16().double() @ weight.plain().double().t()
    assert (got.double() - want).abs().max() / want.abs().max() < 5e-3


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 12), st.integers(1, FEW), st.integers(1, 3))
def test_any_shape_and_any_number_of_threads(name, o, chunks, count, threads):
    weight = packed(name, (o, 16 * chunks), seed=o)
    x_TI = drawn(count, weight.shape[1], seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, dense = weight.product(x_TI), weight.dense()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(dense, weight.plain())
    torch.testing.assert_close(got, F.linear(x_TI.double(), weight.plain().double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "shape"), [("nf4", (5, 24)), ("nf4-b40", (4, 80)), ("int4-g8", (4, 32))])
def test_what_native_code_cannot_read_torch_does(name, shape):
    weight = parse(name).pack(drawn(*shape), torch.float32)
    assert weight.native() is None
    x_TI = drawn(2, shape[1], seed=1)
    assert torch.equal(weight.dense(), weight.plain())
    assert torch.equal(weight(x_TI), F.linear(x_TI, weight.plain()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "levels", [normal(2), normal(3), normal(4), fp4().sort().values, normal(8), dynamic()], ids=len
)
def test_the_nearest_level_is_that_of_torch_and_of_two_the_lower(path, levels, threads):
    edges = (levels[1:] + levels[:-1]) / 2
    special = [
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf]),
        levels,
        edges,
        edges.nextafter(torch.tensor(torch.inf)),
    ]
    values = torch.cat([1.1 * (2 * torch.rand(5000, generator=torch.Generator().manual_seed(0)) - 1), *special])
    assert len(levels) in WIDTHS
    torch.set_num_threads(threads)
    try:
        for part in (values, values[:1], values[:13], values[3:], values[::3], values[:0], values[:4000].view(50, 80)):
            got = nearest(part, levels)
            assert got.dtype == torch.uint8
            assert torch.equal(got.long(), torch.bucketize(part.contiguous(), edges))
    finally:
        torch.set_num_threads(1)


def test_levels_of_another_number_and_type_are_searched_by_torch(path):
    levels, values = torch.tensor([-1.0, 0.0, 2.0]), drawn(40)
    want = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    assert torch.equal(nearest(values, levels).long(), want)
    assert torch.equal(nearest(values.double(), levels.double()).long(), want)


def test_many_rows_take_the_unpacked_matrix(path):
    weight, x_TI = packed("nf4", (64, 192)), drawn(FEW + 1, 192, seed=1)
    assert torch.equal(weight(x_TI), F.linear(x_TI, weight.plain()))


def test_float16_is_unpacked_by_way_of_torch(path):
    weight = packed("nf4", (64, 192), torch.float16)
    assert weight.dense().dtype == torch.float16
    assert torch.equal(weight.dense(), packed("nf4", (64, 192)).plain().half())


def test_what_is_lent_is_the_same_memory_and_what_is_unpacked_is_not(path):
    first, second = packed("nf4", (64, 192)), packed("nf4", (64, 192), seed=1)
    lent = first.lent()
    assert second.lent().data_ptr() == lent.data_ptr() == SCRATCH.held.data_ptr()
    assert first.dense().data_ptr() != second.dense().data_ptr()


@pytest.mark.parametrize("name", ["nf4-dq", "int4-g32", "nf3-b32-s4.fp16.64"])
def test_what_was_replaced_or_copied_is_read_anew(path, name):
    weight, other, x_TI = packed(name, (64, 192)), packed(name, (64, 192), seed=1), drawn(1, 192, seed=1)
    before = weight(x_TI)
    twin = copy.deepcopy(weight)
    for part, t in other.kept.items():
        setattr(weight, part, t)
    assert torch.equal(weight(x_TI), other(x_TI))
    assert torch.equal(twin(x_TI), before)
    assert not torch.equal(weight(x_TI), before)
    twin.codes.zero_()
    assert torch.equal(twin.dense(), twin.plain())
    assert not torch.equal(twin(x_TI), before)


def test_only_what_is_stored_is_held_on_to(path):
    weight = packed("nf3-b32-s4.fp16.64", (64, 192))
    assert weight.native() is not weight.native()
    weight = packed("nf4-dq", (64, 192))
    held, codes = weight.native().layout, weakref.ref(weight.codes)
    assert weight.native().layout is held
    stored = {t.data_ptr() for t in weight.buffers()}
    own = [t for t in held if torch.is_tensor(t) and t.data_ptr() not in stored]
    assert sum(t.nbytes for t in own) == 4 * (16 + 256), "the tables, which all have in common"
    del held
    weight.to("meta")
    assert codes() is None


def test_the_reference_may_be_asked_for(choose):
    choose(library.REFERENCE)
    weight, x_TI = packed("nf4", (64, 192)), drawn(1, 192, seed=1)
    assert library.function("unpack") is None
    assert weight.native() is None
    assert torch.equal(weight(x_TI), F.linear(x_TI, weight.plain()))


def test_an_instruction_set_that_is_not_there_is_said(choose):
    choose("avx1024")
    with pytest.raises(UserError, match="avx1024") as caught:
        library.instruction_set()
    assert all(name in caught.value.remedy for name in library.available())


def test_without_the_library_torch_does_the_work():
    code = ("from pathlib import Path; from deltaw.kernels import library; library.FILE = Path('none');"
            "import torch; from deltaw.weights.formats import parse;"
            "w = parse('nf4-dq').pack(torch.eye(64), torch.float32);"
            "assert torch.equal(w(torch.eye(64)[:1]), w.plain().t()[:1]); print(library.available())")  # fmt: skip
    told = {k: v for k, v in os.environ.items() if k != library.CHOICE}
    said = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "('reference',)"


def test_a_set_that_is_not_there_is_said_without_a_library_too(monkeypatch, choose):
    monkeypatch.setattr(library, "library", lambda: None)
    library.available.cache_clear()
    try:
        choose("avx2")
        with pytest.raises(UserError, match="DELTAW_ISA=avx2 is not to be had"):
            library.function("norm")
        choose(library.REFERENCE)
        assert library.function("norm") is None
    finally:
        library.available.cache_clear()


def test_native_code_without_memory_ends_with_a_sentence():
    code = ("import resource, psutil, torch; from deltaw.kernels import attention; torch.set_num_threads(1);"
            "n = 40_000; x = torch.zeros(n, 1, 256);"
            "t = {'spans': torch.tensor([[0, n, 0, 0]]), 'lse': torch.zeros(n, 1)};"
            "t |= dict.fromkeys(('q', 'k', 'v', 'out'), x); attention.function('attend');"
            "limit = psutil.Process().memory_info().vms + 10_000_000;"
            "resource.setrlimit(resource.RLIMIT_AS, (limit, -1)); attention._call('attend', t, 1.0, 0)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "Memory was full" in done.stderr) == (3, True)
