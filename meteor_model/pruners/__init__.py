"""Every way to drop visual tokens, METEOR's and others', as pure functions behind three registries.

select.py, places.py                    best scores, their gather; scores of places alone
tower_scores.py, spectra.py, budgets.py stage 1: scores, ranks, how encoders share a total
redundancy.py                           stage 2: mutual redundancy
text_scores.py, counts.py               stage 3: attention of the text, adaptive counts, lambda
registry.py                             how a function gets its name
encode_criteria.py, fuse_criteria.py, decode_criteria.py    what each stage's functions are given, and the functions
greedy.py                               picking tokens one after another
fuse_published.py, decode_published.py, sparsevlm.py, autoprune.py, pixels.py    published rules
fuse_coverage.py                        coverage across encoders
builtin.py                              the registries with all of these entered
named.py                                pruners by name, as configurations; entered with entries.py in
named_trivial.py, named_meteor.py, named_published.py
"""
