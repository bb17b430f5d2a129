"""Low-variance fine-tuning of masked diffusion language models, for torchtune."""

__version__ = "0.1.0"
