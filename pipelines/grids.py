"""Images side by side in one picture. As torchvision's make_grid does it, but that takes seconds to import."""

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

GREY = 128


def grid(images: Tensor, columns: int) -> Tensor:
    """images uint8 N C H W, of 1 or 3 channels, in rows, with grey lines of one pixel around them; H W 3. One image has none."""
    columns, line = min(columns, len(images)), int(len(images) > 1)
    framed = F.pad(repeat(images, "n c h w -> n (c grey) h w", grey=3 // images.shape[1]), (line, 0, line, 0), value=GREY)
    blank = torch.full_like(framed[:1], GREY).expand(-len(framed) % columns, -1, -1, -1)
    rows = rearrange(torch.cat([framed, blank]), "(r c) k h w -> (r h) (c w) k", c=columns)
    return F.pad(rows, (0, 0, 0, line, 0, line), value=GREY)
