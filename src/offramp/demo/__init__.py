"""What the quickstart needs and ships: a small residual network, and scikit-learn's handwritten digits."""

from offramp.demo.digits import digits
from offramp.resnet import ResNet, resnet20, resnet56

__all__ = ["ResNet", "digits", "resnet20", "resnet56"]
