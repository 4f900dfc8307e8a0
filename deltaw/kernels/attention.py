"""Softmax attention: of documents laid one after another, and over keys and values that lie in pages.

All documents are one call (native/attention.cpp), and so are the new tokens of many sequences (native/paged.cpp);
torch is the reference of both.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.kernels.library import AT, COUNT, FLAG, LANES, NUMBER, PLAIN, fields, function, plainly

TENSORS = ("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv", "spans")
SIDE = 32
"""Tokens of a page."""


class Flat(ctypes.Structure):
    """What there is to attend to in documents, as C has it."""

    _fields_ = fields((AT, " ".join(TENSORS)), (COUNT, "documents tokens heads kv_heads size window"),
                      (NUMBER, "scale"), (FLAG, "bf16 threads"))  # fmt: skip


def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, spans: Sequence[tuple[int, int, int, int]], scale: float,
           window: int) -> Tensor | None:  # fmt: skip
    """What every token sees of its stem, if it has one, and of its document so far; None: torch is to do this.

    `spans`: start and stop of each document, and of its stem, which is a document before it; `window`: how many
    tokens are seen at most, or 0.
    """
    if not (q_THE.is_cpu and spans and q_THE.shape[1] % k_TKE.shape[1] == q_THE.shape[-1] % (2 * LANES) == 0):
        return None
    whole = [x.contiguous() for x in (q_THE, k_TKE, v_TKE)]
    if plainly("attend", *whole) is None:
        return None
    return _Attend.apply(*whole, torch.tensor(spans), scale, window)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, spans: Tensor, scale: float,
                window: int) -> Tensor:  # fmt: skip
        tensors = {"q": q_THE, "k": k_TKE, "v": v_TKE, "spans": spans,
                   "out": torch.empty_like(q_THE), "lse": torch.empty(q_THE.shape[:2])}  # fmt: skip
        _call("attend", tensors, scale, window)
        ctx.save_for_backward(*tensors.values())
        ctx.names, ctx.told = tuple(tensors), (scale, window)
        return tensors["out"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THE: Tensor) -> tuple[Tensor | None, ...]:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | {"dout": dout_THE.contiguous()}
        grads = {f"d{name}": torch.empty_like(tensors[name]) for name in "qkv"}
        _call("attend_back", tensors | grads, *ctx.told)
        return grads["dq"], grads["dk"], grads["dv"], None, None, None


def _call(name: str, tensors: dict[str, Tensor], scale: float, window: int) -> None:
    q_THE = tensors["q"]
    sizes = len(tensors["spans"]), *q_THE.shape[:2], *tensors["k"].shape[1:], window
    pointers = (tensors[key].data_ptr() if key in tensors else None for key in TENSORS)
    narrow = int(q_THE.dtype == torch.bfloat16)
    function(name)(ctypes.byref(Flat(*pointers, *sizes, scale, narrow, torch.get_num_threads())))


class Run(NamedTuple):
    """A sequence's new tokens `start:stop` of the flat row, behind `past` that are in pages already."""

    start: int
    stop: int
    past: int


class Paged(ctypes.Structure):
    """What there is to attend to in pages, as C has it."""

    _fields_ = fields((AT, "q k v out pages spans table"), (COUNT, "sequences heads kv_heads size window page most"),
                      (NUMBER, "scale"), (FLAG, "bf16 threads"))  # fmt: skip


class Book:
    """One layer's pages, of shape N x 2K x (SIDE * E) numbers: of each head its keys, then of each its values.

    Keys lie turned and values as they are, in words of as many numbers as are multiplied at once.
    """

    def __init__(self, pages_N2KX: Tensor, size: int) -> None:
        self.pages, self.size, self.each = pages_N2KX, size, 4 // pages_N2KX.itemsize

    def read(self, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens of a sequence with these pages: S x K x E."""
        keys, values = self._apart(self.pages[table.long()])
        k_SKE, v_SKE = keys.permute(0, 3, 1, 2, 4), values.permute(0, 2, 4, 1, 3)
        shape = (-1, self.pages.shape[1] // 2, self.size)
        return k_SKE.reshape(shape)[:count], v_SKE.reshape(shape)[:count]

    def write(self, table: Tensor, first: int, k_TKE: Tensor, v_TKE: Tensor) -> None:
        """Put keys and values of tokens from number `first` on into the pages of their sequence."""
        at_T = torch.arange(first, first + len(k_TKE), device=table.device)
        page_T, at_T = table[at_T // SIDE].long(), at_T % SIDE
        keys, values = self._apart(self.pages)
        keys[page_T, :, :, at_T] = k_TKE.reshape(*k_TKE.shape[:2], -1, self.each)
        values[page_T, :, at_T // self.each, :, at_T % self.each] = v_TKE

    def _apart(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Views of keys, page x head x word x token x number, and of values, page x head x words x E x number."""
        n, kv, e, each = len(pages), pages.shape[1] // 2, self.size, self.each
        keys = pages[:, :kv].view(n, kv, e // each, SIDE, each)
        return keys, pages[:, kv:].view(n, kv, SIDE // each, e, each)

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, spans_N3: Tensor, table_NP: Tensor, scale: float,
               window: int) -> Tensor | None:  # fmt: skip
        """Keep the new keys and values, and attend from every new token to its sequence so far; None: torch is to.

        `table_NP`: each sequence's pages, int32; `window`: how many tokens are seen at most, or 0.
        """
        native = function("paged")
        plain = self.pages.dtype in PLAIN and self.pages.device.type == "cpu"
        if not native or not plain or q_THE.shape[-1] % (2 * LANES):
            return None
        q_THE, k_TKE, v_TKE = q_THE.contiguous(), k_TKE.contiguous(), v_TKE.contiguous()
        out_THE, told = torch.empty_like(q_THE), self.told(spans_N3, table_NP)
        q, k, v, out, pages = (t.data_ptr() for t in (q_THE, k_TKE, v_TKE, out_THE, self.pages))
        told |= {"heads": q_THE.shape[1], "kv_heads": k_TKE.shape[1], "size": self.size, "window": window}
        native(ctypes.byref(Paged(q=q, k=k, v=v, out=out, pages=pages, scale=scale, **told)))
        return out_THE

    def told(self, spans_N3: Tensor, table_NP: Tensor) -> dict[str, int]:
        """What a call is told that is the same at all layers."""
        return {"spans": spans_N3.data_ptr(), "table": table_NP.data_ptr(), "sequences": len(spans_N3),
                "page": self.pages.stride(0), "most": table_NP.stride(0),
                "bf16": int(self.pages.dtype == torch.bfloat16), "threads": torch.get_num_threads()}  # fmt: skip
