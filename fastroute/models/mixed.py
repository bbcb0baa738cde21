"""Networks that read float32 images where their layers compute in a half type: what they add to, or shift, stays exact."""

from __future__ import annotations

from fastroute.models.carn import CARN
from fastroute.models.compact import Compact
from fastroute.models.rcan import RCAN
from fastroute.models.rrdbnet import RRDBNet
from fastroute.models.srresnet import SRResNet

MIXED = (CARN, SRResNet, RCAN, RRDBNet, Compact)
