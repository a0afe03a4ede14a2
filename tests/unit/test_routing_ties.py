"""Answers that differ because two experts tie are told from answers that are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cluster.bench.drill_report import Answered, mismatches
from cluster.bench.reference import Reference
from cluster.bench.verify import Answer, Load, compare, problems
from tests.conftest import MakeTiny


class Tied:
    """A reference of two minds: one is told first, the other only now and then."""

    def __init__(self, one: torch.Tensor, other: torch.Tensor) -> None:
        self._one, self._other = one, other

    def logits(self, _prompt: list[int], tokens: list[int]) -> torch.Tensor:
        return self._one[: len(tokens)]

    def others(self, _prompt: list[int], tokens: list[int]) -> Iterator[torch.Tensor]:
        for number in range(6):
            yield (self._other if number == 4 else self._one)[: len(tokens)]


def report_of(reference: Any, served: torch.Tensor, prompts: int = 1) -> tuple[dict[str, Any], list[str]]:
    answers = [Answer([1, 2], served.argmax(-1).tolist(), served) for _ in range(prompts)]
    report = compare(reference, answers, len(served)) | {"max_batch": 1}
    return report, problems(report, Load(prompts, len(served), 1, 0))


def test_the_other_side_of_a_tie_is_no_mistake_and_is_counted() -> None:
    one, other = torch.randn(5, 40), torch.randn(5, 40)
    report, found = report_of(Tied(one, other), other + 1e-6)
    assert found == []
    assert report["routing_ties"] == 1
    assert report["mismatched_tokens"] == 0
    report, found = report_of(Tied(one, other), one)
    assert found == []
    assert report["routing_ties"] == 0
    assert len(report_of(Tied(one, other), other, prompts=2)[1]) == 1  # two of two are no chance


@pytest.mark.parametrize("damage", ["third", "half", "far"])
def test_what_no_tie_explains_is_a_mistake(damage: str) -> None:
    one, other = torch.randn(5, 40), torch.randn(5, 40)
    served = {"third": torch.randn(5, 40), "half": torch.cat([one[:2], other[2:]]), "far": other + 1e-3}[damage]
    report, found = report_of(Tied(one, other), served)
    assert found
    assert report["routing_ties"] == 0


def test_a_drill_asks_for_ties_too() -> None:
    one, other, third = torch.randn(5, 40), torch.randn(5, 40), torch.randn(5, 40)
    known = one.argmax(-1).tolist()
    reference: Any = Tied(one, other)

    def judged(logits: torch.Tensor) -> dict[str, int]:
        return mismatches(reference, [[1, 2]], [known], [Answered(0, 5, tokens=logits.argmax(-1).tolist())])

    assert judged(one) == {"mismatched_tokens": 0, "near_tie_answers": 0, "routing_ties": 0}
    assert judged(other) == {"mismatched_tokens": 0, "near_tie_answers": 0, "routing_ties": 1}
    assert judged(third)["mismatched_tokens"] > 0
    assert judged(third)["near_tie_answers"] == 0


def test_the_reference_takes_both_sides_of_a_tie(tiny: MakeTiny) -> None:
    path, prompt = tiny("mixtral"), torch.randint(0, 90, (12,)).tolist()
    reference = Reference(path, torch.float32)
    plain = reference.logits(prompt, [1, 2, 3])
    limit = 1e-4 * float(plain.std())
    assert any(torch.allclose(other, plain, atol=limit) for other in reference.others(prompt, [1, 2, 3]))
    # Two experts whose gates differ by less than the order of a sum makes, and which compute different things.
    gate = next(p for name, p in reference._model.named_parameters() if name.endswith("gate.weight"))
    with torch.no_grad():
        gate.copy_(gate[:1] + 1e-7 * torch.randn_like(gate))
    first = next(reference.others(prompt, [1, 2, 3]))
    far = [float((other - first).abs().max() / first.std()) for other in reference.others(prompt, [1, 2, 3])]
    assert max(far) > 1e-3
    assert torch.equal(reference.logits(prompt, [1]), reference.logits(prompt, [1]))  # and is itself again
