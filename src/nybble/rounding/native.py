"""The thresholds that the format itself publishes (NF4's and bitsandbytes FP4's encoders)."""

from nybble.rounding import Rounding

PART = Rounding("native", native=True)
