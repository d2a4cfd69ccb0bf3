"""The sizes of a Llama, read from and written to transformers' config.json.

It reads the files of transformers 4 and 5, and refuses options that ``llama.py`` does not have.

Source: transformers' LlamaConfig.
`llama.py` computes with these sizes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# The sizes that have no default.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)

# Options that change the function, with the only value that llama.py implements.
_ASSUMED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama, named as in config.json; ValueError for sizes that do not fit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "max_position_embeddings"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        # RoPE needs heads of even width; groups of query heads need equal sizes.
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                "hidden_size must be a multiple of 2 x num_attention_heads, since RoPE turns pairs"
                f" within a head, got {self.hidden_size} and {heads} heads"
            )
        if heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads must divide num_attention_heads,"
                f" got {self.num_key_value_heads} and {heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Return the sizes in a config.json of transformers 4 or 5, with transformers' defaults.

        Raises:
            ValueError: a size is missing; the model is no Llama; or it has an option that
                ``llama.py`` does not implement (biases, scaled RoPE, another head width).

        >>> tiny = LlamaConfig(64, 32, 48, 2, 4, 2)
        >>> LlamaConfig.from_transformers(tiny.to_transformers()) == tiny
        True
        """
        # Version 5 keeps RoPE's options in a table of their own; null there means not given.
        rope = config.get("rope_parameters") or {}
        found = {"num_key_value_heads": config.get("num_attention_heads"), **rope}
        found |= {name: value for name, value in config.items() if value is not None}
        found["rope_scaling"] = _rope_scaling(config.get("rope_scaling") or rope)

        missing = [name for name in _REQUIRED if found.get(name) is None]
        if missing:
            needed = " and ".join(missing)
            raise ValueError(f"config must have {needed}, got only {sorted(config)}")
        sizes = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        ours = cls(**sizes)

        # Every option that is given must have the value that llama.py implements.
        implemented = {"model_type": "llama", "head_dim": ours.head_dim, **_ASSUMED}
        for name, value in implemented.items():
            if found.get(name, value) != value:
                raise ValueError(
                    f"config must have {name} = {value!r}, as this Llama computes,"
                    f" got {found[name]!r}"
                )
        return ours

    def to_transformers(self) -> dict[str, Any]:
        """Return a config.json that transformers 4 and 5 read as that of a LlamaForCausalLM."""
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **_ASSUMED,
            **asdict(self),
            "rope_parameters": rope,
        }


def _rope_scaling(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the options of a scaled RoPE, None for the default RoPE."""
    kind = options.get("rope_type", options.get("type", "default"))
    return None if kind == "default" else options
