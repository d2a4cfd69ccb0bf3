"""Instructions are found in a disassembly, sorted by kind, and counted for the three kernels."""

import pytest

from qcourse.lab import machine_code
from qcourse.lab.machine_code import VERSIONS, instructions, kind, loop_of

DISASSEMBLY = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/                   LDG.E R2, [R4.64] ;
        /*0030*/              @!P0 LOP3.LUT R1, R2, 0xf000f, R3, 0xf8, !PT ;
        /*0040*/                   HFMA2.MMA R1, R1, R2, R3 ;
        /*0050*/               @P0 BRA 0x20 ;
        /*0060*/                   IADD3 R1, R2, R3, RZ ;
        /*0070*/               @P1 BRA 0x60 ;
        /*0080*/                   EXIT ;
"""


def test_the_loop_is_the_one_that_loads() -> None:
    loop = loop_of(DISASSEMBLY)
    assert [each.split()[0] for each in loop] == ["LDG.E", "LOP3.LUT", "HFMA2.MMA", "BRA"]
    kinds = [kind(each) for each in loop]
    assert kinds == ["memory", "bits", "float arithmetic", "addresses and the rest"]


def test_no_loop_no_count() -> None:
    with pytest.raises(ValueError, match="no loop that loads"):
        loop_of(DISASSEMBLY.replace("LDG", "MOV"))


def test_a_machine_that_cannot_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "__name__", "qcourse.lab.no_such_module")
    assert "No module named" in str(instructions())


def test_three_kernels_each_cheaper_than_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # of this process: the one that compiles must not inherit it
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton", reason="triton is not installed")
    counts = instructions()
    assert not isinstance(counts, str), counts
    total = {version: sum(each.values()) for version, each in counts.items()}
    assert tuple(total) == VERSIONS
    assert total["naive"] > 10 > 4 > total["planes"] > 1.2 * total["tuned"] > 1.8
    assert all(0.1 < each["tensor core"] < 0.5 for each in counts.values())
