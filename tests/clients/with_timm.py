# SPDX-License-Identifier: Apache-2.0
"""timm's own exporter, which its script onnx_export.py calls, over the ops in plain PyTorch."""

import pytest
import torch
from timm.utils.onnx import onnx_export, onnx_forward

import vssm


@pytest.mark.parametrize('model', ('test_vmamba', 'test_spatial_mamba'), indirect=True)
def test_the_exporter_stops_at_our_ops(model, images, tmp_path):
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match='vssm::'):
        onnx_export(model, str(tmp_path / 'model.onnx'), example_input=images)


@pytest.mark.parametrize('model', ('test_vmamba', 'test_spatial_mamba'), indirect=True)
def test_the_exporter_takes_plain_pytorch(model, images, plainly, assert_close, tmp_path):
    """By what VSSM_REFERENCE=1 sets for a process; for images of one size."""
    with vssm.ops.use_reference():
        onnx_export(model, str(tmp_path / 'model.onnx'), example_input=images)
    with torch.no_grad():
        expected = plainly(model, images)
    assert_close(torch.from_numpy(onnx_forward(str(tmp_path / 'model.onnx'), images)), expected, 1e-4)
