import pytest
import torch

from offramp.errors import ValueRangeError
from offramp.splits import stratified_split


@pytest.mark.parametrize("shares", [(0.4, 0.3, 0.3), (0.5, 0.5), (1,), (0.2, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.01, 0.99)])
@pytest.mark.parametrize("seed", range(3))
def test_disjoint_and_proportional(shares, seed):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((500, 101, 7, 1))])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]
    parts = stratified_split(labels, shares, seed=seed)
    every = torch.cat(parts).tolist()
    assert len(every) == len(set(every))
    if abs(sum(shares) - 1) < 1e-9:
        assert len(every) == len(labels)
    for part, share in zip(parts, shares, strict=True):
        assert part.dtype == torch.int64
        assert torch.equal(part, part.sort().values)
        for c, n in enumerate((500, 101, 7, 1)):
            assert abs(int((labels[part] == c).sum()) - share * n) < 1.000001


def test_rounding_favours_no_part():
    """A thousand classes of one row each: the parts get their shares, not all rows or none."""
    parts = stratified_split(torch.arange(1000), (0.4, 0.3, 0.3))
    assert [len(p) for p in parts] == pytest.approx([400, 300, 300], abs=60)


def test_seeds():
    labels = torch.arange(100) % 3
    first, again, other = (stratified_split(labels, (0.5, 0.5), seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_refusals():
    for shares in ((), (0.0, 1.0), (-0.1, 0.5), (0.6, 0.6)):
        with pytest.raises(ValueRangeError):
            stratified_split(torch.zeros(5, dtype=torch.int64), shares)
    assert [len(p) for p in stratified_split(torch.empty(0, dtype=torch.int64), (0.5, 0.5))] == [0, 0]
