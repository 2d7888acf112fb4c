"""Diffusion guidance for investigating networks (Augustin et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from diffsteer.core import Guidance, like, widened
from diffsteer.energy.chains import Chain, LatentOptimizer, Progress, Shifts, renormalized
from diffsteer.energy.data import told
from diffsteer.energy.forces import CleanEnergy, finite
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.methods.classifier_free_guidance import ClassifierFreeGuidance
from diffsteer.perturb import ContextShift


@register(
    "dig-in",
    title="DiG-IN",
    nfe=82,
    asks=("pos", "null"),
    bibtex="""
@inproceedings{augustin2024digin,
  title = {DiG-IN: Diffusion Guidance for Investigating Networks -- Uncovering Classifier Differences, Neuron
    Visualisations, and Visual Counterfactual Explanations},
  author = {Augustin, Maximilian and Neuhaus, Yannic and Hein, Matthias},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024}, eprint = {2311.17833}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class DiGIN(LatentOptimizer):
    """Optimise x_T and what conditions every single step, by backpropagation through the whole chain.

    .. math::
        \\min_{x_T,\\ \\delta^c_i}\\ \\sum_{l=1}^{L} \\frac{2 l}{L (L + 1)}\\, E\\big(\\hat x_0^{(N - L + l)}\\big),
        \\qquad x_{i+1} = \\mathrm{DDIM}\\big(x_i;\\ c + \\delta^c_i\\big),\\qquad \\|x_T\\|\\ \\text{fixed}

    by Adam, all delta starting at 0; x_0^(i) is the estimate of step i of N, the last one of which is the sample.

    Parameters
    ----------
    energy : callable
        E: final samples (B, ...) to (B,), to lower; decoding and cut-outs, if any, are inside. The best iterate is
        chosen by it too, so random cut-outs must be the same in every call. A confidence to raise is -p, the
        disagreement of two networks p2 - p1, a neuron its activation with a minus.
    lr : float
        Of the shifts of embeddings, >= 0: 0.01.
    latent_lr : float
        Of x_T, as unit noise, >= 0: 0.001.
    num_optimization_steps : int
        20; 10 to 100.
    num_loss_steps : int
        L >= 1: 3; how many of the last estimates count, if there are as many steps.
    contexts : tuple of str
        Whose embeddings are shifted, at every step by a shift of its own; () leaves x_T alone, as a network with labels
        instead of embeddings wants it.
    base : str or Guidance
        What makes every step: a context, or a method without a memory; the paper's is
        ``ClassifierFreeGuidance(3.0)``.

    Notes
    -----
    For :func:`diffsteer.optimize_latents`; each sample is the one of lowest energy among those seen, the first one
    included. Every step of the sampler has 2 evaluations of the base at each optimisation step, one of them with its
    derivative (memory holds one step at a time), and 1 at the end. The paper edits real images by null-text inversion,
    and keeps their background by masks: the first is left out, the second is a term of the energy. Trace: "energy", of
    the last estimate, before each update and after the last one.
    """

    energy: CleanEnergy
    lr: float = 0.01
    latent_lr: float = 0.001
    num_optimization_steps: int = 20
    num_loss_steps: int = 3
    contexts: tuple[str, ...] = ("pos", "null")
    base: str | Guidance = field(default_factory=lambda: ClassifierFreeGuidance(3.0))

    def __post_init__(self) -> None:
        for name in ("lr", "latent_lr"):
            check_scale(getattr(self, name), name)
        if self.num_loss_steps < 1 or self.num_optimization_steps < 0:
            raise ParameterError(
                "DiG-IN needs num_loss_steps >= 1 and num_optimization_steps >= 0, got "
                f"{self.num_loss_steps}, {self.num_optimization_steps}"
            )
        if not self.latent_lr and not (self.contexts and self.lr):
            raise ParameterError("nothing is optimised: pass latent_lr > 0, or lr > 0 and a context to shift")

    def optimize(self, chain: Chain, noise: Tensor) -> Progress:
        shifts = [{name: ContextShift() for name in self.contexts} for _ in range(len(chain))]
        start = widened(noise)  # in half precision small steps get lost
        latents, adam = start.clone().requires_grad_(), None
        best = kept = noise
        lowest = torch.full((len(noise),), math.inf, device=noise.device)
        for n in range(self.num_optimization_steps + 1):
            with torch.set_grad_enabled(n < self.num_optimization_steps), set_checkpoint_early_stop(False):
                tried = latents.to(noise.dtype)
                sample, loss, energy = self._run(chain, tried, shifts)
            better = energy < lowest
            rows = like(better, noise) > 0
            best, kept = torch.where(rows, sample, best), torch.where(rows, tried.detach(), kept)
            lowest = torch.where(better, energy, lowest)
            yield energy
            if n < self.num_optimization_steps:
                offsets = [offset for step in shifts for shift in step.values() for offset in shift.offsets.values()]
                adam = adam or torch.optim.Adam(
                    [{"params": [latents], "lr": self.latent_lr}, {"params": offsets, "lr": self.lr}]
                )
                latents.grad, *found = torch.autograd.grad(loss, [latents, *offsets], torch.ones_like(loss))
                for offset, gradient in zip(offsets, found, strict=True):
                    offset.grad = gradient
                adam.step()
                latents.copy_(renormalized(latents, start))
        return best, kept

    def _run(self, chain: Chain, latents: Tensor, shifts: Sequence[Shifts]) -> tuple[Tensor, Tensor, Tensor]:
        """The sample, the weighted loss and the energy of the last estimate."""
        x, seen = chain.initial * latents, []
        for index, shift in enumerate(shifts):
            x, x0 = checkpoint(chain.step, x, index, shift, use_reentrant=False, preserve_rng_state=False)
            seen.append(x0)
        energy = told(self.energy, chain.samples)
        values = torch.stack([energy(widened(x0)) for x0 in seen[-self.num_loss_steps :]])
        weights = torch.arange(1, len(values) + 1).to(values)
        loss, last = (weights / weights.sum()) @ values, values[-1].detach()
        finite("energy", last)
        for name in self.contexts:
            if not shifts[0][name].offsets:
                raise ParameterError(f"the base never asks for the context {name!r}: take it out of contexts=")
        return x.detach(), loss, last
