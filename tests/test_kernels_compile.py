"""Every kernel as machine code, on machines without a GPU: it compiles, does not spill, and its hot loop is short.

Instructions are counted on sm_90, in the loop that does the most terms, on the way through it that finite numbers take.
Terms are counted by the marks that the compiler leaves (see `l1attn_cupy.cuda.machine_code`), and these against the
tile that the kernel's header promises.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor

import pytest

from l1attn_cupy.cuda import machine_code, registry
from l1attn_cupy.cuda.machine_code import Instruction, hot_loop, parse

needs_tools = pytest.mark.skipif(bool(machine_code.missing()), reason=machine_code.missing() or "-")

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
KERNELS = [(variant, dtype) for variant in registry.variants() for dtype in variant.dtypes]


def name_of(variant, dtype):
    return f"{variant.op}-{variant.name}:{variant.line}-{dtype}"


# ---- every variant, dtype and architecture ------------------------------------------------------------------------


def resources(variant, dtype, arch):
    """By name of the assembler: NVRTC's own, whose code CuPy loads; on sm_90 also ptxas of the newest toolkit."""
    found = {"NVRTC": machine_code.compile_native(variant, dtype, arch)}
    if arch == "90":  # whose instructions are counted below
        ptx = machine_code.compile_ptx(variant, dtype, arch)
        _cubin, found["ptxas"] = machine_code.assemble(ptx, arch, variant.shared)
    return found


@pytest.fixture(scope="module")
def compiled(request):
    """Results to come of `resources`, for the tests that were asked for: two processes work ahead."""
    calls = [
        item.callspec.params
        for item in request.session.items
        if item.fspath == request.node.fspath and "arch" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    context = multiprocessing.get_context("spawn")  # a forked child of a process with threads may hang
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        jobs: dict[tuple, Future] = {}
        for call in calls:
            jobs[call["kernel"], call["arch"]] = pool.submit(resources, *call["kernel"], call["arch"])
        yield jobs
        for job in jobs.values():
            job.cancel()


@needs_tools
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: name_of(*kernel))
@pytest.mark.parametrize("arch", [pytest.param(a, marks=() if a == "90" else pytest.mark.slow) for a in ARCHITECTURES])
def test_kernels_compile_without_spills(kernel, arch, compiled):
    """A spill turns register traffic into memory traffic; a launch bound that is too tight causes it."""
    if arch not in machine_code.architectures():
        pytest.skip(f"the installed NVRTC does not know sm_{arch}")
    for assembler, found in compiled[kernel, arch].result().items():
        assert found.spilled == 0, f"{assembler}: {found}"
        assert found.stack == 0, f"{assembler}: an array is indexed at run time: {found}"
        assert found.registers <= 255
        assert found.shared <= 64 * 1024  # sm_75 has no more


# ---- instructions per term ----------------------------------------------------------------------------------------

SINGLE = [(v, d) for v, d in KERNELS if d != "float64"]


def loops(op, name):
    """For parametrize: the kernels of a variant that accumulate in float32."""
    chosen = [kernel for kernel in SINGLE if (kernel[0].op, kernel[0].name) == (op, name)]
    return pytest.mark.parametrize("kernel", chosen, ids=lambda kernel: name_of(*kernel))


@pytest.fixture(scope="module")
def loop_of():
    """The hot loop on sm_90 of a variant and dtype, found once."""
    known: dict = {}

    def find(variant, dtype):
        if (variant, dtype) not in known:
            known[variant, dtype] = machine_code.profile(variant, dtype).loop
        loop = known[variant, dtype]
        steps = loop.terms / machine_code.terms_per_step(variant)
        assert steps >= 1, f"{loop.terms} terms in the loop, {machine_code.terms_per_step(variant)} for each channel"
        assert steps.denominator == 1, f"{loop.terms} terms are no whole number of steps"
        return loop, int(steps)

    return find


@needs_tools
@loops("scores_forward", "tiled")
def test_scores_forward_tiled_budget(kernel, loop_of):
    """Subtract, and add the absolute value: 2 instructions a term."""
    loop, _ = loop_of(*kernel)
    assert loop.count("FADD", "FFMA", "FMUL") == loop.floating_point
    assert loop.floating_point_per_term <= 2.15


@needs_tools
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scores_forward_shared_loads(dtype, loop_of):
    """Of the default for large arrays: 8 x 8 outputs a thread need 4 loads of 128 bits for each channel."""
    variant = registry.choose("scores_forward", dtype, {"q": 2048, "k": 2048, "e": 64}, None)
    loop, steps = loop_of(variant, dtype)
    assert machine_code.terms_per_step(variant) == 64
    assert loop.count("LDS") == 4 * steps  # and so the loop has as many channels as its marks say
    assert loop.shared_loads_per_64_terms <= 5


@needs_tools
@loops("scores_forward", "half2")
def test_scores_forward_half2_budget(kernel, loop_of):
    """Subtract, add the absolute value: two terms in each instruction."""
    loop, steps = loop_of(*kernel)
    assert loop.count("HADD2", "HFMA2") == loop.floating_point
    assert loop.count("LDS") == 2 * steps
    assert loop.floating_point_per_term <= 1.05
    assert loop.slots_per_term <= 1.2


@needs_tools
@loops("scores_quantized", "sad")
def test_scores_quantized_sad_budget(kernel, loop_of):
    """Four terms in one instruction; the loads of small tiles serve fewer."""
    loop, steps = loop_of(*kernel)
    assert loop.count("VABSDIFF4") == loop.terms / 4
    assert loop.count("LDS") == (2 if kernel[0].limits else 4) * steps / 4  # a word is four channels
    assert loop.slots_per_term <= (0.32 if kernel[0].limits else 0.3)


