"""A routed network in the test loop of a training framework, in the place of `net_g`.

Needs fastroute alone. `SRModel` has the outline of BasicSR's class of that name and of its validation, without the framework,
so that the example runs anywhere; in a LightningModule the same `net_g` is called in `validation_step`. What a framework needs
is a `torch.nn.Module` from batch to batch, and a router is one.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

import fastroute


class SRModel:
    """What the test of a super-resolution model does."""

    def __init__(self, net_g: nn.Module) -> None:
        self.net_g = net_g

    def feed_data(self, data: dict[str, torch.Tensor]) -> None:
        """Take a batch of LR and HR images."""
        self.lq, self.gt = data["lq"], data["gt"]

    def test(self) -> None:
        """Super-resolve it."""
        self.net_g.eval()
        with torch.no_grad():
            self.output = self.net_g(self.lq)
        self.net_g.train()

    def validation(self, loader: Iterator[dict[str, torch.Tensor]]) -> float:
        """Mean PSNR in dB."""
        found = []
        for data in loader:
            self.feed_data(data)
            self.test()
            found.append(-10 * float(F.mse_loss(self.output.clamp(0, 1), self.gt).log10()))
        return sum(found) / len(found)


def loader(batches: int = 2) -> Iterator[dict[str, torch.Tensor]]:
    """Drawn pictures, blobs with sharp edges beside a plain half, and their reductions by four."""
    for seed in range(batches):
        noise = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(seed))
        noise[..., 8:] = noise[..., 8:].mean(dim=(2, 3), keepdim=True)
        hr = torch.sigmoid(200 * (F.interpolate(noise, size=(384, 512), mode="bicubic") - 0.5))
        yield {"lq": F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1), "gt": hr}


dense, routed = fastroute.load(), fastroute.load()  # ClassSR over FSRCNN, x4
dense.budget, routed.budget = 1, 0.6
networks = {"bicubic": nn.Upsample(scale_factor=4, mode="bicubic"), "largest branch": dense, "budget 0.6": routed}
for name, net_g in networks.items():
    print(f"{name}: {SRModel(net_g).validation(loader()):.2f} dB")
