# SPDX-License-Identifier: Apache-2.0
"""The selective scan on CUDA. Imported when the first CUDA tensor arrives."""
