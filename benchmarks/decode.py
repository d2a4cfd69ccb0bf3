"""Tokens a second that a 1.1-billion-parameter Llama with random weights writes at 16, 8 and 4 bits a weight.

The shape is TinyLlama's: 22 layers of 2048 x 2048 (keys and values 256), an MLP of 5632, a head of 32,000 that stays
in bfloat16, as do embedding and activations. A step writes one token for each text of the batch; each text holds 64
tokens by then. On a GPU a step is one CUDA graph. 8 bits have a scale a row and torch's own product
(``_weight_int8pack_mm``); 4 bits are in groups of 128, through ``quantize_model(..., kernel="int4")``.

Beside each time stands the roofline's: the bytes of a step over the bandwidth that ``cost.devices.measure`` finds in
the same run, or its operations over the peak. It has no fitted number.
"""

import argparse
import time
from collections.abc import Callable

import torch
from _stamp import report, spread
from torch import Tensor, nn

from qcourse import IntQuantizer, PerChannel, PerGroup, quantize_model
from qcourse.cost.devices import measure_device
from qcourse.cost.memory import bytes_per_parameter
from qcourse.cost.roofline import Device, Work, roofline
from qcourse.models.llama import KVCache, Llama, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.recipes.quantize import QuantizedLinear

VOCABULARY, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 32_000, 2048, 5632, 32, 4
PROMPT, STEPS = 64, 12
BATCHES = (1, 2, 4, 8, 16, 32, 64)
INT4 = IntQuantizer(4, granularity=PerGroup(128), scale_dtype=torch.float16)
INT8 = IntQuantizer(8, granularity=PerChannel(0))
BITS_READ = {
    "bfloat16": 16,
    "int8": 8,
    "int4": 4 + 32 / 128,
}  # what a kernel reads: the INT4 one a scale and a zero


class Int8Linear(nn.Module):
    """y = x w_hat^T by torch's product of floats with int8 codes."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        q = layer.quantized
        self.register_buffer("codes", q.codes)
        self.register_buffer("scale", q.scale.flatten().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """The product, in x's dtype."""
        y = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.codes, self.scale)
        return y.reshape(*x.shape[:-1], -1)  # (..., out)


def with_int8_product(model: nn.Module) -> nn.Module:
    """Replace each ``QuantizedLinear`` of 8 bits, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuantizedLinear):
                setattr(module, name, Int8Linear(child))
    return model


MODELS: dict[str, Callable[[Llama], nn.Module]] = {
    "bfloat16": lambda model: model,
    "int8": lambda model: with_int8_product(quantize_model(model, INT8, progress=False).model),
    "int4": lambda model: quantize_model(model, INT4, kernel="int4", progress=False).model,
}


@torch.no_grad()
def step_ms(model: nn.Module, batch: int, device: torch.device) -> dict[str, float]:
    """The least and the median time of a step, once the prompts have been read; the same step each time."""
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
    return spread(times[2:])


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph: launched from Python, its hundreds of kernels would wait for Python."""
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
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def predicted_ms(config: LlamaConfig, bits: float, batch: int, device: Device) -> float:
    """The roofline of a step: all layers at their bits, the head at 16, the cache and the activations."""
    kv = KV_HEADS * config.head_dim
    block = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, kv)] * 2 + [(HIDDEN, INTERMEDIATE)] * 3
    shapes = {bits: block * config.num_hidden_layers, 16.0: [(HIDDEN, VOCABULARY)]}
    if bits == 16:
        shapes = {16.0: block * config.num_hidden_layers + [(HIDDEN, VOCABULARY)]}
    work = Work(
        2 * 2 * kv * config.num_hidden_layers * PROMPT * batch, 0
    )  # keys and values of 2 bytes
    for bits_read, matrices in shapes.items():
        for a, b in matrices:
            work += Work(
                a * b * bytes_per_parameter(bits_read) + 2 * batch * (a + b), 2 * batch * a * b
            )
    return 1000 * roofline(work, device, "bfloat16")


def rows(layers: int, device: torch.device) -> list[dict]:
    """A line for each model and batch: time a step, tokens a second, the roofline's prediction."""
    config = LlamaConfig(VOCABULARY, HIDDEN, INTERMEDIATE, layers, HEADS, KV_HEADS)
    roof = measure_device() if device.type == "cpu" else None
    found: list[dict] = []
    plain: dict[int, float] = {}
    for name, make in MODELS.items():
        model = make(random_llama(config, seed=0).bfloat16().requires_grad_(False).eval()).to(
            device
        )
        for batch in BATCHES:
            times = step_ms(model, batch, device)
            line = {"what": f"{name}, batch {batch}", "unit": "ms", **times, "target": None}
            line["tokens_per_s"] = float(f"{1000 * batch / times['min']:.4g}")
            line["faster_than_bfloat16"] = float(
                f"{plain.setdefault(batch, times['min']) / times['min']:.3g}"
            )
            if roof:
                line["roofline_ms"] = float(
                    f"{predicted_ms(config, BITS_READ[name], batch, roof):.4g}"
                )
            found.append(line)
            print(line, flush=True)
        del model
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layers", type=int, default=22, help="22 are TinyLlama's, 1.1 billion parameters"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    where = torch.device(options.device)
    label = torch.cuda.get_device_name() if where.type == "cuda" else "cpu"
    report(
        "decode_gpu" if where.type == "cuda" else "decode_cpu",
        rows(options.layers, where),
        device=label,
    )
