"""The model: one `Transformer`, families as data, norms and activations by table."""

from normfree.config import ModelConfig
from normfree.model.attention import InnerAttention, KVCache
from normfree.model.init import init_weights
from normfree.model.losses import LossOutput
from normfree.model.transformer import Block, Transformer
from normfree.tables import ACTIVATIONS, NORMS

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "Block",
    "InnerAttention",
    "KVCache",
    "LossOutput",
    "ModelConfig",
    "Transformer",
    "init_weights",
]
