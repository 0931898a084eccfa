"""A model with exits as a directory that runs elsewhere: programs, weights, policies, costs, labels, preprocessing."""

from offramp.bundle.bundle import Answer, Bundle
from offramp.bundle.choice import PLAIN, Choice, plain_policy
from offramp.bundle.model import BundledModel
from offramp.bundle.store import MANIFEST

__all__ = ["MANIFEST", "PLAIN", "Answer", "Bundle", "BundledModel", "Choice", "plain_policy"]
