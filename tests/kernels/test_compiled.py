"""Every kernel goes through Triton's compiler for an H100, on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import compile_for_h100

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
# What cases begin with, for two processes at a time; of these the last is held against what was compiled before it.
TOGETHER = [("decodes", "rope", "sampling", "int8", "one row", "norm", "gate"), ("attention", compile_for_h100.SIZES)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[list]]:
    """Of each case the kernels that were compiled for it, with the fast memory that they take."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    processes = [start(words, environment) for words in TOGETHER]
    ended = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [errors[-3000:] for _, errors in ended]
    lines = [json.loads(line) for told, _ in ended for line in told.splitlines()]
    return {line["case"]: line["compiled"] for line in lines}


def start(words: tuple[str, ...], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, compile_for_h100.__file__, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_every_kernel_compiles_in_every_dtype_and_with_every_option_and_fits_the_fast_memory(compiled):
    assert sorted(compiled) == sorted(name for name, _ in compile_for_h100.cases())
    kernels = {kernel for case in compiled.values() for kernel, _ in case}
    assert kernels == {
        "_attend_splits", "_merge_splits", "_attend_tile_of_rows", "_rope_and_store", "_sample", "_int8_linear",
        "_add_rms_norm", "_gated", "_one_row_linear", "_place_decodes", "_largest_of_pieces",
    }  # fmt: skip
    assert max(fast for case in compiled.values() for _, fast in case) <= compile_for_h100.FAST_BYTES


def test_nothing_is_compiled_anew_for_a_step_of_another_size(compiled):
    """Attention was compiled for such heads before; int8 products have one kernel for up to 64 rows."""
    assert [kernel for kernel, _ in compiled[compile_for_h100.SIZES]] == ["_int8_linear"]
