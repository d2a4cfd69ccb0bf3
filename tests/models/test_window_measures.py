"""Each window's measures are its own; batches, parts and memory do not change them."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from qcourse.models import window_measures
from qcourse.models.evaluate import agreement, evaluate, perplexity
from qcourse.models.evaluation_windows import LOGITS_BYTES, windows_at_once
from qcourse.models.llama import Llama, load_weights, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.models.recorded_logits import record_logits
from qcourse.models.standard_error import paired_difference, perplexity_change
from qcourse.trace.linears import map_weights

SIZES = LlamaConfig(96, 64, 112, 2, 8, 2, max_position_embeddings=64)
TOKENS = torch.randint(96, (83,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> Llama:
    weights = random_llama(SIZES, seed=0).state_dict()
    return load_weights(SIZES, weights | {"lm_head.weight": 20 * weights["lm_head.weight"]})


@pytest.fixture(scope="module")
def rounded(model: Llama) -> Llama:
    return map_weights(model, lambda w: (w * 20).round() / 20)


def test_a_window_has_the_measures_of_its_own_evaluation(model: Llama, rounded: Llama) -> None:
    found = agreement(rounded, model, TOKENS, 16)
    assert found.tokens_per_window.tolist() == [16, 16, 16, 16, 16, 2]
    for window in range(6):
        # The window's last target is the first id of the next.
        alone = agreement(rounded, model, TOKENS[16 * window : 16 * window + 17], 16)
        assert float(found.nll_per_window[window]) == pytest.approx(alone.nll, rel=1e-5)
        assert float(found.kl_per_window[window]) == pytest.approx(alone.kl, rel=1e-4)
        assert float(found.top1_per_window[window]) == alone.top1
        assert math.isnan(alone.kl_error)
    n = found.tokens_per_window
    assert found.kl == pytest.approx(float((found.kl_per_window * n).sum() / 82))


def test_errors_follow_the_formula(model: Llama, rounded: Llama) -> None:
    found = agreement(rounded, model, TOKENS, 16)
    n = found.tokens_per_window
    for mean, error, each in [
        (found.nll, found.nll_error, found.nll_per_window),
        (found.kl, found.kl_error, found.kl_per_window),
        (found.top1, found.top1_error, found.top1_per_window),
    ]:
        residuals = n * (each - mean)
        assert error == pytest.approx(math.sqrt(6 / 5 * float((residuals**2).sum())) / 82)
    alone = perplexity(model, TOKENS, 16)
    assert alone.perplexity_error == pytest.approx(alone.perplexity * alone.nll_error)
    assert 0 < alone.nll_error < 1


def test_evaluate_gives_all_of_them(model: Llama, rounded: Llama) -> None:
    found = evaluate(rounded, TOKENS, 16, reference=model, size_bytes=200)
    close = agreement(rounded, model, TOKENS, 16)
    alone = perplexity(rounded, TOKENS, 16)
    assert found.kl is not None
    assert found.top1 is not None
    assert found.bits_per_byte is not None
    assert (found.kl.mean, found.kl.error) == (close.kl, close.kl_error)
    assert (found.top1.mean, found.top1.error) == (close.top1, close.top1_error)
    assert found.perplexity.mean == pytest.approx(alone.perplexity)
    assert found.perplexity.error == pytest.approx(alone.perplexity_error)
    assert found.bits_per_byte.mean == pytest.approx(alone.bits_per_byte(200))
    assert found.bits_per_byte.error == pytest.approx(alone.nll_error * 82 / math.log(2) / 200)
    names = [line.partition("  ")[0].strip() for line in str(found).splitlines()]
    assert names == ["perplexity", "bits per byte", "KL divergence", "same top-1"]

    only = evaluate(rounded, TOKENS, 16)
    assert (only.kl, only.top1, only.bits_per_byte) == (None, None, None)
    assert str(only).startswith("perplexity ")
    assert "\n" not in str(only)
    with pytest.raises(ValueError, match="size_bytes must be at least 1, got 0"):
        evaluate(rounded, TOKENS, 16, size_bytes=0)


def test_results_pair_over_the_same_windows_only(model: Llama, rounded: Llama) -> None:
    a = perplexity(rounded, TOKENS, 16)
    b = evaluate(model, TOKENS, 16)
    change = paired_difference(a, b)
    assert change.mean == pytest.approx(a.nll - b.nll.mean)
    assert change.error < math.hypot(a.nll_error, b.nll.error)
    percent = perplexity_change(a, b)
    assert percent.mean == pytest.approx(100 * (a.perplexity / b.perplexity.mean - 1))
    others = [
        perplexity(model, TOKENS[:-1], 16),
        perplexity(model, TOKENS.flip(0), 16),
        perplexity(model, TOKENS, 15),
        perplexity(model, TOKENS, 16, stride=8),
    ]
    for other in others:
        with pytest.raises(ValueError, match="the same windows"):
            paired_difference(a, other)


@pytest.mark.parametrize("stride", [16, 5])
def test_batches_do_not_change_a_window(model: Llama, stride: int) -> None:
    expected = perplexity(model, TOKENS, 16, stride=stride, batch_size=1)
    for size in (3, 100, None):
        found = perplexity(model, TOKENS, 16, stride=stride, batch_size=size)
        torch.testing.assert_close(found.nll_per_window, expected.nll_per_window)
        assert found.nll_error == pytest.approx(expected.nll_error, rel=1e-4)
    assert expected.tokens_per_window.tolist()[:2] == [16, stride]


def test_parts_do_not_change_a_window(
    model: Llama, rounded: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = agreement(rounded, model, TOKENS, 16)
    monkeypatch.setattr(window_measures, "PART_VALUES", 3 * 96)
    parts = agreement(rounded, model, TOKENS, 16)
    torch.testing.assert_close(parts.nll_per_window, whole.nll_per_window)
    torch.testing.assert_close(parts.kl_per_window, whole.kl_per_window)
    assert parts.top1 == whole.top1


def test_a_large_vocabulary_lowers_the_number_of_windows() -> None:
    large = load_weights(LlamaConfig(49152, 8, 8, 1, 1, 1), random_large())
    assert windows_at_once(512, large) == 1
    assert windows_at_once(512, print, large) == 1
    assert windows_at_once(128, large) == 5
    assert LOGITS_BYTES >= 4 * 5 * 128 * 49152
    assert windows_at_once(8192, large) == 1
    assert windows_at_once(512, print) == 8


def random_large() -> dict[str, Tensor]:
    return random_llama(LlamaConfig(49152, 8, 8, 1, 1, 1), seed=0).state_dict()


MEMORY = """
import re, torch
from qcourse.models.evaluate import evaluate
from qcourse.models.recorded_logits import record_logits
from qcourse.models.llama import random_llama
from qcourse.models.llama_config import LlamaConfig

