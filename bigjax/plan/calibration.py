"""How far expected times are from measured ones: one factor, and what it was fitted on.

The compiler's cycles, kernels at the peak and what is waited for come to a time; a real step takes longer, for no
estimate knows of stalls between them. `FACTOR` makes the plan of Llama 3.1 8B on v6e:16x16 what MaxText publishes for
it: 9,392 tokens a second a chip (2 x 8,192 a chip, remat "full") against 7,207. The published run keeps other tensors
than the planned one (it offloads them, at 4 x 8,192), and so the factor holds that too. It is one point; RESULTS.md has
what it makes of Llama 2 70B and Mixtral 8x7B on v5p, which MaxText publishes as well and it was not fitted on.

https://maxtext.readthedocs.io/en/maxtext-v0.2.2/reference/models/tiering.html
"""

FACTOR = 9392 / 7207
