# SPDX-License-Identifier: Apache-2.0
"""Measure models, ours and timm's: cost, speed, memory.

Counts are of one image: parameters, activations (what convolutions and matrix products give) and billions of multiply-
accumulates, GMACs by fvcore as the papers count them and torch by PyTorch's FlopCounterMode. A model that is timed
has random weights. Inference runs in the dtype; a training step is forward, cross entropy and backward without an
optimizer, with float32 weights under autocast. All models take turns, a round each; shown are the median over the
rounds and, after ±, half of the interquartile range. ms is the latency of one image. MB is the most that model, images
and one step hold, in 10^6 bytes. When memory does not suffice, the batch is halved and a note says so; on a CPU the
system may end the process first.

--json is a list of rows, --csv a line a row; both hold every figure with its unit in its name and the conditions it was
taken under. Sizes are one number where an image is square. FILE may be - for the standard output.
"""

from .cli import EXAMPLE, add_arguments, run

__all__ = ['EXAMPLE', 'add_arguments', 'run']
