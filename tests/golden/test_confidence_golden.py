"""Max-prob and entropy, worked by hand."""

import math

import pytest
import torch

from offramp.cost import CostModel
from offramp.errors import ValueRangeError
from offramp.policies import Entropy, MaxProb
from offramp.scores import margin, max_prob, neg_entropy
from offramp.simulate import simulate
from offramp.trace import ExitTrace


def logits(*p: float) -> list[float]:
    return [math.log(v) for v in p]


def test_scores():
    seen = torch.tensor([logits(0.5, 0.25, 0.25), logits(0.7, 0.2, 0.1), logits(1 / 3, 1 / 3, 1 / 3)])
    assert max_prob(seen).tolist() == pytest.approx([0.5, 0.7, 1 / 3], abs=1e-6)
    assert margin(seen).tolist() == pytest.approx([0.25, 0.5, 0.0], abs=1e-6)
    # entropies in bits: 1.5, 1.156780, 1.584963 = log2 3; so 1 - 1.5/1.584963 = .053606, 1 - .729847 = .270153, 0
    assert neg_entropy(seen).tolist() == pytest.approx([0.053606, 0.270153, 0.0], abs=2e-6)
    # two classes at 0.9: .468996 bits of 1
    assert neg_entropy(torch.tensor([logits(0.9, 0.1)])).item() == pytest.approx(0.531004, abs=2e-6)


def test_saturated_and_one_class():
    sure = torch.tensor([[1000.0, 0.0, -1000.0]])
    assert (max_prob(sure).item(), margin(sure).item(), neg_entropy(sure).item()) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueRangeError):
        neg_entropy(torch.zeros(2, 1))
    assert max_prob(torch.zeros(2, 1)).tolist() == [1.0, 1.0]


def test_scores_ignore_the_dtype():
    seen = torch.randn(50, 7).half()
    for score in (max_prob, margin, neg_entropy):
        assert torch.equal(score(seen), score(seen.float()))
        assert torch.equal(score(seen.double()), score(seen.float()))


def table(policy) -> list[int]:
    first = [logits(0.5, 0.5), logits(0.9, 0.1), logits(0.6, 0.4)]
    second = [logits(0.2, 0.8), logits(0.5, 0.5), logits(0.6, 0.4)]
    made = ExitTrace(torch.tensor([first, second, first]))
    return simulate(policy, made, CostModel.from_costs((1, 2, 3))).exit.tolist()


def test_max_prob():
    # exit 0: .5 .9 .6   exit 1: .8 .5 .6
    assert table(MaxProb((0.85, 0.7, 0.0))) == [1, 0, 2]
    assert table(MaxProb((0.55, 0.55, 0.0))) == [1, 0, 0]
    assert table(MaxProb((0.95, 0.95, 0.0))) == [2, 2, 2]
    assert table(MaxProb((0.0, 0.0, 0.0), enabled=(False, True, True))) == [1, 1, 1]


def test_exactly_at_the_threshold_leaves():
    equal = ExitTrace(torch.zeros(2, 1, 2))
    costs = CostModel.from_costs((1, 2))
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert simulate(MaxProb(0.5), equal, costs).exit.tolist() == [0]
    assert simulate(MaxProb(above), equal, costs).exit.tolist() == [1]
    assert simulate(Entropy(neg_entropy(equal.logits[0]).item()), equal, costs).exit.tolist() == [0]


def test_entropy():
    # 1 - bits: exit 0: 0, .531, 1 - .970951 = .029; exit 1: 1 - .721928 = .278, 0, .029
    assert table(Entropy((0.5, 0.25, 0.0))) == [1, 0, 2]
    assert table(Entropy((0.02, 0.25, 0.0))) == [1, 0, 0]


def test_score_one_does_not_switch_an_exit_off():
    sure = ExitTrace(torch.tensor([[[99.0, 0.0]], [[99.0, 0.0]]]))
    costs = CostModel.from_costs((1, 2))
    assert simulate(MaxProb(1.0), sure, costs).exit.tolist() == [0]
    assert simulate(MaxProb(1.0, (False, True)), sure, costs).exit.tolist() == [1]
