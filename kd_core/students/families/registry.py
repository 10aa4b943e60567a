"""The families by `model_type`. A new one is a module of its own and an entry in `FAMILIES`."""

from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.students.families.family import Family
from kd_core.students.families.granite import GRANITE
from kd_core.students.families.llama import LLAMA
from kd_core.students.families.mistral import MISTRAL
from kd_core.students.families.mixtral import MIXTRAL
from kd_core.students.families.qwen import QWEN2, QWEN3
from kd_core.students.families.qwen_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "granite": GRANITE,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}


def family_decoder(arch: Architecture) -> Decoder:
    """Returns a decoder of the architecture's family on the meta device: names and shapes without memory.

    Raises:
        UsageError: the attention heads are no multiple of the key heads.
    """
    return meta_decoder(arch, FAMILIES[arch.family].block)
