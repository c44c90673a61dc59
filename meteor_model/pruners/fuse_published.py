"""Published rules that choose among the projected tokens, before the language model.

Each entry names its paper and what is ours. Ours in all of them: the papers prune one tower of a model with one grid;
here the pool may hold the tokens of several towers, each scored by its own tower's attention over its mean
(`fusion.pooled_attention`), and kept tokens stay in encoder order, then raster order. Where a tower has no CLS token,
attention received stands for attention from CLS. A convolutional tower's tokens count as average.

Legend: M images, N tokens of the pool, K tokens kept, R tokens that remain, C language model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteor_model.pruners.budgets import allocate_budgets
from meteor_model.pruners.fuse_criteria import FUSE_CRITERIA, Pool, picks_as_scores
from meteor_model.pruners.greedy import CHUNK, cover, farthest, relevant_and_diverse, transport
from meteor_model.pruners.select import gather_tokens, in_full_precision, top_indices, unit
from meteor_model.pruners.spectra import energy_rank

LAST_BUT_ONE = -2.0
FIRST_IN_SCORES = 1e6


def saliency(pool: Pool, look: float = LAST_BUT_ONE) -> Tensor:
    """Attention of the towers to their tokens, (M, N) fp32."""
    assert pool.attention is not None, "the model gives what the criterion looks at"
    return pool.attention[look]


def _mask(indices_MK: Tensor, count: int) -> Tensor:
    """Bool (M, N), true at the indices."""
    mask_MN = torch.zeros(len(indices_MK), count, dtype=torch.bool, device=indices_MK.device)
    return mask_MN.scatter(1, indices_MK, True)


def _others(taken_MN: Tensor, taken: int) -> Tensor:
    """The indices (M, N - taken) that are not taken, ascending."""
    order_MN = torch.sort(taken_MN.to(torch.uint8), dim=1, stable=True).indices
    return order_MN[:, : taken_MN.shape[1] - taken]


@FUSE_CRITERIA.register("divprune")
def divprune(pool: Pool) -> Tensor:
    """DivPrune (arXiv 2503.02175): greedy max-min cosine distance between the tokens that stay.

    The first is the token that lies farthest from its nearest neighbour, as in the paper's two-stage algorithm.
    """
    tokens_MNC = pool.tokens_MNC
    return picks_as_scores(farthest(tokens_MNC, pool.keep), tokens_MNC.shape[1])


@FUSE_CRITERIA.register("cdpruner", text=True)
def cdpruner(pool: Pool, *, theta: float = 0.0) -> Tensor:
    """CDPruner (NeurIPS 2025): greedy MAP of a determinantal point process weighted by relevance to the text.

    r = min-max per image of the mean over the text of the cosine of token and text; kernel r_i cos(z_i, z_j) r_j. With
    `theta` in (0, 1) relevance is sharpened to exp(theta r / (2 (1 - theta))); the paper's default is off.

    Ours: there is no CLIP text tower here, so text and image are compared where they meet, in the language model's
    embedding space: the prompt's text embeddings and the projected tokens (the sign is the cosine's own; the paper
    negates CLIP's). All text of the prompt counts, the template's words too.
    """
    assert pool.text_MC is not None, "the model gives what the criterion looks at"
    tokens_MNC = pool.tokens_MNC
    relevance_MN = torch.einsum("mnc,mc->mn", unit(tokens_MNC), pool.text_MC)
    low_M1, high_M1 = relevance_MN.amin(dim=1, keepdim=True), relevance_MN.amax(dim=1, keepdim=True)
    spread_M1 = (high_M1 - low_M1).clamp_min(torch.finfo(torch.float32).tiny)
    # Where all are equally relevant (no text), diversity alone decides.
    relevance_MN = torch.where(high_M1 > low_M1, (relevance_MN - low_M1) / spread_M1, torch.ones_like(relevance_MN))
    if theta:
        relevance_MN = torch.exp(theta * relevance_MN / (2 * (1 - theta)))
    return picks_as_scores(relevant_and_diverse(tokens_MNC, relevance_MN, pool.keep), tokens_MNC.shape[1])


@FUSE_CRITERIA.register("scope", looks=(LAST_BUT_ONE,))
def scope(pool: Pool, *, alpha: float = 1.0) -> Tensor:
    """SCOPE (NeurIPS 2025): the token whose pick covers most of what is not covered, times its attention ** alpha.

    Holds the N x N similarities of an image. Attention is that of the towers' last block but one.
    """
    tokens_MNC = pool.tokens_MNC
    return picks_as_scores(cover(tokens_MNC, saliency(pool).pow(alpha), pool.keep), tokens_MNC.shape[1])


@FUSE_CRITERIA.register("otprune")
def otprune(pool: Pool, *, gamma: float = 0.01) -> Tensor:
    """OTPrune (CVPR 2026): greedy maximum of logdet(I + gamma W_S W_S^T), W the Gram matrix of unit-variance tokens.

    Ours: unit variance over a token's channels, and W divided by their number, so that gamma means the same at every
    width.
    """
    tokens_MNC = pool.tokens_MNC
    return picks_as_scores(transport(tokens_MNC, gamma, pool.keep), tokens_MNC.shape[1])


@FUSE_CRITERIA.register("svd_prune")
@in_full_precision
def svd_prune(pool: Pool, *, share: float = 0.9) -> Tensor:
    """SVD-Prune (arXiv 2604.11530): leverage of the tokens in the leading subspace that holds `share` of the energy.

    Leverage is the squared row norm of U_r. Ours: tokens are not centred, and the share of the squared spectrum is 0.9;
    the left singular vectors come from the eigenvectors of the smaller second moment, in float64. Leverages of a whole
    basis are all equal: ties go to the lower index.
    """
    tokens_MNC = pool.tokens_MNC.detach().double()
    count, width = tokens_MNC.shape[1:]
    if count <= width:
        values_MR, left_MNR = torch.linalg.eigh(torch.bmm(tokens_MNC, tokens_MNC.transpose(1, 2)))
    else:
        values_MR, right_MCR = torch.linalg.eigh(torch.bmm(tokens_MNC.transpose(1, 2), tokens_MNC))
        scale_M1R = values_MR.clamp_min(0).sqrt()[:, None].clamp_min(torch.finfo(torch.float64).tiny)
        left_MNR = torch.bmm(tokens_MNC, right_MCR) / scale_M1R
    spectrum_MR = values_MR.clamp_min(0).sqrt().flip(-1)
    rank_M = energy_rank(spectrum_MR, share)
    leading_MR = torch.arange(spectrum_MR.shape[1], device=rank_M.device) < rank_M[:, None]
    return (left_MNR.flip(-1).square() * leading_MR[:, None]).sum(dim=2).float()


# ---------------------------------------------------------------------------------------------------------- VisionZip


def _dominant(pool: Pool, share: float) -> int:
    """Tokens that stay for their attention; at least one, and one is left for what is merged where there are two."""
    return min(max(round(pool.keep * share), 1), max(pool.keep - 1, 1))


def _targets(pool: Pool, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mask (M, N) of dominant tokens, indices (M, R) of the others, and places (k,) of merge targets among these."""
    salient_MN = saliency(pool)
    count, dominant = salient_MN.shape[1], _dominant(pool, share)
    dominant_MN = _mask(top_indices(salient_MN, dominant), count)
    others_MR = _others(dominant_MN, dominant)
    targets, rest = pool.keep - dominant, count - dominant
    places_k = torch.arange(targets, device=others_MR.device) * max(rest // max(targets, 1), 1)
    return dominant_MN, others_MR, places_k


def merge_contextual(pool: Pool, keep_MK: Tensor, *, dominant: float = 54 / 64) -> Tensor:
    """Dominant tokens as they are; each target becomes the mean of itself and of the others that are most like it."""
    tokens_MNC = pool.tokens_MNC
    _, others_MR, places_k = _targets(pool, dominant)
    targets = len(places_k)
    if targets == 0:
        return gather_tokens(tokens_MNC, keep_MK)
    rest_MRC = gather_tokens(tokens_MNC, others_MR)
    with torch.no_grad():
        unit_MRC = unit(rest_MRC)
        nearest_MR = torch.bmm(unit_MRC, unit_MRC[:, places_k].transpose(1, 2)).argmax(dim=2)
        nearest_MR[:, places_k] = torch.arange(targets, device=nearest_MR.device)
    means_MkC = _means(rest_MRC, nearest_MR, targets)
    index_Mk = others_MR[:, places_k]
    merged_MNC = tokens_MNC.scatter(1, index_Mk[..., None].expand_as(means_MkC), means_MkC.to(tokens_MNC.dtype))
    return gather_tokens(merged_MNC, keep_MK)


def _means(tokens_MRC: Tensor, owner_MR: Tensor, groups: int) -> Tensor:
    """Mean of each group's tokens, (M, groups, C) fp32; every group has at least one. Differentiable in the tokens."""
    index_MRC = owner_MR[..., None].expand_as(tokens_MRC)
    sums_MgC = tokens_MRC.new_zeros(len(tokens_MRC), groups, tokens_MRC.shape[2], dtype=torch.float32)
    sums_MgC = sums_MgC.scatter_add(1, index_MRC, tokens_MRC.float())
    sizes_Mg = torch.zeros(sums_MgC.shape[:2], device=owner_MR.device)
    sizes_Mg = sizes_Mg.scatter_add(1, owner_MR, torch.ones_like(owner_MR, dtype=torch.float32))
    return sums_MgC / sizes_Mg.clamp(min=1)[..., None]


@FUSE_CRITERIA.register("visionzip", looks=(LAST_BUT_ONE,), merge=merge_contextual)
def visionzip(pool: Pool, *, dominant: float = 54 / 64) -> Tensor:
    """VisionZip (arXiv 2412.04467): the tokens with the most attention; the rest merged into targets at even steps.

    54 of 64 are dominant, as published (also 108 of 128, 162 of 192). Attention is that of the last block but one.
    Ours: keys of different towers cannot be compared, so the rest joins the target whose projected token is most
    similar; a target becomes the mean of itself and its members (the public code adds their mean to it).
    """
    dominant_MN, others_MR, places_k = _targets(pool, dominant)
    return dominant_MN.float() * 2 + _mask(others_MR[:, places_k], dominant_MN.shape[1]).float()


# ---------------------------------------------------------------------------------------------- VisPruner and VScan


@FUSE_CRITERIA.register("vispruner", looks=(LAST_BUT_ONE,))
@in_full_precision
def vispruner(pool: Pool, *, ratio: float = 0.5, step: float = 8) -> Tensor:
    """VisPruner (ICCV 2025): a share `ratio` by attention; of the rest, near duplicates go until the number fits.

    The rest is split into tokens at even and odd places; the min(8, left over) even ones that are most similar to any
    odd one go; again, until K stay. Ours: what remains is kept in raster order between rounds; similarity is that of
    projected tokens.
    """
    salient_MN, units_MNC = saliency(pool), unit(pool.tokens_MNC)
    count = salient_MN.shape[1]
    important = min(max(round(pool.keep * ratio), 1), pool.keep)
    important_MN = _mask(top_indices(salient_MN, important), count)
    rest_MR = _others(important_MN, important)
    while rest_MR.shape[1] > pool.keep - important:
        even_ME, odd_MO = rest_MR[:, ::2], rest_MR[:, 1::2]
        drop = min(int(step), rest_MR.shape[1] - (pool.keep - important), even_ME.shape[1])
        if odd_MO.shape[1]:
            like_ME = _most_similar(gather_tokens(units_MNC, even_ME), gather_tokens(units_MNC, odd_MO))
        else:
            like_ME = torch.zeros_like(even_ME, dtype=torch.float32)
        if drop == even_ME.shape[1]:
            rest_MR = odd_MO
            continue
        stay_ME = even_ME.gather(1, top_indices(-like_ME, even_ME.shape[1] - drop))
        rest_MR = torch.sort(torch.cat([stay_ME, odd_MO], dim=1), dim=1).values
    diverse_MN = _mask(rest_MR, count)
    return important_MN.float() * 2 + diverse_MN.float()


def _most_similar(units_MAC: Tensor, others_MBC: Tensor) -> Tensor:
    """The largest product of each with any of the others, (M, A); `CHUNK` rows at a time."""
    return torch.cat(
        [torch.bmm(part_MaC, others_MBC.transpose(1, 2)).amax(dim=2) for part_MaC in units_MAC.split(CHUNK, dim=1)],
        dim=1,
    )


VSCAN_SHALLOW = 5 / 24
WINDOW = 6


def merge_into_nearest(pool: Pool, keep_MK: Tensor, **_: float) -> Tensor:
    """Every kept token becomes the mean of itself and of the dropped tokens whose nearest kept one it is."""
    tokens_MNC = pool.tokens_MNC
    keep = keep_MK.shape[1]
    with torch.no_grad():
        units_MNC = unit(tokens_MNC)
        kept_MKC = gather_tokens(units_MNC, keep_MK)
        parts = [torch.bmm(part, kept_MKC.transpose(1, 2)).argmax(dim=2) for part in units_MNC.split(CHUNK, dim=1)]
        owner_MN = torch.cat(parts, dim=1)
        own_MK = torch.arange(keep, device=keep_MK.device).expand_as(keep_MK)
        owner_MN = owner_MN.scatter(1, keep_MK, own_MK)
    return _means(tokens_MNC, owner_MN, keep).to(tokens_MNC.dtype)


def _windows(pool: Pool) -> list[list[int]]:
    """Indices into the pool by window of 6 x 6 cells, map by map."""
    found, first = [], 0
    for rows, columns in pool.grids:
        for top in range(0, rows, WINDOW):
            for left in range(0, columns, WINDOW):
                cells = [
                    first + row * columns + column
                    for row in range(top, min(top + WINDOW, rows))
                    for column in range(left, min(left + WINDOW, columns))
                ]
                found.append(cells)
        first += rows * columns
    return found


@FUSE_CRITERIA.register("vscan", looks=(VSCAN_SHALLOW, LAST_BUT_ONE), merge=merge_into_nearest)
def vscan(pool: Pool, *, local: float = 0.5) -> Tensor:
    """VScan (TMLR 2026), before the language model: local tokens by early attention, global ones by late attention.

    Half of the tokens are those with the most attention of a shallow layer (index 5 of 24) inside each window of 6 x 6
    cells, half those with the most attention of the last block but one; every dropped token is averaged into its
    nearest kept one. Ours: windows share the local half by their cells, whole numbers by largest remainder; a token
    that both would take counts as local; nearest is by cosine of projected tokens.
    """
    shallow_MN, deep_MN = saliency(pool, VSCAN_SHALLOW), saliency(pool)
    windows, wanted = _windows(pool), min(round(pool.keep * local), pool.keep)
    if wanted >= len(windows):
        shares = allocate_budgets([float(len(cells)) for cells in windows], wanted, [len(cells) for cells in windows])
    else:  # fewer tokens than windows: the first ones of as many evenly spaced windows
        spaced = {(2 * index + 1) * len(windows) // (2 * wanted) for index in range(wanted)}
        shares = tuple(int(index in spaced) for index in range(len(windows)))
    local_MN = torch.zeros_like(shallow_MN, dtype=torch.bool)
    for cells, share in zip(windows, shares, strict=True):
        if share:
            cells_w = torch.tensor(cells, device=shallow_MN.device)
            best_Mk = cells_w[top_indices(shallow_MN[:, cells_w], share)]
            local_MN = local_MN.scatter(1, best_Mk, True)
    return torch.where(local_MN, FIRST_IN_SCORES, deep_MN)
