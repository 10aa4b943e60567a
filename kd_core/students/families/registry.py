"""The families by `model_type`. A new one is a module of its own and an entry in `FAMILIES`."""

from kd_core.students.decoder.architecture import Architecture
from kd_core.students.decoder.decoder import Decoder, meta_decoder
from kd_core.students.families.family import Family
from kd_core.students.families.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from kd_core.students.families.glm import GLM, GLM4
from kd_core.students.families.gpt_oss import GPT_OSS
from kd_core.students.families.granite import GRANITE
from kd_core.students.families.llama import LLAMA
from kd_core.students.families.mistral import MISTRAL
from kd_core.students.families.mixtral import MIXTRAL
from kd_core.students.families.olmo import OLMO2, OLMO3
from kd_core.students.families.phi3 import PHI3
from kd_core.students.families.qwen import QWEN2, QWEN3
from kd_core.students.families.qwen_moe import QWEN3_MOE
from kd_core.students.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "glm": GLM,
    "glm4": GLM4,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma3": GEMMA3,  # with images, of which the text model is read
}


def family_decoder(arch: Architecture) -> Decoder:
    """Returns a decoder of the architecture's family on the meta device: names and shapes without memory.

    Raises:
        UsageError: the attention heads are no multiple of the key heads.
    """
    return meta_decoder(arch, FAMILIES[arch.family].block)
