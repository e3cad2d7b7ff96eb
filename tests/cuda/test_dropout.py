"""The CUDA kernel of dropout: rows at any address, its launches, and what its binding refuses."""

from types import ModuleType

import pytest
import torch

from lmoe_kernels import reference
from lmoe_kernels.backends.cuda import extension
from lmoe_kernels.backends.cuda.dropout import dropout
from tests.tensors import off_by_a_byte, off_by_an_element
from tools.emulator.launches import current_device, recorded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _seed() -> torch.Tensor:
    return torch.randint(-(1 << 63), (1 << 63) - 1, ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "step"), [(520, 520), (520, 528), (520, 521), (515, 515), (515, 520), (1, 1)])
def test_rows_at_any_address(features: int, step: int, dtype: torch.dtype, emulated_cuda: ModuleType, watch) -> None:
    """Rows that are aligned to 16 bytes, or not, one by one or the first alone; results that are, or are not."""
    seed, whole = _seed(), torch.randn(19, step).to(dtype)
    for rows in (whole[:, :features], off_by_an_element(whole)[:, :features]):
        assert torch.equal(dropout(rows, seed, 0.3), reference.dropout(rows, seed, 0.3))


def test_one_launch_on_the_tensors_device_and_the_callers_stream(emulated_cuda: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(extension, "queue", lambda tensor: (1, 0x5EED0))
    with recorded(emulated_cuda) as calls:
        dropout(torch.randn(20, 1030), _seed(), 0.5)
    [launch] = calls.launches
    assert (launch.kernel, launch.device, launch.stream, launch.shared_bytes) == ("dropout_kernel", 1, 0x5EED0, 0)
    assert launch.blocks == 3 * 3, "20 tokens in blocks of 8, 1030 features in blocks of 512"
    assert current_device(emulated_cuda) == 0, "the caller's device is not restored"


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_nothing_is_launched_for_no_elements(shape: tuple[int, int], emulated_cuda: ModuleType) -> None:
    with recorded(emulated_cuda) as calls:
        assert dropout(torch.empty(shape), _seed(), 0.5).shape == shape
    assert calls.launches == []


@pytest.mark.parametrize("name", ["rows", "seed", "out"])
def test_an_address_between_two_elements_is_refused(name: str, emulated_cuda: ModuleType) -> None:
    t = {"rows": torch.randn(3, 8).bfloat16(), "seed": _seed(), "out": torch.zeros(3, 8).bfloat16()}

    def run(t: dict[str, torch.Tensor]) -> None:
        params = emulated_cuda.DropoutParams(extension.DTYPES[torch.bfloat16], (3, 8), t["rows"], t["seed"], 0.5, t["out"])
        emulated_cuda.dropout(params, 0, 0)

    run(t)
    with recorded(emulated_cuda) as calls, pytest.raises(ValueError, match=f"lmoe: {name} must lie on a multiple of"):
        run(t | {name: off_by_a_byte(t[name])})
    assert calls.launches == []


def test_a_shape_of_another_number_of_dimensions_is_refused(emulated_cuda: ModuleType) -> None:
    rows = torch.zeros(2, 3, 4)
    with pytest.raises(TypeError, match="lmoe: shape must have 2 fields, got 3"):
        emulated_cuda.DropoutParams(0, rows.shape, rows, _seed(), 0.5, rows)
