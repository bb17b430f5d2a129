"""Low-variance fine-tuning of masked diffusion language models, for torchtune."""

__version__ = "0.2.0"
