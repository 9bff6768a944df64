# SPDX-License-Identifier: Apache-2.0
"""The selective scan on CUDA, as Triton kernels; `launch` is imported when the first CUDA tensor arrives.

A lane is a channel: what lies side by side in memory is read by lanes side by side. A program owns BLOCK_E channels of
one image and goes along a line of the walk with a tile (S, J, BLOCK_E). Its S warps stand side by side on the line, J
places each:

                          places of the line  -->
             warp 0            warp 1                warp S-1
        +---------------+---------------+       +---------------+
        | 0  1  ..  J-1 | 0  1  ..  J-1 |  ...  | 0  1  ..  J-1 |   channel 0            (lane 0)
        | 0  1  ..  J-1 | 0  1  ..  J-1 |  ...  | 0  1  ..  J-1 |   channel 1            (lane 1)
        |      ...      |      ...      |       |      ...      |
        | 0  1  ..  J-1 | 0  1  ..  J-1 |  ...  | 0  1  ..  J-1 |   channel BLOCK_E - 1  (lane BLOCK_E - 1)
        +---------------+---------------+       +---------------+

The places of a warp are registers of its threads, so that a recurrence is a chain of multiply-adds, and the warps are
stitched by what each makes of the state that enters it (`recurrence`).

A line of more than S J places is walked in strips. A 2-D scan takes all lines of a strip before the next strip, keeps
the states of the line above in registers, and hands the inner recurrence on through one number a line and channel in
memory. For a walk of 8 lines, with the order in which its tiles follow one another:

                   strip 0    strip 1   strip 2
        line 0   |    0    |    4    |    8    |
             1   |    1    |    5    |    9    |    band 0: one program
             2   |    2    |    6    |   10    |
             3   |    3    |    7    |   11    |
                 +---------+---------+---------+    the states of line 3 enter band 1
             4   |    0    |    4    |    8    |
             5   |    1    |    5    |    9    |    band 1: another program, at the same time
             6   |    2    |    6    |   10    |
             7   |    3    |    7    |   11    |

In 1-D all lines are one, place after place, and a band is a part of it.

A walk is one order and one state. The walks of a program follow one another and add to the same output, so that neither
the map nor what is made of it is ever written in several orders (`walk`, `steps`, `forward`). Where images and channels
are too few to fill the device, the walk is cut into bands: one launch finds what every band makes of the state that
enters it, its summary, `bands` passes the states on, and a second launch scans all bands side by side.

The backward pass writes the states of one walk at a time, then follows that walk backwards, along the opposite order
(`backward`). Sums over channels and over images are written in parts and added afterwards: there are no atomics, and
the same tile gives the same bits. The gradients of low-rank steps are PyTorch's matrix products, and follow its setting
of TF32 (`launch`). Which tile a launch takes is in `tiles`.
"""
