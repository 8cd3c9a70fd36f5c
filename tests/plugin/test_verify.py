import pytest
import torch

from qdiff.plugin import verify as module
from qdiff.plugin.verify import report_lines, verify


@pytest.fixture
def as_another_device(monkeypatch):
    """The CPU stands for a GPU whose results may be tampered with: returns the function that does it."""
    tampering = {}

    def on(device, operator, arguments):
        result = operator(*arguments)
        name = operator.name().removeprefix("qdiff::").removesuffix(".default")
        return tampering.get(name, lambda value, _: value)(result, arguments), ""

    monkeypatch.setattr(module, "_on", on)
    monkeypatch.setattr(module, "_embedded", lambda layer, x, device: layer(x))
    return tampering


def test_the_cpu_sums_exactly(quantized):
    checks = list(verify(quantized(), "cpu"))
    assert {check.result for check in checks} == {"integer sums"}
    assert all(check.difference is None for check in checks)
    assert {check.operator for check in checks} >= {"w4a8_linear"}


def test_every_quantized_layer_is_run_and_equal_to_itself(quantized, as_another_device):
    pipe = quantized()
    checks = list(verify(pipe, torch.device("meta")))
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert list(dict.fromkeys(check.layer for check in checks if check.operator != "embedding")) == [
        name for name, plan in denoiser.qdiff.plans.items() if plan.kind != "embedding"
    ]
    assert {check.result for check in checks if check.operator == "quantize_per_sample"} <= {"codes"}
    whole = [check for check in checks if check.operator == "dynamic_linear"]
    assert {check.result for check in whole} == {"integer sums", "values"}
    for layer in {check.layer for check in whole}:  # and the two operators that it stands for
        parts = {check.operator for check in checks if check.layer == layer}
        assert "quantize_per_token" in parts
        assert parts & {"w4a8_linear", "w8a8_linear"}
    assert all(check.difference is None for check in checks)
    assert next(iter(report_lines(checks))).endswith("no difference")


def test_the_first_difference_is_named_with_its_place_and_size(quantized_sd, as_another_device):
    pipe = quantized_sd()
    wrong_from = [name for name, plan in pipe.unet.qdiff.plans.items() if plan.kind == "linear"][3]
    weight = pipe.unet.get_submodule(wrong_from).codes

    def tamper(result, arguments):
        mine = any(isinstance(value, torch.Tensor) and value.data_ptr() == weight.data_ptr() for value in arguments)
        if not mine or result.dtype != torch.int32:
            return result
        result = result.clone()
        result.view(-1)[5] += 3
        return result

    as_another_device["w4a8_linear"] = as_another_device["w8a8_linear"] = tamper
    checks = list(verify(pipe, "meta"))
    first = next(check for check in checks if check.difference)
    assert (first.layer, first.result) == (wrong_from, "integer sums")
    assert first.difference.count == 1
    assert first.difference.first == (0, 0, 5)
    assert first.difference.got - first.difference.expected == first.difference.largest == 3
    lines = list(report_lines(checks))
    assert lines[0].startswith(f"first difference: layer {wrong_from}, ")
    assert "1 of " in lines[1]


def test_a_rounding_of_floating_point_is_no_difference_and_more_is(quantized_sd, as_another_device):
    as_another_device["w4a8_conv2d"] = lambda result, _: result * (1 + 1e-7) if result.is_floating_point() else result
    assert not any(check.difference for check in verify(quantized_sd(), "meta"))
    as_another_device["w4a8_conv2d"] = lambda result, _: result * 1.001 if result.is_floating_point() else result
    wrong = [check for check in verify(quantized_sd(), "meta") if check.difference]
    assert {(check.operator, check.result) for check in wrong} == {("w4a8_conv2d", "values")}
    as_another_device["w4a8_conv2d"] = lambda result, _: (
        torch.full_like(result, float("nan")) if result.is_floating_point() else result
    )
    assert any(check.difference for check in verify(quantized_sd(), "meta"))


def test_the_same_seed_gives_the_same_inputs(quantized_sd, as_another_device):
    seen = []
    as_another_device["quantize_per_sample"] = lambda result, arguments: seen.append(arguments[0]) or result
    for seed in (0, 0, 1):
        list(verify(quantized_sd(), "meta", seed))
    third = len(seen) // 3
    assert torch.equal(seen[0], seen[third])
    assert not torch.equal(seen[0], seen[2 * third])


def test_what_cannot_be_verified_is_refused(tiny_sd, quantized_sd):
    with pytest.raises(ValueError, match="not quantized"):
        list(verify(tiny_sd(), "cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"):
            list(verify(quantized_sd(), "cuda"))


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_reference(quantized):
    wrong = [check for check in verify(quantized(), "cuda") if check.difference]
    assert wrong == []
