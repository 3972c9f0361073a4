"""Pictures of ``theory`` and ``theory_contexts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from theory import GaussianFit, gaussian_density, mixture_density
from torch import Tensor

from lkspec.reporting.figure_style import DPI, STYLE, WIDTH_INCHES, line_colour, line_marker


def fits_figure(fits: Mapping[str, GaussianFit]) -> Figure:
    """The mixture and the Gaussians fitted to it, with their overlaps (Figure 2 of the paper)."""
    points = torch.linspace(-12.0, 12.0, 1201, dtype=torch.float64)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.6), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(points, mixture_density(points), color="#D9D9D9", linewidth=0, label="target p")
        for index, (name, fit) in enumerate(fits.items()):
            label = f"{name}: overlap {fit.overlap:.1%}"
            style = "-" if index < 3 else "--"  # later ones lie on earlier ones
            axes.plot(points, gaussian_density(points, fit), color=line_colour(index), linestyle=style, label=label)
        axes.set(xlabel="x", ylabel="density", xlim=(-12, 12))
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper")
    return figure


def landscapes_figure(
    landscapes: Mapping[str, Float[Tensor, "D M"]],
    means: Float[Tensor, " M"],
    deviations: Float[Tensor, " D"],
    fits: Mapping[str, GaussianFit],
) -> Figure:
    """Each objective over the Gaussian's mean and standard deviation, with every fit marked in every panel."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.6), dpi=DPI, layout="constrained")
        panels = figure.subplots(1, len(landscapes), sharey=True, squeeze=False)[0]
        for axes, (name, values) in zip(panels, landscapes.items(), strict=True):
            # By rank: KL spans three orders of magnitude, TV a third of one.
            ranks = values.flatten().argsort().argsort().reshape(values.shape) / values.numel()
            axes.contourf(means, deviations, ranks, levels=16, cmap="Greys_r")
            axes.grid(visible=False)
            _mark(axes, fits)
            axes.set(title=name, xlabel="mean", xlim=(means[0], means[-1]), ylim=(deviations[0], deviations[-1]))
        panels[0].set_ylabel("standard deviation")
        figure.legend(handles=_handles(fits), loc="outside right upper", title="optimum of")
    return figure


def gradient_norms_figure(norms: Mapping[str, Float[Tensor, " sizes"]], sizes: Sequence[int]) -> Figure:
    """|gradient| of a flat draft over the size of the vocabulary, both logarithmic."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.6), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        for index, (name, values) in enumerate(norms.items()):
            axes.plot(sizes, values, color=line_colour(index), marker=line_marker(index), label=name)
        axes.set(xscale="log", yscale="log", xlabel="vocabulary size", ylabel="norm of the gradient in the logits")
        figure.legend(loc="outside right upper")
    return figure


def shared_drafts_figure(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Figure:
    """What drafts that share q between contexts gain in alpha, over the alpha of KL's; a panel a kind of target."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.6), dpi=DPI, layout="constrained")
        for axes, (title, lines) in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
        ):
            for index, (name, points) in enumerate(lines.items()):
                look = {"color": line_colour(index), "marker": line_marker(index)}
                axes.plot(*zip(*points, strict=True), label=name, linestyle="--" if name == "best q" else "-", **look)
            axes.set(title=title, xlabel="alpha of kl's draft")
        figure.axes[0].set_ylabel("gain in alpha over kl's draft")
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


def _mark(axes: Axes, fits: Mapping[str, GaussianFit]) -> None:
    for index, fit in enumerate(fits.values()):
        axes.plot(  # smaller and smaller: some optima coincide
            [fit.mean], [fit.deviation], linestyle="", color=line_colour(index), marker=line_marker(index),
            markersize=12 - index, markeredgecolor="white",
        )  # fmt: skip


def _handles(fits: Mapping[str, GaussianFit]) -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", color=line_colour(index), marker=line_marker(index), label=name)
        for index, name in enumerate(fits)
    ]
