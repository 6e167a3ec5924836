"""What sets of images have in common, measured on their features [N, F]: distances, diversity, precision and recall."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ...guidance.errors import Problem


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features (arXiv 1706.08500, eq. 6); 0 for identical sets.

    features [N, F] and reference [M, F], N and M above F for a covariance of full rank. Computed in float64; the trace
    of the square root comes from eigenvalues, so there is no complex remainder.
    Raises ValueError for other shapes, numbers that are not finite, or fewer than two samples.
    """
    a, b = _pair(features, reference)
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(features: Tensor, reference: Tensor, subsets: int = 50, size: int = 500, seed: int = 0) -> float:
    """KID (arXiv 1801.01401, section 4): unbiased squared MMD, kernel (x.y / F + 1)^3, mean over random subsets.

    features [N, F], reference [M, F]. About 0, also slightly below, for sets of one distribution. size: samples drawn
    from each set for a subset, at least 2, at most N and M count. Raises ValueError as above.
    """
    a, b = _pair(features, reference)
    size = min(size, len(a), len(b))
    generator = Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        pairs = size * (size - 1)
        total += float((xx.sum() - xx.trace()) / pairs + (yy.sum() - yy.trace()) / pairs - 2 * xy.mean())
    return total / subsets


def within_class_diversity(features: Tensor, classes: Tensor) -> float:
    """Mean distance to the class mean, averaged over the classes present: features [N, F], classes long [N]."""
    spreads = []
    for value in classes.unique():
        group = features[classes == value].double()
        if len(group) > 1:
            spreads.append((group - group.mean(0)).norm(dim=1).mean())
    return float(torch.stack(spreads).mean()) if spreads else 0.0


def inside(features: Tensor, reference: Tensor, k: int = 3) -> Tensor:
    """Which of ``features`` [N, F] lie within the manifold of ``reference`` [M, F] (arXiv 1904.06991, eq. 1): bool [N].

    The manifold is made of balls around the reference's points, each as large as the distance to its k-th neighbour.
    k: from 1 to M - 1. Raises ValueError as above.
    """
    a, b = _pair(features, reference)
    radii = torch.cdist(b, b).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    return (torch.cdist(a, b) <= radii).any(dim=1)


def share_inside(features: Tensor, reference: Tensor, k: int = 3) -> float:
    """Share of ``features`` [N, F] within the manifold of ``reference`` [M, F] (arXiv 1904.06991, eq. 2).

    ``share_inside(made, real)`` is the precision of what was made, ``share_inside(real, made)`` its recall; both depend
    on N and M, so compare only what was measured on as many. Raises ValueError as `inside` does.
    """
    return float(inside(features, reference, k).double().mean())


def _pair(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    return _checked(features), _checked(reference)


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise Problem(f"expected features [N, F] of at least two images, found {list(features.shape)}")
    if not bool(features.isfinite().all()):
        # Else max(0, NaN) would call broken pictures perfect.
        raise Problem("expected finite features, found NaN or infinity; look at the pictures they come from")
    return features.detach().double().cpu()
