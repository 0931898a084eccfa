"""Policies as JSON: whatever the text is, loading gives an equal policy or a FormatError, nothing else."""

import contextlib
import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import FormatError
from offramp.policies import BEEM, Array, EENet, Entropy, MaxProb, Patience, Policy, dumps, from_dict, loads, to_dict

POLICIES = (
    MaxProb((0.9, 0.5), enabled=(True, True)),
    Entropy(0.25),
    Patience(2, enabled=(True, False, True)),
    BEEM((0.1, 0.2), 0.3, reset="zero"),
    EENet(((Array([0.5, 1.0, 0.0, -1.0]),), (Array([0.1] * 5),)), (0.4, 0.0)),
    EENet(((Array([[1.0, 2.0]]), Array([0.0]), Array([1.0]), Array(0.5)),), 0.5, scorer="mlp", class_scores=False),
)
ODD = (
    None, True, False, 0, -1, 1, 2, 0.5, 1e308, 10**400, float("nan"), float("inf"), "", "x", "12", "own", "mlp",
    [], [[]], [1], ["1"], [None], [True], {}, {"array": 1}, {"array": []}, {"array": [[1], [1, 2]]}, {"array": "x"},
    {"array": [[[0.5]]]}, {"array": [10**400]}, {"array": {"array": []}}, {"a": 1},
)  # fmt: skip


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(value, path, odd, how):
    """A copy of `value` with the place at `path` replaced, removed, or a key added to it."""
    value = json.loads(json.dumps(value))
    if not path:
        return odd
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if how == "remove":
        del holder[path[-1]]
    elif how == "add" and isinstance(holder, dict):
        holder["extra"] = odd
    else:
        holder[path[-1]] = odd
    return value


def well_formed(policy) -> bool:
    """Whether what was accepted is a policy that can be written and read again."""
    return isinstance(policy, Policy) and loads(dumps(policy)) == policy and hash(policy) == hash(loads(dumps(policy)))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_mutated_json(seed):
    """20 times 100 files with one or two mutations, some of them cut off."""
    draw = random.Random(seed)
    for _ in range(100):
        value = to_dict(draw.choice(POLICIES))
        for _ in range(draw.choice((1, 1, 2))):
            path = draw.choice(list(places(value)))
            value = mutated(value, path, draw.choice(ODD), draw.choice(("replace", "remove", "add")))
            if not isinstance(value, dict):
                break
        text = json.dumps(value)
        if draw.random() < 0.2:
            text = text[: draw.randrange(len(text))]
        with contextlib.suppress(FormatError):
            assert well_formed(loads(text))


UNCHECKED = """
import itertools, json, sys
sys.path.insert(0, {tests!r})
import test_codec as t
from offramp.errors import FormatError, OfframpError
count = 0
for start in t.POLICIES:
    value = t.to_dict(start)
    for path, odd in itertools.product(t.places(value), t.ODD):
        how = "remove" if odd == 2 else "add" if odd == "x" else "replace"
        try:
            policy = t.loads(json.dumps(t.mutated(value, path, odd, how)))
        except FormatError:
            policy = None
        else:
            assert t.well_formed(policy), policy
            f = vars(policy)
            assert all(type(v) is float for name in ("thresholds", "weights") for v in (
                () if name not in f else f[name] if isinstance(f[name], tuple) else (f[name],))), policy
            assert policy.enabled is None or all(type(v) is bool for v in policy.enabled), policy
            assert f.get("reset", "own") in ("own", "zero") and type(f.get("class_scores", True)) is bool, policy
            assert all(isinstance(a, t.Array) for part in f.get("scorers", ()) for a in part), policy
        count += 1
A = t.Array([1.0])
bad = [None, True, "0.5", "12", ("1", "2"), (True, False), (), 10**400, object(), (None,), dict(a=1), b"12"]
makers = [t.MaxProb, t.Entropy, lambda v: t.BEEM((0.1,), v), lambda v: t.BEEM(v, 0.5), lambda v: t.EENet(((A,),), v)]
cases = [(make, v) for make in makers for v in bad]
cases += [(t.Patience, v) for v in (1.5, True, None, "2", (1,))]
cases += [(lambda v: t.Patience(1, enabled=v), v) for v in ((1, 0), "TF", True, (True, None))]
cases += [(lambda v: t.BEEM((0.1,), 0.5, reset=v), v) for v in ("both", None, 1)]
cases += [(lambda v: t.EENet(((A,),), 0.5, scorer=v), v) for v in ("tree", None)]
cases += [(lambda v: t.EENet(((A,),), 0.5, class_scores=v), v) for v in (1, None, "yes")]
cases += [(lambda v: t.EENet(v, 0.5), v) for v in ((("a",),), ((None,),))]
for make, v in cases:
    try:
        made = make(v)
    except OfframpError:
        continue
    raise SystemExit(f"accepted {{v!r}}: {{made!r}}")
print(count, len(cases))
"""


def test_without_a_type_checker():
    """The test suite checks annotations at run time, which hides what our own checks let through. Here none runs."""
    script = UNCHECKED.format(tests=str(__file__).rsplit("/", 1)[0])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    mutations, constructors = map(int, done.stdout.split())
    assert mutations > 1500
    assert constructors > 70


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "1" * 5000, "{", "null", "[]", '"MaxProb"', "\x00", '{"kind": NaN}']
)
def test_no_json(text):
    with pytest.raises(FormatError):
        loads(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"version": True}, "version True"),
        ({"version": "1"}, "version '1'"),
        ({"kind": "Tree"}, "unknown policy kind 'Tree'"),
        ({"kind": ["MaxProb"]}, "unknown policy kind"),
        ({"extra": 1}, "exactly the keys"),
        ({"fields": {"thresholds": 0.5, "extra": 1}}, "extra"),
        ({"fields": {}}, "thresholds"),
        ({"fields": None}, "NoneType"),
    ],
)
def test_the_message_names_what_is_wrong(change, words):
    with pytest.raises(FormatError, match=words):
        from_dict({**to_dict(MaxProb(0.5)), **change})


def test_tuples_are_restored():
    for policy in POLICIES:
        again = loads(dumps(policy))
        assert again == policy
        assert type(again.enabled) in (tuple, type(None))
        assert repr(again) == repr(policy)
    assert loads(dumps(MaxProb((0.5,)))) != MaxProb(0.5)
