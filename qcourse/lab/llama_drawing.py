"""A drawing of a Llama block: every layer by the name it has in the code, a shape on every arrow.

The idea: the lessons name layers as transformers does, ``self_attn.q_proj`` or ``mlp.down_proj``.
The drawing shows once where each of them is, what it reads and what it adds to the residual stream.
All text has its own opaque background, so that the drawing reads on a white and on a dark page.

Source: Touvron et al. 2023 (Llama); the names of transformers' LlamaForCausalLM.
How it differs from ``figures.py``: that draws numbers; this draws boxes and arrows.
"""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from qcourse.lab.figures import BLUE, GREEN, GREY, ORANGE, new_figure
from qcourse.models.llama_config import LlamaConfig

DARK = "black"
PALE = "#f2f3f5"
# white on blue and dark on the others have a contrast of at least 4.5 to 1
TEXT_COLORS = {BLUE: "white", ORANGE: DARK, GREEN: DARK, GREY: DARK}

STREAM_X = 1.2
BOX_HEIGHT = 0.9
# centers of the three columns of boxes, in units of half an inch
NORM_X = 3.9
PROJECTION_X = 8.3
MIX_X = 12.9


class Box(NamedTuple):
    """A box of the drawing: its name, the second line, its center, its color and its size."""

    name: str
    detail: str
    x: float
    y: float
    color: str
    width: float = 2.6
    height: float = BOX_HEIGHT

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2


def llama_block_figure(config: LlamaConfig) -> Figure:
    """Return a drawing of one block of a Llama, its embedding and its head, with their shapes.

    >>> figure = llama_block_figure(LlamaConfig(64, 32, 48, 2, 4, 2))
    >>> "q_proj\\n32 × 32" in [text.get_text() for text in figure.axes[0].texts]
    True
    """
    figure, ax = new_figure(width=8.0, height=7.2)
    ax.set(xlim=(0, 16), ylim=(0, 14.4))
    ax.axis("off")
    for patch in (figure.patch, ax.patch):
        patch.set_alpha(0)

    size = config.hidden_size
    _label(ax, f"Each block adds twice to a residual stream of {size} numbers per token", 8, 14.0)
    _draw_frame(ax, config)
    _draw_key(ax)
    _draw_stream(ax, config)
    _draw_attention(ax, config)
    _draw_mlp(ax, config)
    _draw_head(ax, config)
    return figure


def _draw_frame(ax: Axes, config: LlamaConfig) -> None:
    """Draw the dashed frame around what each block repeats."""
    frame = FancyBboxPatch((0.4, 1.9), 15.2, 9.9, boxstyle="round,pad=0,rounding_size=0.3")
    frame.set(facecolor="none", edgecolor=GREY, linestyle="--", linewidth=1.2)
    ax.add_patch(frame)
    last = config.num_hidden_layers - 1
    words = f"one of {config.num_hidden_layers} blocks: layers.0 to layers.{last}"
    _label(ax, words, 11.6, 11.8)


def _draw_key(ax: Axes) -> None:
    """Say what blue, orange and grey mean."""
    _draw_box(ax, Box("quantized", "", 7.7, 12.9, BLUE, width=2.2, height=0.6))
    _draw_box(ax, Box("large, stays in floats", "", 10.7, 12.9, ORANGE, width=3.3, height=0.6))
    _draw_box(ax, Box("small, stays in floats", "", 14.1, 12.9, GREY, width=3.3, height=0.6))


def _draw_stream(ax: Axes, config: LlamaConfig) -> None:
    """Draw the embedding and the residual stream below it, down to the last norm."""
    ax.plot([STREAM_X, STREAM_X], [12.5, 0.9], color=ORANGE, lw=4, solid_capstyle="round")
    shape = f"{config.vocab_size:,} × {config.hidden_size}"
    embed = Box("embed_tokens", shape, 1.75, 12.9, ORANGE, width=3.1)
    _draw_box(ax, embed)
    _arrow(ax, (5.1, 12.9), (embed.right, 12.9))
    _label(ax, "token ids", 5.5, 12.9)
    _label(ax, f"residual stream\ntokens × {config.hidden_size}", 2.55, 11.2)


def _draw_attention(ax: Axes, config: LlamaConfig) -> None:
    """Draw the first branch: norm, queries, keys and values, attention, o_proj."""
    size = config.hidden_size
    kv_size = config.num_key_value_heads * config.head_dim
    norm = Box("input_layernorm", f"{size}", NORM_X, 9.6, GREY, width=3.0)
    query_heads = f"{config.num_attention_heads} query heads"
    kv_heads = f"{config.num_key_value_heads} KV heads"
    heads = f"{query_heads}\n{kv_heads}\n{config.head_dim} values per head"
    attention = Box("attention", heads, MIX_X, 9.6, GREEN, width=3.0, height=3.1)
    _draw_branch(ax, norm, size)
    for name, width, y in (("q", size, 10.7), ("k", kv_size, 9.6), ("v", kv_size, 8.5)):
        projection = Box(f"{name}_proj", f"{width} × {size}", PROJECTION_X, y, BLUE)
        _draw_projection(ax, norm, projection, attention, (size, width))
    _draw_box(ax, attention)
    output = Box("o_proj", f"{size} × {size}", MIX_X, 6.75, BLUE)
    _draw_return(ax, attention, output, (size, size))


