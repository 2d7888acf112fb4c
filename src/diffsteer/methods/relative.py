"""A method whose base is the prompt in place of the unconditional prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffsteer.core import Call, Guidance, Plan, State, Step, altered
from diffsteer.methods.compose import Around


@dataclass(frozen=True)
class Relative(Around):
    """The same method with another context wherever it speaks of "null".

    Parameters
    ----------
    method : Guidance
    reference : str
        The context in the place of "null".

    Notes
    -----
    With a positive prompt, dynamic negative guidance can be had in three self-consistent ways:

    ============ ========================================================================================
    against null ``ClassifierFreeGuidance(w) + DynamicNegativeGuidance(...)``: the odds of c- against the
                 unconditional; exact at w = 1, scale = 1 where c+ and c- are independent given x_t
    against c+   ``Relative(DynamicNegativeGuidance(...))``, or that added to ``ClassifierFreeGuidance(w)``: the odds
                 of c- against c+, and a repulsion from c- relative to it
    joint        the same with "c+ and c-", both prompts in one, as the negative prompt: exact without any
                 independence
    ============ ========================================================================================
    """

    method: Guidance
    reference: str = "pos"  # type: ignore[misc]

    @property
    def space(self) -> str:  # type: ignore[override]
        return self.method.space

    def guide(self, step: Step, state: State) -> Plan:
        def moved(call: Call) -> Call:
            return replace(call, context=self.reference) if call.context == "null" else call

        return (yield from altered(self.method.guide(step, state), moved))