config = LlamaConfig(49152, 8, 8, 1, 1, 1, max_position_embeddings=512)
model = random_llama(config, seed=0).eval()
tokens = torch.randint(49152, (8 * 512 + 1,))
reference = record_logits(model)
evaluate(model, tokens[:17], 16, reference=reference)  # what torch loads on first use

def peak_kb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak_kb()
evaluate(model, tokens, 512, reference=reference)
evaluate(model, tokens, 512, reference=reference)
print((peak_kb() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_logits_of_a_large_vocabulary_stay_under_600_mb() -> None:
    # All 8 windows at once would take 800 MB for the model's and 800 MB for the reference's.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 600


def test_a_recorded_reference_runs_once_and_answers_alike(model: Llama, rounded: Llama) -> None:
    calls = []
    hook = model.model.norm.register_forward_pre_hook(lambda *args: calls.append(args))
    reference = record_logits(model)
    expected = agreement(rounded, model, TOKENS, 16)
    calls.clear()
    first = agreement(rounded, reference, TOKENS, 16)
    runs = len(calls)
    again = agreement(rounded, reference, TOKENS, 16)
    hook.remove()
    assert (runs, len(calls)) == (2, 2)  # a batch of whole windows, and the shorter window
    assert first == again == expected
    assert not model.lm_head._forward_pre_hooks


def test_a_recorded_head_keeps_its_own_hooks(model: Llama) -> None:
    # A hook that changes the head's input, as rotation at run time has.
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    expected = model(TOKENS[None, :16])
    found = record_logits(model)(TOKENS[None, :16])
    hook.remove()
    torch.testing.assert_close(found, expected)
