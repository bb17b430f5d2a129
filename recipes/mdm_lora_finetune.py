"""Fine-tuning of adapters of masked diffusion language models: LoRA, DoRA, QLoRA.

    tune run mdm_lora_finetune --config llada/8B_lora
    tune run --nproc_per_node 4 mdm_lora_finetune --config llada/8B_lora model.use_dora=True

The same run as mdm_full_finetune's, from a model with adapters, which alone are trained. A
checkpoint holds them as PEFT's adapter_model.safetensors and adapter_config.json, and the merged
weights in the layout that the base came in. Every option: ``mdm_plugin/config/options.py``.
"""

from mdm_full_finetune import run
from omegaconf import DictConfig

from mdm_plugin.config.loading import parse
from mdm_plugin.config.options import Options


@parse(Options)
def main(cfg: DictConfig) -> None:
    """Fine-tune the adapters of a masked diffusion language model."""
    run(cfg, adapters=True)


if __name__ == "__main__":
    main()
