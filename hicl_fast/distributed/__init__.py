"""Losses over the joined batch of many processes, on ``torch.distributed``."""

from hicl_fast.distributed.agreement import Shares, agree, attempt
from hicl_fast.distributed.gathering import gather_labels, gather_rows, joined_rows, own_rows_among_all, share_rows
from hicl_fast.distributed.info_nce import joined_info_nce, joined_means
from hicl_fast.distributed.ranks import Gather, Ranks, check_gather, ranks_of
from hicl_fast.distributed.ring import foreign_log_sum_exp

__all__ = [
    "Gather",
    "Ranks",
    "Shares",
    "agree",
    "attempt",
    "check_gather",
    "foreign_log_sum_exp",
    "gather_labels",
    "gather_rows",
    "joined_info_nce",
    "joined_means",
    "joined_rows",
    "own_rows_among_all",
    "ranks_of",
    "share_rows",
]
