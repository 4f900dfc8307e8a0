"""Draw what a benchmark wrote: `draw.py NAME FOLDER` makes NAME.svg of NAME.json. Run with the peers' matplotlib."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

OURS, OTHERS = "#2a7f62", ("#b8b8b8", "#8a8a8a")
PARTS = ["#2a7f62", "#c9a227", "#5b7db1", "#a4508b", "#8a8a8a", "#d9d9d9", "#444444"]


def colour(side, sides):
    return (
        OURS if side.startswith("deltaw") else OTHERS[[s for s in sides if not s.startswith("deltaw")].index(side) % 2]
    )


def bars(ax, groups, sides, values, label):
    """Bars side by side; `values` has one of each group and side, or none."""
    for i, side in enumerate(sides):
        at = [g + (i - (len(sides) - 1) / 2) * 0.8 / len(sides) for g in range(len(groups))]
        drawn = ax.bar(at, [values.get((g, side), 0) for g in groups], 0.8 / len(sides), label=side,
                       color=colour(side, sides))  # fmt: skip
        ax.bar_label(drawn, [f"{values[g, side]:,.4g}" if (g, side) in values else "" for g in groups], fontsize=7)
    ax.set_xticks(range(len(groups)), groups, fontsize=8)
    ax.set_ylabel(label)
    ax.legend(frameon=False, fontsize=8, ncols=len(sides), loc="lower right", bbox_to_anchor=(1, 1))


def speed(rows):
    fig, axes = plt.subplots(2, 1, figsize=(8, 6.5))
    groups = list(dict.fromkeys(f"{r['model']}\n{r['shape']}" for r in rows))
    sides = list(dict.fromkeys(r["side"] for r in rows))
    for ax, key, label, per in zip(axes, ("tokens_per_second", "peak_bytes"), ("tokens/s", "peak, GB"), (1, 1e9),
                                   strict=True):  # fmt: skip
        bars(ax, groups, sides, {(f"{r['model']}\n{r['shape']}", r["side"]): r[key] / per for r in rows}, label)
    return fig


def step(rows):
    """A bar of each side, in pieces by who takes the time."""
    fig, ax = plt.subplots(figsize=(8, 2.8))
    kinds = sorted({k for found in rows.values() for k in found}, key=lambda k: -rows["deltaw"].get(k, 0))
    sides = list(rows)[::-1]
    left = dict.fromkeys(sides, 0.0)
    for kind, part in zip(kinds, PARTS, strict=False):
        ms = [rows[side].get(kind, 0) for side in sides]
        ax.barh(sides, ms, left=[left[s] for s in sides], color=part, label=kind)
        for side, many in zip(sides, ms, strict=True):
            left[side] += many
    ax.set_xlabel("milliseconds of a step")
    ax.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return fig


def rows(rows):
    fig, axes = plt.subplots(1, 2, figsize=(8, 3))
    sides = [r["side"] for r in rows]
    for ax, key, label in zip(axes, ("rows_per_second", "first_step_seconds"), ("rows/s", "s to the first step's end"),
                              strict=True):  # fmt: skip
        bars(ax, [""], sides, {("", r["side"]): r[key] for r in rows}, label)
    return fig


def growth(rows):
    asked = list(dict.fromkeys(r["question"] for r in rows))
    questions = [q for q in asked if q != "large"] or asked
    fig, axes = plt.subplots(2, len(questions), figsize=(3 * len(questions), 5), squeeze=False)
    for column, question in enumerate(questions):
        mine = [r for r in rows if r["question"] == question]
        sizes = [r["size"] for r in mine]
        for ax, key, label, per in zip(axes[:, column], ("step_seconds", "peak_bytes"), ("s a step", "peak, GB"),
                                       (1, 1e9), strict=True):  # fmt: skip
            ax.plot(sizes, [r[key] / per for r in mine], "o-", color=OURS)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks(sizes, sizes)
            ax.yaxis.set_major_formatter("{x:g}")
            ax.set_xlabel(question)
            ax.set_ylabel(label)
    return fig


def techniques(rows):
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    rows = rows[::-1]
    for ax, key, label, per in zip(axes, ("kept_bytes_per_token", "tokens_per_second"), ("kB kept for each token",
                                   "tokens/s"), (1e3, 1), strict=True):  # fmt: skip
        ax.barh([r["name"] for r in rows], [r[key] / per for r in rows], color=OURS)
        ax.set_xlabel(label)
    return fig


def roofline(rows):
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    rows = rows[::-1]
    names = [r["kernel"] for r in rows]
    axes[0].barh(names, [100 * r["roofline_share"] for r in rows], color=OURS)
    axes[0].set_xlabel("share of the roofline, %")
    axes[1].barh(names, [r["torch_seconds"] / r["seconds"] for r in rows], color=OURS)
    axes[1].set_xlabel("times as fast as torch")
    axes[1].axvline(1, color=OTHERS[1])
    return fig


def drift(rows):
    fig, ax = plt.subplots(figsize=(8, 3))
    exact = rows["peft fp32"]
    sides = [s for s in rows if s != "peft fp32"]
    for side in sides:
        ax.plot([abs(a - b) for a, b in zip(rows[side], exact, strict=True)], color=colour(side, sides), label=side)
    ax.set_xlabel("step")
    ax.set_ylabel("|loss - loss in fp32|")
    ax.legend(frameon=False, fontsize=8)
    return fig


QUOTED = {"llama.cpp (quoted)": {0: 116, 1: 67, 8: 39}}
"""Of docs/serving.md: tokens/s on another machine, with AMX."""


def serving(rows):
    """Tokens a second against the number of adapters; the peers that were not run are drawn as they were quoted."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    sides = list(dict.fromkeys(r["side"] for r in rows))
    lines = {side: {r["adapters"]: r["tokens_per_second"] for r in rows if r["side"] == side} for side in sides}
    for side, points in {**lines, **QUOTED}.items():
        ax.plot(list(points), list(points.values()), "o:" if side in QUOTED else "o-", label=side,
                color=colour(side, [*sides, *QUOTED]))  # fmt: skip
    ax.set_xscale("symlog", base=2, linthresh=1)
    every = sorted({n for points in lines.values() for n in points})
    ax.set_xticks(every, ["base", *map(str, every[1:])])
    ax.set_xlabel("distinct adapters")
    ax.set_ylabel("tokens/s")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8)
    return fig


