"""A network that spandrel loads, as one class of a router; the other class is bicubic interpolation.

Needs: pip install . spandrel. spandrel tells the architecture from a checkpoint: give the path of yours, or run it as
it is, on a small network with random weights and a picture drawn here.
"""

import sys

import spandrel
import torch
from spandrel.architectures.Compact import Compact

import fastroute
from fastroute.models.arm import edge_score

if len(sys.argv) > 1:
    descriptor = spandrel.ModelLoader().load_from_file(sys.argv[1])
else:
    weights = Compact(num_feat=16, num_conv=4, upscale=4).state_dict()
    descriptor = spandrel.ModelLoader().load_from_state_dict(weights)

# A picture that is smooth on the left and rough on the right: uint8, as photographs are read.
x = torch.linspace(0, 1, 256).expand(3, 192, 256)
image = (255 * (0.2 + 0.5 * x + 0.3 * x.square() * torch.rand(3, 192, 256))).round().to(torch.uint8)

# Alone, on tiles: an image of any size in the memory of a few tiles.
upscale = fastroute.tiled(descriptor, patch=64, overlap=16)
print(f"{descriptor.architecture.name}, scale {upscale.scale}: {tuple(image.shape)} to {tuple(upscale(image).shape)}")

# Routed: patches whose edges are stronger than the threshold go through the network.
router = fastroute.PatchRouter(
    branches=[fastroute.Bicubic(descriptor.scale), descriptor],
    classifier=fastroute.ScoreClassifier(edge_score, thresholds=[30.0]),
    patch=32,
    stride=28,
    scale=descriptor.scale,
    window="hann",
)
result = router.upscale(image)
print(result.stats)
print(router.upscale(image, budget=0.25).stats)  # a quarter of what the network everywhere would cost
