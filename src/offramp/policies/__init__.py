"""Policies: frozen values that say when a row may leave. One file per paper."""

from offramp.policies.arrays import Array
from offramp.policies.base import Evidence, Policy, State, Step, check_exits, visits
from offramp.policies.beem import BEEM
from offramp.policies.berxit import BERxiT
from offramp.policies.bins import AccuracyBins
from offramp.policies.codec import FAMILIES, dumps, from_dict, loads, to_dict
from offramp.policies.confidence import Entropy, Margin, MaxProb
from offramp.policies.eenet import EENet
from offramp.policies.eero import EERO
from offramp.policies.fixed import Fixed
from offramp.policies.fpabee import FPABEE
from offramp.policies.jeidnn import JEIDNN
from offramp.policies.msdnet import MSDNet
from offramp.policies.patience import Patience
from offramp.policies.pcee import PCEE
from offramp.policies.stopping import Stopping
from offramp.policies.voting import Voting
from offramp.policies.ztw import ZTW

__all__ = [
    "BEEM",
    "EERO",
    "FAMILIES",
    "FPABEE",
    "JEIDNN",
    "PCEE",
    "ZTW",
    "AccuracyBins",
    "Array",
    "BERxiT",
    "EENet",
    "Entropy",
    "Evidence",
    "Fixed",
    "MSDNet",
    "Margin",
    "MaxProb",
    "Patience",
    "Policy",
    "State",
    "Step",
    "Stopping",
    "Voting",
    "check_exits",
    "dumps",
    "from_dict",
    "loads",
    "to_dict",
    "visits",
]