def served_step(rows):
    """What a step's calls take, side by side, and what is left of it; in front of them what they could not be below."""
    fig, ax = plt.subplots(figsize=(8, 3))
    steps = list(dict.fromkeys((r["step"], r["adapters"]) for r in rows))[::-1]
    names = ["product", "wear", "paged", "head", "the rest"]
    for y, step in enumerate(steps):
        of = {r["call"]: r for r in rows if (r["step"], r["adapters"]) == step}
        rest = of["step"]["seconds"] - sum(of[name]["seconds"] for name in names[:-1])
        left = 0
        for name, tone in zip(names, plt.cm.viridis([0.1, 0.35, 0.6, 0.8, 0.95]), strict=True):
            wide = 1e3 * (of[name]["seconds"] if name in of else rest)
            ax.barh(y, wide, left=left, color=tone, label=name if y == 0 else None)
            left += wide
        least = 1e3 * sum(r.get("least_seconds", 0) for r in of.values())
        ax.plot([least, least], [y - 0.4, y + 0.4], color="black", label="the least, all together" if y == 0 else None)
    ax.set_yticks(range(len(steps)), [f"{name}, {count or 'no'} adapters" for name, count in steps])
    ax.set_xlabel("ms")
    ax.legend(frameon=False, fontsize=8)
    return fig


def scale(rows):
    fig, ax = plt.subplots(figsize=(6, 2.2))
    ax.barh([f"{r['adapters']:,} adapters, {r['side'].split(', ', 1)[1]}" for r in rows[::-1]],
            [r["tokens_per_second"] for r in rows[::-1]], color=OURS)  # fmt: skip
    ax.set_xlabel("tokens/s")
    return fig


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none"})
    fig = globals()[name](json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    fig.tight_layout()
    fig.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
