"""The sizes of a Llama, and the config.json that carries them between this code and transformers.

The idea: one frozen value holds all that the weights do not say. It keeps transformers' names, reads the files of
versions 4 and 5 (which moved RoPE's options), and refuses a file whose options would make ``llama.py`` compute
something else than transformers does.

Source: transformers' LlamaConfig.

How it differs from ``llama.py``: here is what a file says; there, what is computed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Options that change the function, with the one value that llama.py implements.
_ASSUMED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama, named as in transformers' config.json.

    Raises:
        ValueError: a size is below 1; hidden_size does not split into heads of even width, or the query heads not into
            groups.
    """

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
        for field in fields(self)[:7]:
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} must be at least 1, got {getattr(self, field.name)}"
                )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                "hidden_size must be a multiple of 2 x num_attention_heads, since RoPE turns pairs within a head,"
                f" got {self.hidden_size} and {self.num_attention_heads} heads"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads must divide num_attention_heads,"
                f" got {self.num_key_value_heads} and {self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read the fields of a config.json, of transformers 4 or 5.

        Args:
            config: the file's content, or ``LlamaConfig.to_dict()`` of transformers.

        Returns:
            The sizes; where the file has none, transformers' defaults.

        Raises:
            ValueError: a size is missing, or it is no Llama, or one with an option that ``llama.py`` does not have
                (biases, scaled RoPE, heads of a width of their own).

        >>> tiny = LlamaConfig(64, 32, 48, 2, 4, 2)
        >>> LlamaConfig.from_transformers(tiny.to_transformers()) == tiny
        True
        """
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        if scaling.get("rope_type", scaling.get("type", "default")) == "default":
            scaling = None
        config = {**config, "rope_scaling": scaling}
        found = {"num_key_value_heads": config.get("num_attention_heads"), **rope}
        found |= {name: value for name, value in config.items() if value is not None}
        missing = [field.name for field in fields(cls)[:6] if found.get(field.name) is None]
        if missing:
            raise ValueError(f"config must have {' and '.join(missing)}, got only {sorted(config)}")
        ours = cls(
            **{field.name: found[field.name] for field in fields(cls) if field.name in found}
        )
        for name, value in {"model_type": "llama", "head_dim": ours.head_dim, **_ASSUMED}.items():
            if found.get(name, value) != value:
                raise ValueError(
                    f"config must have {name} = {value!r}, as this Llama computes, got {found[name]!r}"
                )
        return ours

    def to_transformers(self) -> dict[str, Any]:
        """Give the fields of a config.json that transformers 4 and 5 read as LlamaForCausalLM's."""
        rope = {"rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"}}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **_ASSUMED,
            **asdict(self),
            **rope,
        }
