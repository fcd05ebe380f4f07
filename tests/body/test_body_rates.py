"""What is measured once is remembered: in the process and in a file."""

import json

import pytest
import torch

from fastpref.backends import native
from fastpref.body import rates

pytestmark = pytest.mark.skipif(native.problem() is not None, reason="the module is not built")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates._speedup.cache_clear()
    yield
    rates._speedup.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    count = []

    def measure(shape, dtype):
        count.append((shape, dtype))
        return 1.5 + len(count)

    monkeypatch.setattr(rates, "_measure", measure)
    return count


def test_a_shape_is_measured_once(measured, threads):
    assert rates.speedup((64, 32), torch.float32) == 2.5
    assert rates.speedup((64, 32), torch.float32) == 2.5
    rates._speedup.cache_clear()  # another process
    assert rates.speedup((64, 32), torch.float32) == 2.5
    assert len(measured) == 1
    rates.speedup((32, 64), torch.float32)
    rates.speedup((64, 32), torch.bfloat16)
    threads(2)
    rates.speedup((64, 32), torch.float32)
    assert len(measured) == 4
    found = json.loads(rates.cache_file().read_text())
    assert sorted(len(cases) for cases in found.values()) == [1, 3]
    assert all(torch.__version__ in machine for machine in found)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}'])
def test_a_damaged_file_is_written_anew(measured, text):
    rates.cache_file().parent.mkdir()
    rates.cache_file().write_text(text)
    assert rates.speedup((64, 32), torch.float32) == 2.5
    assert any(
        "64x32 float32" in str(v) for v in json.loads(rates.cache_file().read_text()).values()
    )


def test_a_file_that_cannot_be_written_is_left(measured):
    rates.cache_file().parent.parent.joinpath("fastpref").write_text("a file, not a directory")
    assert rates.speedup((64, 32), torch.float32) == 2.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring(dtype, monkeypatch):
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    assert rates.speedup((128, 64), dtype) > 0