def _draw_mlp(ax: Axes, config: LlamaConfig) -> None:
    """Draw the second branch: norm, gate and up, their product, down_proj."""
    size = config.hidden_size
    wide = config.intermediate_size
    norm = Box("post_attention_\nlayernorm", f"{size}", NORM_X, 4.9, GREY, width=3.0, height=1.3)
    product = Box("silu(gate) × up", "", MIX_X, 4.9, GREEN, width=3.0, height=2.0)
    _draw_branch(ax, norm, size)
    for name, y in (("gate_proj", 5.45), ("up_proj", 4.35)):
        projection = Box(name, f"{wide:,} × {size}", PROJECTION_X, y, BLUE)
        _draw_projection(ax, norm, projection, product, (size, wide))
    _draw_box(ax, product)
    output = Box("down_proj", f"{size} × {wide:,}", MIX_X, 2.6, BLUE)
    _draw_return(ax, product, output, (wide, size))


def _draw_head(ax: Axes, config: LlamaConfig) -> None:
    """Draw what follows the last layer: norm, head, logits."""
    norm = Box("norm", f"{config.hidden_size}", NORM_X, 0.9, GREY, width=3.0)
    shape = f"{config.vocab_size:,} × {config.hidden_size}"
    head = Box("lm_head", shape, PROJECTION_X, 0.9, ORANGE)
    _draw_branch(ax, norm, config.hidden_size)
    _arrow(ax, (norm.right, 0.9), (head.left, 0.9), f"{config.hidden_size}")
    _draw_box(ax, head)
    _arrow(ax, (head.right, 0.9), (12.4, 0.9), f"{config.vocab_size:,}")
    _label(ax, "logits of the\nnext token", 13.7, 0.9)


def _draw_branch(ax: Axes, norm: Box, size: int) -> None:
    """Draw the arrow from the residual stream to a norm, and the norm."""
    _arrow(ax, (STREAM_X, norm.y), (norm.left, norm.y), f"{size}")
    _draw_box(ax, norm)


def _draw_projection(
    ax: Axes, norm: Box, projection: Box, mix: Box, widths: tuple[int, int]
) -> None:
    """Draw a linear layer between a norm and what mixes the results."""
    size, width = widths
    _arrow(ax, (norm.right, norm.y), (projection.left, projection.y), f"{size}")
    _arrow(ax, (projection.right, projection.y), (mix.left, projection.y), f"{width:,}")
    _draw_box(ax, projection)


def _draw_return(ax: Axes, mix: Box, output: Box, widths: tuple[int, int]) -> None:
    """Draw the last linear layer of a branch below the mix, and its sum with the stream."""
    read, written = widths
    top = output.y + output.height / 2
    _arrow(ax, (mix.x, mix.y - mix.height / 2), (output.x, top), f"{read:,}")
    _draw_box(ax, output)
    _arrow(ax, (output.left, output.y), (STREAM_X + 0.25, output.y), f"{written}")
    _label(ax, "+", STREAM_X, output.y, boxstyle="circle,pad=0.25")


def _draw_box(ax: Axes, box: Box) -> None:
    corner = (box.left, box.y - box.height / 2)
    style = "round,pad=0,rounding_size=0.15"
    patch = FancyBboxPatch(corner, box.width, box.height, boxstyle=style)
    patch.set(facecolor=box.color, edgecolor="none")
    ax.add_patch(patch)
    color = TEXT_COLORS[box.color]
    words = f"{box.name}\n{box.detail}".strip()
    ax.text(box.x, box.y, words, color=color, ha="center", va="center", fontsize=8.5)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], words: str = "") -> None:
    """Draw an arrow, with words in its middle."""
    style = {"arrowstyle": "-|>", "color": GREY, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)
    if words:
        _label(ax, words, (start[0] + end[0]) / 2, (start[1] + end[1]) / 2)


def _label(ax: Axes, words: str, x: float, y: float, *, boxstyle: str = "round,pad=0.2") -> None:
    """Write words on a pale background of their own."""
    background = {"facecolor": PALE, "edgecolor": GREY, "lw": 0.6, "boxstyle": boxstyle}
    ax.text(x, y, words, color=DARK, ha="center", va="center", fontsize=8, bbox=background)
