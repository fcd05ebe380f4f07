"""What a CPU lacks, and that training takes the numbers that the device is fast at."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("transformers")

from fastpref.backends import native, processor, rates  # noqa: E402
from fastpref.cli import doctor  # noqa: E402
from fastpref.trainer.config import PreferenceConfig, UnpairedPreferenceConfig  # noqa: E402

NONE = dict.fromkeys(processor.FEATURES, False)
AVX2 = NONE | {"avx2": True, "fma": True}
AVX512 = AVX2 | dict.fromkeys(("avx512f", "avx512bw", "avx512dq", "avx512vl"), True)
ARM = NONE | {"asimd": True}


@pytest.fixture(scope="module")
def rates_of_products():
    return rates.product_rates()


@pytest.fixture
def measured(rates_of_products, monkeypatch):
    """The machine's products, which take half a second to measure, are measured once."""
    monkeypatch.setattr(rates, "product_rates", lambda: rates_of_products)


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (NONE, ["AVX2 and FMA", "AVX-512", "AVX512-BF16", "bf16 units"]),
        (AVX2, ["AVX-512 (avx512f", "AVX512-BF16", "bf16 units (amx_bf16 or avx512_bf16)"]),
        (AVX512, ["AVX512-BF16", "bf16 units"]),
        (AVX512 | {"amx_bf16": True}, []),
        (AVX512 | {"avx512_bf16": True}, []),
        (ARM, ["bf16 units (bf16)"]),
        (ARM | {"bf16": True}, []),
        (None, []),
    ],
)
def test_what_a_cpu_lacks(features, said, monkeypatch, measured):
    lines = processor.lacking(features)
    assert len(lines) == len(said)
    for line, start in zip(lines, said, strict=True):
        assert line.startswith(start)
    monkeypatch.setattr(processor, "read_processor", lambda: ("Some CPU", features))
    facts = doctor.collect()
    assert facts["cpu"]["lacks"] == lines
    shown = dict(doctor.lines(facts))["CPU"]
    assert [text for name, text in shown if name == "lacks"] == lines
    fast = features is not None and not any("bf16 units" in line for line in lines)
    assert processor.bf16_is_fast("cpu") == fast and processor.bf16_is_fast("mps")


@pytest.fixture(params=[PreferenceConfig, UnpairedPreferenceConfig])
def made(request, tmp_path, monkeypatch):
    def make(features, **options):
        processor.say_once.cache_clear()
        monkeypatch.setattr(processor, "read_processor", lambda: ("Some CPU", features))
        return request.param(output_dir=str(tmp_path), use_cpu=True, **options)

    return make


def test_bf16_by_default_where_it_is_fast(made, caplog):
    fast = AVX512 | {"avx512_bf16": True}
    assert made(fast).bf16 is True and made(fast, bf16=False).bf16 is False
    assert made(fast, fp16=True).bf16 is False and made(fast, precision="fast").bf16 is True
    assert not caplog.records


def test_fp32_by_default_where_bf16_is_slow(made, caplog):
    for _ in range(2):
        config = made(AVX2)
        assert config.bf16 is False
    assert type(config)(output_dir=config.output_dir, use_cpu=True).bf16 is False
    text = "this CPU has no bf16 units, so that training takes fp32; bf16=True asks for bf16"
    assert (
        caplog.record_tuples == [("fastpref", logging.WARNING, text)] * 2
    )  # once after each clear


def test_what_is_asked_for_stands(made, caplog):
    assert made(AVX2, bf16=False).bf16 is False and made(AVX2, fp16=True).bf16 is False
    assert not caplog.records
    assert made(AVX2, bf16=True).bf16 is True
    assert "bf16 is True, but this CPU has no bf16 units" in caplog.text
    assert made(AVX2, bf16=True, precision="fast").bf16 is True
    with pytest.raises(ValueError, match="precision is 'fast', which needs 16-bit operands"):
        made(AVX2, precision="fast")


def test_rates_of_products(rates_of_products):
    """Both dtypes, and what follows from them."""
    found = rates_of_products
    assert list(found) == ["float32", "bfloat16"]
    for rate in found.values():
        assert rate["torch"] > 0 and rate["used"] in ("native", "torch")
        built = native.problem() is None
        assert (rate["native"] is not None) == (rate["peak"] is not None) == built
        assert not built or rate["peak"] > 0
    assert [name for name, _ in rates.what_follows(found)] == [*found, "body of a model"]
    for half, said in (
        (10.0, "10 times slower"),
        (250.0, "2.5 times as fast"),
        (100.0, "about as"),
    ):
        made = {"float32": {"torch": 100.0, "native": 150.0, "peak": 160.0, "used": "native"}}
        made["bfloat16"] = {"torch": half, "native": None, "peak": None, "used": "torch"}
        lines = dict(rates.what_follows(made))
        assert "at most 160" in lines["float32"] and "at most" not in lines["bfloat16"]
        assert said in lines["body of a model"] and "not built" in lines["bfloat16"]
