"""The mask of a row, with the padding that context parallelism needs.

Context parallelism needs rows of certain lengths. The missing tokens are appended to the row as one
more document: no token of the row attends to it and its own tokens have no label, so the padding
changes nothing but the work of a few tokens::

    --seq-length 10, 4 ranks       t0 t1 t2 t3 t4 t5 t6 t7 t8 t9 | p0 p1
"""

from __future__ import annotations

from collections.abc import Sequence

from cp_megatron.plan.mask import Mask, Window


def row_mask(
    lengths: Sequence[int], *, document_mask: bool, window: Window | None = None, padding: int = 0
) -> Mask:
    """Makes the causal mask of a row.

    Args:
        lengths: the lengths of the documents in the row.
        document_mask: attention never crosses a document; otherwise the row is one sequence.
        window: the window of the model, as in ``Mask``.
        padding: tokens appended to the row.
    """
    seen = list(lengths) if document_mask else [sum(lengths)]
    if not document_mask and not padding:
        return Mask.causal(seen[0], window)
    return Mask.documents([*seen, padding] if padding else seen, window=window)
