"""A method replaced for a while: on one instance, in one thread, and exactly as before afterwards."""

from __future__ import annotations

import copy
import inspect
import threading
from contextlib import ExitStack

import pytest

from diffsteer.patching import patched


class Counter:
    """Steps, and may be copied."""

    def __init__(self) -> None:
        self.at = 0

    def step(self, by: int = 1) -> int:
        """How far it has come."""
        self.at += by
        return self.at


def doubled(native, by: int = 1) -> int:
    return native(2 * by)


def test_it_is_as_before_afterwards_also_after_an_exception() -> None:
    counter = Counter()
    with patched(counter, "step", doubled):
        assert counter.step(3) == 6
        assert list(inspect.signature(counter.step).parameters) == ["by"]
    assert "step" not in counter.__dict__
    counter.step = own = lambda by=1: -by  # an offload hook's, say

    def fail() -> None:
        with patched(counter, "step", doubled):
            assert counter.step(3) == -6
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert counter.__dict__["step"] is own


def test_a_copy_is_not_patched() -> None:
    """It steps itself, not the original, also once the patch is gone."""
    counter = Counter()
    with patched(counter, "step", doubled):
        other = copy.deepcopy(counter)
        assert other.step(5) == 5
    assert (counter.at, other.step(), other.at) == (0, 6, 6)
    assert copy.deepcopy(other).step() == 7
    assert other.at == 6
    counter.step = lambda by=1: -by
    with patched(counter, "step", doubled):
        assert copy.deepcopy(counter).step(5) == -5


def test_calls_from_inside_of_the_replacement_are_native() -> None:
    counter = Counter()
    with patched(counter, "step", lambda native, by=1: counter.step(10 * by)):
        assert [counter.step(2), counter.step(2)] == [20, 40]


@pytest.mark.parametrize("first", [0, 1])
def test_other_threads_get_the_native_method_and_ends_may_come_in_any_order(first: int) -> None:
    """Two threads that patch one object: each sees its own, and nothing is left, whoever ends first."""
    counter, seen = Counter(), []

    def elsewhere() -> None:
        seen.append(counter.step(0))

    with ExitStack() as stack:
        stack.enter_context(patched(counter, "step", lambda native, by=1: 100))
        here = threading.Thread(target=elsewhere)
        here.start()
        here.join()
        assert seen == [0]
        assert counter.step() == 100
    runs = [patched(counter, "step", lambda native, by=1, k=k: k + native(0)) for k in (1, 2)]
    for run in runs:
        run.__enter__()
    runs[first].__exit__(None, None, None)
    left = 2 - first
    assert counter.step() == left
    runs[1 - first].__exit__(None, None, None)
    assert "step" not in counter.__dict__
