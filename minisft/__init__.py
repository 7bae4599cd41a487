"""minisft: supervised fine-tuning with LoRA, from scratch.

``load_model`` reads a pretrained model, ``quantize_`` stores its linears in 4 bits, ``apply_lora_`` adds adapters, ``train``,
``dpo`` and ``grpo`` are whole runs from data to adapter, ``generate`` and ``evaluate`` ask a model, ``merge`` folds adapters
into weights, ``save_adapter`` and ``load_adapter_`` exchange them with other programs. Every command of ``minisft`` is one
call here; ``api.py`` lists them.

Importing this package imports no PyTorch and touches no GPU, network, environment variable or thread setting. The first use of
a name that needs PyTorch loads it, and with it the rest of the package.
"""

from typing import TYPE_CHECKING

from minisft.common.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NumericError,
    ResourceError,
    TokenizerError,
    UserError,
)
from minisft.config import LoRAConfig, ModelConfig, QuantConfig, RunConfig
from minisft.training.preference_config import DPOConfig, GRPOConfig

if TYPE_CHECKING:
    from minisft.api import (
        CausalLM,
        DoRALinear,
        EvalResult,
        LoRAEmbedding,
        LoRALinear,
        MergeReport,
        NF4Linear,
        Tokenizer,
        TrainResult,
        adapters_off,
        analyze_ab,
        apply_lora_,
        capacity,
        combine_folders,
        compare_files,
        diff_models,
        dpo,
        dpo_loss,
        evaluate,
        export_gguf,
        export_peft,
        generate,
        grpo,
        grpo_loss,
        inspect_quality,
        inspect_rows,
        interpolated,
        load_adapter_,
        load_model,
        load_tokenizer,
        lora_modules,
        lr_find,
        make_feedback_rows,
        merge,
        merge_,
        merge_and_certify,
        merge_folder,
        open_arena,
        plan,
        plan_ab,
        quantize_,
        quantize_folder,
        read_feedback,
        read_pool,
        run_quickstart,
        save_adapter,
        save_model,
        save_quantized,
        scale_adapters_,
        select_rows,
        serve,
        serve_arena,
        sweep,
        token_log_probs,
        train,
        unmerge_,
        verify,
        verify_gguf,
        verify_merge,
        write_card,
        write_comparison,
        write_feedback,
    )

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "CausalLM",
    "CheckpointError",
    "ConfigError",
    "DPOConfig",
    "DataError",
    "DoRALinear",
    "EvalResult",
    "GRPOConfig",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "ModelConfig",
    "ModelError",
    "NF4Linear",
    "NumericError",
    "QuantConfig",
    "ResourceError",
    "RunConfig",
    "Tokenizer",
    "TokenizerError",
    "TrainResult",
    "UserError",
    "adapters_off",
    "analyze_ab",
    "apply_lora_",
    "capacity",
    "combine_folders",
    "compare_files",
    "diff_models",
    "dpo",
    "dpo_loss",
    "evaluate",
    "export_gguf",
    "export_peft",
    "generate",
    "grpo",
    "grpo_loss",
    "inspect_quality",
    "inspect_rows",
    "interpolated",
    "load_adapter_",
    "load_model",
    "load_tokenizer",
    "lora_modules",
    "lr_find",
    "make_feedback_rows",
    "merge",
    "merge_",
    "merge_and_certify",
    "merge_folder",
    "open_arena",
    "plan",
    "plan_ab",
    "quantize_",
    "quantize_folder",
    "read_feedback",
    "read_pool",
    "run_quickstart",
    "save_adapter",
    "save_model",
    "save_quantized",
    "scale_adapters_",
    "select_rows",
    "serve",
    "serve_arena",
    "sweep",
    "token_log_probs",
    "train",
    "unmerge_",
    "verify",
    "verify_gguf",
    "verify_merge",
    "write_card",
    "write_comparison",
    "write_feedback",
]


def __getattr__(name: str) -> object:
    """A public name that needs PyTorch, at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minisft import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__", *(name for name in globals() if name.startswith("__"))]
