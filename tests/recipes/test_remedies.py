"""Outliers planted in the tiny language model, and every remedy, by the model's predictions."""

import pytest
import torch

from qcourse import IntQuantizer, PerChannel
from qcourse.methods.activations import WithActivations
from qcourse.methods.llm_int8 import OutlierColumns
from qcourse.methods.smoothquant import SmoothQuant
from qcourse.models.evaluate import agreement
from qcourse.models.llama import Llama
from qcourse.models.tinylm import load_tinylm
from qcourse.recipes.fold import fold
from qcourse.recipes.outliers import plant_outliers
from qcourse.recipes.quantize import quantize_model
from qcourse.recipes.rotate import rotate_model
from qcourse.texts.corpus import encode_documents, stdlib_corpus
from qcourse.trace.calibration_batches import windows

TENSOR = IntQuantizer(8)
ROW = IntQuantizer(8, granularity=PerChannel(0))
ROW4 = IntQuantizer(4, granularity=PerChannel(0))
TEXTS: dict[str, torch.Tensor] = {}


@pytest.fixture(scope="module")
def trained() -> Llama:
    model, tokenizer = load_tinylm()
    documents = [document for document in stdlib_corpus("held_out") if document.kind == "docs"]
    TEXTS["judge"] = encode_documents(documents[::4], tokenizer)[:257]
    TEXTS["calibrate"] = encode_documents(documents[1::4], tokenizer)[:512]
    return model


@pytest.fixture(scope="module")
def planted(trained: Llama) -> Llama:
    return plant_outliers(trained, (5, 77, 130, 200), 32.0)


def kl(model: Llama, original: Llama, method: WithActivations) -> float:
    """How far the quantized model's predictions are from the original's."""
    calibration = windows(TEXTS["calibrate"], 256) if method.calibrated else None
    quantized = quantize_model(
        model, method, calibration=calibration, fold=fold, progress=False
    ).model
    return agreement(quantized, original, TEXTS["judge"], context=256).kl


def test_each_remedy_keeps_planted_outliers_from_the_scale_in_eight_bits(
    trained: Llama, planted: Llama
) -> None:
    one_scale = kl(planted, trained, WithActivations(ROW, TENSOR, static=True))
    by_token = kl(planted, trained, WithActivations(ROW, ROW))
    smoothed = kl(planted, trained, WithActivations(SmoothQuant(ROW, 0.5), TENSOR, static=True))
    apart = kl(planted, trained, WithActivations(ROW, OutlierColumns(ROW)))
    rotated = kl(rotate_model(planted).model, trained, WithActivations(ROW, TENSOR, static=True))
    assert one_scale > 3 * by_token > 6 * smoothed
    assert smoothed > 2 * max(apart, rotated)


def test_smoothing_and_rotation_undo_what_was_planted(trained: Llama, planted: Llama) -> None:
    for method in (
        WithActivations(SmoothQuant(ROW), TENSOR, static=True),
        WithActivations(SmoothQuant(ROW4), ROW4),
    ):
        assert kl(planted, trained, method) == pytest.approx(kl(trained, trained, method), rel=0.02)
    four = WithActivations(ROW4, ROW4)
    rotated = kl(rotate_model(planted).model, trained, four)
    assert rotated == pytest.approx(kl(rotate_model(trained).model, trained, four), rel=0.02)
    assert kl(planted, trained, four) > 10 * kl(trained, trained, four) > 20 * rotated


def test_four_bits_for_weights_and_eight_for_activations(trained: Llama, planted: Llama) -> None:
    w4a8 = WithActivations(ROW4, ROW)
    assert kl(planted, trained, w4a8) > 1.5 * kl(trained, trained, w4a8)
    assert kl(rotate_model(planted).model, trained, w4a8) < 1.2 * kl(trained, trained, w4a8)
