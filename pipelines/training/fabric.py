"""Lightning Fabric, imported without torchmetrics: it looks at the version of that, which imports all of it and half of SciPy."""

import sys

hidden = "torchmetrics" not in sys.modules
if hidden:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]
try:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
finally:
    if hidden:
        del sys.modules["torchmetrics"]

__all__ = ["DDPStrategy", "Fabric", "ModelParallelStrategy", "Strategy"]