@needs_tools
@loops("scores_backward", "tiled")
def test_scores_backward_tiled_budget(kernel, loop_of):
    """Subtract, half a step, multiply and add: 3 instructions a term, for one gradient."""
    loop, steps = loop_of(*kernel)
    parameters = kernel[0].parameters
    assert loop.count("LDS") == steps * (parameters["ROWS"] + parameters["CHANNELS"]) / 4
    assert loop.floating_point_per_term <= 3.3


@needs_tools
@loops("scores_backward", "scatter")
def test_scores_backward_scatter_budget(kernel, loop_of):
    """One difference and one step serve both gradients: 4 instructions a term."""
    loop, steps = loop_of(*kernel)
    assert loop.count("LDS") == steps * kernel[0].parameters["ROWS"] / 4
    assert loop.floating_point_per_term <= 4.5


@needs_tools
@loops("attention_forward", "tiled")
def test_attention_forward_tiled_budget(kernel, loop_of):
    """The scores as in scores_forward_tiled, with 4 x 8 or 2 x 16 a thread; products of matrices are other loops."""
    loop, steps = loop_of(*kernel)
    parameters = kernel[0].parameters
    queries, keys = 4 * parameters["BLOCK_Q"] // parameters["THREADS"], parameters["TILE_K"] // 4
    if kernel[1] in registry.BYTES.values():
        assert loop.count("VABSDIFF4") == loop.terms / 4
        assert loop.count("LDS") == (queries + keys) * steps / 16
        assert loop.slots_per_term <= 0.3
        return
    assert loop.count("FADD") == loop.floating_point
    assert loop.count("LDS") == (queries + keys) * steps / 4
    assert loop.floating_point_per_term <= 2.2


@needs_tools
@loops("attention_backward", "tiled")
def test_attention_backward_tiled_budgets(kernel):
    """Sums in 2 instructions a term, signs in 3; in 4 where h is uneven."""
    cubin, _ = machine_code.assemble(machine_code.compile_ptx(*kernel))
    loops = machine_code.loops(machine_code.disassemble(cubin))
    signs = [loop for loop in loops if any(".SAT" in instruction.opcode for instruction in loop.instructions)]
    sums = [loop for loop in loops if loop not in signs]
    assert [loop.floating_point_per_term <= 2.15 for loop in sums] == [True]
    even, uneven = sorted(loop.floating_point_per_term for loop in signs)
    assert even <= 3.3
    assert uneven <= 4.3


# ---- finding the loop ---------------------------------------------------------------------------------------------

NESTED = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FSETP.GTU.FTZ.AND P1, PT, |R2|, +INF , PT ;
        /*0020*/                   FADD.FTZ R9, R9, |R8| ;
.L_x_2:
        /*0030*/                   LDS.128 R4, [R3] ;
        /*0040*/              @P1  BRA `(.L_x_3) ;
        /*0050*/                   FADD.FTZ R4, R4, -R5 ;
        /*0060*/                   FADD.FTZ R6, R6, |R4| ;
        /*0070*/                   HADD2 R7, R7, |R4| ;
        /*0080*/                   FFMA.FTZ.SAT R8, R4, R10, 0.5 ;
        /*0090*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   FSETP.GT.FTZ.AND P2, PT, R4, RZ, PT ;
        /*00b0*/                   FSEL R4, R5, RZ, P2 ;
.L_x_4:
        /*00c0*/              @!P0 BRA `(.L_x_2) ;
        /*00d0*/               @P3 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
"""


def test_parse_reads_predicates_and_targets():
    instructions = parse(NESTED)
    assert len(instructions) == 16
    assert instructions[1] == Instruction("", "FSETP.GTU.FTZ.AND", "P1, PT, |R2|, +INF , PT", None)
    assert instructions[4].predicate == "P1"
    assert instructions[4].target == 10
    assert instructions[12].target == 3
    assert instructions[15].target == 15


def test_hot_loop_is_the_innermost_with_terms_on_the_way_that_does_them():
    """Neither the loop around it nor the slow way through it counts; a packed sum is two terms, a comparison none."""
    loop = hot_loop(parse(NESTED))
    assert [instruction.base for instruction in loop.instructions] == "LDS BRA FADD FADD HADD2 FFMA BRA BRA".split()
    assert (loop.terms, loop.floating_point, loop.count("LDS")) == (4, 4, 1)
    assert loop.floating_point_per_term == 1
    assert loop.slots_per_term == 2
    assert loop.shared_loads_per_64_terms == 16


def test_hot_loop_says_that_there_is_none():
    with pytest.raises(ValueError, match="no loop of this kernel has a term"):
        hot_loop(parse(NESTED.replace("|", "").replace(".SAT", "")))


@needs_tools
def test_compile_error_shows_the_line_as_written(tmp_path, monkeypatch):
    name = "scores_forward_gather.cu"
    text = (registry.packaged_folder() / name).read_text()
    (tmp_path / name).write_text(text.replace("acc_t sum = 0;", "acc_t sum = zero;"))
    line = text.partition("acc_t sum = 0;")[0].count("\n") + 1
    monkeypatch.setenv("L1ATTN_KERNELS", str(tmp_path))
    variant = registry.choose("scores_forward", "float32", {"q": 1, "k": 1, "e": 1}, "gather")
    with pytest.raises(registry.KernelError, match=rf"{name}\({line}\): error: identifier \"zero\""):
        machine_code.compile_ptx(variant, "float32")
