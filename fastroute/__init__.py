"""fastroute: kernels that turn the FLOPs saved by dynamic-routing super-resolution into time saved.

Names are loaded when they are first used, so that ``import fastroute`` takes no time; ``__init__.pyi`` lists them. A program
that only calls the operators as ``torch.ops.fastroute.*``, such as an exported one, imports `fastroute.ops`.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
