"""The paper's Figure 2 and the gradients of its appendix A.5, computed with the objectives that training uses.

python experiments/theory/figures.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from lkspec.figure_style import save
from lkspec.losses.objectives import KL, TV, LKAlpha, LKLambda, Objective, ReverseKL
from lkspec.theory import fit_gaussian, gradient_norms, landscape
from lkspec.theory_figures import fits_figure, gradient_norms_figure, landscapes_figure

FOLDER = Path(__file__).parent


def main() -> None:
    objectives: list[Objective] = [KL(), ReverseKL(), TV(), LKAlpha(), LKLambda(3.0), LKLambda(10.0)]
    objectives += [LKLambda(1.0), LKLambda(fixed_lambda=0.5)]
    fits = {objective.describe(): fit_gaussian(objective) for objective in objectives}
    print(f"{'objective':<32} {'mean':>7} {'deviation':>10} {'overlap':>8}")
    for name, fit in fits.items():
        print(f"{name:<32} {fit.mean:>7.2f} {fit.deviation:>10.2f} {fit.overlap:>8.1%}")
    shown = {name: fits[name] for name in list(fits)[:6]}
    save(fits_figure(shown), FOLDER / "fits.png")

    means = torch.linspace(-7.0, 8.0, 76, dtype=torch.float64)
    deviations = torch.linspace(0.4, 6.0, 57, dtype=torch.float64)
    landscapes = {o.describe(): landscape(o, means, deviations) for o in (KL(), ReverseKL(), TV())}
    save(landscapes_figure(landscapes, means, deviations, shown), FOLDER / "landscapes.png")

    sizes = [2**power for power in range(6, 19, 2)]
    norms = {o.describe(): gradient_norms(o, sizes) for o in (KL(), TV(), LKAlpha(), LKLambda(3.0))}
    save(gradient_norms_figure(norms, sizes), FOLDER / "gradient_norms.png")
    print("\nnorm of the gradient, flat draft, target flat on 16 tokens")
    print(f"{'V':>8} " + " ".join(f"{name:>24}" for name in norms))
    for index, size in enumerate(sizes):
        print(f"{size:>8,} " + " ".join(f"{float(values[index]):>24.3g}" for values in norms.values()))


if __name__ == "__main__":
    main()
