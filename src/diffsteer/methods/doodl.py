"""Direct optimization of diffusion latents (Wallace et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffsteer.core import Guidance
from diffsteer.energy.chains import Chain, Edict, LatentOptimizer, Progress, renormalized
from diffsteer.energy.data import told
from diffsteer.energy.forces import CleanEnergy, clean_force
from diffsteer.energy.steps import draw
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods.classifier_free_guidance import ClassifierFreeGuidance


@register(
    "doodl",
    title="DOODL",
    nfe=404,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{wallace2023endtoend,
  title = {End-to-End Diffusion Latent Optimization Improves Classifier Guidance},
  author = {Wallace, Bram and Gokul, Akash and Ermon, Stefano and Naik, Nikhil},
  booktitle = {IEEE/CVF International Conference on Computer Vision},
  year = {2023}, eprint = {2303.13703}, archivePrefix = {arXiv}
}

@inproceedings{wallace2023edict,
  title = {EDICT: Exact Diffusion Inversion via Coupled Transformations},
  author = {Wallace, Bram and Gokul, Akash and Naik, Nikhil},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}, eprint = {2211.12446}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class DOODL(LatentOptimizer):
    """Optimise x_T by the exact gradient of an energy of the final image, through a chain that can be run backwards.

    .. math::
        g &= -\\tfrac12 \\big(\\partial_{x_T} + \\partial_{y_T}\\big)\\, \\tfrac{s}{2}\\big(E(x_0) + E(y_0)\\big)
        \\big|_{x_T = y_T} \\\\
        b &\\leftarrow m\\,b + \\mathrm{clip}(g, \\pm c), \\qquad
        x_T \\leftarrow \\|n\\|\\,\\frac{x_T + b + \\rho z}{\\|x_T + b + \\rho z\\|}, \\qquad z \\sim N(0, I)

    with (x_0, y_0) = EDICT(x_T, y_T) and n the noise that it began with. A step of EDICT from t to s, A = alpha_s /
    alpha_t, B = sigma_s - A sigma_t, at even steps, at odd ones with x and y exchanged in the first line:

    .. math::
        x &\\leftarrow A x + B e(y), & y &\\leftarrow A y + B e(x) \\\\
        x &\\leftarrow p x + (1 - p) y, & y &\\leftarrow p y + (1 - p) x

    Parameters
    ----------
    energy : callable
        E: final samples (B, ...) to (B,), to lower; decoding and cut-outs, if any, are inside.
    scale : float
        s >= 0: 1 (CLIP), 0.05 (fine-grained classifiers), 3 (personalisation) in the official code. Once the clip
        acts it hardly matters.
    num_optimization_steps : int
        50; 500 for personalisation, 25 for edits.
    momentum : float
        m in [0, 1).
    clip : float
        c > 0, elementwise: 1e-3; 1e-2 for classifiers, 3e-3 for personalisation.
    perturbation : float
        rho >= 0: 1e-4; 1e-3 for classifiers.
    mix : float
        p in (0, 1].
    renormalize : bool
        Whether x_T keeps the norm that it began with.
    base : str or Guidance
        What makes the noise e: a context, or a method without a memory; the paper's is
        ``ClassifierFreeGuidance(7.5)``.

    Notes
    -----
    For :func:`diffsteer.optimize_latents`; the samples are x_0 after the last update. Every step of the sampler has 4
    evaluations of the base at each optimisation step, two of them with their derivative, and 2 at the end. Memory does
    not grow with the number of steps: the chain is inverted beside its gradient, as exactly as the precision allows.
    Two coupled latents make other images than :func:`diffsteer.sample`, and need small steps: with few of them the pair
    drifts apart and leaves the data, whatever is optimised.
    Optimisation from an intermediate step, and of the latents of real images, is left out. Trace: "energy", E(x_0)
    before each update and after the last one.
    """

    energy: CleanEnergy
    scale: float = 1.0
    num_optimization_steps: int = 50
    momentum: float = 0.9
    clip: float = 1e-3
    perturbation: float = 1e-4
    mix: float = 0.93
    renormalize: bool = True
    base: str | Guidance = field(default_factory=lambda: ClassifierFreeGuidance(7.5))

    def __post_init__(self) -> None:
        for name in ("scale", "perturbation"):
            check_scale(getattr(self, name), name)
        if not (0 <= self.momentum < 1 and 0 < self.mix <= 1 and self.clip > 0 and self.num_optimization_steps >= 0):
            raise ParameterError(
                "DOODL needs 0 <= momentum < 1, 0 < mix <= 1, clip > 0 and num_optimization_steps >= 0, got "
                f"{self.momentum}, {self.mix}, {self.clip}, {self.num_optimization_steps}"
            )

    def optimize(self, chain: Chain, noise: Tensor) -> Progress:
        edict, latents, velocity = Edict(chain, self.mix), noise, torch.zeros_like(noise)
        for _ in range(self.num_optimization_steps):
            x_T = chain.initial * latents
            x, y = edict.run(x_T, x_T)
            (down_x, energy), (down_y, _) = (clean_force(self.energy, z, chain.samples) for z in (x, y))
            *_, down_x, down_y = edict.back(x, y, down_x, down_y)
            down = self.scale / 4 * chain.initial * (down_x + down_y)
            velocity = self.momentum * velocity + down.clamp(-self.clip, self.clip)
            latents = latents + velocity + self.perturbation * draw(chain, noise).to(noise)
            if self.renormalize:
                latents = renormalized(latents, noise)
            yield energy
        x_T = chain.initial * latents
        x, _ = edict.run(x_T, x_T)
        yield told(self.energy, chain.samples)(x)
        return x, latents
