"""AWQ: the choices of a direct search over tokens, and never worse than RTN, for any inputs."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import normal
from torch import Tensor

from qcourse import IntQuantizer, PerChannel, PerGroup, PerTensor, QuantizedTensor
from qcourse.methods import clip
from qcourse.methods.awq import Awq, awq

INT4 = IntQuantizer(4, granularity=PerGroup(16))
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(16)]


def outliers(tokens: int, size: int, seed: int = 0, factor: float = 20) -> Tensor:
    """Correlated inputs, one channel in 16 of which is larger."""
    common = normal(tokens, 1, seed=seed + 1) * normal(size, seed=seed + 2)
    x = normal(tokens, size, seed=seed) + 0.5 * common
    x[:, 3::16] *= factor
    return x


def loss(w: Tensor, w_hat: Tensor, x: Tensor) -> float:
    """||x (w - w_hat)^T||^2 by the outputs, in float64."""
    return float((x.double() @ (w.double() - w_hat.double()).T).square().sum())


# A direct search, by hand and in float64: every trial is run on the tokens.


def by_hand(
    w: np.ndarray, share: np.ndarray | float, size: int, bits: int, symmetric: bool
) -> np.ndarray:
    """Each group of each row rounded on the grid of a share of its range."""
    rows = w.reshape(len(w), -1, size)
    low = (np.minimum(rows.min(2), 0) * share)[..., None]
    high = (np.maximum(rows.max(2), 0) * share)[..., None]
    levels = 2**bits - 1
    if symmetric:
        scale = np.maximum(-low, high) / (levels // 2)
        codes = np.clip(np.rint(rows / scale), -(levels // 2) - 1, levels // 2)
    else:
        scale = (high - low) / levels
        zero = np.rint(-low / scale)
        codes = np.clip(np.rint(rows / scale) + zero, 0, levels) - zero
    return (codes * scale).reshape(w.shape)


def direct_search(
    w: np.ndarray, x: np.ndarray, size: int, bits: int, symmetric: bool
) -> tuple[int, list[float], np.ndarray, np.ndarray]:
    """alpha, the error at each alpha, the clips and the loss at each; alpha and clips in i / 20."""
    mean = np.abs(x).mean(0)
    errors = []

    def scale(step: int) -> np.ndarray:
        s = mean ** (step / 20)
        return s / np.sqrt(s.max() * s.min())

    for step in range(21):
        s = scale(step)
        w_hat = by_hand(w * s, 1, size, bits, symmetric) / s
        errors.append(np.linalg.norm(x @ (w - w_hat).T) / np.linalg.norm(x @ w.T))
    step = int(np.argmin(errors))
    ws = w * scale(step)
    xs = x / scale(step)
    losses = np.empty((10, len(w), w.shape[1] // size))
    for i in range(10):
        d = ws - by_hand(ws, 1 - i / 20, size, bits, symmetric)
        for g in range(w.shape[1] // size):
            part = slice(g * size, (g + 1) * size)
            losses[i, :, g] = ((xs[:, part] @ d[:, part].T) ** 2).sum(0)
    clips = losses.argmin(0)

    def loss_of_rows(clips: np.ndarray) -> np.ndarray:
        d = ws - by_hand(ws, 1 - clips / 20, size, bits, symmetric)
        return ((xs @ d.T) ** 2).sum(0)

    clips[loss_of_rows(clips) >= loss_of_rows(0 * clips)] = 0
    return step, errors, clips, losses


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens", [200, 600], ids=["by x", "by x^T x"])
def test_the_same_choices_as_a_direct_search_over_tokens(tokens: int, symmetric: bool) -> None:
    w = normal(512, 512) * 0.02
    x = outliers(tokens, 512, seed=1)
    result = awq(w, x, IntQuantizer(4, symmetric, granularity=PerGroup(128)))
    step, errors, clips, losses = direct_search(
        w.double().numpy(), x.double().numpy(), 128, 4, symmetric
    )
    assert 0 < step < 20
    assert result.alpha == step / 20
    assert result.curve.tolist() == pytest.approx(errors, rel=1e-4)
    chosen = ((1 - result.shrink) * 20).round().long().numpy()
    assert len(np.unique(chosen)) > 5
    differs = chosen != clips
    assert differs.mean() < 0.002  # two clips may tie to within float32
    at_chosen = np.take_along_axis(losses, chosen[None], 0)[0]
    at_best = np.take_along_axis(losses, clips[None], 0)[0]
    assert at_chosen[differs] == pytest.approx(at_best[differs], rel=1e-4)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerChannel(0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_clip_of_rows_that_share_a_scale_is_best_for_all_of_them(
    granularity: Any, seed: int
) -> None:
    # With orthogonal inputs the losses of columns add up, whichever of them share a scale.
    w = normal(6, 32, seed=seed)
    x = torch.linalg.qr(normal(40, 32, seed=seed)).Q * torch.arange(1.0, 33)
    result = awq(w, x, IntQuantizer(3, granularity=granularity), grid=2)
    assert result.input_scale is not None
    ws = (w * result.input_scale).double().numpy()
    xs = (x / result.input_scale).double().numpy()
    # The axis along which values share a scale.
    axis = {PerTensor(): None, PerChannel(1): 0, PerChannel(0): 1}[granularity]
    rows = {None: ws.reshape(1, -1), 0: ws.T, 1: ws}[axis]
    losses = []
    for i in range(10):
        w_hat = by_hand(rows, 1 - i / 20, rows.shape[1], 3, True)
        d = ws - (w_hat.T if axis == 0 else w_hat.reshape(ws.shape))
        losses.append(((xs**2).sum(0) * d**2).sum(axis))
    best = 1 - np.stack(losses).argmin(0) / 20
    assert np.min(best) < 1
    assert result.shrink.double().numpy().reshape(best.shape) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_outliers_are_what_it_is_for(seed: int) -> None:
    w = normal(96, 128, seed=seed)
    x = outliers(300, 128, seed=seed + 10)
    quantizer = IntQuantizer(4, granularity=PerGroup(64))
    size = loss(w, torch.zeros_like(w), x)
    to_nearest = math.sqrt(loss(w, quantizer(w).dequantize(), x) / size)
    unclipped = awq(w, x, quantizer, clip=False)
    clipped = awq(w, x, quantizer)
    assert unclipped.error < 0.75 * to_nearest
    assert clipped.error < 0.97 * unclipped.error
    assert unclipped.alpha == clipped.alpha
    s = clipped.input_scale
    assert s is not None
    assert float(s[3::16].min()) > float(s[4::16].max())
    assert float(s.max() * s.min()) == pytest.approx(1, rel=1e-5)


# Laws

INPUTS = {
    "normal": lambda t, n, seed: normal(t, n, seed=seed),
    "outliers": outliers,
    "one row over and over": lambda t, n, seed: normal(1, n, seed=seed).expand(t, n),
    "constant columns": lambda t, n, seed: torch.ones(t, n) * normal(n, seed=seed).round(),
    "columns in pairs": lambda t, n, seed: normal(t, n // 2, seed=seed).repeat(1, 2),
    "opposites": lambda t, n, seed: (
        torch.cat([normal(t, n // 2, seed=seed)] * 2, 1) * torch.tensor([1.0, -1.0]).repeat(n // 2)
    ),
    "rank 2": lambda t, n, seed: normal(t, 2, seed=seed) @ normal(2, n, seed=seed + 1),
    "dead channels": lambda t, n, seed: normal(t, n, seed=seed) * (torch.arange(n) % 3 > 0),
    "zero": lambda t, n, seed: torch.zeros(t, n),
    "of all sizes": lambda t, n, seed: (
        normal(t, n, seed=seed) * 10 ** (8 * normal(n, seed=seed + 1).clamp(-2, 2))
    ),
    "huge": lambda t, n, seed: normal(t, n, seed=seed) * 1e37,
    "tiny": lambda t, n, seed: normal(t, n, seed=seed) * 1e-37,
}
WEIGHTS = {
    "normal": lambda o, n, seed: normal(o, n, seed=seed),
    "positive": lambda o, n, seed: normal(o, n, seed=seed).abs() + 1,
    "zero rows": lambda o, n, seed: normal(o, n, seed=seed) * (torch.arange(o) % 2)[:, None],
    "zero": lambda o, n, seed: torch.zeros(o, n),
    "on the grid": lambda o, n, seed: normal(o, n, seed=seed).round().clamp(-7, 7),
    "of all sizes": lambda o, n, seed: (
        normal(o, n, seed=seed) * 10 ** (5 * normal(o, n, seed=seed + 1).clamp(-2, 2))
    ),
    "huge": lambda o, n, seed: normal(o, n, seed=seed) * 5e37,
    "tiny": lambda o, n, seed: normal(o, n, seed=seed) * 1e-35,
}


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from(sorted(INPUTS)),
    st.sampled_from(GRANULARITIES),
    st.booleans(),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([1, 2, 5, 31, 32, 60]),
    st.sampled_from([1, 3, 8]),
    st.integers(0, 1000),
)
def test_never_worse_than_to_nearest_nor_clipped_than_unclipped(
    weights: str,
    inputs: str,
    granularity: Any,
    symmetric: bool,
    bits: int,
    tokens: int,
    out: int,
    seed: int,
) -> None:
    w = WEIGHTS[weights](out, 32, seed)
    x = INPUTS[inputs](tokens, 32, seed + 1)
    quantizer = IntQuantizer(bits, symmetric, granularity)
    to_nearest = quantizer(w).dequantize()
    unclipped = awq(w, x, quantizer, clip=False, grid=4)
    clipped = awq(w, x, quantizer, grid=4)
    for result in (unclipped, clipped):
        assert torch.isfinite(result.w_hat).all()
        assert result.shrink.shape == result.quantized.scale.shape
        assert result.input_scale is not None
        assert 0.0099 < float(result.input_scale.min()) <= float(result.input_scale.max()) < 101
    assert (unclipped.shrink == 1).all()
    candidates = (clipped.w_hat, unclipped.w_hat, to_nearest)
    losses = [loss(w, w_hat, x) for w_hat in candidates]
    # Sums in float32 of products that may cancel; and w_hat itself is float32.
    furthest = max(float((w - w_hat).double().square().sum()) for w_hat in candidates)
    w_squares = float(w.double().square().sum())
    x_squares = float(x.double().square().sum())
    noise = (1e-5 * furthest + 1e-12 * w_squares) * x_squares
    assert losses[0] <= losses[1] * (1 + 1e-5) + noise
    assert losses[1] <= losses[2] * (1 + 1e-5) + noise
    size = float((x.double() @ w.double().T).square().sum())
    if size > 1e-4 * w_squares * x_squares:
        assert clipped.error**2 == pytest.approx(losses[0] / size, rel=1e-3, abs=noise / size)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_of_one_magnitude_ask_for_no_scale(granularity: Any, symmetric: bool) -> None:
    w = normal(8, 32)
    x = normal(50, 32, seed=1).sign()
    quantizer = IntQuantizer(4, symmetric, granularity)
    result = awq(w, x, quantizer, clip=False)
    assert result.alpha == 0
    assert torch.equal(result.quantized.codes, quantizer(w).codes)
    assert torch.equal(result.quantized.scale, quantizer(w).scale)


@pytest.mark.parametrize("tokens", [20, 64])
def test_the_size_of_inputs_and_of_weights_does_not_matter(tokens: int) -> None:
    w = normal(8, 32)
    x = outliers(tokens, 32)
    base = awq(w, x, INT4)
    for power in (-120, -40, 60, 118):
        other = awq(w, x * 2.0**power, INT4)
        assert torch.equal(other.quantized.codes, base.quantized.codes)
        assert other.error == base.error
    for power in (-110, 50, 115):
        assert torch.equal(awq(w * 2.0**power, x, INT4).quantized.codes, base.quantized.codes)


@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(16), PerTensor()])
def test_strips_change_nothing(granularity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(9, 32)
    x = outliers(40, 32)
    quantizer = IntQuantizer(3, granularity=granularity)
    whole = awq(w, x, quantizer)
    monkeypatch.setattr(clip, "STRIP", 64)  # two rows
    parts = awq(w, x, quantizer)
    assert torch.equal(parts.shrink, whole.shrink)
    assert torch.equal(parts.quantized.codes, whole.quantized.codes)
    assert parts.error == pytest.approx(whole.error, rel=1e-5)


# Traps


def test_groups_that_do_not_hold_0_are_not_clipped_by_their_zero_point() -> None:
    w = normal(8, 32).abs() + 5  # a zero point on [5, 8] would be -25, and clamped to 0
    quantizer = IntQuantizer(4, symmetric=False, granularity=PerGroup(16))
    result = awq(w, normal(40, 32, seed=1), quantizer, clip=False)
    # s is within a factor of 3.
    assert float((result.w_hat - w).abs().max()) < 0.51 * float(w.max()) / 15 * 3
    assert int(result.quantized.codes.max()) == 15


def test_a_scale_that_storage_cannot_hold_is_no_candidate() -> None:
    w = normal(4, 32).clamp(-2, 2)
    x = outliers(40, 32, factor=100)
    w *= 60000 * 7 / float(w.abs().max())  # the largest scale is 60000, near float16's 65504
    quantizer = IntQuantizer(4, granularity=PerGroup(16), scale_dtype=torch.float16)
    result = awq(w, x, quantizer)
    assert torch.isfinite(result.w_hat).all()
    assert torch.isinf(result.curve).any()
    assert awq(w / 1024, x, quantizer).alpha > result.alpha


def test_dead_channels_keep_their_weights() -> None:
    w = normal(8, 32)
    x = outliers(40, 32)
    x[:, 5] = 0
    result = awq(w, x, IntQuantizer(8, granularity=PerGroup(16)))
    # s_j is at least 1% of the geometric middle; the published code lets it go to 0.
    assert result.alpha > 0
    assert float((result.w_hat - w)[:, 5].abs().max()) < 1.5


def test_half_precision_is_worked_on_in_float32() -> None:
    w = normal(8, 32).half()
    x = outliers(40, 32).bfloat16()
    result = awq(w, x, INT4)
    assert torch.equal(result.quantized.codes, awq(w.float(), x.float(), INT4).quantized.codes)
    assert awq(w.double(), outliers(40, 32), INT4).w_hat.dtype == torch.float64


@dataclass(frozen=True, slots=True)
class Steps:
    """The parameters of the quantizer below."""

    size: Tensor


@dataclass(frozen=True)
class Uneven:
    """A quantizer that is none of ours: three values, -1, 0 and 2, times a size for each group."""

    granularity: Any
    bits: int = 2

    def __call__(self, x: Tensor) -> QuantizedTensor:
        parameters = self.fit(x)
        return QuantizedTensor(self.encode(x, parameters), parameters, self)

    def fit(self, x: Tensor) -> Steps:
        rows = self.granularity.rows(x)
        size = torch.maximum(-rows.amin(1), rows.amax(1) / 2)
        return Steps(size.reshape(self.granularity.scale_shape(x.shape)))

    def encode(self, x: Tensor, parameters: Steps) -> Tensor:
        values = torch.tensor([0.0, 2.0, -1.0])
        steps = self.granularity.rows(x) / parameters.size.reshape(-1, 1).clamp(min=1e-30)
        return self.granularity.unrows(
            (steps[..., None] - values).abs().argmin(-1).to(torch.uint8), x.shape
        )

    def decode(self, codes: Tensor, parameters: Steps) -> Tensor:
        values = torch.tensor([0.0, 2.0, -1.0])[self.granularity.rows(codes).long()]
        return self.granularity.unrows(values * parameters.size.reshape(-1, 1), codes.shape)

    def nearest(self, x: Tensor, parameters: Steps) -> tuple[Tensor, Tensor]:
        codes = self.encode(x, parameters)
        return codes, self.decode(codes, parameters)

    def parameter_nbytes(self, parameters: Steps) -> int:
        return parameters.size.nbytes


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_any_quantizer_will_do(granularity: Any) -> None:
    w = normal(8, 32)
    x = outliers(40, 32)
    quantizer = Uneven(granularity)
    to_nearest = quantizer(w).dequantize()
    result = awq(w, x, quantizer)
    assert loss(w, result.w_hat, x) < 0.9 * loss(w, to_nearest, x)
    assert (result.shrink < 1).any()


# The method


def test_batches_are_as_good_as_one() -> None:
    w = {"a": normal(8, 32), "b": normal(4, 32, seed=3)}
    x = outliers(75, 32)
    method = Awq(INT4)
    once = method.observe(None, x)
    seen = None
    for batch in x.split(9):
        seen = method.observe(seen, batch)
    assert seen is not None
    for name, result in method.quantize(w, seen).items():
        expected = method.quantize(w, once)[name]
        assert torch.equal(result.quantized.codes, expected.quantized.codes)
        assert result.error == pytest.approx(expected.error, rel=1e-4)


def test_what_is_kept_of_the_inputs_stays_small() -> None:
    seen = None
    for batch in normal(500, 32).split(10):
        seen = Awq(INT4).observe(seen, batch)
        assert sum(map(len, seen.batches)) < 32
        assert seen.gram is None or not seen.batches
        batch.zero_()  # the model may use its memory again
    assert seen is not None
    x = normal(500, 32)
    torch.testing.assert_close(
        seen.as_one_group().stored[0] / seen.input_factor**2, x.T @ x, rtol=1e-4, atol=1e-3
    )
    first = seen.as_one_group().stored.clone()
    assert torch.equal(seen.as_one_group().stored, first)  # to ask changes nothing


def test_layers_that_share_an_input_share_the_scale_that_is_best_for_all() -> None:
    x = outliers(100, 32)
    w = {"q": normal(16, 32), "k": 5 * normal(8, 32, seed=1), "v": normal(8, 32, seed=2) / 5}
    method = Awq(INT4, clip=False)
    together = method.quantize(w, method.observe(None, x))
    stacked = awq(torch.cat(list(w.values())), x, INT4, clip=False)
    assert {result.alpha for result in together.values()} == {stacked.alpha}
    assert torch.equal(
        torch.cat([result.quantized.codes for result in together.values()]), stacked.quantized.codes
    )
    for result in together.values():
        assert result.input_scale is not None
        assert stacked.input_scale is not None
        assert torch.equal(result.input_scale, stacked.input_scale)
    assert stacked.curve.tolist() == pytest.approx(together["q"].curve.tolist(), rel=1e-5)


def test_a_model_without_use_for_a_scale_gets_none() -> None:
    method = Awq(INT4)
    result = method.quantize({"a": normal(8, 32)}, method.observe(None, normal(50, 32).sign()))["a"]
    assert result.input_scale is None
    assert torch.equal(result.w_hat, result.quantized.dequantize())
    assert re.fullmatch(r"alpha 0\.00, \d+% of scales clipped", result.note)


def test_a_coarser_grid_is_part_of_a_finer() -> None:
    w = normal(8, 32)
    x = outliers(40, 32)
    fine = awq(w, x, INT4)
    coarse = awq(w, x, INT4, grid=4)
    assert len(coarse.curve) == 5
    assert torch.equal(coarse.curve, fine.curve[::5])


def test_rows_whose_errors_cancel_stay_as_they_are() -> None:
    """Two groups with opposite weights read the same input, so unclipped they lose nothing."""
    part = normal(6, 16)
    w = torch.cat([part, -part], 1)
    x = normal(40, 16, seed=1).repeat(1, 2)
    result = awq(w, x, INT4)
    assert result.error == 0
    assert awq(w[:, :16], x[:, :16], INT4).shrink.lt(1).any()


# What is refused


@pytest.mark.parametrize(
    ("w", "x", "error", "words"),
    [
        (
            normal(4, 32),
            normal(8, 16),
            ValueError,
            r"w (4, 32) and x (8, 16) must have the same inputs",
        ),
        (normal(32), normal(8, 32), ValueError, "w of shape (32,) must be a matrix"),
        (
            normal(4, 32),
            normal(2, 8, 32),
            ValueError,
            "x of shape (2, 8, 32) must have the shape (tokens, in)",
        ),
        (normal(4, 32), torch.zeros(0, 32), ValueError, "x is empty"),
        (torch.zeros(0, 32), normal(8, 32), ValueError, "w is empty"),
        (normal(4, 32).long(), normal(8, 32), TypeError, "w has dtype torch.int64"),
        (normal(4, 32), [[1.0]], TypeError, "x is a list"),
        (normal(4, 32) / 0, normal(8, 32), ValueError, "w has 128 NaN or infinite values"),
        (normal(4, 32), normal(8, 32) * math.nan, ValueError, "x has 256 NaN or infinite values"),
        (normal(4, 24), normal(8, 24), ValueError, "group size=16 does not divide"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_matrices_that_cannot_be(w: Any, x: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        awq(w, x, INT4)


@pytest.mark.parametrize(
    ("quantizer", "grid", "error", "words"),
    [
        ("int4", 20, TypeError, "quantizer='int4' must be a quantizer such as IntQuantizer(4, "),
        (IntQuantizer, 20, TypeError, "must be a quantizer such as"),
        (INT4, 0, ValueError, "grid=0 must be a whole number"),
        (INT4, 2.0, ValueError, "grid=2.0 must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_that_cannot_be(
    quantizer: Any, grid: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        awq(normal(4, 32), normal(8, 32), quantizer, grid=grid)
    with pytest.raises(error, match=re.escape(words)):
        Awq(quantizer, grid=grid)


def test_a_layer_that_is_refused_is_named() -> None:
    method = Awq(replace(INT4, scale_dtype=torch.float16))
    with pytest.raises(ValueError, match=r"layer 'up': scale=1\.\d+e\+06 cannot be held"):
        method.quantize(
            {"gate": normal(4, 32), "up": normal(4, 32) * 4e6}, method.observe(None, normal(8, 32))
        )


@pytest.mark.parametrize(
    ("w", "words"),
    [
        (normal(4, 32) * math.nan, "layer 'up': w has 128 NaN or infinite values of 128"),
        (normal(32), "layer 'up': w of shape (32,) must be a matrix"),
    ],
)
def test_a_weight_that_is_refused_is_not_called_x(w: Tensor, words: str) -> None:
    method = Awq(INT4)
    with pytest.raises(ValueError, match=re.escape(words)):
        method.quantize({"gate": normal(4, 32), "up": w}, method.observe(None, normal(8, 32)))


@pytest.mark.parametrize("tokens", [5, 40])
def test_batches_of_very_different_sizes_count_by_their_sizes(tokens: int) -> None:
    method = Awq(INT4)
    x = outliers(tokens, 32)
    loud = method.observe(None, x * 1e20)
    for seen in (
        method.observe(method.observe(None, normal(tokens, 32) * 1e-10), x * 1e20),
        method.observe(method.observe(None, 0 * x), x * 1e20),
    ):
        one, other = (method.quantize({"w": normal(4, 32)}, each)["w"] for each in (loud, seen))
        assert torch.equal(one.quantized.codes, other.quantized.codes)
        assert other.error == pytest.approx(one.error, rel=1e-4)
