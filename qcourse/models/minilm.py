"""all-MiniLM-L6-v2: a small pretrained sentence encoder, in plain torch and offline.

It has 22.6 million trained parameters, with the outlier channels that training leaves, and maps a
text to a unit vector of 384 numbers; similar texts get similar vectors. The forward pass is BERT's:
embeddings, six layers of attention and MLP, and the mean over the tokens, scaled to length 1. The
tokens of all texts form one matrix (tokens, 384), padded for attention only, so linear layers see
real tokens only.

Source: Devlin et al. 2019, "BERT"; Wang et al. 2020, "MiniLM"; Reimers and Gurevych 2019,
"Sentence-BERT". Weights: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
`llama.py` is a decoder: it attends to earlier tokens only, and generates.
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

WIDTH = 384
HEADS = 12
LAYERS = 6
MLP_WIDTH = 1536
VOCABULARY = 30522
POSITIONS = 512
MAX_TOKENS = 256  # of the published model: it reads no further

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
# The head of BERT's own training task, and a table of 0 to 511.
_UNUSED = ("pooler.", "embeddings.position_ids")


class EncoderLayer(nn.Module):
    """One layer of BERT: x = norm(x + attention(x)), then x = norm(x + MLP(x))."""

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
        q = _heads(self.query(x), mask)
        k = _heads(self.key(x), mask)
        v = _heads(self.value(x), mask)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])

        # Drop the padding again: only real tokens reach the linear layers.
        tokens = mixed.transpose(1, 2).flatten(2)[mask]  # (tokens, 384)
        x = self.attention_norm(x + self.out(tokens))
        hidden = F.gelu(self.up(x))
        return self.mlp_norm(x + self.down(hidden))


class MiniLM(nn.Module):
    """The encoder, made by ``load_minilm``; ``embed`` maps texts to unit vectors."""

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
        """Return the mean vector of each text, scaled to length 1; mask is True for real tokens."""
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.words(ids[mask]) + self.positions(place[mask]) + self.segments.weight[0]
        x = self.norm(x)  # (tokens, 384)
        for layer in self.layers:
            x = layer(x, mask)
        total = _pad(x, mask).sum(1)
        mean = total / mask.sum(1, keepdim=True)
        return F.normalize(mean)

    @torch.no_grad()
    def embed(self, texts: Iterable[object], *, batch_size: int = 32) -> Float[Tensor, "texts 384"]:
        """Return one unit vector per text, so that a dot product is a cosine similarity.

        A text is read up to its 256th token. Raises TypeError if texts is a single string or holds
        anything else than strings, ValueError if batch_size is below 1.

        >>> a, b, c = load_minilm().embed(["a cat sat down", "kitten sitting", "rates rose"])
        >>> bool(a @ b > 0.5 > 0.1 > a @ c)
        True
        """
        encodings = self.tokenizer.encode_batch(_strings(texts))
        tokens = [torch.tensor(encoding.ids) for encoding in encodings]
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")

        # Longest first: texts of a batch have similar lengths, so there is little padding.
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        embeddings = self.words.weight.new_empty(len(tokens), WIDTH)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            embeddings[batch] = self._embed_batch([tokens[i] for i in batch])
        return embeddings

    def _embed_batch(self, tokens: list[Tensor]) -> Tensor:
        device = self.words.weight.device
        ids = pad_sequence(tokens, batch_first=True).to(device)  # (texts, longest)
        lengths = torch.tensor([len(row) for row in tokens], device=device)
        place = torch.arange(ids.shape[1], device=device)
        return self(ids, place < lengths[:, None])


def load_minilm(folder: Path | None = None) -> MiniLM:
    """Return the pretrained model in float32 and eval mode, after checking SHA-256, offline.

    Args:
        folder: with model.safetensors and tokenizer.json; by default as ``find_folder``.

    Raises:
        FileNotFoundError, ValueError: no folder has the files, or one is not the published one.

    >>> sum(p.numel() for p in load_minilm().parameters())
    22565376
    """
    folder = find_folder(folder)
    weights = parse_safetensors(read_checked(folder / "model.safetensors"))
    tokenizer = Tokenizer.from_buffer(read_checked(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)

    # On the meta device a model takes no memory and draws no random numbers.
    with torch.device("meta"):
        model = MiniLM(tokenizer)
    used = {_rename(name): w for name, w in weights.items() if not name.startswith(_UNUSED)}
    model.load_state_dict(used, assign=True)
    return model.eval().requires_grad_(False)


def _embedding(rows: int) -> nn.Embedding:
    # On the meta device nn.Embedding's own random numbers would import torch's compiler, which
    # takes longer than all the rest of loading.
    empty = torch.empty(rows, WIDTH)
    return nn.Embedding.from_pretrained(empty)


def _heads(x: Tensor, mask: Tensor) -> Tensor:
    padded = _pad(x, mask).unflatten(2, (HEADS, -1))  # (texts, longest, heads, 32)
    return padded.transpose(1, 2)  # (texts, heads, longest, 32)


def _pad(
    x: Float[Tensor, "tokens width"], mask: Bool[Tensor, "texts longest"]
) -> Float[Tensor, "texts longest width"]:
    padded = x.new_zeros(*mask.shape, x.shape[1])
    padded[mask] = x
    return padded


def _strings(texts: Iterable[object]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(
            f"texts must be a list of strings, got the string {texts!r}:"
            " write [text] for a single one"
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
