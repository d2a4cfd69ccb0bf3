"""Training what rounding or pruning broke: prepared, healed, converted, and what stops it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcourse import (
    IntQuantizer,
    PerChannel,
    PerGroup,
    PerTensor,
    load_tinylm,
    perplexity,
    quantize_model,
)
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.activations import Dynamic
from qcourse.methods.sparsity import NM
from qcourse.methods.ternary import TernaryQuantizer
from qcourse.models.llama import Llama, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.minifloat import E2M1
from qcourse.recipes.heal import heal
from qcourse.recipes.prune import Magnitude, SparseGPT, Wanda, hold_zeros, prune_model
from qcourse.recipes.qat_model import convert_qat, prepare_qat
from qcourse.texts.corpus_sources import read_package
from qcourse.trace.calibration_batches import random_windows

SMALL = LlamaConfig(64, 32, 48, 2, 4, 2)
INT2 = IntQuantizer(2, granularity=PerGroup(16))
INT2_ROWS = IntQuantizer(2, granularity=PerChannel(0))


@pytest.fixture
def model() -> Llama:
    return random_llama(SMALL, seed=0).eval().requires_grad_(False)


@pytest.fixture
def batches() -> list[Tensor]:
    """A language with a rule: each token is three more than the one before."""
    start = torch.arange(8)[:, None]
    return [(start + i + 3 * torch.arange(17)) % 64 for i in range(40)]


def loss_of(model: nn.Module, batches: list[Tensor]) -> float:
    ids = torch.cat(batches)
    with torch.no_grad():
        return float(
            nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        )


@pytest.mark.parametrize(
    ("quantizer", "options"),
    [
        (INT2, {}),
        (INT2, {"learned_scale": True}),
        (FloatQuantizer(E2M1, PerChannel(0)), {}),
        (TernaryQuantizer(), {"inputs": IntQuantizer(8, granularity=PerChannel(0))}),
    ],
)
def test_it_learns_and_is_converted_as_it_was_trained(
    model: Llama, batches, quantizer: Any, options: Any
) -> None:
    original = copy.deepcopy(model.state_dict())
    student = prepare_qat(model, quantizer, **options)
    before = loss_of(student, batches)
    done = heal(student, batches, learning_rate=1e-2, progress=False)
    assert (len(done.losses), done.note) == (40, "")
    assert loss_of(student, batches) < 0.7 * before
    converted = convert_qat(student)
    assert sum(isinstance(each, QuantizedLinear) for each in converted.modules()) == 14
    assert not any(each.requires_grad for each in converted.parameters())
    ids = batches[0]
    with torch.no_grad():
        torch.testing.assert_close(converted(ids), student(ids), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert isinstance(convert_qat(student), nn.Module)  # the student is still one


def test_a_teacher_is_followed(model: Llama, batches: list[Tensor]) -> None:
    heal(
        model.requires_grad_(True), batches, learning_rate=1e-2, progress=False
    )  # it has something to say
    teacher = model.eval().requires_grad_(False)
    student = prepare_qat(teacher, INT2, learned_scale=True)
    losses = heal(student, batches, teacher=teacher, learning_rate=3e-3, progress=False).losses
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_same_batches_give_the_same_weights(model: Llama, batches: list[Tensor]) -> None:
    students = [prepare_qat(model, INT2, learned_scale=True) for _ in range(2)]
    losses = [heal(student, iter(batches), steps=5, progress=False).losses for student in students]
    assert losses[0] == losses[1]
    assert all(
        torch.equal(*pair)
        for pair in zip(*(each.state_dict().values() for each in students), strict=True)
    )


@pytest.mark.parametrize("broken_at", [0, 3, 6])
def test_nan_stops_it_and_the_last_good_state_is_kept(
    model: Llama, batches: list[Tensor], broken_at: int
) -> None:
    student = prepare_qat(model, INT2)
    twin = prepare_qat(model, INT2)
    calls = iter(range(99))
    forward = student.forward
    student.forward = lambda ids: forward(ids) * (torch.nan if next(calls) == broken_at else 1)
    with pytest.warns(
        UserWarning, match=f"stopped after {broken_at + 1} steps: the loss became nan"
    ):
        done = heal(student, batches[:7], learning_rate=1e-2, progress=False)
    assert len(done.losses) == broken_at + 1
    assert f"the weights are those of step {broken_at}" in done.note
    if broken_at > 1:
        calls = iter(range(99))
        heal_until(twin, batches[:7], broken_at - 1)
    for mine, its in zip(student.parameters(), twin.parameters(), strict=True):
        assert torch.isfinite(mine).all()
        assert torch.equal(mine, its)


def heal_until(student: nn.Module, batches: list[Tensor], steps: int) -> None:
    """The first steps of a schedule of all batches: stop by an error."""

    def some() -> Any:
        yield from batches[:steps]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        heal(student, some(), steps=len(batches), learning_rate=1e-2, progress=False)


def test_an_update_beyond_all_floats_is_undone(model: Llama, batches: list[Tensor]) -> None:
    student = prepare_qat(model, INT2)
    hook = next(student.parameters()).register_hook(lambda grad: grad * torch.nan)
    with pytest.warns(UserWarning, match="the last update left the range of floats"):
        heal(student, batches[:1], progress=False)
    hook.remove()
    assert all(torch.isfinite(each).all() for each in student.parameters())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"batches": []}, ValueError, "steps=0 at least 1"),
        ({"batches": iter([]), "steps": 3}, ValueError, "batches has no batch"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0 must be above 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate=nan"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
        ({"alpha": 2.0}, ValueError, "alpha=2.0"),
        ({"alpha": 0.5}, ValueError, "alpha=0.5 needs a teacher"),
        ({"batches": iter([torch.ones(1, 4)])}, TypeError, "len"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_healed(
    model: Llama, batches, change: dict, kind: type[Exception], words: str
) -> None:
    given = {"batches": batches, **change}
    with pytest.raises(kind, match=words):
        heal(prepare_qat(model, INT2), given.pop("batches"), progress=False, **given)


def test_a_model_that_is_one_layer_itself() -> None:
    layer = nn.Linear(16, 4)
    converted = convert_qat(prepare_qat(layer, INT2))
    assert isinstance(converted, QuantizedLinear)
    assert not converted.training
    expected = INT2(layer.weight.detach()).dequantize()
    torch.testing.assert_close(converted.weight, expected)


def test_what_cannot_be_prepared_or_converted(model: Llama) -> None:
    with pytest.raises(ValueError, match=r"must have an nn\.Linear layer, and this ReLU has none"):
        prepare_qat(nn.ReLU(), INT2)
    with pytest.raises(ValueError, match="do not suit the quantizer"):
        prepare_qat(model, IntQuantizer(2, granularity=PerGroup(20)))
    with pytest.raises(
        ValueError,
        match="student must come from prepare_qat: this Llama has no fake-quantized layer",
    ):
        convert_qat(model)


def test_inputs_have_a_scale_per_token_per_batch_or_per_group_but_not_per_channel() -> None:
    layer = nn.Linear(4, 2)
    x = torch.tensor([[[7.0, 1.0, 0.0, 0.0], [0.7, 0.1, 0.2, 0.0]]])
    per_token = prepare_qat(layer, INT2_ROWS, inputs=IntQuantizer(4, granularity=PerChannel(0)))
    per_batch = prepare_qat(layer, INT2_ROWS, inputs=IntQuantizer(4, granularity=PerTensor()))
    torch.testing.assert_close(input_of(per_token, x), x)
    rounded = torch.tensor([[[7.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(input_of(per_batch, x), rounded)
    torch.testing.assert_close(convert_qat(per_batch).rounded(x), rounded)
    with pytest.raises(ValueError, match=r"inputs have the granularity PerChannel\(axis=1\)"):
        prepare_qat(layer, INT2_ROWS, inputs=IntQuantizer(8, granularity=PerChannel(1)))


@pytest.mark.usefixtures("unchecked")
def test_inputs_that_are_no_quantizer() -> None:
    inputs: Any = Dynamic(IntQuantizer(8, granularity=PerChannel(0)))
    with pytest.raises(TypeError, match="must be a quantizer"):
        prepare_qat(nn.Linear(4, 2), INT2_ROWS, inputs=inputs)


def input_of(student: nn.Module, x: Tensor) -> Tensor:
    """What the product of a student that is one layer gets as its input."""
    hook = next(iter(student._forward_pre_hooks.values()))
    return hook(student, (x,))


@pytest.mark.parametrize("method", [Magnitude(NM(2, 4)), Wanda(NM(2, 4)), SparseGPT(NM(2, 4))])
def test_a_pruned_model(model: Llama, batches: list[Tensor], method: Any) -> None:
    pruned = prune_model(
        model, method, calibration=[batch[:, :-1] for batch in batches[:4]], progress=False
    )
    assert len(pruned.masks) == len(pruned.errors) == 14
    for name, mask in pruned.masks.items():
        weight = pruned.model.get_submodule(name).weight
        assert mask.reshape(-1, 4).sum(1).eq(2).all()
        assert not weight[~mask].any()
        old = model.get_submodule(name).weight
        assert torch.equal(weight[mask], old[mask]) == (not isinstance(method, SparseGPT))
    assert torch.equal(pruned.model.lm_head.weight, model.lm_head.weight)


def test_layers_that_are_not_pruned_are_named_with_the_reason() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("idle", "used", "other")})
    pruned = prune_model(
        model,
        Wanda(NM(2, 4)),
        calibration=[torch.ones(2, 8)],
        run=lambda model, x: model["used"](x),
        layers=["used", "idle"],
        progress=False,
    )
    assert list(pruned.masks) == ["used"]
    assert [(kept.name, kept.why) for kept in pruned.kept] == [
        ("idle", "no calibration batch reaches it"),
        ("other", "not chosen"),
    ]


def test_zeros_are_held_while_the_rest_is_trained(model: Llama, batches: list[Tensor]) -> None:
    pruned = prune_model(model, Magnitude(NM(2, 4)), progress=False)
    student = hold_zeros(pruned.model, pruned.masks)
    before = loss_of(student, batches)
    heal(student, batches, learning_rate=1e-2, progress=False)
    assert loss_of(student, batches) < 0.7 * before
    for name, mask in pruned.masks.items():
        weight = student.get_submodule(name).weight
        assert not weight[~mask].any()
        assert weight[mask].ne(0).all()


def test_what_cannot_be_pruned(model: Llama) -> None:
    with pytest.raises(ValueError, match="calibration=None"):
        prune_model(model, Wanda(NM(2, 4)), progress=False)
    with pytest.raises(ValueError, match="do not suit"):
        prune_model(model, Magnitude(NM(1, 3)), progress=False)
    with pytest.raises(ValueError, match=r"must have an nn\.Linear layer"):
        prune_model(nn.ReLU(), Magnitude(NM(2, 4)), progress=False)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match="masks has 'up', and the model no such linear layer"):
        hold_zeros(model, {"up": torch.ones(2, 2).bool()})
    with pytest.raises(
        ValueError, match=rf"the mask of {name} must be boolean of the shape \(48, 32\)"
    ):
        hold_zeros(model, {name: torch.ones(2, 2).bool()})
    with pytest.raises(ValueError, match="must be boolean"):
        hold_zeros(model, {name: torch.ones(48, 32)})


@pytest.mark.usefixtures("unchecked")
def test_a_pruning_method_is_needed(model: Llama) -> None:
    with pytest.raises(TypeError, match=r"method='wanda' must be such as Magnitude\(NM\(2, 4\)\)"):
        prune_model(model, "wanda", progress=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def english() -> Tensor:
    tiny = load_tinylm()
    documents = [
        each for each in read_package("argparse", lambda unit: True) if each.kind == "docs"
    ]
    return torch.tensor([0, *tiny.tokenizer.encode("\n".join(each.text for each in documents)).ids])


def test_the_tiny_lm_two_bits_learned_again_and_two_of_four(english: Tensor) -> None:
    """A few steps on a little text are enough to see which way it goes."""
    tiny = load_tinylm().model
    text = english[:1025]
    whole = perplexity(tiny, text, 256).perplexity
    grid = IntQuantizer(2, granularity=PerGroup(32), scale_rule="mse")
    rounded = perplexity(quantize_model(tiny, grid, progress=False).model, text, 256).perplexity
    student = prepare_qat(tiny, grid, learned_scale=True)
    heal(
        student,
        random_windows(english, 129, count=6, batch_size=4),
        teacher=tiny,
        learning_rate=1e-3,
        progress=False,
    )
    learned = perplexity(convert_qat(student), text, 256).perplexity
    assert whole < learned < rounded
    found = {}
    for method in (Magnitude(NM(2, 4)), Wanda(NM(2, 4)), SparseGPT(NM(2, 4))):
        calibration = random_windows(english[1025:], 256, count=1)
        pruned = prune_model(tiny, method, calibration=calibration, progress=False)
        found[type(method).__name__] = perplexity(pruned.model, text, 256).perplexity
    assert found["SparseGPT"] < found["Magnitude"]
    assert found["Wanda"] < found["Magnitude"]
