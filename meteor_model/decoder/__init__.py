"""Stage 3, text-guided pruning inside an unmodified Hugging Face decoder.

families.py  what a decoder family does to queries, keys, positions and logits, from its own modules and settings
prompt.py    the prompt's columns: attended, visual, positions
scores.py    one layer's score row, and which heads look at the image
masks.py     attention masks of the layers below and above the pruning
cache.py     `MeteorCache` and the `Decision` that it carries
loop.py      `decode_pruned`: lower layers, score, keep, upper layers
"""
