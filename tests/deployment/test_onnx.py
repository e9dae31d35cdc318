"""Compressed models go through ONNX; runs where onnx, onnxscript and onnxruntime are installed."""

import pytest
import torch

from peft_jactus.deployment.export import compressed_copy
from tests.support.compressed_models import tiny_bert, tiny_llama, trained

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# Float32, summed in another order.
ROUNDING = 1e-6


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.model.config.use_cache = False

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).logits


def check(model, folder, **options):
    """Export, and compare at another batch size and length than the example's; return the weights in the file."""
    model = Logits(model).eval()
    ids = torch.randint(2, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.onnx.export(model, (ids[:2, :7],), dynamo=True, dynamic_shapes=(dynamic,), **options)
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(ids), rtol=0, atol=ROUNDING)
    return onnx.load(folder / "model.onnx").graph.initializer


@pytest.mark.filterwarnings("ignore")  # torch's exporter has deprecations of its own
@pytest.mark.parametrize("storage", ["pivoted", "factored"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_onnxruntime_gives_the_logits_at_any_batch_size_and_length(make, storage, tmp_path):
    check(compressed_copy(trained(make(), storage=storage)), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_onnxruntime_takes_weights_in_few_bits(make, bits, tmp_path):
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    model = compressed_copy(trained(make()), bits=bits)
    held = sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(".codes"))
    weights = check(model, tmp_path, optimize=False)  # or small weights are multiplied out
    kind = onnx.TensorProto.INT8 if bits == 8 else onnx.TensorProto.UINT8
    assert sum(len(weight.raw_data) for weight in weights if weight.data_type == kind) == held > 0
