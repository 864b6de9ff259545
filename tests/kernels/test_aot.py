"""Every kernel compiles for every GPU, without spilling and within its shared memory."""

import pytest
from aot import SHARED_LIMIT, TARGETS, compile_variant
from harness import SPECS

from whet.kernels.launch import triton

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Compile anew, and leave nothing in the user's cache."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SPECS)
def test_kernel_fits_the_gpu(name, target):
    kernels = SPECS[name].aot
    assert kernels
    for aot in kernels:
        for variant in aot.variants:
            usage = compile_variant(aot, variant, target)
            case = (aot.kernel.__name__, variant, usage)
            assert usage["spills"] == 0, case
            assert usage["shared"] <= SHARED_LIMIT[target] * 1024, case
            assert 0 < usage["registers"] <= 255, case


def test_rows_that_are_not_aligned_compile_too():
    aot = SPECS["norm"].aot[0]
    assert compile_variant(aot, aot.variants[0], 89, divisible=False)["spills"] == 0


def test_a_spill_is_seen():
    """A block four times too wide for its warps must fail the test above."""
    aot = SPECS["norm"].aot[1]
    wide = dict(aot.variants[1]) | {"BLOCK_D": 65536}
    assert compile_variant(aot, wide, 89)["spills"] > 0
