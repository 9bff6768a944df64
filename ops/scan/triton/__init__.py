# SPDX-License-Identifier: Apache-2.0
"""The selective scan on CUDA, as Triton kernels; `launch` is imported when the first CUDA tensor arrives.

A lane is a channel: what lies side by side in memory is read by lanes side by side. A program owns BLOCK_E channels of
one image and goes over the map with a tile (S, J, BLOCK_E). Its S warps have J places each:

                          places of a line  -->
             warp 0            warp 1                warp S-1
        +---------------+---------------+       +---------------+
        | 0  1  ..  J-1 | 0  1  ..  J-1 |  ...  | 0  1  ..  J-1 |   channel 0            (lane 0)
        | 0  1  ..  J-1 | 0  1  ..  J-1 |  ...  | 0  1  ..  J-1 |   channel 1            (lane 1)
        |      ...      |      ...      |       |      ...      |
        | 0  1  ..  J-1 | 0  1  ..  J-1 |  ...  | 0  1  ..  J-1 |   channel BLOCK_E - 1  (lane BLOCK_E - 1)
        +---------------+---------------+       +---------------+

The places of a warp are registers of its threads, so that a recurrence is a chain of multiply-adds.

In 2-D (`forward_2d`) the warps go down the lines as a wave, each a line behind its left neighbour, so that what its
neighbour has left of a line is there when it needs it. At the times 0 to 4 three warps are at the lines

              warp 0   warp 1   warp 2
        t = 0    0        -        -
            1    1        0        -
            2    2        1        0
            3    -        2        1
            4    -        -        2

and the states of the line above stay in registers. Orders 0 and 1 begin in one corner, 2 and 3 in the other: the wave
scans both orders of a corner at once, one along the places and then down the lines, the other down and then along. A
line of more than S J places is walked in strips, one after the other, which hand on one number a line and channel in
memory.

In 1-D (`forward_1d`) the walk is one line, of which a program takes S J places at a time, and its warps are stitched by
what each makes of the state that enters it (`recurrence`).

Low-rank step sizes are formed where they are needed, by a product of the tile's R numbers a place with the weights on
the tensor cores (`steps`).

A walk is one order, or in 2-D a corner's two, and one state. The walks of a program follow one another and add to the
same output, so that neither the map nor what is made of it is ever written in several orders. What is a program's and
where its walks go is in `walk`. Where images and channels are too few to fill the device, the walk is cut into bands,
of lines in 2-D: one launch finds what every band makes of the state that enters it, its summary, `bands` passes the
states on, and a second launch scans all bands side by side.

The backward pass (`backward_1d`, `backward_2d`) takes one walk at a time. The forward kernel writes what each place
took from its neighbours, a h and a g, and the walk is followed backwards, along the opposite order; the gradient of a
is then a product of these alone, and no small difference of large numbers. Sums over channels and over images are
written in parts and added afterwards: there are no atomics, and the same tile gives the same bits. The gradients of
low-rank steps are PyTorch's matrix products, and follow its setting of TF32 (`launch`). Which tile a launch takes is in
`tiles`.
"""
