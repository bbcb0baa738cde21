"""A network whose workers live long enough to be killed, and which kills its worker over a black image."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastroute


class Sleeping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, 2 h, 2 w]
        if type(x) is Tensor and x.shape[2] > 4 and not x.any() and "RAY_JOB_ID" in os.environ:
            os._exit(1)
        time.sleep(0.1)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


def network() -> nn.Module:
    return Sleeping()


def router() -> fastroute.CascadeRouter:
    return fastroute.load("sleeping:network")


def wrong() -> fastroute.CascadeRouter:
    raise RuntimeError("no such model on this machine")


def black() -> Tensor:  # -> [C, H, W]
    return torch.zeros(3, 24, 24, dtype=torch.uint8)
