# SPDX-License-Identifier: Apache-2.0
"""The test model with the 1-D scan on scikit-learn's handwritten digits."""

_base_ = './vmamba2d_test.py'

model = dict(model_name='test_vmamba')
