"""The fast paths of training, as operators; each has the same contract in PyTorch beside it."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The half precision that autocast multiplies x in; None outside autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
