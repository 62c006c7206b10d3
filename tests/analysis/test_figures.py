"""The figures' numbers, and the command that draws them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hicl_fast.analysis import embeddings, simulation
from hicl_fast.analysis.__main__ import main
from hicl_fast.reference import normalise

SMALL = ["--grid", "4", "--samples", "5", "--steps", "2"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(30, 6, generator=generator)
    for name, view in (("u", u), ("v", u + 0.3 * torch.randn(30, 6, generator=generator))):
        np.save(tmp_path / f"{name}.npy", view.numpy())
    views = [str(tmp_path / "u.npy"), str(tmp_path / "v.npy")]
    main(["--output_dir", str(tmp_path / "out"), *SMALL, "--embeddings", *views])
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    figures = {
        "figure2_dissipation",
        "figure3_weight",
        "figure4_ratio",
        "figure5_similarity",
        "figure5_embeddings",
        "lemma1",
    }
    assert pictures == figures
    assert all(read(tmp_path / "out" / f"{name}.csv") for name in figures)
    rows = read(tmp_path / "out" / "gradient_terms.csv")
    assert [row["objective"] for row in rows] == ["info_nce", "arccon", "mpt", "met", "mat"]
    densities = read(tmp_path / "out" / "figure5_embeddings.csv")
    for pair in ("negative", "positive"):
        assert sum(float(row[pair]) for row in densities) * 2 / len(densities) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("largest", "extend"), [(1.0, "neither"), (7.0, "max")])
def test_what_is_off_the_scale_is_said(
    largest: float, extend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from matplotlib.figure import Figure

    from hicl_fast.analysis import figures

    given = {}
    monkeypatch.setattr(Figure, "colorbar", lambda self, mesh, **options: given.update(options))
    rows = [
        {"objective": "mpt", "mu_pos": p, "mu_neg": n, "ratio": largest if p == n else 0.5}
        for p in (0, 1)
        for n in (0, 1)
    ]
    figures.heat_maps(rows, "ratio", tmp_path / "out.png", highest=5.0)
    assert given["extend"] == extend


def test_what_the_command_refuses(tmp_path: Path) -> None:
    for wrong in (["--model", "m"], ["--grid", "1"], ["--model", "m", "--text", "t", "--embeddings", "u", "v"]):
        with pytest.raises(SystemExit):
            main(["--output_dir", str(tmp_path), *wrong])
    np.save(tmp_path / "u.npy", np.zeros((3, 2)))
    np.save(tmp_path / "v.npy", np.zeros((4, 2)))
    with pytest.raises(SystemExit, match="embeddings: expected two arrays of one shape"):
        main(["--output_dir", str(tmp_path), *SMALL, "--embeddings", str(tmp_path / "u.npy"), str(tmp_path / "v.npy")])


@pytest.mark.parametrize("angles", [(0.3, 0.9), (0.5, 0.6), (1.2, 1.5)])
@pytest.mark.parametrize("dihedral", [0.0, 0.4, 1.5, 3.0])
def test_lemma(angles: tuple[float, float], dihedral: float) -> None:
    found = simulation.smallest_ratio(*angles, dihedral)
    assert found == pytest.approx(simulation.predicted_ratio(*angles, dihedral), abs=1e-3)


def test_dissipation_falls_with_the_gap() -> None:
    draws = simulation.Draws.of(100, 0)
    positive = torch.tensor([0.2, 1.0])
    for objective in ("info_nce", "arccon", "mpt", "met", "mat"):
        near, far = (simulation.dissipation(objective, positive, mean, draws) for mean in (0.6, 2.6))  # type: ignore[arg-type]
        assert near[1] > 0.99 and far[0] < 0.01 and far[0] <= far[1] and near[0] <= near[1]


def test_share_grows_as_temperature_falls() -> None:
    draws = simulation.Draws.of(50, 0)
    shares = [simulation.hardest_share(1.5, tau, draws) for tau in simulation.TEMPERATURES]
    assert shares == sorted(shares) and 1 / 127 < shares[0] < 0.05 and shares[-1] > 0.5


def test_ratios_at_known_angles() -> None:
    positive, negative = torch.tensor(math.pi / 6), torch.tensor(math.pi / 2)
    assert float(simulation.ratio("mat", positive, negative)) == pytest.approx(2)
    assert float(simulation.ratio("met", positive, negative)) == pytest.approx(
        math.sqrt(2) / (2 * math.sin(math.pi / 12))
    )
    assert float(simulation.ratio("arccon", positive, negative)) == pytest.approx(2 * math.sin(math.radians(40)))
    assert not simulation.occurs("met", negative, positive)


def test_alignment_uniformity_and_histograms() -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(40, 5, generator=generator) for _ in range(2))
    s = normalise(u) @ normalise(u).T
    others = ~torch.eye(40, dtype=torch.bool)
    assert embeddings.alignment(u, v) == pytest.approx(float((normalise(u) - normalise(v)).pow(2).sum(1).mean()))
    assert embeddings.uniformity(u) == pytest.approx(float((4 * s[others] - 4).exp().mean().log()), abs=1e-5)
    negative, positive = embeddings.histograms(u, v, 20)
    cross = normalise(u) @ normalise(v).T
    assert torch.equal(negative, torch.histc(cross[others], 20, -1, 1)) and negative.sum() == 40 * 39
    assert torch.equal(positive, torch.histc(cross.diagonal(), 20, -1, 1))


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    wrong = np.ones((4, 3), dtype=np.float32)
    np.save(tmp_path / "u.npy", wrong)
    wrong[1, 2] = np.nan
    np.save(tmp_path / "v.npy", wrong)
    with pytest.raises(ValueError, match="embeddings: expected finite numbers, got NaN or infinity in .*v.npy"):
        embeddings.load_views([tmp_path / "u.npy", tmp_path / "v.npy"])
