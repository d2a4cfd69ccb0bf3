"""Pictures with sliders. Each widget redraws a figure of `figures.py` and says in words what is to be seen.

The idea: the picture is an image and the words are text in the page, so that a browser test can read them; and a widget
carries its first picture along as a plain image, for readers without a kernel.
"""

import base64
import io
import math
from typing import Any

import ipywidgets
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from qcourse.cost.decode import LLAMA_2_7B, LLAMA_2_70B, decode_work
from qcourse.cost.devices import DEVICES
from qcourse.cost.memory import bytes_per_parameter
from qcourse.lab.figures import float_figure, grid_figure, step_figure
from qcourse.numerics.affine import quantize
from qcourse.numerics.metrics import code_entropy, relative_error
from qcourse.numerics.minifloat import FloatFormat, code_values

MODELS = {"Llama-2-7B": LLAMA_2_7B, "Llama-2-70B": LLAMA_2_70B}


class PictureBox(ipywidgets.VBox):
    """Controls, a picture and its readout; shows the picture alone where widgets do not run.

    Args:
        controls: what the reader moves.
        picture: bytes of a PNG when its value is set.
        readout: what is to be seen, in words.
    """

    def __init__(
        self, controls: list[Any], picture: ipywidgets.Image, readout: ipywidgets.HTML
    ) -> None:
        super().__init__([ipywidgets.HBox(controls), picture, readout])
        self.picture, self.readout = picture, readout

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        still = base64.b64encode(self.picture.value).decode()
        return {**super()._repr_mimebundle_(**kwargs), "image/png": still}


