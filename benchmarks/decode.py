"""Decoding speed of a 1.1-billion-parameter Llama with random weights at 16, 8 and 4 bits.

The shape is TinyLlama's: 22 layers of 2048 x 2048 (keys and values 256), an MLP of 5632, a head of
32,000. The head, the embedding and the activations stay in bfloat16. A step decodes one token per
sequence of the batch, after a prompt of 64 tokens. On a GPU a step is one CUDA graph. 8 bits have
one scale per row and use torch's own product (``_weight_int8pack_mm``); 4 bits are in groups of 128
and use ``quantize_model(..., kernel="int4")``.

On a CPU each time stands next to the roofline's: the bytes of a step over the bandwidth that
``cost.devices.measure_device`` finds in the same run, or its operations over the peak. No number of
it is fitted.
"""

import argparse
import time
from collections.abc import Callable

import torch
from _stamp import four_digits, report, spread
from torch import Tensor, nn

from qcourse import IntQuantizer, PerChannel, PerGroup, quantize_model
from qcourse.cost.devices import measure_device
from qcourse.cost.memory import bytes_per_parameter
from qcourse.cost.roofline import Device, Work, roofline
from qcourse.models.llama import KVCache, Llama, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.recipes.quantize import QuantizedLinear

VOCABULARY = 32_000
HIDDEN = 2048
INTERMEDIATE = 5632
HEADS = 32
KV_HEADS = 4
PROMPT = 64  # tokens per sequence
STEPS = 12
UNCOUNTED = 2  # the first steps
BATCHES = (1, 2, 4, 8, 16, 32, 64)
INT4 = IntQuantizer(4, granularity=PerGroup(128), scale_dtype=torch.float16)
INT8 = IntQuantizer(8, granularity=PerChannel(0))
# Bits per weight that a kernel reads; the INT4 one also a scale and a zero per group of 128.
BITS_READ = {"bfloat16": 16, "int8": 8, "int4": 4 + 32 / 128}


class Int8Linear(nn.Module):
    """y = x w_hat^T by torch's product of floats and int8 codes."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        q = layer.quantized
        self.register_buffer("codes", q.codes)
        self.register_buffer("scale", q.scale.flatten().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """Return the product in x's dtype."""
        y = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.codes, self.scale)
        return y.reshape(*x.shape[:-1], -1)  # (..., out)


def with_int8_product(model: nn.Module) -> nn.Module:
    """Replace each ``QuantizedLinear`` of 8 bits in place; return the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuantizedLinear):
                setattr(module, name, Int8Linear(child))
    return model


def in_bfloat16(model: Llama) -> nn.Module:
    """Return the model as it is."""
    return model


def in_int8(model: Llama) -> nn.Module:
    """Return a model of 8-bit weights."""
    return with_int8_product(quantize_model(model, INT8, progress=False).model)


def in_int4(model: Llama) -> nn.Module:
    """Return a model of 4-bit weights."""
    return quantize_model(model, INT4, kernel="int4", progress=False).model


MODELS = {"bfloat16": in_bfloat16, "int8": in_int8, "int4": in_int4}


@torch.no_grad()
def step_ms(model: nn.Module, batch: int, device: torch.device) -> dict[str, float]:
    """Return the minimum and the median time of a step after the prompt; always the same step."""
    cache = KVCache()
    ids = torch.zeros(batch, PROMPT, dtype=torch.long, device=device)
    model(ids, cache)
    prompt = dict(cache.layers)

    def step() -> None:
        cache.layers = dict(prompt)
        model(ids[:, :1], cache)

    run = captured(step) if device.type == "cuda" else step
    times = []
    for _ in range(STEPS):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(1000 * (time.perf_counter() - start))
    return spread(times[UNCOUNTED:])


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return the step as one CUDA graph, because launching its kernels from Python is slower."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def predicted_ms(config: LlamaConfig, bits: float, batch: int, device: Device) -> float:
    """Return the roofline of a step: layers at their bits, head at 16, cache, activations."""
    kv = KV_HEADS * config.head_dim
    square = [(HIDDEN, HIDDEN)] * 2
    keys_and_values = [(HIDDEN, kv)] * 2
    mlp = [(HIDDEN, INTERMEDIATE)] * 3
    block = square + keys_and_values + mlp
    head = (HIDDEN, VOCABULARY)

    # The cache: keys and values of 2 bytes for every token of the prompt.
    cache_nbytes = 2 * 2 * kv * config.num_hidden_layers * PROMPT * batch
    work = Work(cache_nbytes, 0)
    for inputs, outputs in block * config.num_hidden_layers:
        work += product_work(inputs, outputs, bits, batch)
    work += product_work(*head, 16, batch)
    return 1000 * roofline(work, device, "bfloat16")


def product_work(inputs: int, outputs: int, bits: float, batch: int) -> Work:
    """Return the bytes and operations of one product: the weight at its bits, x and y at 16."""
    weight_nbytes = inputs * outputs * bytes_per_parameter(bits)
    activation_nbytes = 2 * batch * (inputs + outputs)
    return Work(weight_nbytes + activation_nbytes, 2 * batch * inputs * outputs)


def bfloat16_llama(config: LlamaConfig) -> Llama:
    """Return a model with random weights, for inference."""
    return random_llama(config, seed=0).bfloat16().requires_grad_(False).eval()


def rows(layers: int, device: torch.device) -> list[dict]:
    """Return a row per model and batch: time per step, tokens per second, the roofline's time."""
    config = LlamaConfig(VOCABULARY, HIDDEN, INTERMEDIATE, layers, HEADS, KV_HEADS)
    roof = measure_device() if device.type == "cpu" else None
    found: list[dict] = []
    bfloat16_ms: dict[int, float] = {}
    for name, make in MODELS.items():
        model = make(bfloat16_llama(config)).to(device)
        for batch in BATCHES:
            times = step_ms(model, batch, device)
            least_ms = times["min"]
            if name == "bfloat16":
                bfloat16_ms[batch] = least_ms
            row = {"what": f"{name}, batch {batch}", "unit": "ms", **times, "target": None}
            row["tokens_per_s"] = four_digits(1000 * batch / least_ms)
            row["faster_than_bfloat16"] = float(f"{bfloat16_ms[batch] / least_ms:.3g}")
            if roof:
                row["roofline_ms"] = four_digits(predicted_ms(config, BITS_READ[name], batch, roof))
            found.append(row)
            print(row, flush=True)
        del model
    return found


def main() -> None:
    """Measure all models and batches, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22, help="TinyLlama has 22")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    name = "decode_gpu" if on_gpu else "decode_cpu"
    label = torch.cuda.get_device_name() if on_gpu else "cpu"
    report(name, rows(options.layers, device), device=label)


if __name__ == "__main__":
    main()
