"""Muon in float32 is torch's Muon, but for the rounding of bfloat16."""

import pytest
import torch

from ivt_agents.training import muon
from ivt_agents.training.muon import Muon, orthogonalised

TORCHS = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}


def walked(optimizer: type[torch.optim.Optimizer], steps: int = 4) -> list[torch.Tensor]:
    """Parameters after some steps on a quadratic; one never has a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (24, 8), (8, 24)]
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    unused = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = optimizer([*matrices, unused], lr=0.1, weight_decay=0.0)
    for _ in range(steps):
        sum(((k + 1) * m.square()).sum() for k, m in enumerate(matrices)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [m.detach() for m in (*matrices, unused)]


def test_in_float32_it_walks_as_torchs_does(monkeypatch):
    monkeypatch.setattr(muon, "bf16_pays", lambda: False)
    for ours, torchs in zip(walked(Muon), walked(torch.optim.Muon), strict=True):
        assert (ours - torchs).abs().max() < 0.01, "four steps of 0.1; bfloat16 keeps two digits"


def test_where_bfloat16_pays_it_is_torchs_to_the_bit(monkeypatch):
    monkeypatch.setattr(muon, "bf16_pays", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(walked(Muon), walked(torch.optim.Muon), strict=True))


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = matrix.clone()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalised(matrix, TORCHS["ns_coefficients"], TORCHS["ns_steps"], TORCHS["eps"]) @ v.T
    assert torch.equal(matrix, kept)
    values = inner.diagonal()
    assert ((values > 0.5) & (values < 1.3)).all()
    assert (inner - torch.diag(values)).abs().max() < 1e-9
