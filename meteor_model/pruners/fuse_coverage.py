"""Coverage of all encoders' tokens by the few that stay, weighted by what a token says; no encoder is dropped whole.

METEOR's stage 2 keeps the tokens that the other encoders do not say; two of them may say the same, and an encoder may
lose all of its tokens. Every strong rival has a term for diversity or coverage (CDPruner, SCOPE); here it is taken
across encoders.

Legend: M images, N tokens of the pool, K tokens kept, C language model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteor_model.pruners.fuse_criteria import FUSE_CRITERIA, Pool, picks_as_scores
from meteor_model.pruners.greedy import cover
from meteor_model.pruners.redundancy import mutual_redundancy
from meteor_model.pruners.select import in_full_precision, unit
from meteor_model.pruners.tower_scores import mean_similarity


@FUSE_CRITERIA.register("coverage", floors=True)
@in_full_precision
def coverage(pool: Pool, *, saliency: float = 1.0, novelty: float = 0.0) -> Tensor:
    """Greedy coverage of the pool across encoders times saliency; every encoder keeps at least one token.

    Each pick gains most of sum_i max(0, cos(z_i, z_j) - c_i) * s_j ** saliency * n_j ** novelty, where c_i is the best
    cosine of token i to those picked (the coverage of SCOPE, NeurIPS 2025). s_j = (1 - cos(z_j, mean of its map)) / 2
    (METEOR's shallow score); n_j = (1 - R_j / tokens of the other encoders) / 2, METEOR's own R, off by default. As
    many picks as `pruning.fuse.floor` gives an encoder, at least one, are its own: once there are no more picks left
    than floors to fill, only encoders below theirs may be picked from. Ours. Holds the N x N similarities of an image.
    """
    return _covering(pool, _weights(pool, saliency, novelty))


@FUSE_CRITERIA.register("coverage_text", floors=True, text=True)
@in_full_precision
def coverage_text(pool: Pool, *, saliency: float = 1.0, relevance: float = 1.0, novelty: float = 0.0) -> Tensor:
    """`coverage`, times relevance to the prompt's text: t_j ** relevance, t_j = (1 + cos(z_j, text)) / 2.

    The text as in `cdpruner`: the mean of the unit embeddings of the prompt. Without text all t_j are equal.
    """
    assert pool.text_MC is not None, "the model gives what the criterion looks at"
    text_MN = torch.einsum("mnc,mc->mn", unit(pool.tokens_MNC), unit(pool.text_MC))
    return _covering(pool, _weights(pool, saliency, novelty) * ((1 + text_MN) / 2).clamp_min(0).pow(relevance))


def _weights(pool: Pool, saliency: float, novelty: float) -> Tensor:
    """(M, N) fp32, positive."""
    there = [tokens for tokens in pool.tokens if tokens.shape[1]]
    own_MN = torch.cat([mean_similarity(tokens) for tokens in there], dim=1)
    weights_MN = ((1 - own_MN) / 2).clamp_min(0).pow(saliency)
    if novelty and len(there) > 1:
        sizes = [tokens.shape[1] for tokens in there]
        others = [own_MN.new_full((size,), float(sum(sizes) - size)) for size in sizes]
        said_MN = mutual_redundancy(pool.tokens) / torch.cat(others)
        weights_MN = weights_MN * ((1 - said_MN) / 2).clamp_min(0).pow(novelty)
    return weights_MN


def _covering(pool: Pool, weights_MN: Tensor) -> Tensor:
    sizes = [tokens.shape[1] for tokens in pool.tokens]
    floors = pool.floors or tuple(int(size > 0) for size in sizes)
    owners = [index for index, size in enumerate(sizes) for _ in range(size)]  # (the meta device repeats nothing)
    owner_N = torch.tensor(owners, device=weights_MN.device)
    picks_MK = cover(pool.tokens_MNC, weights_MN, pool.keep, owner_N, floors)
    return picks_as_scores(picks_MK, weights_MN.shape[1])
