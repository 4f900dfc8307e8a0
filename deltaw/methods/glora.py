"""GLoRA: (W + W ∘ A + B) x + (b + b ∘ D + E + W C), each of A to E a matrix, a vector, a number or nothing.

Chavan et al. 2023, arXiv:2306.07967; ∘ is elementwise, as in the authors' code (Arnav0400/ViT-Slim). What is chosen at
a layer is its *path*. A supernet draws one for every layer and pass, so that a search can try them all afterwards.
"""

import math
from dataclasses import field
from typing import ClassVar, Literal, NamedTuple, get_args
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapters.adapter import HEAD, Method, Site
from deltaw.errors import UserError
from deltaw.models.slots import Affine, Delta, Linear, Parts
from deltaw.settings import Rank, settings

Wide = Literal["lora", "vector", "constant", "none"]
Prompt = Literal["lora", "vector", "none"]
Flat = Literal["vector", "constant", "none"]
CHOICES = (get_args(Wide), get_args(Wide), get_args(Prompt), get_args(Flat), get_args(Flat))


class Path(NamedTuple):
    """What each of the five terms of a layer is."""

    a: str
    b: str
    c: str
    d: str
    e: str

    def numbers(self, o: int, i: int, rank: int) -> int:
        """How many numbers this path trains at a layer of this size."""
        sides = ((o, i), (o, i), (i, 1), (o, 0), (o, 0))
        return sum({"lora": rank * (rows + columns), "vector": rows, "constant": 1, "none": 0}[choice]
                   for choice, (rows, columns) in zip(self, sides, strict=True))  # fmt: skip


USUAL = Path("vector", "lora", "none", "none", "none")
LARGEST = Path("lora", "lora", "lora", "vector", "vector")


def drawn(rng: torch.Generator | None = None) -> Path:
    """A path, all equally likely."""
    picked = (int(torch.randint(len(some), (), generator=rng)) for some in CHOICES)
    return Path(*(some[i] for some, i in zip(CHOICES, picked, strict=True)))


class General(Delta):
    """The terms of one layer. A vector or a number is a part of the matrices, which all paths of a supernet share."""

    def __init__(self, o: int, i: int, rank: int, path: Path, rng: torch.Generator) -> None:
        super().__init__()
        self.size, self.path, self.roams = (o, i, rank), path, False
        for term, choice, rows, columns in (("A", path.a, o, i), ("B", path.b, o, i), ("C", path.c, i, 1)):
            if choice == "lora":
                bound = math.sqrt(6 / (rank + columns))  # Xavier's
                up = torch.empty(rank, columns).uniform_(-bound, bound, generator=rng)
                self.register_parameter(f"{term}_up", nn.Parameter(up))
            if choice != "none":
                shape = {"lora": (rows, rank), "vector": (rows, 1), "constant": (1, 1)}[choice]
                self.register_parameter(f"{term}_down", nn.Parameter(torch.zeros(shape)))
        for term, choice in (("D", path.d), ("E", path.e)):
            if choice != "none":
                self.register_parameter(term, nn.Parameter(torch.zeros(o if choice == "vector" else 1)))

    def within(self, path: Path) -> Path:
        """The path without the terms that this layer does not have."""
        there = {name[0] for name, _ in self.named_parameters()}
        return Path(*(choice if term in there else "none" for term, choice in zip("ABCDE", path, strict=True)))

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The two matrices of a term that is one of rank R: R x I and O x R."""
        return self.get_parameter(f"{name}_up"), self.get_parameter(f"{name}_down")

    def term(self, name: str, choice: str) -> Tensor | None:
        """What a term is by this choice: O x I, O x 1 or 1 x 1 (A, B), I x 1 (C), O or 1 (D, E)."""
        if choice == "none":
            return None
        if name in "DE":
            flat = self.get_parameter(name)
            return flat[:1] if choice == "constant" else flat
        down = self.get_parameter(f"{name}_down")
        if choice == "lora":
            return down @ self.get_parameter(f"{name}_up")
        return down[:1, :1] if choice == "constant" else down[:, :1]

    def beside(self, choice: str) -> tuple[Tensor, Tensor]:
        """B by this choice as a product, whatever it is: R x I and O x R."""
        if choice == "lora":
            return self.pair("B")
        b, (o, i, _) = self.term("B", choice), self.size
        return torch.ones(1, i), torch.zeros(o, 1) if b is None else b.expand(o, 1)

    def bias(self, slot: Linear, path: Path, dtype: torch.dtype) -> Tensor | None:
        """B + b ∘ D + E + W C, or None where there is nothing of it."""
        c_I1, d, e = (self.term(name, choice) for name, choice in zip("CDE", path[2:], strict=True))
        own_O = slot.bias if slot.bias is None or d is None else slot.bias * (1 + d)
        prompt_O = None if c_I1 is None else slot.weight(c_I1.t().to(dtype))[0]
        terms = [term for term in (own_O, e, prompt_O) if term is not None]
        return sum(terms[1:], terms[0]).expand(slot.weight.shape[0]) if terms else None

    def forward(self, slot: Linear, x_TI: Tensor) -> Tensor:
        path = self.within(drawn()) if self.roams and self.training else self.path
        bias_O = self.bias(slot, path, x_TI.dtype)
        y_TO: Tensor = slot.weight(x_TI)
        if path.a == "lora":
            y_TO = y_TO + self._elementwise(slot, x_TI)
        elif (a := self.term("A", path.a)) is not None:
            y_TO = y_TO + y_TO * a.flatten().to(x_TI.dtype)  # 1 + a would be rounded to one
        if path.b != "none":
            up_RI, down_OR = (t.to(x_TI) for t in self.beside(path.b))
            y_TO = y_TO + F.linear(F.linear(x_TI, up_RI), down_OR)
        return y_TO if bias_O is None else y_TO + bias_O.to(x_TI.dtype)

    def _elementwise(self, slot: Linear, x_TI: Tensor) -> Tensor:
        """(W ∘ A_down A_up) x: as `rank` products with W where there are fewer tokens than make that dearer."""
        up_RI, down_OR = (t.to(x_TI.dtype) for t in self.pair("A"))
        if len(x_TI) * (len(up_RI) - 1) > len(up_RI) + 1:
            return F.linear(x_TI, slot.weight.dense() * (down_OR @ up_RI))
        parts = [slot.weight(x_TI * up) * down for up, down in zip(up_RI, down_OR.t(), strict=True)]
        return torch.stack(parts).sum(0)

    def merged(self, slot: Linear) -> Parts:
        w_OI = slot.weight.dense().float()
        a, b = self.term("A", self.path.a), self.term("B", self.path.b)
        new_OI = w_OI if a is None else w_OI + w_OI * a
        bias_O = self.bias(slot, self.path, slot.weight.dtype)
        parts: Parts = {"weight": slot.weight.repack(new_OI if b is None else new_OI + b)}
        return parts if bias_O is None else {**parts, "bias": bias_O.to(slot.weight.dtype)}

    def served(self, slot: Linear) -> Affine | None:
        if self.path.a == "lora":
            return None  # W ∘ A is of full rank
        a = self.term("A", self.path.a)
        bias_O = self.bias(slot, self.path, slot.weight.dtype) if set(self.path[2:]) != {"none"} else None
        gain_O = None if a is None else (1 + a).flatten().expand(self.size[0])
        return Affine(*self.beside(self.path.b), 1.0, gain_O, bias_O)

    def along(self, path: Path) -> Delta:
        """The same by one of a supernet's paths, without what that does not use."""
        other = General(*self.size, path, torch.Generator())
        with torch.no_grad():
            for name, p in other.named_parameters():
                mine = self.get_parameter(name)
                p.copy_(mine[tuple(slice(n) for n in p.shape)])
        return other


