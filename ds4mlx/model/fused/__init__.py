"""The model as launches, for one token of each of a few sequences: what decoding runs on a GPU.

`block`, `attention` and `moe` compute what the modules of those names do, under their names, cut so that
a weight is read once for all sequences and nothing large is written. What looks at one token at a time
is one launch for all; what meets a state is launched for each sequence. Products are handed on as
float32 sums, and rounded to the activation type by whoever reads them.
"""
