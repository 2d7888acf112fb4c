"""The engine along a pipeline's schedule: what classic and modular pipelines have in common."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffsteer.adapters.contexts import mentioned
from diffsteer.adapters.network import PipelineNet
from diffsteer.core import Guidance, Info, widened
from diffsteer.engine import (
    Batching,
    Engine,
    describe,
    describe_scheduler,
    every_kth,
    plain,
    stack_trace,
    stream,
    versions,
)
from diffsteer.errors import IgnoredPromptWarning, ParameterError, UnsupportedError
from diffsteer.paths import Level
from diffsteer.sampling import Result
from diffsteer.schedulers import ScheduleReading


class GuidedSteps:
    """One run of a pipeline under a method, step by step.

    Parameters
    ----------
    method : Guidance
    models : mapping of str to nn.Module
        Twin networks.
    generator : torch.Generator, or list of them
        That the pipeline draws from, one for each image or one for all; as they stand now, they seed the method's own
        randomness.
    eta : float
    trace : str
    batching : float or "auto"
        As in :func:`diffsteer.sample`.
    """

    reading: ScheduleReading  # from the first step on
    wanted: Mapping[str, Any]  # contexts beside "pos", as they were given; nothing where it is the default

    def __init__(
        self,
        method: Guidance,
        models: Mapping[str, nn.Module],
        generator: Any,
        eta: float,
        trace: str,
        batching: Batching = 0,
    ) -> None:
        self.method, self.models, self.eta = method, models, eta
        self.seeds = list(map(_seed, generator)) if isinstance(generator, (list, tuple)) else _seed(generator)
        self.every, self.batching = every_kth(trace), batching
        self.engine: Engine | None = None
        self.levels: list[Level] = []  # from the first step on
        self.index = 0  # of the evaluation
        self.kept: list[Info] = []

    def locate(self, scheduler: Any, timestep: Any) -> Level:
        """The level of this step; ``timestep`` is what the scheduler has said of it, or None."""
        if self.index == 0:
            self.reading = ScheduleReading(scheduler, self.eta)
            self.reading.require(self.method.needs)
            self.levels = self.reading.levels[self.reading.position(0, timestep) :]
        offset = len(self.reading.levels) - len(self.levels)
        level = self.reading.levels[self.reading.position(offset + self.index, timestep)]
        self.levels[self.index] = level  # the same but for PNDM's repeated point after a late start
        return level

    def guide(self, nets: Mapping[str, PipelineNet], x: Tensor) -> Tensor:
        """The method's prediction at ``x``, (B, ...)."""
        if self.engine is None:
            streams = _streams(self.seeds, len(x))
            self.engine = Engine(nets, self.method, torch.arange(len(x)), streams, self.batching)
            reading = self.reading
            inner = reading.inner(len(self.levels) - 1)
            if self.engine.start(x, self.levels, reading.stochastic, reading.ancestral, inner) is not x:
                raise UnsupportedError("this method starts elsewhere than the pipeline; run it with diffsteer.sample()")
        self.engine.nets = nets
        prediction, info = self.engine.guide(x, self.index)
        if self.index == len(self.levels) - 2:
            self._check_asked()
        if self.every and self.index % self.every == 0:
            self.kept.append({name: value.detach().float().cpu() for name, value in info.items()})
        return prediction

    def _check_asked(self) -> None:
        """Say so where a context was given that the whole run has not asked for."""
        assert self.engine is not None
        known = self.engine.asked | mentioned(self.method)  # some read a context beside their evaluations
        unasked = [repr(name) for name, given in self.wanted.items() if given and name not in known]
        if unasked:
            warnings.warn(
                f"context {', '.join(unasked)} had no effect: {type(self.method).__name__} never asked for it; check "
                "its name, or give the method a term that uses it",
                IgnoredPromptWarning,
                stacklevel=2,
            )

    def record(self, steps: int, contexts: list[str]) -> dict[str, Any]:
        """What ran, as plain data."""
        assert self.engine is not None
        record: dict[str, Any] = plain({
            "method": describe(self.method),
            "scheduler": describe_scheduler(self.reading.scheduler),
            "steps": steps, "eta": self.eta, "stochastic": self.reading.stochastic, "contexts": contexts,
            "batching": self.engine.batching,
            "log_snr": [round(level.log_snr, 6) for level in self.levels],
            "inner": list(self.engine.inner),
            "versions": versions(),
        })  # fmt: skip
        return record

    def outcome(self, x: Tensor, record: dict[str, Any]) -> Result:
        """What the run has come to, at ``x``, (B, ...)."""
        assert self.engine is not None
        nfe = self.engine.nfe
        return Result(x.detach().cpu(), stack_trace(self.kept, len(nfe)), nfe, record)


def drawing(generator: Any, pipe: Any) -> Any:
    """The generators that a pipeline draws from: without any of its own, torch's for its device."""
    if generator is not None:
        return generator
    device = pipe._execution_device  # it walks through all modules
    if device.type == "cuda":
        torch.cuda.init()  # before, there are none
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.mps._get_default_mps_generator() if device.type == "mps" else torch.default_generator


def _seed(generator: torch.Generator) -> int:
    """To follow a generator without drawing: its seed while it has not drawn, then a hash of where it stands."""
    state, seed = generator.get_state(), generator.initial_seed()
    if torch.equal(state, torch.Generator(generator.device).manual_seed(seed).get_state()):
        return seed
    return int.from_bytes(hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest(), "little")


def _streams(seeds: int | list[int], batch: int) -> list[torch.Generator]:
    """A method's own randomness, one stream per image."""
    if isinstance(seeds, list):
        return [stream(seed, 0, 1) for seed in seeds]
    return [stream(seeds, i, 1) for i in range(batch)]


def wide(x: Tensor) -> Tensor:
    """In single precision at least: posteriors are sums of small differences."""
    return widened(x.detach())


def check_needs(method: Guidance, models: Mapping[str, nn.Module]) -> None:
    """Refuse what no pipeline can give, and a network in the place of its own."""
    if "main" in models:
        raise ParameterError('"main" is the pipeline\'s own denoiser; models= is for others, by the names methods use')
    unmet = sorted(set(method.needs) - {"neg", "grad", "first_order", "noise", "perturb"})
    if unmet:
        raise UnsupportedError(f"a pipeline cannot give what this method needs: {', '.join(unmet)}; use sample()")


def check_uncached(module: nn.Module) -> None:
    """Refuse a network whose cache, enabled or applied as hooks, would answer one branch with another's features."""
    registries = (vars(part).get("_diffusers_hook") for part in module.modules())
    hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    if getattr(module, "is_cache_enabled", False) or any(hook._is_stateful for hook in hooks):
        raise UnsupportedError(
            f"{type(module).__name__} has a cache enabled, which would answer one branch with another's features; call "
            "its disable_cache() first, or load it without the cache's hooks"
        )


def entry(module: nn.Module) -> str:
    """What calling a module calls: ``forward``, unless it was compiled in place."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
