"""Every error that diffsteer raises on purpose. The message always says what to do."""

from __future__ import annotations


class DiffsteerError(Exception):
    """Base of all of them."""


class ParameterError(DiffsteerError, ValueError):
    """A parameter outside its range."""


class UnknownNameError(DiffsteerError, LookupError):
    """A method, model, concept or context that does not exist."""

    def __init__(self, kind: str, name: object, known: object) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)  # type: ignore[arg-type]
        listed = ", ".join(map(str, self.known)) or "(none)"
        super().__init__(f"unknown {kind} {name!r}; known: {listed}")


class MissingContextError(DiffsteerError, LookupError):
    """A method asked for a context that the denoiser does not have."""


class UnsupportedError(DiffsteerError, NotImplementedError):
    """A combination that cannot work; the message names one that can."""


class NonFiniteError(DiffsteerError, ArithmeticError):
    """A branch returned NaN or infinity."""


class StateError(DiffsteerError, RuntimeError):
    """A method's state does not belong to this batch."""


class WeightsError(DiffsteerError, OSError):
    """A model folder or a weight file that cannot be read safely."""


class OutputError(DiffsteerError, OSError):
    """A file or folder that cannot be written."""


class DependencyError(DiffsteerError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class ClippingWarning(UserWarning):
    """The scheduler clips or thresholds x0, which changes what is sampled."""


class CalibrationWarning(UserWarning):
    """A calibration is used (or left out) away from where it was fitted."""


class IgnoredPromptWarning(UserWarning):
    """A prompt was given that the attached method never asks for."""


class UnverifiedWarning(UserWarning):
    """Something that should work by its code, but that no test of ours has shown to work."""
