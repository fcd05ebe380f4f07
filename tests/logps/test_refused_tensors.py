"""Tensors that no kernel reads: each is refused by its name, with what was given and expected."""

from __future__ import annotations

import pytest
import torch
from autograd_uses import N, V, inputs

from fastpref import linear_dpo_loss, linear_token_logps, token_logps

SEQUENCES = 4


def quantised(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


def jagged(t):
    return torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged)


TENSORS = {
    "to_sparse": (torch.Tensor.to_sparse, r"layout torch.sparse_coo, expected .* to_dense\(\)"),
    "to_sparse_csr": (torch.Tensor.to_sparse_csr, r"layout torch.sparse_csr, expected .* to_dense"),
    "to_mkldnn": (torch.Tensor.to_mkldnn, r"layout torch._mkldnn, expected"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t[:1]]), "nested tensor, expected"),
    "jagged": (jagged, "nested tensor, expected a dense one: torch.nested.to_padded_tensor"),
    "quantised": (quantised, "qint8, expected float64"),
    "complex": (lambda t: t.to(torch.complex64), "complex64, expected float64"),
    "integer": (torch.Tensor.long, "int64, expected float64"),
    "bool": (torch.Tensor.bool, "bool, expected float64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn, expected float64"),
    "numpy": (torch.Tensor.numpy, "ndarray, expected a tensor"),
    "list": (torch.Tensor.tolist, "list, expected a tensor"),
}
OF_MATRICES = ("to_sparse_csr", "to_mkldnn", "nested", "jagged")  # a vector cannot be that
BETA = "ignore:.*(beta|prototype|deprecated):UserWarning"


@pytest.mark.only_if(lambda name, kind: name != "bias" or kind not in OF_MATRICES)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "logits", "lora_hidden", "lora_B"])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings(BETA, "ignore:.*deprecated:DeprecationWarning")
def test_tensors_that_no_kernel_reads(name, kind):
    make, message = TENSORS[kind]
    hidden, weight, labels = (t.detach() for t in inputs())
    tensors = {
        "hidden": hidden,
        "weight": weight,
        "bias": torch.randn(V),
        "lora_hidden": torch.randn(N, 2),
        "lora_B": torch.randn(V, 2),
        "logits": hidden @ weight.t(),
    }
    bad = make(tensors[name])
    with pytest.raises(ValueError, match=f"^{name}: got (a |a tensor of )?{message}"):
        if name == "logits":
            token_logps(bad, labels)
        else:
            del tensors["logits"]
            linear_token_logps(labels=labels, **{**tensors, name: bad})


@pytest.mark.parametrize("name", ["labels", "token_indices", "sequence_ids", "ref_logps"])
def test_sparse_tensors_beside_the_head(name):
    hidden, weight, labels = (t.detach() for t in inputs())
    tensors = {
        "labels": labels,
        "token_indices": torch.arange(N),
        "sequence_ids": torch.arange(N) // 2,
        "ref_logps": torch.zeros(SEQUENCES),
    }
    tensors[name] = tensors[name].to_sparse()
    with pytest.raises(ValueError, match=f"^{name}: got a tensor of layout torch.sparse_coo"):
        linear_dpo_loss(hidden, weight, num_sequences=SEQUENCES, **tensors)


@pytest.mark.parametrize(
    "name", ["weight", "labels", "token_indices", "sequence_ids", "lora_B", "bias"]
)
def test_tensors_on_another_device(name):
    hidden, weight, labels = (t.detach() for t in inputs())
    tensors = {
        "weight": weight,
        "labels": labels,
        "token_indices": torch.arange(N),
        "sequence_ids": torch.arange(N) // 2,
        "bias": torch.randn(V),
        "lora_hidden": torch.randn(N, 2),
        "lora_B": torch.randn(V, 2),
    }
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=r"^(\w+): got device (meta|cpu), expected (meta|cpu)$"):
        linear_dpo_loss(hidden, num_sequences=SEQUENCES, reference_free=True, **tensors)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no processes")
@pytest.mark.parametrize("name", ["hidden", "weight", "labels"])
def test_dtensors(name, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors = dict(zip(("hidden", "weight", "labels"), inputs(), strict=True))
        tensors[name] = distribute_tensor(tensors[name].detach(), mesh)
        with pytest.raises(ValueError, match=rf"^{name}: got a DTensor, expected .* full_tensor"):
            linear_token_logps(**tensors)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["hidden", "weight", "labels", "logits"])
def test_tensors_of_inference_mode(name):
    tensors = dict(zip(("hidden", "weight", "labels"), inputs(), strict=True))
    with torch.inference_mode():
        made = {**tensors, "logits": torch.randn(N, V)}[name].clone()
        reference = linear_token_logps(**{k: t.clone() for k, t in tensors.items()})
    assert torch.equal(reference, linear_token_logps(**tensors))
    if name == "logits":  # nothing to differentiate
        assert not token_logps(made, tensors["labels"]).requires_grad
        return
    tensors[name] = made
    if name == "weight":  # which the backward pass does not read
        assert torch.equal(linear_token_logps(**tensors), reference)
        return
    with pytest.raises(RuntimeError, match=rf"^{name}: got a tensor made under .*its clone\(\)"):
        linear_token_logps(**tensors)
    with torch.no_grad():
        assert torch.equal(linear_token_logps(**tensors), reference)
