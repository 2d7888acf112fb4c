"""Negative prompting: the NOT of composable diffusion (Liu et al., 2022), in its four conventions."""

from __future__ import annotations

from dataclasses import dataclass

from diffsteer.core import Call, Guidance, Plan, State, Step
from diffsteer.errors import ParameterError
from diffsteer.methods._checks import check_scale
from diffsteer.methods._registry import register


@register(
    "np",
    title="Negative prompting",
    nfe=2,
    asks=("null", "neg"),
    bibtex="""
@inproceedings{liu2022compositional,
  title = {Compositional Visual Generation with Composable Diffusion Models},
  author = {Liu, Nan and Li, Shuang and Du, Yilun and Torralba, Antonio and Tenenbaum, Joshua B.},
  booktitle = {European Conference on Computer Vision},
  year = {2022}, eprint = {2206.01714}, archivePrefix = {arXiv}
}""",
)
@dataclass(frozen=True)
class NegativePrompting(Guidance):
    """Push every sample away from an unwanted context with a constant weight.

    .. math:: e = b - \\lambda\\,(e(c^-) - b),\\qquad b = e(\\emptyset) + w\\,(e(c^+) - e(\\emptyset))

    Four rules go by this name; ``e0, e+, e-`` are the predictions of "null", "pos" and the unwanted context.

    ========== =================================== =========================================================
    convention prediction                          here
    ========== =================================== =========================================================
    alone      e0 - lambda (e- - e0)               ``NegativePrompting(lambda)``
    added      e0 + w (e+ - e0) - lambda (e- - e0) ``ClassifierFreeGuidance(w) + NegativePrompting(lambda)``
    replacing  e- + w (e+ - e-)                    ``NegativePrompting.replacing_null(w)``
    anchored   b - lambda (e- - b), b guided by w  ``NegativePrompting(lambda, anchor=w)``
    ========== =================================== =========================================================

    Parameters
    ----------
    scale : float
        lambda >= 0; 0 leaves b.
    context : str
        The unwanted context.
    anchor : float
        w >= 0 of the guided prediction b that the unwanted context is compared with: 0 is the null context, 1 the
        positive one.

    Notes
    -----
    2 evaluations per step at anchor 0 ("null") or 1 ("pos"), 3 at others; one less at scale 0. Affine. Replacing is
    adding at ``lambda = w - 1``: the null context drops out. Its target p(x) / p(c- | x)**lambda rewards being unlike
    c- without bound, so samples that never had to do with c- move too.
    """

    scale: float = 1.0
    context: str = "neg"
    anchor: float = 0.0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_scale(self.anchor, "anchor")
        if self.context == self.reference and self.anchor in (0, 1):
            raise ParameterError(f"{self.context!r} is what the unwanted context is compared with; it would do nothing")

    @classmethod
    def replacing_null(cls, guidance_scale: float = 7.5, context: str = "neg") -> NegativePrompting:
        """The form of diffusers and the web interfaces: the negative prompt takes the empty one's place.

        Parameters
        ----------
        guidance_scale : float
            w > 1, the only scale there is.
        context : str

        Raises
        ------
        ParameterError
            A scale of 1, at which the negative prompt would have no effect, or below, where it attracts.
        """
        if not guidance_scale > 1:
            raise ParameterError(
                f"guidance_scale must be above 1, got {guidance_scale}: at 1 the negative prompt has no effect, below "
                "it attracts; raise it, use NegativePrompting(scale), which has a weight of its own, or leave the "
                "negative prompt out"
            )
        return cls(guidance_scale - 1, context, anchor=1.0)

    @property
    def reference(self) -> str:  # type: ignore[override]
        return "pos" if self.anchor == 1 else "null"

    def guide(self, step: Step, state: State) -> Plan:
        positive = "pos" if self.anchor else "null"  # equal calls are evaluated once
        negative = self.context if self.scale else positive
        neg, cond, null = yield [Call(negative), Call(positive), Call(self.reference)]
        base = null + self.anchor * (cond - null)
        return base - self.scale * (neg - base), state, {}
