"""Figures with sliders: each widget redraws a figure of `figures.py` and describes it in words.

The idea: the figure is an image and the words are text in the page, so that a browser test can read
them. A widget stores its first figure as a plain image, for readers without a kernel.

How it differs from ``readouts.py``: that computes the numbers and the words; this shows them.
"""

import base64
import io
from collections.abc import Callable
from typing import Any

import ipywidgets
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from qcourse.cost.devices import DEVICES
from qcourse.lab.figures import float_figure, grid_figure, step_figure
from qcourse.lab.readouts import MODELS, float_readout, grid_readout, step_parts, step_readout
from qcourse.numerics.minifloat import FloatFormat

POWERS_OF_TWO = [1 << n for n in range(18)]

# what a widget shows for the present values of its controls
Shown = tuple[Figure, str]


class PictureBox(ipywidgets.VBox):
    """Controls, a picture and a readout; where widgets do not run, the picture alone.

    Args:
        controls: sliders, buttons and menus.
        draw: returns the figure and the words for the present values of the controls.
    """

    def __init__(self, controls: list[Any], draw: Callable[[], Shown]) -> None:
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "760px"})
        self.readout = ipywidgets.HTML()
        self._draw = draw
        super().__init__([ipywidgets.HBox(controls), self.picture, self.readout])
        for control in controls:
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, _: object = None) -> None:
        figure, words = self._draw()
        self.picture.value = png(figure)
        self.readout.value = f"<p>{words}</p>"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        still = base64.b64encode(self.picture.value).decode()
        return {**bundle, "image/png": still}


def watch_the_grid(
    weights: Float[Tensor, " count"], *, bits: int = 4, symmetric: bool = True, outlier: float = 3.0
) -> PictureBox:
    """Return `grid_figure` with controls for the bit width, the kind of grid and one outlier."""
    controls = {
        "bits": ipywidgets.IntSlider(bits, 2, 8, description="bits"),
        "outlier": ipywidgets.FloatSlider(
            outlier, min=0.5, max=6.0, step=0.1, description="outlier at"
        ),
        "symmetric": ipywidgets.Checkbox(symmetric, description="symmetric", indent=False),
    }

    def draw() -> Shown:
        chosen = _values(controls)
        return grid_figure(weights, **chosen), grid_readout(weights, **chosen)

    return PictureBox(list(controls.values()), draw)


def click_the_bits(format: FloatFormat, *, code: int = 0) -> PictureBox:
    """Return `float_figure` with one button per bit, and the number worked out."""
    # highest bit first, as one writes it
    places = range(format.bits - 1, -1, -1)
    buttons = []
    for place in places:
        bit = (code >> place) & 1
        layout = {"width": "44px"}
        button = ipywidgets.ToggleButton(bool(bit), description=str(bit), layout=layout)
        buttons.append(button)

    def draw() -> Shown:
        pressed = 0
        for button, place in zip(buttons, places, strict=True):
            button.description = str(int(button.value))
            pressed += button.value << place
        return float_figure(pressed, format), float_readout(pressed, format)

    return PictureBox(buttons, draw)


def time_a_step(
    *, model: str = "Llama-2-7B", bits: int = 16, batch: int = 1, context: int = 512
) -> PictureBox:
    """Return `step_figure` with controls for the model, its bits, batch, context and device."""
    models = list(MODELS)
    devices = list(DEVICES)
    # batches from 1 to 1024, contexts from 128 to 131072
    batches = POWERS_OF_TWO[:11]
    contexts = POWERS_OF_TWO[7:]

    menu = ipywidgets.Dropdown
    slider = ipywidgets.SelectionSlider
    device = "NVIDIA A100 SXM 80 GB"
    controls = {
        "model": menu(options=models, value=model, description="model"),
        "bits": menu(options=[16, 8, 4], value=bits, description="bits"),
        "batch": slider(options=batches, value=batch, description="batch"),
        "context": slider(options=contexts, value=context, description="context"),
        "device": menu(options=devices, value=device, description="device"),
    }

    def draw() -> Shown:
        chosen = _values(controls)
        return step_figure(step_parts(**chosen)), step_readout(**chosen)

    box = PictureBox(list(controls.values()), draw)
    box.children[0].layout.flex_flow = "row wrap"
    return box


def _values(controls: dict[str, Any]) -> dict[str, Any]:
    """Return the present value of each control by its name."""
    return {name: control.value for name, control in controls.items()}


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG."""
    # 90 dots per inch make a figure of 8 inches 720 pixels wide
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return out.getvalue()
