"""What DNG's ``baseline`` does where everything is exact: eight modes on a ring, one of them unwanted.

python benchmarks/baseline.py
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

import diffsteer as ds

MOVED = 0.1  # from where the unguided sample of the same seed is; modes have standard deviation 0.2
SETTINGS = ((0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 2.0), (1.0, 5.0), (1.0, 20.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    mixture = ds.toy.ring()
    denoiser = mixture.denoiser({"null": None, "neg": [0]})

    def run(method: ds.Guidance | None) -> Tensor:
        return ds.sample(
            denoiser, method, scheduler=DDPMScheduler(clip_sample=False), num_samples=options.samples,
            steps=options.steps, seed=0, trace="off",
        ).samples  # fmt: skip

    unguided = run(None)
    print("| baseline | scale | left | KL of the other modes to even shares | moved |\n|---|---|---|---|---|")
    for baseline, scale in SETTINGS:
        samples = run(ds.DynamicNegativeGuidance(scale, prior=1 / 8, baseline=baseline))
        nearest = torch.cdist(samples, mixture.means.to(samples)).argmin(1)
        shares = np.bincount(nearest.numpy(), minlength=8) / len(nearest)
        rest = shares[1:] / shares[1:].sum()
        moved = float(((samples - unguided).norm(dim=1) > MOVED).double().mean())
        kl = float(-np.log(7 * rest).mean())
        print(f"| {baseline:g} | {scale:g} | {shares[0]:.2%} | {kl:.4f} | {moved:.0%} |", flush=True)


if __name__ == "__main__":
    main()
