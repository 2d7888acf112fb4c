"""Linear classifier-free guidance and its three parts (Li et al., 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, Run, State, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level


@dataclass(frozen=True, eq=False)
class GaussianFit:
    """A Gaussian on flattened samples, ``N(mean, basis diag(variances) basis^T)``, in float64.

    Parameters
    ----------
    mean : Tensor, (D,)
    basis : Tensor, (D, R)
        Orthonormal columns: the directions in which it varies.
    variances : Tensor, (R,)
        Positive.
    """

    mean: Tensor
    basis: Tensor
    variances: Tensor

    @classmethod
    def of(cls, samples: Tensor, rank: int | None = None) -> GaussianFit:
        """Mean and covariance of samples, (N, ...) with N >= 2; the ``rank`` directions of largest variance."""
        if len(samples) < 2 or (rank is not None and rank < 1):
            raise ParameterError(f"a fit takes at least 2 samples and rank 1, got {len(samples)} and {rank}")
        flat = samples.detach().flatten(1).double().cpu()
        mean = flat.mean(0)
        _, spread, rows = torch.linalg.svd(flat - mean, full_matrices=False)
        return cls._kept(mean, rows.T[:, :rank], spread[:rank] ** 2 / (len(flat) - 1))

    @classmethod
    def from_covariance(cls, mean: Tensor, covariance: Tensor) -> GaussianFit:
        """From a mean (D,) and a symmetric, positive semi-definite covariance (D, D)."""
        mean, covariance = mean.double(), covariance.double()
        if covariance.shape != (len(mean), len(mean)) or not torch.allclose(covariance, covariance.T):
            raise ParameterError(f"a covariance is symmetric, {(len(mean),) * 2} for this mean")
        variances, basis = torch.linalg.eigh(covariance)
        if float(variances[0]) < -1e-9 * float(variances[-1]):
            raise ParameterError(f"a covariance has no negative eigenvalues, this one {float(variances[0]):.3g}")
        return cls._kept(mean, basis, variances)

    @classmethod
    def _kept(cls, mean: Tensor, basis: Tensor, variances: Tensor) -> GaussianFit:
        """Without the directions that have no variance."""
        some = variances > 1e-12 * variances.max()
        return cls(mean, basis[:, some], variances[some])


@register(
    "linear-cfg",
    title="Linear classifier-free guidance",
    nfe=1,
    asks=("pos",),
    bibtex="""
@inproceedings{li2025towards,
  title = {Towards Understanding the Mechanisms of Classifier-Free Guidance},
  author = {Li, Xiang and Wang, Rongrong and Qu, Qing},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025}, eprint = {2505.19210}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class LinearCFG(Guidance):
    """Guide by the difference of two linear denoisers, fitted to the data, split into three parts.

    The best linear denoiser of data with mean mu and covariance Sigma is D(x) = mu + W (x - mu), with
    W = Sigma (Sigma + sigma^2)^{-1} where alpha = 1. For a class c and all data u,

    .. math::
        D_c - D_u = \\underbrace{(1 - W_u)(\\mu_c - \\mu_u)}_{\\text{mean shift}}
        + \\underbrace{V_+ \\Lambda_+ V_+^T (x - \\mu_c)}_{\\text{positive components}}
        + \\underbrace{V_- \\Lambda_- V_-^T (x - \\mu_c)}_{\\text{negative components}}

    from the eigenvalues of W_c - W_u: directions in which the class varies more than all data, which are amplified,
    and those in which it varies less, which are suppressed. Added to the network's own conditional denoiser:

    .. math:: D = D_\\theta(x; c) + (w_m - 1)\\,\\text{mean shift} + (w_+ - 1)\\,\\text{positive}
        + (w_- - 1)\\,\\text{negative}

    Parameters
    ----------
    conditional, unconditional : GaussianFit
        Of the class and of all data, in the network's own values (latents, for latent models).
    scale : float
        w >= 0, of all three parts; 1 is conditional sampling. The paper's gamma is w - 1; it recommends none.
    mean_scale, positive_scale, negative_scale : float, optional
        w_m, w_+ and w_- >= 0 of one part, in place of ``scale``.

    Notes
    -----
    1 evaluation per step, half of CFG's: the directions come from the data. They resemble CFG's at high and moderate
    noise only; keep to it with ``Window(LinearCFG(...), low=...)``. Where data and networks are Gaussian it is CFG
    exactly. Fewer samples than values will do: no covariance is inverted. Scaling the parts apart is this library's
    reading of the paper, which shows each by itself.
    """

    space: ClassVar[str] = "x0"
    reference: ClassVar[str] = "pos"

    conditional: GaussianFit
    unconditional: GaussianFit
    scale: float = 2.0
    mean_scale: float | None = None
    positive_scale: float | None = None
    negative_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "mean_scale", "positive_scale", "negative_scale"):
            if getattr(self, name) is not None:
                check_scale(getattr(self, name), name)
        if not all(hasattr(fit, "variances") for fit in (self.conditional, self.unconditional)):
            raise ParameterError("conditional and unconditional are fits: GaussianFit.of(samples) of each")
        if self.conditional.mean.shape != self.unconditional.mean.shape:
            sizes = len(self.conditional.mean), len(self.unconditional.mean)
            raise ParameterError(f"the two fits are of different data: {sizes[0]} and {sizes[1]} values a sample")

    @cached_property
    def _basis(self) -> Tensor:
        """Orthonormal columns that span everything in which either fit varies; (D, K)."""
        columns: Tensor = torch.linalg.qr(torch.cat([self.conditional.basis, self.unconditional.basis], 1))[0]
        return columns

    def terms(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Mean shift, positive and negative components at ``x``, (B, ...) each; their sum is D_c - D_u."""
        c, u, basis = self.conditional, self.unconditional, self._basis
        # W / alpha of each, which acts on x - alpha mu and exists at alpha = 0 too
        gain_c, gain_u = (level.alpha * k.variances / (level.alpha**2 * k.variances + level.sigma**2) for k in (c, u))
        inside_c, inside_u = basis.T @ c.basis, basis.T @ u.basis
        eigenvalues, vectors = torch.linalg.eigh(inside_c * gain_c @ inside_c.T - inside_u * gain_u @ inside_u.T)
        vectors = (basis @ vectors).to(x.device)
        mean = (c.mean - u.mean) - u.basis @ (level.alpha * gain_u * (u.basis.T @ (c.mean - u.mean)))
        # one product per sample: in one of a whole batch, rounding would depend on its size
        offsets = x.flatten(1).double() - level.alpha * c.mean.to(x.device)
        shares = torch.stack([vectors.T @ offset for offset in offsets])
        parts = [
            torch.stack([vectors @ (side.to(x.device) * share) for share in shares])
            for side in (eigenvalues.clamp(min=0), eigenvalues.clamp(max=0))
        ]
        shift, positive, negative = (
            part.reshape(x.shape).to(x.dtype) for part in (mean.to(x.device).expand_as(parts[0]), *parts)
        )
        return shift, positive, negative

    def start(self, run: Run) -> State:
        size = run.x[0].numel()
        if size != len(self.conditional.mean):
            raise ParameterError(f"the fits are of {len(self.conditional.mean)} values a sample, these have {size}")

    def guide(self, step: Step, state: State) -> Plan:
        (cond,) = yield [Call("pos")]
        prediction = cond
        scales = (self.mean_scale, self.positive_scale, self.negative_scale)
        for part, scale in zip(self.terms(step.x, step.level), scales, strict=True):
            prediction = prediction + ((self.scale if scale is None else scale) - 1) * part
        return prediction, state, {}