@settings
class GLoRA(Method):
    """Train a scale for the weights, a LoRA beside them, and biases, each in the form that is chosen."""

    peak_rate: ClassVar[float] = 4e-3
    """BLEU 37.5, 39.6 at 1e-3, 4e-3 (benchmarks/table.py --rows 60 --set minutes=null steps=30)."""

    rank: Rank = 4
    """Rank R of the terms that are matrices."""
    a: Wide = "vector"
    """What multiplies W: a matrix of rank R, a number for every output, one number, or nothing."""
    b: Wide = "lora"
    """What is added to W: a matrix of rank R, a number for every output, one number, or nothing."""
    c: Prompt = "none"
    """What W is applied to and added as a bias: a vector of rank R, a vector, or nothing."""
    d: Flat = "none"
    """What multiplies the bias: a vector, a number, or nothing. Only where the layer has one."""
    e: Flat = "none"
    """What is added to the bias: a vector, a number, or nothing."""
    supernet: bool = False
    """Train all of it, along a path drawn for every layer and pass, for deltaw search to choose from."""
    paths: dict[str, str] = field(default_factory=dict)
    """Other paths for some layers, by their names: {"layers.0.mlp.up_proj": "none/lora/none/none/vector"}."""

    def plan(self, sites: list[Site]) -> list[Site]:
        if unknown := sorted(self.paths.keys() - {site.name for site in sites}):
            raise UserError(f"There is a path for {unknown[0]}, which is no adapted layer.")
        if self.supernet and (self.paths or (self.a, self.b, self.c, self.d, self.e) != USUAL):
            raise UserError("A supernet trains every term of every layer.", remedy="Leave --a to --e and --paths out.")
        return sites

    def build(self, site: Site, rng: torch.Generator) -> General:
        o, i = site.slot.weight.shape
        path = LARGEST if self.supernet else Path(self.a, self.b, self.c, self.d, self.e)
        if site.name in self.paths:
            path = read_path(self.paths[site.name])
        if site.slot.bias is None:
            path = path._replace(d="none")
        head = site.name == HEAD  # it is used as a matrix, and has no bias
        delta = General(o, i, self.rank, path._replace(c="none", d="none", e="none") if head else path, rng)
        if self.supernet and not head:  # outside of training along one path that is like those that are drawn
            delta.roams = True
            delta.path = delta.within(drawn(torch.Generator().manual_seed(crc32(site.name.encode()))))
        return delta


def read_path(text: str) -> Path:
    """Read a path as it is written: A to E, divided by slashes.

    Raises:
        UserError: it is none.
    """
    parts = text.split("/")
    if len(parts) != len(CHOICES) or any(part not in some for part, some in zip(parts, CHOICES, strict=False)):
        raise UserError(f"'{text}' is no path.", remedy="One looks like vector/lora/none/none/none: A to E.")
    return Path(*parts)