def watch_the_grid(
    weights: Float[Tensor, " count"], *, bits: int = 4, symmetric: bool = True, outlier: float = 3.0
) -> PictureBox:
    """Weights dropping to their levels, with sliders for the bit width, the kind of grid and one outlier's place."""
    controls = {
        "bits": ipywidgets.IntSlider(bits, 2, 8, description="bits"),
        "outlier": ipywidgets.FloatSlider(
            outlier, min=0.5, max=6.0, step=0.1, description="outlier at"
        ),
        "symmetric": ipywidgets.Checkbox(symmetric, description="symmetric", indent=False),
    }
    picture, readout = (
        ipywidgets.Image(format="png", layout={"max_width": "760px"}),
        ipywidgets.HTML(),
    )

    def redraw(_: object = None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        picture.value = png(grid_figure(weights, **chosen))
        readout.value = f"<p>{grid_readout(weights, **chosen)}</p>"

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return PictureBox(list(controls.values()), picture, readout)


def click_the_bits(format: FloatFormat, *, code: int = 0) -> PictureBox:
    """The bits of a small float as buttons, its picture, and what it stands for, worked out."""
    places = range(format.bits - 1, -1, -1)
    buttons = [
        ipywidgets.ToggleButton(
            bool(code >> place & 1), description=str(code >> place & 1), layout={"width": "44px"}
        )
        for place in places
    ]
    picture, readout = (
        ipywidgets.Image(format="png", layout={"max_width": "760px"}),
        ipywidgets.HTML(),
    )

    def redraw(_: object = None) -> None:
        for button in buttons:
            button.description = str(int(button.value))
        now = sum(button.value << place for button, place in zip(buttons, places, strict=True))
        picture.value = png(float_figure(now, format))
        readout.value = f"<p>{float_readout(now, format)}</p>"

    for button in buttons:
        button.observe(redraw, names="value")
    redraw()
    return PictureBox(buttons, picture, readout)


def time_a_step(
    *, model: str = "Llama-2-7B", bits: int = 16, batch: int = 1, context: int = 512
) -> PictureBox:
    """What one step of writing waits for, with controls for the model, its bits, batch, context and the device."""
    powers = [1 << n for n in range(18)]
    controls = {
        "model": ipywidgets.Dropdown(options=list(MODELS), value=model, description="model"),
        "bits": ipywidgets.Dropdown(options=[16, 8, 4], value=bits, description="bits"),
        "batch": ipywidgets.SelectionSlider(options=powers[:11], value=batch, description="batch"),
        "context": ipywidgets.SelectionSlider(
            options=powers[7:], value=context, description="context"
        ),
        "device": ipywidgets.Dropdown(
            options=list(DEVICES), value="NVIDIA A100 SXM 80 GB", description="device"
        ),
    }
    picture, readout = (
        ipywidgets.Image(format="png", layout={"max_width": "760px"}),
        ipywidgets.HTML(),
    )

    def redraw(_: object = None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        picture.value = png(step_figure(step_parts(**chosen)))
        readout.value = f"<p>{step_readout(**chosen)}</p>"

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    box = PictureBox(list(controls.values()), picture, readout)
    box.children[0].layout.flex_flow = "row wrap"
    return box


def step_parts(*, model: str, bits: int, batch: int, context: int, device: str) -> dict[str, float]:
    """Seconds that a step's weights, cache and activations take to arrive, and that its operations take."""
    sizes, group_size, on = MODELS[model], 128 if bits < 16 else None, DEVICES[device]
    bare, whole = (
        decode_work(sizes, batch=batch, context=tokens, bits=bits, group_size=group_size)
        for tokens in (0, context)
    )
    weights = sizes.parameters * bytes_per_parameter(bits, group_size)
    moved = {
        "weights": weights,
        "cache": whole.bytes - bare.bytes,
        "activations": bare.bytes - weights,
    }
    times = {name: size / on.bandwidth_bytes_per_s for name, size in moved.items()}
    return {**times, "operations": whole.operations / on.peak("float16")}


def step_readout(*, model: str, bits: int, batch: int, context: int, device: str) -> str:
    """What `time_a_step` says: the time, what it waits for, the tokens a second, and whether it fits the device at all.

    >>> step_readout(model="Llama-2-7B", bits=4, batch=1, context=512, device="NVIDIA A10")
    '6.1 ms a step, bound by memory (weights 93%, cache 7%) · 163 tokens a second · 3.7 GB of 24 GB'
    """
    parts = step_parts(model=model, bits=bits, batch=batch, context=context, device=device)
    memory_s, holds = (
        sum(parts.values()) - parts["operations"],
        DEVICES[device].memory_bytes or math.inf,
    )
    step_s = max(memory_s, parts["operations"])
    shares = ", ".join(f"{name} {parts[name] / memory_s:.0%}" for name in ("weights", "cache"))
    bound = f"memory ({shares})" if memory_s >= parts["operations"] else "its multipliers"
    needs = (parts["weights"] + parts["cache"]) * DEVICES[device].bandwidth_bytes_per_s
    room = f"{needs / 1e9:.1f} GB of {holds / 1e9:g} GB" + (
        ": it does not fit" if needs > holds else ""
    )
    return f"{1000 * step_s:,.1f} ms a step, bound by {bound} · {batch / step_s:,.0f} tokens a second · {room}"


def float_readout(code: int, format: FloatFormat) -> str:
    """What `click_the_bits` says: the code, its fields, and the number.

    >>> from qcourse.numerics.minifloat import E4M3
    >>> float_readout(0b0_0111_100, E4M3), float_readout(0b1_0000_001, E4M3)
    ('code 60 · + 2^(7 - 7) · (1 + 4/8) = 1.5', 'code 129 · - 2^(1 - 7) · 1/8 = -0.00195312')
    >>> float_readout(0x7F, E4M3)
    'code 127 · above the largest number of E4M3: NaN'
    """
    value = float(code_values(format)[code])
    if not math.isfinite(value):
        return f"code {code} · above the largest number of {format}: {'NaN' if math.isnan(value) else 'infinity'}"
    sign = "-" if format.signed and code >> format.bits - 1 else "+"
    steps = 1 << format.mantissa_bits
    e, m = divmod(code & (1 << format.exponent_bits + format.mantissa_bits) - 1, steps)
    rest = (
        f"2^({e} - {format.bias}) · (1 + {m}/{steps})"
        if e
        else f"2^(1 - {format.bias}) · {m}/{steps}"
    )
    return f"code {code} · {sign} {rest} = {value:g}"


def grid_readout(
    weights: Float[Tensor, " count"], *, bits: int, symmetric: bool, outlier: float
) -> str:
    """What `watch_the_grid` says: step, codes in use, their entropy, and the error of the ordinary weights.

    >>> grid_readout(torch.tensor([-0.5, 0.25, 0.5]), bits=4, symmetric=True, outlier=3.5)
    'step 0.5 · 3 of 16 codes in use by the ordinary weights, entropy 1.58 bits of 4 · their relative error 0.333'
    """
    q = quantize(torch.cat([weights, weights.new_tensor([outlier])]), bits, symmetric=symmetric)
    codes, w_hat = q.codes[:-1], q.dequantize()[:-1]
    return (
        f"step {q.scale.item():.3g} · {len(codes.unique())} of {1 << bits} codes in use by the ordinary weights, "
        f"entropy {code_entropy(codes):.2f} bits of {bits} · their relative error {relative_error(weights, w_hat):.3f}"
    )


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    return out.getvalue()
