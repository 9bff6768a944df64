# SPDX-License-Identifier: Apache-2.0
"""Our ONNX files in OpenVINO."""

import openvino
import pytest
import timm
import torch

from vssm.models.export import export_onnx


@pytest.mark.parametrize('name', ('test_vmamba2d', 'test_spatial_mamba'))
def test_logits(name, plainly, assert_close, tmp_path):
    """Of a shallow network, as to export takes long, for batches of any number and images of any size."""
    model = timm.create_model(name, num_classes=4, depths=(1, 1), dims=(16, 32)).eval()
    export_onnx(model, tmp_path / 'model.onnx')
    compiled = openvino.compile_model(tmp_path / 'model.onnx', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for shape in ((1, 3, 32, 48), (3, 3, 33, 47)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = plainly(model, images)
        assert_close(torch.from_numpy(compiled(images.numpy())[0]), expected, 1e-4)
