"""Gradient-free classifier guidance, GFCG (Shenoy et al., 2026)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffsteer.core import Call, Guidance, Plan, State, Step, like, widened
from diffsteer.errors import NonFiniteError, ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register
from diffsteer.paths import Level, convert


@register(
    "gfcg",
    title="Gradient-free classifier guidance",
    nfe=2,
    asks=("pos",),
    bibtex="""
@inproceedings{shenoy2026gradientfree,
  title = {Gradient-Free Classifier Guidance for Diffusion Model Sampling},
  author = {Shenoy, Rahul and Pan, Zhihong and Balakrishnan, Kaushik and Cheng, Qisen and Jeon, Yongmoon and
            Yang, Heejune and Kim, Jaewon},
  booktitle = {IEEE/CVF Winter Conference on Applications of Computer Vision},
  year = {2026}, eprint = {2411.15393}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class GradientFreeClassifierGuidance(Guidance):
    """Push away from the class with which a classifier confuses the sample most, the more so the less sure it is.

    With the classifier's shares p_k of the estimated clean sample, and k* the likeliest class but c,

    .. math:: e = e(c) + \\lambda\\,(1 - p_c)\\,(e(c) - e(k^*))

    Parameters
    ----------
    classifier : callable
        Maps (x0, level), x0 being (B, ...) in the network's values and ``level`` the noise that it was estimated at,
        to logits (B, K). Latent models: decode first.
    classes : tuple of str
        The context of each of the K classes, in the classifier's order; "pos" is the wanted one, c.
    scale : float
        lambda >= 0, of a sample of which the classifier is sure that it is not c; 0 is conditional sampling. The scale
        of other methods, w = 1 at conditional sampling, is 1 + lambda (1 - p_c).

    Notes
    -----
    2 evaluations per step, each sample's second one under its own class; the classifier runs once, without gradients.
    The class and the weight are found anew at every step. At high noise x0 is a blur, of which an ordinary classifier
    knows nothing: use one that takes the level into account, or a :class:`diffsteer.Window`. Affine with a weight per
    sample: the same in eps, x0 and v. With CFG it is a sum, ``ClassifierFreeGuidance(w) +
    GradientFreeClassifierGuidance(...)``. As the ``base`` of an energy its weight counts as
    a constant. Information, (B,) each: "scale", 1 + lambda (1 - p_c), and "confidence",
    p_c. The paper lets the classifier set the weight at each step; its function could not be verified, and 1 - p_c is
    this library's choice: for two equally frequent classes and an exact p(c | x_t) it makes the method CFG with
    w = 1 + lambda.
    """

    reference: ClassVar[str] = "pos"

    classifier: Callable[[Tensor, Level], Tensor]
    classes: tuple[str, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not callable(self.classifier):
            raise ParameterError(f"classifier maps (x0, level) to logits (B, K), got {self.classifier!r}")
        if isinstance(self.classes, str) or len(set(self.classes)) < max(len(self.classes), 2):
            raise ParameterError('classes is a tuple of at least two different contexts, such as ("pos", "neg")')
        if "pos" not in self.classes:
            raise ParameterError(f'the wanted class is the context "pos"; name it among the classes {self.classes}')

    def guide(self, step: Step, state: State) -> Plan:
        (cond,) = yield [Call("pos")]
        if self.scale == 0:
            return cond, state, {}
        wanted = self.classes.index("pos")
        shares = self._shares(step, convert(cond, step.x, step.level, step.space, "x0"))
        nearest = shares.index_fill(1, torch.tensor(wanted, device=shares.device), -1).argmax(1)  # the first of equals
        rows = {name: (nearest == k).nonzero()[:, 0] for k, name in enumerate(self.classes)}
        rows = {name: own for name, own in rows.items() if len(own) > 0}
        answers = yield [Call(name, rows=own if len(own) < len(cond) else None) for name, own in rows.items()]
        rival = cond
        for own, answer in zip(rows.values(), answers, strict=True):
            rival = rival.index_copy(0, own, answer)
        weight = self.scale * (1 - shares[:, wanted])
        info = {"scale": 1 + weight, "confidence": shares[:, wanted]}
        return cond + like(weight, cond) * (cond - rival), state, info

    def _shares(self, step: Step, x0: Tensor) -> Tensor:
        """The classifier's p(k | x0), (B, K), in single precision at least."""
        with torch.no_grad():
            logits = self.classifier(x0, step.level)
        if logits.shape != (len(x0), len(self.classes)):
            raise ParameterError(
                f"the classifier returned {tuple(logits.shape)} logits for {len(x0)} samples and {len(self.classes)} "
                "classes; name one context for each of its classes"
            )
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(f"the classifier returned NaN or infinity at step {step.index}; check its input range")
        return widened(logits).softmax(1)
