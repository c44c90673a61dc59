"""Does pruning keep quality? Models trained on composed scenes, every pruner on the same final questions.

sizes.py            how large: the real one, and toys for tests and a first look
models.py           the layouts, the tokenizer, weights at the start
stored_scenes.py    composed scenes, drawn once
maps.py             maps of frozen towers, kept on disk
questions.py        which questions of an image are learned, which are asked
muon.py             the optimizer of matrices
train.py            the loop
experiment.py       what the commands do
rows.py             which pruner at how many tokens
answers.py          a model's answers under one of them
statistics.py       scores, paired differences and verdicts, from stored answers alone
pictures.py         tokens against score
__main__.py         the commands
"""
