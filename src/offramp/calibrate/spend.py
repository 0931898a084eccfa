"""What exit shares cost in a budget's unit, for a given set of exits that are on."""

from dataclasses import dataclass

from offramp.cost import Budget, CostModel

__all__ = ["WINDOW", "Spend"]

#: A budget is met by a cost in [WINDOW * budget, budget].
WINDOW = 0.98


@dataclass(frozen=True)
class Spend:
    """Costs of the visited exits, in the budget's unit."""

    costs: CostModel
    budget: Budget
    enabled: tuple[bool, ...]

    @property
    def amount(self) -> float:
        """The budget, in its unit."""
        return self.budget.amount

    @property
    def limit(self) -> float:
        """The largest cost that meets the budget: the amount, with room for rounding of sums."""
        return self.amount * (1 + 1e-9)

    @property
    def visited(self) -> tuple[int, ...]:
        """The exits that are on, and the last."""
        return tuple(k for k, on in enumerate(self.costs.visited(self.enabled)) if on)

    @property
    def cumulative(self) -> tuple[float, ...]:
        """The mean cost when every row leaves at that visited exit."""
        count = len(self.visited)
        return tuple(self.mean(tuple(float(i == k) for i in range(count))) for k in range(count))

    def mean(self, shares: tuple[float, ...]) -> float:
        """The mean cost when `shares[i]` of the rows leave at the i-th visited exit."""
        full = [0.0] * self.costs.exits
        for k, share in zip(self.visited, shares, strict=True):
            full[k] = share
        return self.costs.spent(full, self.budget, self.enabled)
