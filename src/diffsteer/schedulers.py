"""Reading diffusers' schedulers: which levels they visit, how much noise they add, what they want to be given."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from diffsteer.denoisers import prediction_space
from diffsteer.errors import ClippingWarning, ParameterError, UnsupportedError
from diffsteer.paths import FlowPath, Level, LogPath, Path, Preconditioning, VEPath, VPPath, convert, preserving

# The coordinates that a scheduler's samples live in, by class name (bases count).
# x = alpha x0 + sigma eps, levels by timestep
_ALPHAS = ("DDPM", "DDIM", "DDPMParallel", "DDIMParallel", "PNDM", "LCM", "TCD")
_VP_SIGMAS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
_VE_SIGMAS = (
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "DPMSolverSDE",
)  # x = x0 + sigma eps, the network sees x / sqrt(1 + sigma**2)
_EDM = ("EDMEuler", "EDMDPMSolverMultistep")  # x = x0 + sigma eps, with EDM's preconditioning inside step()
_FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM")  # x = (1 - sigma) x0 + sigma eps

_FIRST_ORDER = (
    "DDPM",
    "DDIM",
    "DDPMParallel",
    "DDIMParallel",
    "LCM",
    "TCD",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "EDMEuler",
    "FlowMatchEulerDiscrete",
    "FlowMatchLCM",
)

# what diffusers accepts, and then does not do
_NO_X0 = (
    "PNDM",
    "EulerAncestralDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "DPMSolverSDE",
    *_EDM,
)
_NO_THIRD_ORDER = (("DPMSolverMultistep", "sde-dpmsolver"), ("EDMDPMSolverMultistep", "sde-dpmsolver++"))


def _kind(scheduler: Any) -> str:
    names = [base.__name__.removesuffix("Scheduler") for base in type(scheduler).__mro__]
    kinds = {"alphas": _ALPHAS, "vp": _VP_SIGMAS, "ve": _VE_SIGMAS, "edm": _EDM, "flow": _FLOW}
    for kind, known in kinds.items():
        if any(name in known for name in names):
            return kind
    listed = ", ".join(sorted(name for group in kinds.values() for name in group))
    raise UnsupportedError(f"scheduler {names[0]} is not known; use one of {listed}")


class ScheduleReading:
    """What a diffusers scheduler, already set to its steps, says of itself; nothing is changed.

    Parameters
    ----------
    scheduler : diffusers scheduler
    eta : float
        DDIM's noise fraction in [0, 1].

    Attributes
    ----------
    levels : list of Level
        One per network evaluation of the main loop, and the final one.
    stochastic : float or None
        kappa, the fraction of ancestral noise that a step adds: 1 ancestral, 0 deterministic, None unknown.
    ancestral : bool
        Whether its steps with kappa = 1 are DDPM's kernel: the variance beta-tilde around the prediction's own mean.
    path : Path
        The path of a network trained with this scheduler's own schedule.
    prediction : str
        The space of what ``step()`` wants: "eps", "x0", "v" or "flow" ("x0" stands for EDM's raw output).
    """

    def __init__(self, scheduler: Any, eta: float = 0.0) -> None:
        self.scheduler, self.eta = scheduler, eta
        own = (c.__name__ for c in type(scheduler).__mro__ if c.__module__.startswith("diffusers."))
        self.name, self.kind = next(own, type(scheduler).__name__).removesuffix("Scheduler"), _kind(scheduler)
        config = scheduler.config
        self._check_complete()
        for option in ("clip_sample", "thresholding"):
            if config.get(option, False):
                warnings.warn(
                    f"{type(scheduler).__name__} has {option}=True: x0 is clipped, so samples outside the box are "
                    f"distorted; build it with {option}=False",
                    ClippingWarning,
                    stacklevel=5,
                )
        self.timesteps: Tensor = scheduler.timesteps
        self._times: list[float] = self.timesteps.tolist()
        self.levels = [self._level(i) for i in range(len(self.timesteps))] + [self._last()]
        self.stochastic, self.ancestral = self._stochastic(), self._ancestral()
        self.prediction = "x0" if self.kind == "edm" else prediction_space(config.get("prediction_type", "flow"))

    def _check_complete(self) -> None:
        """Refuse settings that want what guidance does not carry, or that diffusers breaks on amid a run."""
        config, name = self.scheduler.config, type(self.scheduler).__name__
        if str(config.get("variance_type")).startswith("learned"):
            fixed = "'fixed_small'" if self.name.startswith("DDPM") else None
            raise UnsupportedError(
                f"{name} has variance_type={config.variance_type!r}: it reads a variance that the network adds to its "
                f"prediction, which guidance does not carry; build it with variance_type={fixed}"
            )
        if config.get("solver_order") == 3 and (self.name, config.get("algorithm_type")) in _NO_THIRD_ORDER:
            raise UnsupportedError(
                f"diffusers' {name} has no third order of {config.algorithm_type!r}; build it with solver_order=2"
            )
        if self.name == "UniPCMultistep" and config.final_sigmas_type == "zero":
            high_to_the_end = config.solver_order > 1 and not config.lower_order_final
            if config.solver_type == "bh1" or not config.predict_x0 or high_to_the_end:
                raise UnsupportedError(
                    f"diffusers' {name} divides by 0 in its last step unless solver_type='bh2', predict_x0=True and "
                    "lower_order_final=True; build it so, or with final_sigmas_type='sigma_min'"
                )

    def require(self, needs: frozenset[str]) -> None:
        """Refuse a method that needs what this scheduler does not do."""
        config = self.scheduler.config
        order = config.get("solver_order") if self.name.startswith("DPMSolver") else None
        own_mean = config.get("algorithm_type") == "sde-dpmsolver"  # not that of DDPM's kernel
        single = self.name in _FIRST_ORDER or (order == 1 and not own_mean)
        if "recurrence" in needs and not single:
            raise UnsupportedError(
                f"this method runs levels again, which {self.name} cannot: its history would be that of another "
                "trajectory; use DDIM, DDPM, Euler, Euler ancestral or FlowMatchEuler"
            )
        if "first_order" in needs and not single:
            raise UnsupportedError(
                f"this method needs a scheduler that makes each step from one evaluation; {self.name} does not: use "
                "DDIM, DDPM, Euler, Euler ancestral or FlowMatchEuler"
            )
        if "noise" in needs and not self.stochastic:
            raise UnsupportedError(
                f"mode='mean' moves a step's mean by its variance, and {self.name} has none, or an unknown one; use "
                "mode='score', or DDPM, Euler ancestral, or DDIM with eta > 0"
            )
        if "first_order" in needs and self._astray():
            warnings.warn(
                f"diffusers' {self.name} always goes num_train_timesteps // steps timesteps down, which under "
                f"timestep_spacing={config.timestep_spacing!r} and with these steps is not to the next of its list, "
                "where this method takes it to go; use 'leading', or 'trailing' with a number of steps that divides "
                "num_train_timesteps",
                UserWarning,
                stacklevel=4,
            )

    def _astray(self) -> bool:
        """Whether this is a DDIM whose steps do not end at the next timestep."""
        if not self.name.startswith("DDIM"):
            return False
        stride = self.scheduler.config.num_train_timesteps // self.scheduler.num_inference_steps
        return any(t - stride != after for t, after in pairwise(self._times))

    @property
    def path(self) -> Path:
        config = self.scheduler.config
        if self.kind == "flow" or config.get("use_flow_sigmas", False):
            return FlowPath(config.num_train_timesteps)
        if self.kind == "edm":
            return VEPath(config.sigma_data)
        if config.get("timestep_type") == "continuous" and config.prediction_type == "v_prediction":
            return LogPath()
        return VPPath(tuple(self.scheduler.betas.double().tolist()))

    def _from_sigma(self, sigma: float) -> Level:
        if self.kind in ("ve", "edm"):
            return Level(1.0, sigma)
        if self.kind == "flow" or self.scheduler.config.get("use_flow_sigmas", False):
            return Level(1 - sigma, sigma)
        return preserving(sigma)

    def _from_alpha_bar(self, alpha_bar: float) -> Level:
        return Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    @cached_property
    def _alphas_bar(self) -> Tensor:
        # diffusers keeps the cumulative product in single precision, which spoils small steps by 1.5e-4
        return torch.cumprod(1 - self.scheduler.betas.double(), 0)

    def _level(self, index: int) -> Level:
        if self.kind == "alphas":
            return self._from_alpha_bar(float(self._alphas_bar[int(self.timesteps[index])]))
        if self.name.startswith("KDPM2") and index % 2:  # half way of a step
            between = index if self.name == "KDPM2Discrete" else index - 1
            return self._from_sigma(float(self.scheduler.sigmas_interpol[between]))
        if self.name == "DPMSolverSDE" and index % 2:
            return self._from_sigma(float(self.scheduler.sigmas[index - 1 : index + 1].prod().sqrt()))
        return self._from_sigma(float(self.scheduler.sigmas[index]))

    def _last(self) -> Level:
        if self.kind != "alphas":
            return self._from_sigma(float(self.scheduler.sigmas[-1]))
        to_one = self.scheduler.config.get("set_alpha_to_one", True)
        return Level(1.0, 0.0) if to_one else self._from_alpha_bar(float(self._alphas_bar[0]))

    def _stochastic(self) -> float | None:
        config = self.scheduler.config
        if self.name.startswith("DDIM"):
            return self.eta**2
        if self.name in ("DDPM", "DDPMParallel", "EulerAncestralDiscrete"):
            return 1.0
        if self.name in ("DPMSolverMultistep", "DPMSolverSinglestep", "EDMDPMSolverMultistep"):
            if not str(config.algorithm_type).startswith("sde"):
                return 0.0
            most = 1 if self.name == "DPMSolverSinglestep" else 2  # stages have noise of their own, taken back later
            return 1.0 if config.solver_order <= most else None  # the third order's means are far from any kernel's
        if self.name in ("LCM", "FlowMatchLCM", "TCD", "SASolver", "KDPM2AncestralDiscrete", "DPMSolverSDE"):
            return None
        return None if config.get("stochastic_sampling", False) else 0.0

    def _ancestral(self) -> bool:
        config = self.scheduler.config
        if self.name.startswith("DDPM"):  # beta itself exceeds beta-tilde
            return str(config.variance_type).startswith("fixed_small")
        return config.get("algorithm_type") != "sde-dpmsolver"

    def position(self, expected: int, timestep: Any = None) -> int:
        """The index in ``levels`` of where the scheduler stands; ``expected`` where it does not tell."""
        if self.kind == "alphas":  # levels go by timestep, and one may come twice
            return expected if timestep is None else self._times.index(float(timestep))
        for known in (self.scheduler.step_index, self.scheduler.begin_index):
            if known is not None:
                return int(known)
        return expected if timestep is None else int(self.scheduler.index_for_timestep(timestep))

    def input_scale(self, level: Level) -> float:
        """From this scheduler's coordinates to those in which it shows samples to the network."""
        if self.kind == "ve":
            return 1 / math.hypot(1.0, level.sigma)
        return self._preconditioning(level).inside if self.kind == "edm" else 1.0

    def inner(self, count: int) -> list[int]:
        """Which of the first ``count`` evaluations of a run are inner points of a step, not of the trajectory."""
        if self.name == "PNDM":  # blocks of four Runge-Kutta stages, or one repeated point
            stages = len(self.scheduler.prk_timesteps)
            return [i for i in range(min(stages, count)) if i % 4] if stages else [1] if count > 1 else []
        return list(range(1, count, 2)) if hasattr(self.scheduler, "state_in_first_order") else []

    def from_output(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """A network's answer to this scheduler as a prediction in ``self.prediction``; (B, ...)."""
        return self._preconditioning(level).x0(output, x) if self.kind == "edm" else output

    def to_output(self, prediction: Tensor, x: Tensor, level: Level) -> Tensor:
        """A prediction in ``self.prediction`` as what ``step()`` wants; undoes EDM's preconditioning."""
        return self._preconditioning(level).output(prediction, x) if self.kind == "edm" else prediction

    def _preconditioning(self, level: Level) -> Preconditioning:
        config = self.scheduler.config
        return Preconditioning.at(level.sigma, config.sigma_data, prediction_space(config.prediction_type))


class SchedulerView(ScheduleReading):
    """A private scheduler of the same configuration as a diffusers scheduler, set to a number of steps.

    Parameters
    ----------
    scheduler : diffusers scheduler
        Left untouched.
    steps : int
        Number of inference steps, >= 1.
    eta : float
        DDIM's noise fraction in [0, 1].
    """

    def __init__(self, scheduler: Any, steps: int, eta: float = 0.0, device: str | torch.device = "cpu") -> None:
        if not isinstance(steps, Integral) or steps < 1:
            raise ParameterError(f"steps must be a whole number of at least 1, got {steps}")
        _kind(scheduler)  # an unknown one is refused before it is touched
        # diffusers takes what was given by position for a default, which another scheduler need not keep
        config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
        own = type(scheduler).from_config(config)
        if hasattr(own, "set_shift") and scheduler.shift != own.shift:  # records and stored runs go by the config
            raise UnsupportedError(
                f"set_shift() has set this {type(scheduler).__name__} to {scheduler.shift}, of which its config says "
                f"nothing; use its from_config(scheduler.config, shift={scheduler.shift})"
            )
        if own.config.get("invert_sigmas", False):
            raise UnsupportedError(
                f"this {type(scheduler).__name__} has invert_sigmas=True: it goes from data to noise; use its "
                "from_config(scheduler.config, invert_sigmas=False)"
            )
        self._accepted = set(inspect.signature(own.step).parameters)
        if not isinstance(eta, Real) or not 0 <= eta <= 1:
            raise ParameterError(f"eta must be a number in [0, 1], got {eta!r}")
        if eta and "eta" not in self._accepted:
            raise ParameterError(f"{type(scheduler).__name__} takes no eta; leave it 0 or use DDIMScheduler")
        try:
            own.set_timesteps(steps, device=device)
        except ValueError as error:
            if "`mu` must be passed" not in str(error):
                raise ParameterError(f"{type(scheduler).__name__} cannot take {steps} steps: {error}") from error
            shift = "shift" if "shift" in own.config else "flow_shift"
            raise UnsupportedError(
                f"this {type(scheduler).__name__} has use_dynamic_shifting=True: it shifts its levels by the size of "
                "the picture, which only a pipeline tells it; use its from_config(scheduler.config, "
                f"use_dynamic_shifting=False, {shift}=3.0), or diffsteer.attach() the method to the pipeline"
            ) from error
        if hasattr(own, "set_begin_index"):
            own.set_begin_index(0)  # it would look for its first timestep, and take the second if there are two
        super().__init__(own, eta)
        self._check_descent(steps)
        self._check_prediction()

    def _check_prediction(self) -> None:
        """Refuse a prediction that no step can be made of; networks may predict what they will, and are converted."""
        told = "whatever the network predicts: that is what denoiser(..., prediction=) is told"
        if self.scheduler.config.get("prediction_type") == "sample" and self.name in _NO_X0:
            raise UnsupportedError(
                f"diffusers' {self.name} makes no steps of prediction_type='sample'; build it with 'epsilon', {told}"
            )
        if self.prediction == "eps" and self.levels[0].alpha == 0:
            raise UnsupportedError(
                f"this {self.name} starts at pure noise, of which prediction_type='epsilon' says nothing; build it "
                f"with 'v_prediction', {told}"
            )

    def _check_descent(self, steps: int) -> None:
        """Refuse more steps than the schedule has levels: diffusers then repeats some, and its solvers divide by 0."""
        inner = self.inner(len(self.timesteps))
        rhos = [level.rho for i, level in enumerate(self.levels[:-1]) if i not in inner]
        falls = operator.ge if self.scheduler.config.get("solver_order") == 1 else operator.gt  # needs no step before
        if not all(falls(before, after) for before, after in pairwise(rhos)):
            raise ParameterError(
                f"{self.name} does not come to a lower noise level with each of {steps} steps: take fewer, below its "
                f"{self.scheduler.config.num_train_timesteps} timesteps of training"
            )

    def initial(self, noise: Tensor) -> Tensor:
        """x_T from unit noise, (B, ...)."""
        return noise * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def rewind(self) -> None:
        """Undo the count of the last step, so that its level can be run again."""
        if getattr(self.scheduler, "_step_index", None) is not None:
            self.scheduler._step_index -= 1

    def step(
        self, prediction: Tensor, space: str, index: int, x: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The scheduler's next sample from a prediction in any space; (B, ...)."""
        level, t = self.levels[index], self.timesteps[index]
        output = self.to_output(convert(prediction, x, level, space, self.prediction), x, level)
        self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else None
        keywords: dict[str, Any] = {"generator": list(generators), "eta": self.eta}
        used = {k: v for k, v in keywords.items() if k in self._accepted}
        if self.name == "DPMSolverSDE" and self.scheduler.noise_sampler is None:  # it draws from trees of its own
            self.scheduler.noise_sampler_seed = [generator.initial_seed() for generator in generators]
        return self.scheduler.step(output, t, x, return_dict=False, **used)[0]
