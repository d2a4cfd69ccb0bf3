"""A quantized model comes back from its file as it was; bad files are refused, old files stay."""

import json
import pstats
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qcourse import IntQuantizer, PerGroup
from qcourse.layers import storage
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.layers.saved_values import describe, rebuild, register
from qcourse.layers.storage import load_quantized, save_quantized
from qcourse.models.llama import Llama, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.recipes.quantize import quantize_model

SIZES = LlamaConfig(96, 64, 96, 2, 4, 2, tie_word_embeddings=True)
QUANTIZER = IntQuantizer(3, symmetric=False, granularity=PerGroup(32), scale_dtype=torch.float16)
IDS = torch.arange(20)[None]
OLD_FILE = Path(__file__).parents[1] / "data" / "saved_by_0.1.safetensors"
SCALE = "model.layers.1.mlp.up_proj.scale"


def empty() -> Llama:
    with torch.device("meta"):
        return Llama(SIZES)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = quantize_model(random_llama(SIZES, seed=0), QUANTIZER, progress=False).model
    save_quantized(model, tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


def test_there_and_back(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    back = load_quantized(path, empty())
    ours = model.state_dict()
    theirs = back.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])
    assert torch.equal(back(IDS), model(IDS))
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert back.model.layers[0].mlp.up_proj.layout.quantizer == QUANTIZER
    assert not back.training


def test_the_file_is_as_small_as_the_model(saved: tuple[nn.Module, Path]) -> None:
    model, path = saved
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert size < path.stat().st_size < size + 20_000  # the header
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_every_kind_of_buffer_comes_back(tmp_path: Path) -> None:
    q = IntQuantizer(4, granularity=PerGroup(8))(torch.randn(5, 16))
    layer = QuantizedLinear(
        q, torch.randn(5), input_scale=torch.rand(16) + 1, input_order=torch.randperm(16)
    )
    save_quantized(nn.Sequential(layer), tmp_path / "a")
    back = load_quantized(tmp_path / "a", nn.Sequential(nn.Linear(16, 5)))
    x = torch.randn(3, 16)
    assert torch.equal(back(x), layer(x))


def test_a_model_that_is_one_layer_itself(tmp_path: Path) -> None:
    layer = quantize_model(nn.Linear(32, 8), QUANTIZER, progress=False).model
    x = torch.randn(3, 32)
    save_quantized(layer, tmp_path / "a")
    assert torch.equal(load_quantized(tmp_path / "a", nn.Linear(32, 8))(x), layer(x))
    changed(tmp_path / "a", lambda tensors, about: tensors.pop("scale"))
    with pytest.raises(ValueError, match="tensor scale is missing"):
        load_quantized(tmp_path / "a", nn.Linear(32, 8))


def test_buffers_that_overlap_come_back_each(tmp_path: Path) -> None:
    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 4)
            whole = torch.randn(4, 8)
            self.register_buffer("whole", whole)
            self.register_buffer("rows", whole[:2])
            self.register_buffer("ints", whole.view(torch.int32))

    model = quantize_model(Overlapping(), QUANTIZER, progress=False).model
    save_quantized(model, tmp_path / "a")
    back = load_quantized(tmp_path / "a", Overlapping())
    for name, buffer in model.named_buffers():
        assert torch.equal(back.get_buffer(name), buffer)
        assert back.get_buffer(name).dtype == buffer.dtype


def test_the_model_given_is_not_changed(saved: tuple[nn.Module, Path]) -> None:
    given = random_llama(SIZES, seed=3)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    load_quantized(saved[1], given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())


# The disk


