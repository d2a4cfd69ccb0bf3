"""Figures and their widgets: what a control changes, and what shows where widgets do not run."""

import base64
import math

import ipywidgets
import pytest
import torch
from torch import Tensor, nn

from qcourse.cost.decode import LLAMA_2_70B, decode_time
from qcourse.cost.devices import DEVICES
from qcourse.lab.figures import grid_figure
from qcourse.lab.readouts import float_readout, grid_readout, step_parts, step_readout
from qcourse.lab.widgets import PictureBox, click_the_bits, png, time_a_step, watch_the_grid
from qcourse.numerics.minifloat import E2M1, E3M2, E4M3, E5M2, FloatFormat, code_values

WEIGHTS = torch.linspace(-1, 1, 9)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def box() -> PictureBox:
    return watch_the_grid(WEIGHTS, bits=4, symmetric=True, outlier=3.0)


@pytest.mark.parametrize(("number", "value"), [(0, 2), (1, 5.5), (2, False)])
def test_each_control_changes_the_picture_and_the_words(
    box: PictureBox, number: int, value: object
) -> None:
    picture, readout = box.picture.value, box.readout.value
    box.children[0].children[number].value = value
    assert bytes(box.picture.value).startswith(PNG)
    assert box.picture.value != picture
    assert box.readout.value != readout


def test_a_control_set_back_brings_the_first_picture_back(box: PictureBox) -> None:
    picture, readout = box.picture.value, box.readout.value
    slider = box.children[0].children[0]
    slider.value = 2
    slider.value = 4
    assert (box.picture.value, box.readout.value) == (picture, readout)


def test_the_readout_is_about_what_the_controls_say(box: PictureBox) -> None:
    assert grid_readout(WEIGHTS, bits=4, symmetric=True, outlier=3.0) in box.readout.value
    box.children[0].children[1].value = 6.0
    assert grid_readout(WEIGHTS, bits=4, symmetric=True, outlier=6.0) in box.readout.value


def test_a_reader_without_a_kernel_gets_the_picture(box: PictureBox) -> None:
    bundle = box._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == box.picture.value
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert isinstance(box, ipywidgets.Widget)


@pytest.mark.parametrize(
    "weights", [WEIGHTS.bfloat16(), WEIGHTS.half(), nn.Parameter(WEIGHTS), WEIGHTS.double()]
)
@pytest.mark.parametrize("outlier", [None, 3.0])
def test_weights_of_any_kind_are_drawn(weights: Tensor, outlier: float | None) -> None:
    # 9 weights from -1 to 1 in steps of 1/4 are exact in each dtype, so the pictures are the same.
    assert png(grid_figure(weights, outlier=outlier)) == png(grid_figure(WEIGHTS, outlier=outlier))


def test_each_click_on_a_bit_changes_the_number_and_the_picture() -> None:
    box = click_the_bits(E4M3, code=0b0_1111_110)
    assert "= 448" in box.readout.value
    buttons, before = box.children[0].children, box.picture.value
    assert [button.description for button in buttons] == list("01111110")
    buttons[0].value = True
    assert "= -448" in box.readout.value
    assert buttons[0].description == "1"
    assert box.picture.value != before
    buttons[7].value = True
    assert "above the largest number of E4M3: NaN" in box.readout.value


@pytest.mark.parametrize("format", [E4M3, E5M2, E3M2, E2M1], ids=str)
def test_the_words_say_the_number_of_every_code(format: FloatFormat) -> None:
    for code in range(1 << format.bits):
        value = float(code_values(format)[code])
        words = float_readout(code, format)
        if math.isfinite(value):
            left, right = words.split(" · ", 1)[1].split(" = ")
            assert float(right) == pytest.approx(value, rel=1e-5)
            # the formula, evaluated
            formula = left.replace("^", "**").replace("·", "*")
            assert eval(formula) == value
        else:
            assert words.endswith("NaN" if math.isnan(value) else "infinity")


H100 = {"model": "Llama-2-70B", "device": "NVIDIA H100 SXM"}


OTHER_CHOICES = ("Llama-2-70B", 4, 64, 8192, "NVIDIA L4")


@pytest.mark.parametrize(("number", "value"), list(enumerate(OTHER_CHOICES)))
def test_each_choice_changes_the_step(number: int, value: object) -> None:
    box = time_a_step(bits=16, batch=1, context=512)
    picture, readout = box.picture.value, box.readout.value
    box.children[0].children[number].value = value
    assert bytes(box.picture.value).startswith(PNG)
    assert box.picture.value != picture
    assert box.readout.value != readout


@pytest.mark.parametrize(("bits", "group_size"), [(16, None), (8, 128), (4, 128)])
@pytest.mark.parametrize("batch", [1, 1024])
def test_the_longer_bar_is_the_time_of_the_step(
    bits: int, group_size: int | None, batch: int
) -> None:
    parts = step_parts(bits=bits, batch=batch, context=128, **H100)
    sizes = {"batch": batch, "context": 128, "bits": bits, "group_size": group_size}
    memory_s = parts["weights"] + parts["cache"] + parts["activations"]
    step_s = decode_time(LLAMA_2_70B, DEVICES["NVIDIA H100 SXM"], **sizes)
    assert max(memory_s, parts["operations"]) == pytest.approx(step_s)
    assert (memory_s > parts["operations"]) == (batch == 1)
    cache = 2 * 80 * 8 * 128 * 2 * batch * 128
    assert parts["cache"] * 3.35e12 == pytest.approx(cache)


def test_the_readout_names_what_is_waited_for_and_what_fits() -> None:
    float16 = step_readout(bits=16, batch=1, context=128, **H100)
    assert "bound by memory (weights 100%, cache 0%)" in float16
    assert float16.endswith("137.5 GB of 80 GB: it does not fit")

    int4 = step_readout(bits=4, batch=1, context=128, **H100)
    assert int4.endswith("35.5 GB of 80 GB")

    # 2 operations per weight of 68.7 billion, at 989e12 per second: 7,200 tokens, minus attention's
    large_batch = step_readout(bits=4, batch=1024, context=128, **H100)
    assert "bound by its multipliers" in large_batch
    assert " · 7,179 tokens a second · " in large_batch
