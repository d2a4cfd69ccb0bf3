"""GGUF files that gguf-py wrote, read by us and by gguf-py; and files that are damaged."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcourse import QuantizedTensor, read_gguf
from qcourse.formats.ggml_types import TYPES
from qcourse.formats.gguf_header import read_header

STORED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def weights(seed: int = 0) -> np.ndarray:
    """A matrix of three rows, with a block of zeros, one of equal values, and one above zero."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 96)).astype(np.float32)
    w[0, :32] = 0
    w[1, :32] = 0.7
    w[2, :32] = np.abs(w[2, :32]) + 3
    return w


def written(path: Path, *, names: tuple[str, ...] = STORED) -> Path:
    """A file of gguf-py with one tensor per type, and metadata of every kind."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_float32("a.float", 0.1)
    writer.add_float64("a.double", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_int64("an.int64", -(2**40))
    writer.add_string("a.string", "naïve ▁ text")
    writer.add_array("some.strings", ["a", "", "çedilla"])
    writer.add_array("some.ints", [1, -2, 3])
    for name in names:
        kind = GGMLQuantizationType[name]
        data = gguf_quantize(weights(), kind) if name != "F32" else weights()
        raw = None if name in ("F32", "F16") else kind
        writer.add_tensor(f"w.{name}", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gguf") / "all.gguf")


@pytest.mark.parametrize("name", STORED)
def test_each_type_decodes_to_the_bits_of_gguf_py(path: Path, name: str) -> None:
    ours = read_gguf(path).tensors[f"w.{name}"]
    assert ours.type == name
    theirs = next(t for t in GGUFReader(path).tensors if t.name == f"w.{name}")
    expected = torch.from_numpy(dequantize(theirs.data, theirs.tensor_type).copy())
    found = ours.dequantize()
    assert found.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=400), st.sampled_from(["Q8_0", "Q4_0", "Q4_1"]))
def test_any_bytes_decode_as_gguf_py_decodes_them(content: bytes, name: str) -> None:
    from qcourse.formats.ggml_blocks import READERS

    kind = GGMLQuantizationType[name]
    block_size, block_nbytes = GGML_QUANT_SIZES[kind]
    count = -(-len(content) // block_nbytes)
    padded = np.frombuffer(content.ljust(count * block_nbytes, b"\x11"), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(dequantize(padded, kind).copy())
    quantized = READERS[name](torch.from_numpy(padded.copy()), (count * block_size,))
    # A scale that is no number is refused, and so is a negative one where the format has none.
    halves = padded.reshape(count, block_nbytes)
    used = np.ascontiguousarray(halves[:, : 4 if name == "Q4_1" else 2]).view(np.float16)
    if not np.isfinite(used).all() or (name == "Q8_0" and (used < 0).any()):
        with pytest.raises(ValueError, match=r"must be (positive and )?finite"):
            quantized.dequantize()
        return
    assert torch.equal(quantized.dequantize(), expected)


def test_codes_and_sizes_are_those_of_the_file(path: Path) -> None:
    file = read_gguf(path)
    for name, bits in (("Q8_0", 8.5), ("Q4_0", 4.5), ("Q4_1", 5.0)):
        quantized = file.tensors[f"w.{name}"].load()
        assert isinstance(quantized, QuantizedTensor)
        assert quantized.nbytes == file.tensors[f"w.{name}"].place.nbytes
        assert quantized.bits_per_weight == bits


def test_metadata_is_that_of_gguf_py(path: Path) -> None:
    ours = read_gguf(path).metadata
    theirs = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    for key, value in ours.items():
        assert value == theirs[key], key
    # gguf-py adds three of its own, from the header.
    assert {key for key in theirs if not key.startswith("GGUF.")} == set(ours)
    assert ours["some.strings"] == ["a", "", "çedilla"]


def test_the_table_of_types_is_that_of_gguf_py() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert {number: tuple(kind) for number, kind in TYPES.items()} == theirs


def test_nothing_is_copied_before_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("w", np.zeros((2000, 4000), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(path).tensors["w"]
    loaded = tensor.load()
    assert isinstance(loaded, torch.Tensor)
    # A float tensor shares the mapped bytes.
    assert loaded.data_ptr() == tensor.data.data_ptr()
    assert loaded.shape == (2000, 4000)


def test_writing_into_a_loaded_tensor_does_not_change_the_file(path: Path) -> None:
    before = path.read_bytes()
    loaded = read_gguf(path).tensors["w.F32"].load()
    assert isinstance(loaded, torch.Tensor)
    loaded.fill_(9.0)
    assert path.read_bytes() == before


def test_a_type_that_is_not_decoded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "k.gguf"
    writer = GGUFWriter(path, "llama")
    blocks = np.zeros((1, 144), dtype=np.uint8)
    writer.add_tensor("w", blocks, raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(path).tensors["w"]
    assert (tensor.type, tensor.shape) == ("Q4_K", (1, 256))
    with pytest.raises(ValueError, match=r"tensor 'w' has the type Q4_K; this reads F32, .*Q8_0"):
        tensor.load()


# What is wrong, by hand: a header of these bytes.


def text(content: str) -> bytes:
    encoded = content.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    axes = struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def header(
    *tensors: bytes,
    metadata: bytes = b"",
    entries: int = 0,
    count: int | None = None,
    version: int = 3,
    data: int = 4096,
) -> bytes:
    number = len(tensors) if count is None else count
    start = b"GGUF" + struct.pack("<IQQ", version, number, entries)
    return start + metadata + b"".join(tensors) + bytes(data)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


HUGE = 2**63
BAD = [
    (b"GGML" + bytes(40), "begins with b'GGML'"),
    (b"GG", "the magic number takes 4 bytes at byte 0, but 2 are left"),
    (header(version=1), "it has version 1; this reads 2 and 3"),
    (header(version=3 << 24), "it is big-endian"),
    (header(entries=10**9), "1000000000 metadata entries need at least 13000000000 bytes"),
    (header(count=10**9), "1000000000 tensors need at least 24000000000 bytes"),
    (
        header(metadata=struct.pack("<Q", HUGE), entries=1),
        "a metadata key takes 9223372036854775808 bytes at byte 32",
    ),
    (
        header(metadata=entry("k", 8, struct.pack("<Q", HUGE)), entries=1),
        "the value of 'k' takes 9223372036854775808 bytes",
    ),
    (
        header(metadata=entry("k", 9, struct.pack("<IQ", 4, 2**62)), entries=1),
        "the array 'k' takes 18446744073709551616 bytes",
    ),
    (
        header(metadata=entry("k", 9, struct.pack("<IQ", 8, 10**9)), entries=1),
        "1000000000 values of 'k' need at least 8000000000 bytes",
    ),
    (header(metadata=entry("k", 13, b"") + bytes(9), entries=1), "'k' has the type 13"),
    (
        header(metadata=text("k")[:-1] + b"\xff" + bytes(20), entries=1),
        "a metadata key is not UTF-8",
    ),
    (
        header(metadata=2 * entry("k", 0, b"\1"), entries=2),
        "the metadata key 'k' comes twice",
    ),
    (
        header(metadata=entry("k", 9, 6 * struct.pack("<IQ", 9, 1)), entries=1),
        "'k' has arrays in arrays, more than 4 deep",
    ),
    (
        header(metadata=entry("general.alignment", 4, struct.pack("<I", 0)), entries=1),
        "general.alignment is 0; it must be a multiple of 8",
    ),
    (
        header(metadata=entry("general.alignment", 8, text("x")), entries=1),
        "general.alignment is 'x'",
    ),
    (header(tensor("w", [32], kind=4)), "tensor 'w' has the unknown type 4"),
    (header(tensor("w", [32], offset=8)), "tensor 'w' begins at 8, no multiple of 32"),
    (header(tensor("w", [33], kind=3)), "'w' has rows of 33, no multiple of the 32 values"),
    (header(tensor("w", [1] * 5)), "tensor 'w' has 5 axes; ggml has at most 4"),
    (header(tensor("w", [4096])), "tensor 'w' ends at byte 16"),
    (header(tensor("w", [32], offset=2**62)), "tensor 'w' ends at byte 4611686018427388"),
    (header(tensor("w", [2**32, 2**32, 2**32])), "tensor 'w' ends at byte 3169126500570"),
    (header(tensor("w", [32]), tensor("w", [32], offset=128)), "the tensor 'w' comes twice"),
    (
        header(tensor("a", [64]), tensor("b", [32], offset=128)),
        "the tensors 'a' and 'b' overlap",
    ),
]


@pytest.mark.parametrize(("content", "reason"), BAD, ids=[reason[:40] for _, reason in BAD])
def test_a_damaged_file_is_refused_before_memory_is_taken(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bad\.gguf is not readable as GGUF: ") as raised:
        read_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reason in str(raised.value)
    assert peak < 2_000_000


def test_the_headers_of_these_tests_are_otherwise_right() -> None:
    content = header(
        tensor("a", [32]),
        tensor("b", [64, 2], kind=3, offset=128),
        metadata=entry("k", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 2) + b"\1\2"),
        entries=1,
    )
    found = read_header(memoryview(content))
    assert found.metadata == {"k": [[1, 2]]}
    assert found.tensors["b"].shape == (2, 64)
    assert found.tensors["b"].nbytes == 2 * 2 * 20


def test_an_empty_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ValueError, match="it is empty"):
        read_gguf(tmp_path / "empty.gguf")
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9, 0.98])
def test_a_truncated_file_is_refused(path: Path, part: float) -> None:
    content = path.read_bytes()
    with pytest.raises(ValueError, match="byte"):
        read_header(memoryview(content[: int(part * len(content))]))


@pytest.fixture(scope="module")
def content(path: Path) -> bytes:
    return path.read_bytes()


@settings(max_examples=1000, deadline=None)
@example(edits=[(8, 255), (15, 255)])
@given(edits=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_mutated_header_is_read_or_refused(content: bytes, edits: list[tuple[int, int]]) -> None:
    damaged = bytearray(content)
    for at, value in edits:
        damaged[at] = value
    try:
        found = read_header(memoryview(damaged))
    except ValueError:
        return
    for place in found.tensors.values():
        assert place.start >= 0
        assert place.start + place.nbytes <= len(damaged)
