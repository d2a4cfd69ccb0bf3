"""The drawing of a Llama block names every layer of the code, and all of its text is readable."""

import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Annotation, Text
from torch import nn

from qcourse.lab import BLUE, GREY, ORANGE, llama_block_figure
from qcourse.models.llama import random_llama
from qcourse.models.llama_config import LlamaConfig

SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True)
SMALL = LlamaConfig(64, 32, 48, 2, 4, 2)


def words(figure: Figure) -> list[Text]:
    """The texts of a drawing, without the arrows."""
    texts = figure.axes[0].texts
    return [text for text in texts if not isinstance(text, Annotation)]


def filled_boxes(figure: Figure) -> list[FancyBboxPatch]:
    """The boxes that have a color, which the frame has not."""
    patches = figure.axes[0].patches
    boxes = [patch for patch in patches if isinstance(patch, FancyBboxPatch)]
    return [box for box in boxes if box.get_facecolor()[3] == 1]


def shapes_of_code(config: LlamaConfig) -> dict[str, list[int]]:
    """The last name of each layer of the code, with the shape of its weight."""
    modules = random_llama(config, seed=0).named_modules()
    kinds = (nn.Linear, nn.Embedding, nn.RMSNorm)
    return {
        name.rpartition(".")[2]: list(module.weight.shape)
        for name, module in modules
        if isinstance(module, kinds)
    }


def test_every_layer_of_the_code_is_drawn_with_the_shape_of_its_weight() -> None:
    drawn = {}
    for text in words(llama_block_figure(SMALL)):
        *name, shape = text.get_text().split("\n")
        if name and re.fullmatch(r"\d+( × \d+)?", shape):
            drawn["".join(name)] = [int(size) for size in shape.split(" × ")]
    assert drawn == shapes_of_code(SMALL)


def test_the_arrows_of_smollm2_say_how_many_numbers_a_token_has() -> None:
    figure = llama_block_figure(SMOLLM2)
    texts = [text.get_text() for text in words(figure)]
    arrows = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    numbers = [text for text in texts if re.fullmatch(r"[\d,]+", text)]
    # the arrow of the token ids carries no number: an id is no vector
    assert len(numbers) == len(arrows) - 1
    assert set(numbers) == {"576", "192", "1,536", "49,152"}
    assert texts.count("192") == 2  # keys and values
    assert texts.count("1,536") == 3  # gate, up and their product
    assert texts.count("+") == 2
    assert "attention\n9 query heads\n3 KV heads\n64 values per head" in texts


def test_the_key_names_the_three_colors_of_weights() -> None:
    key = {"quantized": BLUE, "large, stays in floats": ORANGE, "small, stays in floats": GREY}
    figure = llama_block_figure(SMOLLM2)
    found = {text.get_text(): background(text, figure) for text in words(figure)}
    for name, color in key.items():
        assert found[name] == pytest.approx((*to_rgb(color), 1))


def test_no_two_texts_touch_and_none_leaves_the_drawing() -> None:
    figure = llama_block_figure(SMOLLM2)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = words(figure)
    areas = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for i, area in enumerate(areas):
        assert figure.bbox.count_contains([area.min, area.max]) == 2, texts[i].get_text()
        for other, text in zip(areas[:i], texts[:i], strict=True):
            assert not area.overlaps(other), (texts[i].get_text(), text.get_text())


def contrast(a: str | tuple, b: str | tuple) -> float:
    """The contrast of two colors as WCAG 2.1 defines it, 1 to 21."""

    def luminance(color: str | tuple) -> float:
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in to_rgb(color)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


def background(text: Text, figure: Figure) -> tuple:
    """The color behind a text: its own background, or that of the box around its position."""
    own = text.get_bbox_patch()
    if own is not None:
        assert own.get_facecolor()[3] == 1
        return own.get_facecolor()
    for box in filled_boxes(figure):
        if box.get_bbox().count_contains([text.get_position()]):
            return box.get_facecolor()
    raise AssertionError(f"{text.get_text()!r} stands on the page itself")


def test_all_text_reads_on_a_white_and_on_a_dark_page() -> None:
    figure = llama_block_figure(SMOLLM2)
    # the page shows through, so text needs a background of its own
    assert figure.patch.get_alpha() == figure.axes[0].patch.get_alpha() == 0
    for text in words(figure):
        assert contrast(text.get_color(), background(text, figure)) >= 4.5, text.get_text()


def test_the_contrast_is_that_of_the_standard() -> None:
    assert contrast("black", "white") == 21
    # an example of WCAG's: the lightest gray that reads on white
    assert contrast("#767676", "white") == pytest.approx(4.54, abs=0.01)
