"""Guidance by any energy: a loss, a classifier or a reward that is differentiable.

Three things vary from paper to paper. The *energy* is one number per sample, to be lowered: a function of a clean image
(:data:`~diffsteer.energy.forces.CleanEnergy`) or of a noisy one and its level
(:data:`~diffsteer.energy.forces.NoisyEnergy`). The *force* is minus its gradient: on x_t through the network, on x0
alone, or on x_t with eps held. How a force *acts* is one of five modes (:mod:`diffsteer.energy.steps`).
:mod:`~diffsteer.energy.losses` has ready-made energies; any callable is one. What has data for each sample of a run is
told which ones it is asked about (:mod:`~diffsteer.energy.data`).
"""
