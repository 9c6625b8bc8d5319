"""The model as launches, for one token of each of a few sequences: what decoding runs on a GPU.

`block`, `attention` and `moe` compute what the modules of those names do, under their names, cut so that
a weight is read once for all sequences and nothing large is written. A launch is for all sequences, or
for four where it adds to their states; where it meets these it takes the arrays of each. Products are
handed on as float32 sums, and rounded to the activation type by whoever reads them.
"""
