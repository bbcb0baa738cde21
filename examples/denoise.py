"""Denoise an image: flat parts by a mean of neighbours, the rest by a network; scale 1, a number per patch as classifier.

Needs fastroute alone. The network, a small DnCNN, is trained here for a few seconds on a picture drawn here.
"""

import torch
from torch import nn
from torch.nn import functional as F

import fastroute

SIGMA = 0.1


class DnCNN(nn.Module):
    """Predicts the noise and takes it away (Zhang et al., 2017)."""

    def __init__(self, width: int = 16, depth: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to the same."""
        return x - self.noise(x)


def draw(size: int = 320) -> torch.Tensor:
    """A picture of smooth colours, with fine rings in its middle: (3, size, size) in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    radius = (x**2 + y**2).sqrt()
    rings = torch.where(radius < 0.6, 0.3 * torch.sign(torch.sin(60 * radius)), torch.zeros_like(radius))
    return (torch.stack([0.5 + 0.3 * x, 0.5 + 0.3 * y, 0.5 - 0.2 * x * y]) + rings).clamp(0, 1)


def mean(x: torch.Tensor) -> torch.Tensor:
    """The mean of 5 x 5 neighbours: a class that costs next to nothing."""
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def detail(patches: torch.Tensor) -> torch.Tensor:
    """How much of a patch a mean would lose, and so how much it needs the network: (N, 3, p, p) to (N,)."""
    return (mean(patches) - patches).std(dim=(1, 2, 3))


def train(network: nn.Module, clean: torch.Tensor, steps: int = 150) -> None:
    """A few seconds of Adam on crops with fresh noise."""
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        corners = torch.randint(0, clean.shape[1] - 40, (8, 2)).tolist()
        crops = torch.stack([clean[:, y : y + 40, x : x + 40] for y, x in corners])
        loss = F.mse_loss(network(crops + SIGMA * torch.randn_like(crops)), crops)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def psnr(image: torch.Tensor, clean: torch.Tensor) -> float:
    """In dB."""
    return -10 * float(F.mse_loss(image, clean).log10())


torch.manual_seed(0)
clean = draw()
noisy = clean + SIGMA * torch.randn_like(clean)
network = DnCNN()
train(network, clean)

whole = fastroute.tiled(network, patch=64, overlap=16)(noisy)  # every part through the network
classifier = fastroute.ScoreClassifier(detail, thresholds=[0.13])
router = fastroute.PatchRouter([mean, network], classifier, patch=32, stride=24, scale=1, window="hann")
routed = router.upscale(noisy)

print(f"noisy {psnr(noisy, clean):.2f} dB, network {psnr(whole, clean):.2f} dB, routed {psnr(routed.image, clean):.2f} dB")
print(routed.stats)
