"""pytest tests/test_descriptors.py: the products of cuda_attention/descriptors.cu, emulated; bench.py runs them on a GPU."""
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cuda_attention import bench, ops

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("emulated") / "descriptors.so"
    subprocess.run(["g++", "-O2", "-std=c++17", "-DEMULATED", "-I", str(ROOT / "tests"), "-x", "c++", "-shared", "-fPIC",
                    str(ROOT / "cuda_attention" / "descriptors.cu"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("rows", (64, 128))
@pytest.mark.parametrize("width", ops.WIDTHS)
def test_products_are_exact(emulated, width, rows):
    """Of operands K-major, in registers, and MN-major, from boxes at any row, some of which run over the end."""
    assert bench.exact_products(emulated, width, rows, "cpu") == {"K-major": True, "MN-major": True}


def test_sizes_that_no_kernel_uses_are_refused(emulated):
    with pytest.raises(RuntimeError, match="CUDA error -1"):
        bench.exact_products(emulated, 32, 64, "cpu")


@pytest.mark.slow
def test_descriptors_compile_without_spills(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    done = subprocess.run(["nvcc", *ops.FLAGS, "-Xptxas", "-v", "-gencode=arch=compute_90a,code=sm_90a",
                           str(ROOT / "cuda_attention" / "descriptors.cu"), "-o", str(tmp_path / "out.so")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(used) == 4 and set(used) == {("0", "0", "0")}
    assert "C75" not in done.stderr and "warning" not in done.stderr, done.stderr
    assert ctypes.CDLL(str(tmp_path / "out.so")).descriptor_products
