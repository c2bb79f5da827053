"""Figures of results and of the attention pattern, .png or .svg, by matplotlib. It is optional: it
is imported only where a figure is drawn. The same numbers give the same file."""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import longlora

STYLE = {"axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
         "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"], "grid.color": "0.9",
         "savefig.dpi": 150, "svg.fonttype": "none", "svg.hashsalt": "longlora"}  # text stays text
# Okabe and Ito's colours, for the colour-blind too; not as many as markers: pairs repeat late.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
BLUE, RED, DARK, MARKERS = *COLORS[:2], "0.35", "osD^vPX*"
LEGEND = {"loc": "outside lower center", "ncols": 4, "frameon": False}  # never on the data
Series = dict[str, tuple[list[int], list[float | None], list[float | None] | None]]


def check(path: Path) -> None:
    """Raises ValueError if no figure can be written to `path`: before the long work, not after."""
    if path.suffix not in (".png", ".svg") or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--plot {path}: name a .png or .svg in a folder that can be written to")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError("figures need matplotlib: pip install matplotlib") from None


@contextlib.contextmanager
def figure(path: Path, width: float, height: float, panels: int = 1, **options) -> Iterator:
    """The axes of a figure of so many inches (8 fill a README), written when the block ends."""
    check(path)
    import matplotlib.figure  # not pyplot, which keeps every figure
    with matplotlib.rc_context(STYLE):
        fig = matplotlib.figure.Figure((width, height), layout="constrained")
        yield fig.subplots(1, panels, **options)
        longlora.replace_file(path, lambda partial: fig.savefig(
            partial, format=path.suffix[1:], metadata={"Date": None}))


def lines(ax, series: Series) -> None:
    for i, (name, (x, y, error)) in enumerate(series.items()):
        y, error = (None if v is None else np.array(v, float) for v in (y, error))  # None: nan
        ax.errorbar(x, y, error, label=name, color=COLORS[i % 7], marker=MARKERS[i % 8], capsize=3)
    ax.grid(True, which="both")
    ax.figure.legend(**LEGEND)


def curve(path: Path, series: Series, title: str, ylabel: str, marks: dict[str, int] = {},
          xlabel: str = "tokens in the window") -> None:
    """A line for each of `series`: x, y, and y's standard errors if known; `marks` are x's."""
    xs = sorted({x for xs, _, _ in series.values() for x in xs})
    if len(xs) > 6:  # their labels would overlap
        xs = [x for x in xs if x & (x - 1) == 0] or [xs[0], xs[-1]]
    ys = np.array([y for _, ys, _ in series.values() for y in ys], float)  # None becomes nan
    with figure(path, 8, 4.5) as ax:
        for i, (name, x) in enumerate(marks.items()):  # names above the axes, a row each
            ax.axvline(x, 0, top := 1.02 + 0.06 * i, color=DARK, linestyle=":", clip_on=False)
            ax.text(x, top, name, transform=ax.get_xaxis_transform(), ha="center", va="bottom")
        lines(ax, series)
        ax.set_xscale("log", base=2)
        ax.set_xticks(xs, [f"{x:,}" for x in xs])
        if np.nanmax(ys) > 5 * np.nanmin(ys) > 0:
            ax.set_yscale("log", subs=(2, 3, 5))
            ax.yaxis.set(major_formatter=(plain := lambda y, _: f"{y:,g}"), minor_formatter=plain)
        ax.set_title(title, pad=8 + 16 * len(marks))
        ax.set(xlabel=xlabel, ylabel=ylabel)


