"""minisft: supervised fine-tuning with LoRA, from scratch.

``load_model`` reads a pretrained model, ``quantize_`` holds its linears in 4 bits, ``apply_lora_`` adds adapters,
``save_adapter`` and ``load_adapter_`` exchange them with the field's tools. Importing this package touches no GPU, network,
environment variable or thread setting.
"""

from minisft.common.errors import UserError
from minisft.config import LoRAConfig, ModelConfig, QuantConfig, RunConfig
from minisft.formats import load_adapter_, load_model, save_adapter, save_model, save_quantized
from minisft.lora import DoRALinear, LoRAEmbedding, LoRALinear
from minisft.model import CausalLM
from minisft.nf4_linear import NF4Linear
from minisft.surgery import adapters_off, apply_lora_, lora_modules, quantize_, scale_adapters_

__version__ = "0.1.0"
__all__ = [
    "CausalLM",
    "DoRALinear",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "ModelConfig",
    "NF4Linear",
    "QuantConfig",
    "RunConfig",
    "UserError",
    "adapters_off",
    "apply_lora_",
    "load_adapter_",
    "load_model",
    "lora_modules",
    "quantize_",
    "save_adapter",
    "save_model",
    "save_quantized",
    "scale_adapters_",
]
