"""OLMo 2 (arXiv 2501.00656): norms behind attention and feed-forward, and of whole queries and keys. OLMo 3: windows.

OLMo 3 (Ai2, 2025) has a window in three of four layers. Layers with a window do not scale RoPE.
"""

from typing import Any

from torch import Tensor, nn

from kd_core.document_lengths import Documents
from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.attention import Attention
from kd_core.students.decoder.kv_cache import LayerCache
from kd_core.students.decoder.norm import ProjectionNorm, RMSNorm
from kd_core.students.decoder.transformer_block import TransformerBlock
from kd_core.students.families.family import FULL, SLIDING, Config, Family, read_attention_bias, read_windows, write_windows
from kd_core.students.huggingface.rope_config import rope_fields
