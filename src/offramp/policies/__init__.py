"""Policies: frozen values that say when a row may leave. One file per paper."""

from offramp.policies.arrays import Array
from offramp.policies.base import Evidence, Policy, State, Step, check_exits, visits
from offramp.policies.beem import BEEM
from offramp.policies.codec import FAMILIES, dumps, from_dict, loads, to_dict
from offramp.policies.confidence import Entropy, MaxProb
from offramp.policies.eenet import EENet
from offramp.policies.patience import Patience

__all__ = [
    "BEEM",
    "FAMILIES",
    "Array",
    "EENet",
    "Entropy",
    "Evidence",
    "MaxProb",
    "Patience",
    "Policy",
    "State",
    "Step",
    "check_exits",
    "dumps",
    "from_dict",
    "loads",
    "to_dict",
    "visits",
]
