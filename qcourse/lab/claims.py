"""The claims of the course's five founding documents, and the verdict a lesson reaches on each.

The idea: a lesson computes, asserts, and only then calls `settle`, which shows the claim beside the
finding. The documents are called A to E; the statements are in the course's own words.

How it differs from ``published.py``: that holds measurements of others, which lessons only draw.
"""

import re
from dataclasses import dataclass
from html import escape

SOURCES = {
    "A": "Quantization for Inference",
    "B": "A Weight Matrix, Newly Compressed",
    "C": "Model Quantization",
    "D": "Quantization And Model Compression",
    "E": "Quantization: Reducing Numerical Precision in Neural Network Weights and Activations",
}

# each verdict with its color
VERDICTS = {"HOLDS": "#2a8c4a", "HOLDS IF": "#b07800", "WRONG": "#c0392b"}

# One claim per row: its number, the documents that make it, the statement.
# Two or more spaces separate the columns; an indented line continues the row above it.
_TABLE = """
1   A, B, C  the error |w - w_hat| is at most half a step, s/2.
2   A, B     A rounds w/s + z, B rounds w/s and then adds z.
3   A        b bits give 2^b levels (256, 16) and b/16 of float16's memory.
4   A        weights near 0.01 and one outlier of 5 at INT4: a step of about 5/8, ordinary weights
             share a code or two.
5   C        the vector [-0.51, 0.02, 0.33, -0.18, 0.6] at INT8: every error within s/2, symmetric
             or not.
6   C        its JavaScript and its Python quantizer are the same mathematics.
7   C        an asymmetric zero point is round(-min / s), with no need to widen the range to 0.
8   D        [-2.8, 3.1] at INT8: s is about 0.0244; 0.70 becomes code 29 and comes back as 0.7076.
9   D        [-0.4, 5.7] at UINT8: s is about 0.0239, z about 17.
10  D        pack the first two INT4 codes of [-0.33, -0.10, 0.02, 0.41], low nibble first.
11  D        (-3, 6) packs to 0x6d and, at s = 0.05, comes back as -0.15 and 0.30.
12  B        the worst error follows from b and the largest magnitude M; an outlier of 20 M hurts
             all who share its scale.
13  B        on data that is never negative, asymmetric beats symmetric.
14  B        512 x 512 with 8 loud columns: errors 0.0702, 0.0079, 0.4021, 0.1450; the good ones
             have a scale a row.
15  D        rows in [-0.2, 0.2] and [-2, 2] at INT4: at s = 2/7 the small row is -1, 0, 1; alone s
             = 0.0286.
16  C        groups of 128 with a 16-bit scale add 0.125 bits, about 3%; the table of the same page
             says about 4.5 bits.
17  C        its group-wise code quantizes a matrix of any width.
18  D        k/8 + (scale + zero bytes)/group bytes a parameter: 0.515625 at INT4 g128; 70B: 36.1
             GB, scales 1.09 GB.
19  D        4096 x 4096: 32 MiB in float16; 8 MiB in INT4 with 131,072 scales in 256 KiB.
20  D        8192 x 4096: float16, INT8 a channel and INT4 g128, in bytes and MiB.
21  E        7B parameters: 28, 14, 7, 3.5 and 1.75 GB at 32, 16, 8, 4 and 2 bits.
22  E        float16 and bfloat16 both range over +-65,504.
23  C        70B parameters: 140 GB in float16, 35 GB in INT4.
24  E        LLM.int8() keeps features beyond 6 sigma in float16.
25  E        about 0.1% of the dimensions (channels) of activations are outliers.
26  C        quantizing activations hurts more than quantizing weights.
27  C        a dot product of codes needs one int32 accumulator, rescaled once by s_w s_x.
28  B, C     SmoothQuant moves the outliers of activations into the weights, whose scales can handle
             them.
29  B        QuaRot and SpinQuant flatten outliers by random rotations before quantizing.
30  E        GPTQ: after rounding weight i, the others change by -(w_q - w) / H_ii times row i of H.
31  B, C     at equal bits GPTQ keeps a layer's outputs, and the model, closer than rounding to
             nearest.
32  E        about 1% of the weights are salient, those that meet large activations; AWQ scales them
             up.
33  D        straight through: the gradient passes where qmin < round(x/s) + z < qmax, and nowhere
             else.
34  C        rounding to 2 bits breaks a model; quantization-aware training wins it back.
35  D        2:4 stores two values of four with their positions: [0, -1.25, 0, 0.5] is [-1.25, 0.5]
             at [1, 3].
36  D        a student learns from (1 - a) CE + a T^2 KL(teacher, student), both softened by T.
37  D        FP8 comes as E4M3, 1-4-3 bits, and E5M2, 1-5-2: more precision near one, or a wider
             range.
38  D        1.2 GB of weights at 900 GB/s take 1.333 ms in FP16, and in INT4 with 3% of metadata
             0.343 ms.
39  A, B     writing is bound by memory, so halving the bytes of the weights nearly halves its time.
40  C        to take it for granted that smaller is faster is a bug.
41  B        70B on nodes of 4 x 40 GB, 30% reserved, 12 replicas: GPUs in FP16, INT8 and INT4, and
             the reduction.
42  E        an INT8 KV cache takes half the memory, which leaves room for longer texts or larger
             batches.
43  D        with one scale for a group of INT4 weights, the scale comes out of the inner sum.
44  B        70B in INT4 fits one GPU of 40 GB, so the fleet shrinks by close to four times.
45  B        NF4 makes Llama-3.1-8B take about 4 times less memory.
46  C        a range that is too tight clips the tails, which is usually worse than one that is too
             wide.
47  B        per-tensor INT4 destroys the matrix: 40% relative error.
48  C        7B in INT4 with groups is about 4 GB, about 7 times smaller than float32.
49  E        rounding to nearest at INT4 loses much accuracy in models below about 30B parameters.
50  A, C, D  A keeps a scale for each weight column, C and D for each row.
51  B, D     B uses codes [-128, 127], D [-127, 127] (and [-7, 7] at INT4).
52  C        rounding errors are roughly zero-mean and partly cancel in a long sum.
53  D        a perplexity measured on one kind of text says nothing about another.
54  D        zeros anywhere pay only where a format and kernels for them cost less than what they
             skip.
55  E        INT8 inference brings 1.5 to 2 times the throughput of FP16.
72  E        LLM.int8() loses nothing in quality, at a cost in time.
56  B, C, D, E  INT4 costs a perplexity of 0.1 to 0.5, 0.1 to 1.0, a fraction, or under 1%.
59  C        the first and the last layers are disproportionately sensitive.
67  D        a change of perplexity measured on one kind of text does not carry over to another.
71  E        larger models are more robust to quantization.
73  C        INT8 is almost always safe with simple post-training quantization.
77  B        networks survive rounding because their solutions are flat and redundant.
"""


