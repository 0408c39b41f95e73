"""Statistics of discrete tokens as of a language: arrays in, plain numbers out, nothing random without a
seed.

`stream` holds token sequences and their reading orders; `zipf`, `growth`, `entropy`, `compression`, `ngrams`,
`grammar`, `labels` and `alignment` measure them; `lexel.evaluate.analysis` puts a report together.
Questions and several definitions are those of "Analyzing the Language of Visual Tokens" (Chan et al. 2024,
arXiv 2411.05001); where that paper's exact variant is not known, the function says what is computed here.
"""
