"""Which policy the options of a command name."""

from pathlib import Path

from bundles import bundle

from offramp import MaxProb, dumps
from offramp.cli.opening import Opened, chosen, picked


def test_a_file_is_not_taken_for_the_bundles_policy_of_that_name(tmp_path: Path) -> None:
    opened = Opened(bundle())
    name, inside = next(iter(opened.bundle.policies.items()))
    other = MaxProb(0.123)
    path = tmp_path / f"{name}.json"
    path.write_text(dumps(other))
    found = picked(opened, str(path), None, None, 1)
    assert (found.name, found.policy, found.inside) == (name, other, False)
    assert chosen(opened, str(path), None, None, 1)[1].policy == other
    assert picked(opened, name, None, None, 1).policy == inside.policy
    assert picked(opened, name, None, None, 1).inside
