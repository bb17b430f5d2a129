"""Passwords and tokens of a config, kept out of what is written and logged."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

_NAME = re.compile(
    r"(^|_)(secret|password|passwd|api_?key|access_?key|credentials?)$"
    r"|^((use_)?auth_|hf_|access_|bearer_|refresh_)?token$",  # and not mask_token
    re.IGNORECASE,
)


def redacted(cfg: DictConfig) -> DictConfig:
    """A resolved copy with ``***`` for the texts of keys called hf_token, api_key, password, …."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: "***" if _NAME.search(str(key)) and isinstance(x, str) else clean(x)
                for key, x in value.items()
            }
        return [clean(x) for x in value] if isinstance(value, list) else value

    created = OmegaConf.create(clean(OmegaConf.to_container(cfg, resolve=True)))
    assert isinstance(created, DictConfig)
    return created
