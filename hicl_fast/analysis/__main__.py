"""Redraws figures 2–5 of the gradient paradigm's paper (arXiv 2402.18281), each as PNG and as CSV.

    python -m hicl_fast.analysis --output_dir figures                                      by simulation
    python -m hicl_fast.analysis --output_dir figures --model run --text sentences.txt     and of a model
    python -m hicl_fast.analysis --output_dir figures --embeddings u.npy v.npy             and of two views (N, D)

figure2  dissipation against the mean angles to positive and negatives      figure3  the hardest negative's share
figure4  the ratios that change; grey: angles that training doesn't meet    figure5  distributions of similarities
lemma1   the smallest ratio that still shortens the distance, against the angle between the planes
With a model or embeddings: figure5_embeddings, gradient_terms.csv, alignment_uniformity.csv.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import get_args

import torch
from torch import Tensor

from hicl_fast._command import Parser, command, input_file, needs, output_folder, whole
from hicl_fast.analysis import simulation
from hicl_fast.analysis.terms import gradient_terms
from hicl_fast.losses.paradigm import GradientParadigmLoss
from hicl_fast.ops.paradigm.settings import Modification, Objective

with needs("analysis", __name__):
    from tqdm import tqdm

    from hicl_fast.analysis import embeddings

CONTRASTIVE: tuple[Objective, ...] = ("info_nce", "arccon", "mpt", "met", "mat")
MODIFIED: tuple[Modification, ...] = get_args(Modification)
BINS = 100


@command("analysis")
def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    from hicl_fast.analysis import figures  # needs matplotlib, which --help doesn't

    views = given_views(args)
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)

    rows = dissipations(args.grid, args.samples, args.seed)
    figures.write_csv(rows, folder / "figure2_dissipation.csv")
    figures.heat_maps(rows, "dissipation", folder / "figure2_dissipation.png", highest=1.0)

    rows = shares(args.grid, args.samples, args.seed)
    figures.write_csv(rows, folder / "figure3_weight.csv")
    figures.curves(
        rows, "mu_neg", "hardest_share", "temperature", folder / "figure3_weight.png", xlabel=r"$\mu_{neg}$ / $\pi$"
    )

    rows = ratios(args.grid)
    figures.write_csv(rows, folder / "figure4_ratio.csv")
    figures.heat_maps(rows, "ratio", folder / "figure4_ratio.png", highest=5.0, shaded="does_not_occur")

    rows = lemma(args.grid)
    figures.write_csv(rows, folder / "lemma1.csv")
    path = folder / "lemma1.png"
    figures.curves(rows, "alpha", "smallest_ratio", "angles", path, dashed="predicted", xlabel=r"$\alpha$ / $\pi$")

    rows = trained(args.steps, args.seed)
    figures.write_csv(rows, folder / "figure5_similarity.csv")
    figures.distributions(rows, folder / "figure5_similarity.png")

    if views is not None:
        u, v = views
        rows = densities("embeddings", *embeddings.histograms(u, v, BINS))
        figures.write_csv(rows, folder / "figure5_embeddings.csv")
        figures.distributions(rows, folder / "figure5_embeddings.png")
        figures.write_csv(terms(u, v), folder / "gradient_terms.csv")
        lies = {
            "alignment": embeddings.alignment(u, v),
            "uniformity_u": embeddings.uniformity(u),
            "uniformity_v": embeddings.uniformity(v),
        }
        figures.write_csv([lies], folder / "alignment_uniformity.csv")
        print(", ".join(f"{name} {value:.4f}" for name, value in lies.items()))
    for file in sorted(folder.glob("*.png")):
        print(file)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m hicl_fast.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=output_folder, required=True)
    add("--model", help="a folder of the trainer or sentence-transformers, or any encoder; with --text")
    add(
        "--text",
        type=input_file,
        metavar="FILE",
        help="sentences, one a line or in a table, each embedded twice under dropout",
    )
    add("--max_sentences", type=whole(2), default=1024)
    add(
        "--embeddings", type=input_file, nargs=2, metavar=("U.npy", "V.npy"), help="two views (N, D) instead of a model"
    )
    add("--grid", type=whole(2), default=40, help="points along each angle")
    add("--samples", type=whole(1), default=200, help="batches drawn for each point")
    add("--steps", type=whole(1), default=150, help="of training in figure 5")
    add("--seed", type=whole(0), default=0)
    args = parser.parse_args(argv)
    if (args.model is None) != (args.text is None):
        parser.error("text: expected with --model and only with it")
    if args.model is not None and args.embeddings is not None:
        parser.error("embeddings: expected none with --model")
    return args


def given_views(args: argparse.Namespace) -> tuple[Tensor, Tensor] | None:
    if args.embeddings is not None:
        return embeddings.load_views(args.embeddings)
    return None if args.model is None else embeddings.views_of_model(args.model, args.text, args.max_sentences)


def _angles(low: float, high: float, count: int) -> list[float]:
    """In units of π."""
    return [round(low + (high - low) * i / (count - 1), 4) for i in range(count)]


def dissipations(grid: int, samples: int, seed: int) -> list[dict[str, object]]:
    draws = simulation.Draws.of(samples, seed)
    positive_means = _angles(0.05, 0.5, grid)
    points = [(objective, n) for objective in CONTRASTIVE for n in _angles(0.05, 1.0, grid)]
    rows: list[dict[str, object]] = []
    for objective, n in tqdm(points, desc="figure 2", file=sys.stderr):
        values = simulation.dissipation(objective, torch.tensor(positive_means) * math.pi, n * math.pi, draws)
        rows += [
            {"objective": objective, "mu_pos": p, "mu_neg": n, "dissipation": value}
            for p, value in zip(positive_means, values.tolist(), strict=True)
        ]
    return rows


def shares(grid: int, samples: int, seed: int) -> list[dict[str, object]]:
    draws = simulation.Draws.of(samples, seed)
    points = [(tau, n) for tau in simulation.TEMPERATURES for n in _angles(0.05, 1.0, grid)]
    return [
        {"temperature": tau, "mu_neg": n, "hardest_share": simulation.hardest_share(n * math.pi, tau, draws)}
        for tau, n in tqdm(points, desc="figure 3", file=sys.stderr)
    ]


def ratios(grid: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for objective in ("arccon", "met", "mat"):
        for p in _angles(0.05, 0.5, grid):
            for n in _angles(0.05, 1.0, grid):
                angles = torch.tensor([p * math.pi, n * math.pi], dtype=torch.float64)
                value = float(simulation.ratio(objective, *angles))
                idle = not bool(simulation.occurs(objective, *angles))
                rows.append(
                    {"objective": objective, "mu_pos": p, "mu_neg": n, "ratio": value, "does_not_occur": int(idle)}
                )
    return rows


def lemma(grid: int) -> list[dict[str, object]]:
    points = [(p, n, a) for p, n in ((0.1, 0.3), (0.2, 0.3), (0.2, 0.45)) for a in _angles(0.0, 1.0, grid)]
    return [
        {
            "angles": f"{p}π, {n}π",
            "alpha": a,
            "smallest_ratio": simulation.smallest_ratio(p * math.pi, n * math.pi, a * math.pi),
            "predicted": simulation.predicted_ratio(p * math.pi, n * math.pi, a * math.pi),
        }
        for p, n, a in tqdm(points, desc="lemma 1", file=sys.stderr)
    ]


def trained(steps: int, seed: int) -> list[dict[str, object]]:
    losses = {
        "info_nce": GradientParadigmLoss("info_nce"),
        "vicreg": GradientParadigmLoss("vicreg"),
        "vicreg, modified": GradientParadigmLoss("vicreg", modified=MODIFIED, ratio=1.5),
        "mhe": GradientParadigmLoss("mhe"),
        "mhe, modified": GradientParadigmLoss("mhe", modified=MODIFIED, ratio=1.75),
    }
    rows: list[dict[str, object]] = []
    for name, loss in losses.items():
        progress = tqdm(range(steps), desc=f"figure 5, {name}", file=sys.stderr)
        negative, positive = simulation.trained_similarities(loss, progress, seed=seed)
        rows += densities(name, *(torch.histc(s.clamp(-1, 1), BINS, -1, 1) for s in (negative, positive)))
    return rows


def densities(name: str, negative: Tensor, positive: Tensor) -> list[dict[str, object]]:
    """Counts in BINS bins of [−1, 1] as rows of a density that integrates to 1."""
    width = 2 / BINS
    parts = [(count / count.sum() / width).tolist() for count in (negative, positive)]
    centres = [-1 + width * (bin + 0.5) for bin in range(BINS)]
    return [
        {"name": name, "similarity": centre, "negative": n, "positive": p}
        for centre, n, p in zip(centres, *parts, strict=True)
    ]


def terms(u: Tensor, v: Tensor) -> list[dict[str, object]]:
    """Each objective's gradient terms of the embeddings, averaged over rows."""
    return [
        {"objective": objective} | {name: float(x) for name, x in gradient_terms(u, v, objective).means().items()}
        for objective in tqdm(CONTRASTIVE, desc="gradient terms", file=sys.stderr)
    ]


if __name__ == "__main__":
    main()