@dataclass(frozen=True)
class Claim:
    """A statement of the documents that its letters name."""

    number: int
    sources: str
    statement: str


@dataclass(frozen=True)
class Settled:
    """A claim with its verdict. A notebook shows it as a colored line, a terminal as plain text."""

    claim: Claim
    verdict: str
    finding: str

    def __repr__(self) -> str:
        # for terminals and for the tests of notebooks
        claim = self.claim
        first = f"Claim {claim.number} ({claim.sources}): {claim.statement}"
        return f"{first}\n  {self.verdict}: {self.finding}"

    def _repr_html_(self) -> str:
        claim = self.claim
        color = VERDICTS[self.verdict]
        # a statement such as "a < b" must not become a tag
        statement = escape(claim.statement, quote=False)
        finding = escape(self.finding, quote=False)
        return (
            f'<div style="border-left: 4px solid {color}; padding: 2px 10px">'
            f"<b>Claim {claim.number}</b> ({claim.sources}): {statement}<br>"
            f'<b style="color: {color}">{self.verdict}</b>: {finding}</div>'
        )


def _read_table(table: str) -> dict[int, Claim]:
    """Return the claims of a table by number."""
    # join each row with the lines that continue it
    rows: list[str] = []
    for line in table.strip().splitlines():
        if line.startswith(" "):
            rows[-1] += " " + line.strip()
        else:
            rows.append(line)

    # a statement may itself hold two spaces, so split twice only
    claims = {}
    for row in rows:
        number, sources, statement = re.split(r" {2,}", row, maxsplit=2)
        claims[int(number)] = Claim(int(number), sources, statement)
    return claims


CLAIMS = _read_table(_TABLE)


def settle(number: int, verdict: str, finding: str) -> Settled:
    """Return the claim of that number with the verdict that the cell has just asserted.

    Args:
        verdict: "HOLDS", "HOLDS IF" (the finding gives the condition) or "WRONG" (the finding
            corrects the claim).

    Raises:
        ValueError: no such claim or verdict.

    >>> settle(3, "HOLDS", "before scales")
    Claim 3 (A): b bits give 2^b levels (256, 16) and b/16 of float16's memory.
      HOLDS: before scales
    """
    if number not in CLAIMS:
        known = ", ".join(str(each) for each in CLAIMS)
        raise ValueError(f"number={number} must be the number of a claim: {known}")
    if verdict not in VERDICTS:
        raise ValueError(f"verdict={verdict!r} must be one of {', '.join(VERDICTS)}")
    return Settled(CLAIMS[number], verdict, finding)
