"""A policy of every kind, with thresholds in the middle of its scores, so that every exit is used."""

from dataclasses import replace

import torch

import offramp
from offramp.policies import (
    EERO,
    FPABEE,
    JEIDNN,
    PCEE,
    ZTW,
    AccuracyBins,
    Array,
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

    def stopping(mixed, gates=None, flags=None):
        """Stopping whose first so many exits are mixed with those before them."""
        own = torch.arange(EXITS)[:, None] >= mixed
        weights = torch.eye(EXITS) + torch.where(own, 0.0, 0.3) * torch.ones(EXITS, EXITS).tril(-1)
        return halfway(offramp.Stopping(2.0, Array(weights), Array(torch.zeros(EXITS, 1)), gates, flags))

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
        "stopping": stopping(EXITS, Array(torch.tensor([[-0.3, 0.8, -0.4, 0.5]]).repeat(EXITS, 1))),
        "stopping, alone": stopping(0),
        "stopping, alone at last, one off": stopping(2, None, off),
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
    "ztw, apart", "jei-dnn", "jei-dnn, one off", "stopping", "stopping, alone", "stopping, alone at last, one off",
    "bins", "patience, labels", "beem, labels", "fixed", "never", "at once", "only the last",
)  # fmt: skip


def near_rounding(policy, trace, outcome):
    """Rows that would leave elsewhere if the logits differed by rounding, as those of other batch sizes do."""
    generator, near = torch.Generator().manual_seed(6), torch.zeros(ROWS, dtype=torch.bool)
    for _ in range(8):
        other = offramp.ExitTrace(trace.logits + 1e-5 * torch.randn(trace.logits.shape, generator=generator))
        near |= offramp.simulate(policy, other, COSTS).exit != outcome.exit
    return near