FULL = """
import resource, sys, torch
from qcourse import IntQuantizer
from qcourse.recipes.quantize import quantize_model
from qcourse.layers.storage import save_quantized
model = quantize_model(torch.nn.Linear(512, 512), IntQuantizer(8), progress=False).model
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_quantized(model, sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit to a file's size can be set there")
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old one")
    done = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(f"could not write {path} ("), done.stderr
    assert "what was there before is as it was" in done.stdout
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_breaks_off_leaves_the_old_one(
    saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = saved
    old = path.read_bytes()

    def half(tensors: dict[str, Tensor], aside: Path, metadata: dict[str, str]) -> None:
        aside.write_bytes(old[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", half)
    with pytest.raises(OSError, match=r"could not write .*No space left on device.*is as it was"):
        save_quantized(model, path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


# Files that are wrong


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_file_that_is_cut_short(saved: tuple[nn.Module, Path], share: float) -> None:
    path = saved[1]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is cut short, or no safetensors file"
    ):
        load_quantized(path, empty())


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_quantized(tmp_path / "none", empty())


def changed(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Write the file again after a change of its tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["qcourse"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, about)
    save_file(tensors, path, metadata={"qcourse": json.dumps(about)})


CODES = "model.layers.1.mlp.up_proj.packed"
NORM = "model.norm.weight"
LAYER = "model.layers.1.mlp.up_proj"
STRANGER = "pstats.FunctionProfile"  # a dataclass, but not one of this package


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, a: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t, a: t.pop("model.embed_tokens.weight"), "weight is missing"),
        (lambda t, a: t.pop(CODES), f"tensor {CODES} is missing"),
        (lambda t, a: t.pop(SCALE), f"tensor {SCALE} is missing"),
        (lambda t, a: t.update({"more": torch.ones(2)}), "tensor more is not one of the model"),
        (
            lambda t, a: t.update({NORM: torch.ones(2)}),
            rf"tensor {NORM} has the shape \(2,\), the model \(64,\)",
        ),
        (
            lambda t, a: t.update({CODES: t[CODES][1:].clone()}),
            f"'{LAYER}' has a wrong tensor: packed has shape",
        ),
        (
            lambda t, a: t.update({CODES: t[CODES].float()}),
            f"'{LAYER}' has a wrong tensor: packed is of torch.float32",
        ),
        (
            lambda t, a: t[SCALE].view(-1)[3:4].fill_(torch.nan),
            f"'{LAYER}' has a wrong tensor: scale=nan must be",
        ),
        (lambda t, a: t.update({SCALE: t[SCALE][1:].clone()}), f"'{LAYER}' has a wrong tensor: "),
        (lambda t, a: a.update(format="other"), "its metadata say 'other'"),
        (lambda t, a: a["layers"].update(other=a["layers"][LAYER]), "has no linear layer 'other'"),
        (
            lambda t, a: a["layers"][LAYER].update(shape=[64, 96]),
            r"is \(64, 96\) without bias in the file, \(96, 64\)",
        ),
        (
            lambda t, a: a.pop("inputs"),
            r"model\.safetensors has metadata with no table of 'inputs'",
        ),
        (
            lambda t, a: a["inputs"].update(other=1),
            r"metadata on the inputs of 'other', which is none of its",
        ),
        (lambda t, a: a.pop("tied"), r"model\.safetensors has metadata with no table of 'tied'"),
        (
            lambda t, a: a.update(layers=[]),
            r"model\.safetensors has metadata with no table of 'layers'",
        ),
        (
            lambda t, a: a["layers"][LAYER]["quantizer"].update(value="os.system"),
            "'os.system', which is no registered class",
        ),
        (
            lambda t, a: a["layers"][LAYER]["quantizer"].update(value=STRANGER),
            f"'{STRANGER}', which is no registered class",
        ),
        (lambda t, a: a["layers"][LAYER]["quantizer"].update(bits=99), "bits=99 must be"),
        (
            lambda t, a: a["layers"][LAYER]["quantizer"].update(extra=1),
            "no value of this version of qcourse",
        ),
    ],
)
def test_a_file_with_something_wrong(
    saved: tuple[nn.Module, Path], change: Any, words: str
) -> None:
    changed(saved[1], change)
    with pytest.raises(ValueError, match=words):
        load_quantized(saved[1], empty())


def test_a_file_of_something_else(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no file of 'qcourse quantized model, 1'"):
        load_quantized(tmp_path / "other.safetensors", empty())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{no", "has metadata that are no JSON"),
        ("[]", r"metadata say \[\]"),
        ("null", "metadata say None"),
    ],
)
def test_metadata_of_another_form(tmp_path: Path, text: str, words: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors", metadata={"qcourse": text})
    with pytest.raises(ValueError, match=rf"other\.safetensors .*{words}"):
        load_quantized(tmp_path / "other.safetensors", empty())


def test_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="must have a QuantizedLinear layer to be saved, and this Linear has none"
    ):
        save_quantized(nn.Linear(2, 2), tmp_path / "a")


# Values as JSON


def test_a_value_goes_through_json() -> None:
    assert rebuild(json.loads(json.dumps(describe(QUANTIZER))), IntQuantizer) == QUANTIZER


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2),
        len,
        {"a": 1},
        Path("a"),
        pstats.FunctionProfile("1", 0.0, 0.0, 0.0, 0.0, "a", 1),
    ],
)
def test_what_cannot_be_described(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be saved"):
        describe(value)


def test_a_class_of_ones_own_can_be_registered() -> None:
    @dataclass(frozen=True)
    class Mine:
        size: int

    with pytest.raises(TypeError, match=r"a Mine cannot be saved: .*register adds one"):
        describe(Mine(3))
    register("mine of this test", Mine)
    assert rebuild(describe(Mine(3)), Mine) == Mine(3)
    with pytest.raises(ValueError, match=r"name='int' is taken by IntQuantizer; choose another"):
        register("int", Mine)
    with pytest.raises(TypeError, match="must be a dataclass"):
        register("path", Path)


def test_a_dtype_that_is_none() -> None:
    with pytest.raises(ValueError, match="'load', which is none of torch's"):
        rebuild({"dtype": "load"}, torch.dtype)


def test_a_file_of_before_the_registry_loads() -> None:
    """Version 0.1 named classes by module paths that no longer exist; here are all quantizers."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(9)])
    loaded = load_quantized(OLD_FILE, model)
    kinds = [type(layer.layout.quantizer).__name__ for layer in loaded]
    assert kinds == [
        *("IntQuantizer", "FloatQuantizer", "FloatQuantizer", "CodebookQuantizer"),
        *("NVFP4Quantizer", "TernaryQuantizer", "IntQuantizer", "IntQuantizer", "IntQuantizer"),
    ]
    inputs = [type(layer.inputs).__name__ for layer in loaded[6:]]
    assert inputs == ["Dynamic", "Static", "OutlierColumns"]
    torch.manual_seed(0)
    assert torch.isfinite(loaded(torch.randn(16, 64))).all()


def test_a_value_of_another_type() -> None:
    with pytest.raises(ValueError, match=r"PerGroup\(size=2\), which is no IntQuantizer"):
        rebuild(describe(PerGroup(2)), IntQuantizer)
