"""N:M pruning by hand and by brute force, SparseGPT against least squares, and its storage."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import normal
from torch import Tensor

from qcourse import PerGroup, quantize
from qcourse.cost.memory import sparse_bytes_per_parameter
from qcourse.methods.second_moment import SecondMoment, output_error
from qcourse.methods.sparse_storage import compress_sparse, position_bits, semi_structured
from qcourse.methods.sparsity import NM, magnitude, sparsegpt, wanda

PATTERNS = [NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 2), NM(3, 4), NM(4, 4), NM(1, 1), NM(5, 16)]


def correlated(tokens: int, size: int, seed: int = 0) -> Tensor:
    """Inputs of a low rank and noise, of uneven sizes."""
    low_rank = normal(tokens, size // 4, seed=seed) @ normal(size // 4, size, seed=seed + 1)
    x = low_rank + 0.5 * normal(tokens, size, seed=seed + 2)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.3, 3, size)[order]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_a_mask_keeps_the_highest_of_each_run(m: int, runs: int, keep: int, seed: int) -> None:
    pattern = NM(min(keep, m), m)
    score = normal(3, runs * m, seed=seed).round(decimals=1)
    scores = score.reshape(-1, m).tolist()
    masks = pattern.mask(score).reshape(-1, m).tolist()
    for row, kept in zip(scores, masks, strict=True):
        assert sum(kept) == pattern.keep
        # Of equal scores the first.
        best = sorted(range(m), key=lambda i: (-row[i], i))[: pattern.keep]
        assert [i for i in range(m) if kept[i]] == sorted(best)


def test_magnitude_and_wanda_by_hand() -> None:
    w = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
    assert magnitude(w, NM(2, 4)).weight.tolist() == [
        [3, 0, 2, 0],
        [0, 0, -0.30000001192092896, 0.4000000059604645],
    ]
    x = torch.tensor([[1.0, 10.0, 1.0, 0.0], [1.0, -10.0, 1.0, 0.0]])
    for h in (x.T @ x, SecondMoment().add(x)):
        pruned = wanda(w, h, NM(2, 4))
        assert pruned.mask.tolist() == [[True, True, False, False], [False, True, True, False]]
    lost = x @ (w - pruned.weight).T
    assert pruned.error == pytest.approx(float(lost.norm() / (x @ w.T).norm()), rel=1e-5)


def test_a_zero_that_is_kept_is_in_the_mask() -> None:
    pruned = magnitude(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), NM(2, 4))
    assert pruned.mask.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_errors_fall_in_order(pattern: NM) -> None:
    w = normal(48, 80)
    x = correlated(400, 80)
    h = x.T @ x / len(x)
    plain = output_error(w, magnitude(w, pattern).weight, h)
    by_inputs = wanda(w, h, pattern)
    answered = sparsegpt(w, h, pattern)
    for pruned in (by_inputs, answered):
        assert pruned.mask.reshape(-1, pattern.m).sum(1).eq(pattern.keep).all()
        assert not pruned.weight[~pruned.mask].any()
        assert pruned.error == pytest.approx(output_error(w, pruned.weight, h))
    if pattern.keep == pattern.m:
        assert torch.equal(by_inputs.weight, w)
        torch.testing.assert_close(answered.weight, w)
    else:
        assert answered.error < 0.9 * by_inputs.error < 0.9 * plain


def test_sparsegpt_is_near_the_best_that_a_mask_allows() -> None:
    """With the mask given, least squares on the inputs that stay: no weights do better."""
    w = normal(8, 32)
    x = correlated(300, 32).double()
    h = x.T @ x / len(x)
    pruned = sparsegpt(w.double(), h, NM(2, 4))
    best = torch.zeros(8, 32).double()
    for i, kept in enumerate(pruned.mask):
        best[i, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ w[i].double())
    least = output_error(w.double(), best, h)
    assert least <= pruned.error < 3.5 * least
    assert pruned.error < 0.75 * wanda(w.double(), h, NM(2, 4)).error


def test_one_run_of_two_is_the_surgeons_step() -> None:
    h = torch.tensor([[2.0, 1.2], [1.2, 1.0]]).double()
    w = torch.tensor([[0.5, 0.4]]).double()
    inverse = torch.linalg.inv(h)
    pruned = sparsegpt(w, h, NM(1, 2), damp=1e-9)
    # The score of column 0 is w^2 / [H^-1]_00; of column 1, after column 0, it is w^2 H_11.
    scores = [float(w[0, 0] ** 2 / inverse[0, 0]), float(w[0, 1] ** 2 * h[1, 1])]
    assert scores[0] < scores[1]
    assert pruned.mask.tolist() == [[False, True]]
    expected = float(w[0, 1] - w[0, 0] / inverse[0, 0] * inverse[0, 1])
    assert float(pruned.weight[0, 1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_blocks_change_nothing(block_size: int) -> None:
    w = normal(24, 64)
    x = correlated(300, 64)
    h = (x.T @ x).double()
    whole = sparsegpt(w.double(), h, NM(2, 4), block_size=64)
    pruned = sparsegpt(w.double(), h, NM(2, 4), block_size=block_size)
    assert torch.equal(pruned.mask, whole.mask)
    torch.testing.assert_close(pruned.weight, whole.weight)


def test_dead_inputs() -> None:
    w = normal(6, 16)
    x = correlated(100, 16)
    x[:, 4:9] = 0
    pruned = sparsegpt(w, x.T @ x, NM(2, 4))
    assert not pruned.weight[:, 4:9].any()
    assert torch.isfinite(pruned.weight).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["float32", "float16", "codes"])
def test_compressed_and_back(pattern: NM, kind: str) -> None:
    pruned = magnitude(normal(6, 80), pattern)
    weight = pruned.weight
    if kind == "codes":
        weight = quantize(weight, 4, granularity=PerGroup(16)).codes
    if kind == "float16":
        weight = weight.half()
    small = compress_sparse(weight, pruned.mask, pattern)
    back = small.decompress()
    assert back.dtype == weight.dtype
    assert torch.equal(back, weight)
    assert small.values.shape == (6, 80 * pattern.keep // pattern.m)
    bits = 8 * weight.element_size()
    stored = 8 * small.nbytes / 480
    expected = 8 * sparse_bytes_per_parameter(bits, pattern.keep, pattern.m)
    assert stored == pytest.approx(expected, abs=8 / 480)


def test_the_sources_example() -> None:
    w = torch.tensor([[0.0, -1.25, 0.0, 0.5]])
    small = compress_sparse(w, NM(2, 4).mask(w.abs()), NM(2, 4))
    assert small.values.tolist() == [[-1.25, 0.5]]
    assert small.where().tolist() == [[1, 3]]
    assert small.positions.tolist() == [0b1101]


def test_bits_by_hand() -> None:
    assert [position_bits(m) for m in (1, 2, 3, 4, 8, 9)] == [0, 1, 2, 2, 3, 4]
    assert 8 * sparse_bytes_per_parameter(16, 2, 4) == 9
    assert 8 * sparse_bytes_per_parameter(4, 2, 4, group_size=128) == 3 + 16 / 128
    assert 8 * sparse_bytes_per_parameter(4, 1, 1) == 4
    for keep, m in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match=f"keep={keep} of m=4 must be from 1 to m"):
            sparse_bytes_per_parameter(4, keep, m)


HALF = NM(2, 4)
ONES = torch.ones(2, 8)
MASK = torch.tensor([True, False] * 4).expand(2, 8)  # every other input
NO_FIT = r"hessian of shape \(7, 7\) does not fit w"
NO_RUNS = r"m=4 of 2:4 does not divide .* \(2, 6\)"
NO_RUNS_OF_ANY = "m=4 of 2:4 does not divide"
NO_RUNS_OF_6 = "m=4 does not divide the 6 inputs"
TOO_MANY = r"mask keeps \[2\] of 4 in some run; 1:4 keeps 1"
NO_GPU = "weight is on cpu; 2:4 products need an NVIDIA GPU"


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: NM(0, 4), ValueError, "keep=0 of m=4"),
        (lambda: NM(5, 4), ValueError, "keep=5 of m=4"),
        (lambda: NM(2.0, 4), ValueError, r"keep=2.0 of m=4"),
        (lambda: magnitude(ONES[:, :6], HALF), ValueError, NO_RUNS),
        (lambda: magnitude(torch.ones(8), HALF), ValueError, r"w of shape \(8,\) must be a matrix"),
        (lambda: magnitude(torch.ones(2, 8).int(), NM(2, 4)), TypeError, "w"),
        (lambda: magnitude(torch.full((2, 8), torch.nan), NM(2, 4)), ValueError, "NaN"),
        (lambda: wanda(ONES, torch.eye(7), HALF), ValueError, NO_FIT),
        (lambda: sparsegpt(ONES, torch.eye(7), HALF), ValueError, NO_FIT),
        (lambda: sparsegpt(ONES[:, :6], torch.eye(6), HALF), ValueError, NO_RUNS_OF_ANY),
        (lambda: sparsegpt(ONES, torch.eye(8), HALF, damp=0.0), ValueError, "damp"),
        (lambda: compress_sparse(ONES, MASK[:, :4], HALF), ValueError, r"mask of shape \(2, 4\)"),
        (lambda: compress_sparse(ONES, MASK.float(), HALF), ValueError, "must be boolean"),
        (lambda: compress_sparse(ONES, MASK, NM(1, 4)), ValueError, TOO_MANY),
        (lambda: compress_sparse(ONES, MASK, HALF), ValueError, "weight is not 0 everywhere"),
        (lambda: compress_sparse(ONES[:, :6], MASK[:, :6], HALF), ValueError, NO_RUNS_OF_6),
        (lambda: semi_structured(ONES), RuntimeError, NO_GPU),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA GPU here"
)
def test_sparse_tensor_cores() -> None:
    pruned = magnitude(normal(256, 256), NM(2, 4)).weight.half().cuda()
    x = normal(64, 256, seed=1).half().cuda()
    y = torch.nn.functional.linear(x, semi_structured(pruned))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, pruned), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("seed", range(4))
def test_sparsegpt_is_near_the_best_of_all_masks(seed: int) -> None:
    """Two runs of four have 36 masks: each with the best weights that it allows."""
    w = normal(1, 8, seed=seed).double()
    x = correlated(200, 8, seed).double()
    before = w.clone()
    h = x.T @ x / len(x)
    pairs = list(itertools.combinations(range(4), 2))
    errors = []
    for first, second in itertools.product(pairs, pairs):
        kept = [*first, *(4 + i for i in second)]
        errors.append(output_error(w, solved(w, h, kept), h))
    best = min(errors)
    found = sparsegpt(w, h, NM(2, 4)).error
    assert best <= found + 1e-12 < 1.4 * best
    assert torch.equal(w, before)  # of one row, the transpose is the same memory


def solved(w: Tensor, h: Tensor, kept: list[int]) -> Tensor:
    out = torch.zeros_like(w)
    out[0, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ w[0])
    return out
