"""The paper's Figure 2 and the gradients of its appendix A.5, and one q for many contexts, with training's objectives.

python experiments/theory/figures.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from theory import fit_gaussian, gradient_norms, landscape
from theory_contexts import agreement, best_draft, shared_draft, sharpening, zipf_contexts
from theory_figures import fits_figure, gradient_norms_figure, landscapes_figure, shared_drafts_figure

from lkspec.losses.objectives import KL, TV, LKAlpha, LKLambda, Objective, ReverseKL
from lkspec.reporting.figure_style import save

FOLDER = Path(__file__).parent
SHARPNESS = [1 + step / 20 for step in range(41)]


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

    panels = {}
    for title, concentration in (("sure contexts (1.3 nats)", 2.0), ("unsure ones (2.3 nats)", 8.0)):
        print(f"\n{title}: alpha of one q for n of them, (at the best sharpness), same first choice")
        panels[title] = shared_drafts(concentration)
    save(shared_drafts_figure(panels), FOLDER / "shared_drafts.png")


def shared_drafts(concentration: float) -> dict[str, list[tuple[float, float]]]:
    """The lines of a panel: (alpha of kl's draft, what others gain over it), a point a number of contexts."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for num_contexts in (2, 3, 4, 6, 8, 16, 64):
        targets = zipf_contexts(max(10, 640 // num_contexts), num_contexts, 128, concentration=concentration)
        drafts = {o.describe(): shared_draft(o, targets) for o in (LKAlpha(), LKLambda(3.0), LKLambda(10.0))}
        drafts = {"kl": targets.mean(1), **drafts, "best q": best_draft(targets)}
        found = {name: sharpening(targets, draft, SHARPNESS) for name, draft in drafts.items()}
        greedy = {name: float(agreement(targets, draft).mean()) for name, draft in drafts.items()}
        told = [f"{n} {f.alpha:.3f} ({f.sharpness:.2f}: {f.sharpened:.3f}) {greedy[n]:.3f}" for n, f in found.items()]
        print(f"{num_contexts:>3}  " + "  ".join(told))
        plain = found.pop("kl")
        lines.setdefault("kl, sharpened", []).append((plain.alpha, plain.sharpened - plain.alpha))
        for name, one in found.items():
            lines.setdefault(name, []).append((plain.alpha, one.alpha - plain.alpha))
    return lines


if __name__ == "__main__":
    main()
