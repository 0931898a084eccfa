"""One step, two drivers: the live runtime leaves at the simulator's exits, for every policy and batch size."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import offramp
from offramp.demo import resnet20
from offramp.policies import (
    EERO,
    FPABEE,
    JEIDNN,
    PCEE,
    ZTW,
    AccuracyBins,
    Array,
    Evidence,
    Fixed,
    Margin,
    MSDNet,
    Voting,
)
from offramp.policies.fpabee import divergence
from offramp.scores import margin, max_prob, neg_entropy
from offramp.simulate import walk

EXITS, CLASSES, ROWS = 4, 5, 61
COSTS = offramp.CostModel.from_costs((0.2, 0.5, 0.8, 1.0))
ONE_EXIT = ("never", "at once", "only the last", "fixed")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = resnet20(classes=CLASSES, ch_in=1, seed=3)
    made = offramp.attach(network, at=("layer1.1", "layer2", "layer3.0"), example=torch.randn(2, 1, 16, 16))
    made.eval()
    probe = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        seen = made(probe)
    for k, linear in enumerate([*(h.linear for h in made.heads), network.linear]):
        # centred logits of moderate spread, so that rows differ and really leave at different exits
        spread = seen[k].std(dim=0).mean() / 1.5
        linear.weight.data.div_(spread)
        linear.bias.data.sub_(seen[k].mean(dim=0)).div_(spread)
    return made


@pytest.fixture(scope="module")
def rows():
    return torch.randn(ROWS, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trace(model, rows):
    with torch.inference_mode():
        return offramp.ExitTrace(logits=model(rows).clone())


def policies(trace):
    """Policies with thresholds in the middle of their scores, so that every exit is used."""
    middle = tuple(max_prob(trace.logits).median(dim=1).values.add(0.01).tolist())
    generator = torch.Generator().manual_seed(2)
    off = (True, False, True, True)

    def eenet(before, extra=0):
        """One linear scorer per exit, each seeing the q of so many exits."""
        widths = [CLASSES + 2 + extra + n for n in before]
        return tuple((Array(torch.rand(width, generator=generator)),) for width in widths)

    def halfway(policy):
        """The policy with thresholds in the middle of its scores."""
        score = walk(policy, trace).score.median(dim=1).values.add(0.003).tolist()
        return replace(policy, thresholds=tuple(score[n] for n in ((0, 1, 1, 2) if policy.enabled else range(EXITS))))

    def ztw(cascade, flags=None):
        arrays = [Array(0.3 * torch.randn(shape, generator=generator)) for shape in ((EXITS,) * 2, (EXITS, CLASSES))]
        return halfway(ZTW(2.0, *arrays, cascade, flags))

    cascade = Array(0.2 * torch.randn(EXITS, CLASSES, CLASSES, generator=generator))
    gates = Array(torch.randn(EXITS, 5, generator=generator))
    still = {
        task: divergence(*trace.logits[1:3], "js", task).median().item() + 1e-3 for task in ("classes", "multilabel")
    }
    quarters = torch.tensor([0.25, 0.5, 0.75])
    edges = tuple(tuple(torch.quantile(p, quarters).add(0.003).tolist()) for p in max_prob(trace.logits))
    return {
        "max-prob": offramp.MaxProb(middle),
        "max-prob, one off": offramp.MaxProb(middle, enabled=off),
        "entropy": offramp.Entropy(tuple(neg_entropy(trace.logits).median(dim=1).values.add(0.003).tolist())),
        "patience": offramp.Patience(1),
        "patience, one off": offramp.Patience(1, enabled=off),
        "beem": offramp.BEEM((0.4, 0.6, 0.8, 1.0), 0.6),
        "beem, reset zero": offramp.BEEM((0.4, 0.6, 0.8, 1.0), 0.6, reset="zero"),
        "beem, one off": offramp.BEEM((0.4, 0.6, 0.8, 1.0), 0.6, enabled=off),
        "eenet": offramp.EENet(eenet((0, 1, 2, 3)), 0.9),
        "eenet, one off": offramp.EENet(eenet((0, 1, 1, 2)), 0.9, enabled=off),
        "eenet, votes": offramp.EENet(eenet((0, 1, 2, 3), 1), 1.5, votes=True),
        "margin": Margin(tuple(margin(trace.logits).median(dim=1).values.add(0.003).tolist())),
        "msdnet, one off": MSDNet(middle, off),
        "eero": EERO(middle),
        "f-pabee": FPABEE(still["classes"]),
        "f-pabee, labels, one off": FPABEE(still["multilabel"], 1, "kl", off, "multilabel"),
        "pcee": PCEE(neg_entropy(trace.logits).median().item() + 0.003),
        "pcee, two in a row": PCEE(neg_entropy(trace.logits).median().item() + 0.003, 2),
        "voting": Voting(0.6),
        "voting, one off": Voting(1.4, 0.5, off),
        "ztw": ztw(cascade),
        "ztw, one off": ztw(cascade, off),
        "ztw, apart": ztw(None),
        "jei-dnn": halfway(JEIDNN(gates)),
        "jei-dnn, one off": halfway(JEIDNN(gates, enabled=off)),
        "bins": AccuracyBins(edges, ((0.2, 0.5, 0.7, 0.9),) * EXITS, 0.8),
        "patience, labels": offramp.Patience(1, None, "multilabel"),
        "beem, labels": offramp.BEEM((0.4, 0.6, 0.8, 1.0), 0.6, "own", None, "multilabel"),
        "fixed": Fixed(1, EXITS),
        "never": offramp.MaxProb(2.0),
        "at once": offramp.MaxProb(0.0),
        "only the last": offramp.MaxProb(0.0, enabled=(False, False, False, True)),
    }


NAMES = (
    "max-prob", "max-prob, one off", "entropy", "patience", "patience, one off", "beem", "beem, reset zero",
    "beem, one off", "eenet", "eenet, one off", "eenet, votes", "margin", "msdnet, one off", "eero", "f-pabee",
    "f-pabee, labels, one off", "pcee", "pcee, two in a row", "voting", "voting, one off", "ztw", "ztw, one off",
    "ztw, apart", "jei-dnn", "jei-dnn, one off", "bins", "patience, labels", "beem, labels", "fixed", "never",
    "at once", "only the last",
)  # fmt: skip


def near_rounding(policy, trace, outcome):
    """Rows that would leave elsewhere if the logits differed by rounding, as those of other batch sizes do."""
    generator, near = torch.Generator().manual_seed(6), torch.zeros(ROWS, dtype=torch.bool)
    for _ in range(8):
        other = offramp.ExitTrace(trace.logits + 1e-5 * torch.randn(trace.logits.shape, generator=generator))
        near |= offramp.simulate(policy, other, COSTS).exit != outcome.exit
    return near


@pytest.mark.parametrize("size", [1, 2, 7, 61])
@pytest.mark.parametrize("name", NAMES)
def test_live_exits_are_the_simulated_ones(model, rows, trace, name, size):
    policy = policies(trace)[name]
    outcome = offramp.simulate(policy, trace, COSTS)
    near = near_rounding(policy, trace, outcome)
    assert near.sum() <= 2
    run = offramp.Runtime(model, policy)
    parts = [run(rows[i : i + size]) for i in range(0, ROWS, size)]
    exits = torch.cat([p.exit for p in parts])
    assert torch.equal(exits[~near], outcome.exit[~near])
    same = exits == outcome.exit
    probabilities = torch.cat([p.probabilities for p in parts])
    torch.testing.assert_close(probabilities[same], torch.softmax(outcome.answer, -1)[same], rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([p.label for p in parts]), probabilities.argmax(-1))
    torch.testing.assert_close(torch.cat([p.score for p in parts])[same], outcome.score[same], rtol=1e-4, atol=1e-4)


def test_the_policies_above_use_several_exits(trace):
    made = policies(trace)
    assert tuple(made) == NAMES
    for name, policy in made.items():
        used = len(offramp.simulate(policy, trace, COSTS).exit.unique())
        assert used == 1 if name in ONE_EXIT else used >= 2, name


def test_rows_leave_one_by_one_and_not_as_a_batch(model, rows, trace):
    """A single `.all()` over the batch would let a row wait for its neighbours."""
    policy = policies(trace)["max-prob"]
    alone = torch.cat([offramp.Runtime(model, policy)(rows[i : i + 1]).exit for i in range(ROWS)])
    together = offramp.Runtime(model, policy)(rows).exit
    assert len(together.unique()) > 1
    assert (alone == together).float().mean() > 0.95  # the rest lies within rounding of a threshold


def test_an_answer_does_not_depend_on_the_neighbours(model, rows, trace):
    policy = policies(trace)["beem"]
    run = offramp.Runtime(model, policy)
    whole = run(rows)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(4))
    shuffled = run(rows[order])
    torch.testing.assert_close(shuffled.probabilities, whole.probabilities[order], rtol=1e-4, atol=1e-5)


def test_heads_of_exits_that_are_off_do_not_run(model, rows):
    class Bomb(nn.Module):
        def forward(self, *_):
            raise AssertionError("this head is switched off")

    kept = model.heads[1]
    model.heads[1] = Bomb()
    try:
        prediction = offramp.Runtime(model, offramp.MaxProb(1.1, enabled=(True, False, True, True)))(rows)
        assert (prediction.exit == 3).all()
        with pytest.raises(AssertionError, match="switched off"):
            offramp.Runtime(model, offramp.MaxProb(1.1))(rows)
    finally:
        model.heads[1] = kept


def test_an_exit_that_is_off_does_not_fire_at_score_one(model):
    policy = offramp.MaxProb(1.0, enabled=(False, True, True, True))
    certain = Evidence(torch.tensor([[200.0, 0.0, 0.0, 0.0, 0.0]]))
    assert not policy.step(0, certain, ()).stop.any()
    assert policy.step(1, certain, ()).stop.all()


def test_no_rows_give_no_answers(model):
    prediction = offramp.Runtime(model, offramp.MaxProb(0.5))(torch.zeros(0, 1, 16, 16))
    assert prediction.label.shape == (0,)
    assert prediction.probabilities.shape == (0, CLASSES)


def test_nan_rows_are_named(model, rows):
    bad = rows.clone()
    bad[[3, 8]] = float("nan")
    with pytest.raises(offramp.ValueRangeError, match=r"rows \[3, 8\]"):
        offramp.Runtime(model, offramp.MaxProb(0.5))(bad)


def test_a_policy_for_other_exits_is_refused(model):
    with pytest.raises(offramp.ShapeError, match="3 entries, but there are 4 exits"):
        offramp.Runtime(model, offramp.MaxProb((0.5, 0.5, 0.5)))


def test_weights_changed_after_attaching_are_used(model, rows, trace):
    run = offramp.Runtime(model, offramp.MaxProb(2.0))
    before = run(rows[:5]).probabilities
    kept = model.backbone.linear
    try:
        model.backbone.linear = nn.Linear(64, CLASSES)  # replaced, not updated in place
        after = run(rows[:5]).probabilities
        with torch.inference_mode():
            torch.testing.assert_close(after, torch.softmax(model.plain(rows[:5]), -1), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, after)
        model.double()
        assert run(rows[:5].double()).probabilities.shape == (5, CLASSES)
    finally:
        model.backbone.linear = kept
        model.float()


def test_bf16_stages_answer_in_float32(model, rows, trace):
    try:
        run = offramp.Runtime(model.bfloat16(), policies(trace)["max-prob"])
        prediction = run(rows.bfloat16())
        assert prediction.probabilities.dtype == torch.float32
        assert prediction.score.dtype == torch.float32
        assert len(prediction.exit.unique()) > 1
    finally:
        model.float()


def test_heads_run_in_eval_mode_whatever_the_flag():
    """BatchNorm in a head in training mode would mix rows and move its statistics."""
    torch.manual_seed(0)
    images = torch.randn(9, 1, 16, 16)
    made = offramp.attach(resnet20(ch_in=1), at=("layer1", "layer2"), head="conv", example=images[:2])
    run = offramp.Runtime(made.eval(), offramp.MaxProb(0.2))
    expected, state = run(images), {k: v.clone() for k, v in made.state_dict().items()}
    made.train()
    found = run(images)
    assert torch.equal(found.probabilities, expected.probabilities)
    assert made.heads.training
    assert made.backbone.training
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())


def test_threads_may_share_a_runtime(model, rows, trace):
    from concurrent.futures import ThreadPoolExecutor

    run = offramp.Runtime(model, policies(trace)["beem"])
    expected = run(rows).exit
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(rows).exit, range(12)))
    assert all(torch.equal(f, expected) for f in found)
