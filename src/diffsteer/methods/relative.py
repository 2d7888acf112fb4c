"""A method whose base is the prompt in place of the unconditional prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from diffsteer.core import After, Guidance, Plan, Run, State, Step, check_methods


@dataclass(frozen=True)
class Relative(Guidance):
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

    def __post_init__(self) -> None:
        check_methods(self.method)

    @property
    def space(self) -> str:  # type: ignore[override]
        return self.method.space

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.method.needs

    def start(self, run: Run) -> State:
        return self.method.start(run)

    def guide(self, step: Step, state: State) -> Plan:
        plan = self.method.guide(step, state)
        try:
            calls = next(plan)
            while True:
                answers = yield [replace(c, context=self.reference) if c.context == "null" else c for c in calls]
                calls = plan.send(answers)
        except StopIteration as done:
            result: tuple[Tensor, State, dict[str, Tensor]] = done.value
            return result

    def after(self, step: Step, x_next: Tensor, state: State) -> After:
        return self.method.after(step, x_next, state)
