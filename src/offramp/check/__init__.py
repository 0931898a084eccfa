"""Whether a calibration still applies to new rows, from scores alone: no labels are needed.

What the calibration rows looked like to a policy is kept as a `Reference`. New rows are compared with it test by test,
and one verdict is given whose chance of a false alarm is at most `level`.
"""

from offramp.check.kept import Reference, Sample, reference
from offramp.check.moving import recalibrate_quantiles
from offramp.check.twosample import Test, ks_p
from offramp.check.verdict import Checked, Verdict, check

__all__ = ["Checked", "Reference", "Sample", "Test", "Verdict", "check", "ks_p", "recalibrate_quantiles", "reference"]
