# SPDX-License-Identifier: Apache-2.0
"""Our ONNX files in OpenVINO."""

import openvino
import pytest
import torch

from vssm.models.export import export_onnx


@pytest.mark.parametrize('model', ('test_vmamba2d', 'test_spatial_mamba'), indirect=True)
def test_logits(model, plainly, assert_close, tmp_path):
    """Of batches of any number, and of images of any size."""
    export_onnx(model, tmp_path / 'model.onnx')
    compiled = openvino.compile_model(tmp_path / 'model.onnx', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for shape in ((1, 3, 32, 48), (3, 3, 33, 47)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = plainly(model, images)
        assert_close(torch.from_numpy(compiled(images.numpy())[0]), expected, 1e-4)