def heatmaps(path: Path, maps: dict[str, list[dict]]) -> None:
    """Passkeys retrieved by length and depth: each of `maps` has rows of eval.py's passkey()."""
    shares = [np.array([row["by_depth"] for row in rows], float).T for rows in maps.values()]
    n, m = (max(sizes) for sizes in zip(*(share.shape for share in shares)))  # depths, lengths
    columns, cell = [len(rows) for rows in maps.values()], 0.4 * min(1, 10 / m)  # inches
    with figure(path, max(5, 1.1 + cell * sum(columns)), 1.4 + 0.3 * min(max(n, 5), 10), len(maps),
                sharey=True, squeeze=False, width_ratios=columns) as (axes,):
        for ax, share, (name, rows) in zip(axes, shares, maps.items()):
            edges = np.linspace(0, 100, len(share) + 1)
            image = ax.pcolormesh(range(len(rows) + 1), edges, share, cmap="Blues", vmin=0, vmax=1)
            ax.patch.set(facecolor="0.93", edgecolor="0.75", hatch="///")  # where no trial fell
            for (i, j), value in np.ndenumerate(share):
                if max(n, m) <= 10 and not np.isnan(value):
                    ax.text(j + 0.5, (edges[i] + edges[i + 1]) / 2, f"{value:.2f}", size=9,
                            ha="center", va="center", color="w" if value > 0.5 else "k")
            shown = range(0, len(rows), 1 + m // 21)  # a slanted label takes 0.2 inches
            ax.set_xticks([j + 0.5 for j in shown], [f"{rows[j]['length']:,}" for j in shown],
                          rotation=45, ha="right", rotation_mode="anchor")
            ax.set(title=name, ylim=(100, 0))
        axes[0].set_ylabel("depth of the key (%)")
        ax.figure.supxlabel("tokens in the prompt", size=10)
        ax.figure.colorbar(image, ax=axes, label="share retrieved", pad=0.02, aspect=15)


def dots(path: Path, groups: dict[str, list[float]], title: str, xlabel: str) -> None:
    """A row for each of `groups`: its values and their mean."""
    with figure(path, 8, 1.5 + 0.42 * len(groups)) as ax:
        for y, values in enumerate(groups.values()):
            mean, hidden = sum(values) / len(values), "_" * (y > 0)  # named once in the legend
            ax.plot(mean, y, "o", color=BLUE, ms=9, label=hidden + "mean")
            ax.plot(values, [y] * len(values), "o", color=RED, ms=4, label=hidden + "one seed")
            ax.annotate(f"{mean:.2f}", (mean, y), (0, 7), textcoords="offset points", ha="center")
        ax.set_yticks(range(len(groups)), groups)
        ax.set(title=title, xlabel=xlabel, ylim=(len(groups) - 0.5, -0.75))
        ax.grid(True)
        ax.figure.legend(**LEGEND)


def seen(T: int, G: int | None = None, shift: bool = True) -> torch.Tensor:
    """Which query sees which key, (2, T, T) for a head of each half; without G by full attention.
    With equal scores and the identity as values, the output is each key's weight."""
    x, v = torch.zeros(1, 2, T, 1), torch.eye(T).expand(1, 2, T, T)
    out = (longlora.shifted_sparse_attention(x, x, v, G, shift) if G
           else longlora.causal_attention(x, x, v))
    return out[0] > 0


def pattern(path: Path, T: int = 16, G: int = 4) -> None:
    """Which query sees which key (the paper's Figure 3), as longlora.py's own functions have it."""
    full, (first, second), ticks = seen(T)[0], seen(T, G), range(0, T, G)
    panels = {"inference: all heads\nfull attention": (full, DARK),
              f"training: half of the heads\ngroups of {G} tokens": (first, BLUE),
              f"training: the other half\ngroups shifted by {G // 2}": (second, RED)}
    with figure(path, 8, 3.3, len(panels)) as axes:
        for ax, (title, (mask, color)) in zip(axes, panels.items()):
            for cells, fill in ((full & ~mask, "0.9"), (mask, color)):
                ax.spy(cells, marker="s", ms=130 / T, mew=0, color=fill)
            ax.xaxis.tick_bottom()
            ax.set(title=title, xlabel="key", ylabel="query", xticks=ticks, yticks=ticks)


def reach(path: Path, T: int = 2048, G: int = 512, layers: int = 8) -> None:
    """How many earlier tokens can influence the last of T through 1, 2, ... layers, by the union of
    all heads' patterns. In blocks of G/2 tokens: exact for the last if T is a multiple of that."""
    n, depth, series = T // (G // 2), range(1, layers + 1), {}
    for name, masks in {"full attention": seen(n), "S2-Attn": seen(n, 2),
                        "groups, not shifted": seen(n, 2, shift=False)}.items():
        paths = [torch.linalg.matrix_power(masks.any(0).double(), layer)[-1] for layer in depth]
        series[name] = depth, [int((x > 0).sum()) * (G // 2) - 1 for x in paths], None
    with figure(path, 8, 4) as ax:
        lines(ax, series)
        ax.set_yticks(ticks := range(0, T + 1, G), [f"{y:,}" for y in ticks])
        ax.set(title=f"How far information travels: T = {T:,}, G = {G:,}", xlabel="layers",
               ylabel=f"earlier tokens that can\ninfluence the last of {T:,}", xticks=depth)
